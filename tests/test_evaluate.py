"""Feature extraction, kNN, linear classifier, and test.py on a miniature run."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from evaluation_data import ROOT, class_folders, fabricated_run, one_line
from scripts import run

import dataloader
import evaluate
import model
import parallel
import utils


def clusters(
    n: int, classes: int = 4, width: int = 6, noise: float = 0.05, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, width) around one centre for each class, far from standardised, and labels (n,)."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    scale, shift = 10.0 ** torch.linspace(-2, 2, width), torch.linspace(-50, 50, width)
    return (
        centres[labels] + noise * torch.randn(n, width, generator=random)
    ) * scale + shift, labels


# ------------------------------------------------------------------------------------------------------------------------------ kNN


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_knn_is_a_vote_counted_by_hand(weighted: bool, k: int) -> None:
    train, train_labels = clusters(40, noise=2.0)
    test, test_labels = clusters(30, noise=2.0, seed=1)
    hits = 0
    for x, label in zip(test.tolist(), test_labels.tolist()):
        cosines = [
            sum(a * b for a, b in zip(x, y)) / math.dist(x, [0] * 6) / math.dist(y, [0] * 6)
            for y in train.tolist()
        ]
        nearest = sorted(range(40), key=lambda i: -cosines[i])[:k]
        votes = Counter()
        for i in nearest:
            votes[int(train_labels[i])] += math.exp(cosines[i] / 0.07) if weighted else 1
        hits += max(votes, key=lambda c: (votes[c], -c)) == label
    accuracy = (
        100
        * evaluate.knn_hits(train, train_labels, test, test_labels, k=k, weighted=weighted)
        / len(test)
    )
    assert 0 < hits < 30
    assert accuracy == pytest.approx(100 * hits / 30)


def test_knn_weights_and_length_matter() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]) * torch.tensor(
        [[0.01], [100.0], [100.0]]
    )
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.1]])
    assert (
        evaluate.knn_hits(train, labels, query, torch.tensor([0]), k=3, temperature=0.07) == 1
    )  # one near beats two far
    assert evaluate.knn_hits(train, labels, query, torch.tensor([0]), k=3, weighted=False) == 0
    assert evaluate.knn_hits(train, labels, query, torch.tensor([0]), k=3, temperature=100.0) == 0


def test_knn_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (*clusters(40, noise=2.0), *clusters(30, noise=2.0, seed=1))
    whole = evaluate.knn_hits(*data, k=7)
    monkeypatch.setattr(evaluate, "BLOCK", 3 * 40)
    assert evaluate.knn_hits(*data, k=7) == whole


def test_knn_refuses_more_neighbours_than_images() -> None:
    with pytest.raises(ValueError, match="k 41"):
        evaluate.knn_hits(*clusters(40), *clusters(8), k=41)


# ---------------------------------------------------------------------------------------------------------------- linear classifier


def test_separable_features_are_classified_without_error() -> None:
    result = evaluate.linear_evaluation(
        *clusters(200), *clusters(100, seed=1), epochs=10, lrs=[0.01, 0.1, 1.0], trials=range(3)
    )
    assert result["accuracy"][:, -1].tolist() == [100.0] * 3


def test_saved_classifier_gives_the_reported_accuracy_on_plain_features() -> None:
    train, test = clusters(200, noise=1.0), clusters(100, noise=1.0, seed=1)
    result = evaluate.linear_evaluation(*train, *test, epochs=5, lrs=[0.03], trials=range(2))
    for weight, bias, curve, predicted in zip(
        result["weight"], result["bias"], result["accuracy"], result["predicted"]
    ):
        top1 = float(curve[-1])
        assert 30 < top1 < 95 and torch.equal(
            predicted, F.linear(test[0], weight, bias).argsort(dim=1, descending=True)
        )
        assert 100 * (
            F.linear(test[0], weight, bias).argmax(1) == test[1]
        ).double().mean() == pytest.approx(top1, abs=1e-4)
    assert result["accuracy"].shape == (2, 5)
    assert not torch.equal(result["weight"][0], result["weight"][1])


def test_the_test_split_decides_nothing() -> None:
    train, (test, test_labels) = clusters(300, noise=1.0), clusters(120, noise=1.0, seed=1)
    results = [
        evaluate.linear_evaluation(
            *train, features, labels, epochs=4, lrs=[1e-5, 0.01, 0.1], trials=range(2)
        )
        for features, labels in (
            (test, test_labels),
            (test, test_labels.flip(0).roll(1)),
            (test[:7] * 3, test_labels[:7]),
        )
    ]
    for other in results[1:]:
        assert (
            other["learning_rate"] == results[0]["learning_rate"]
            and other["heldout_top1"] == results[0]["heldout_top1"]
        )
        assert torch.equal(other["weight"], results[0]["weight"]) and torch.equal(
            other["bias"], results[0]["bias"]
        )
        assert not torch.equal(other["accuracy"], results[0]["accuracy"])


def test_learning_rate_is_the_best_on_the_held_out_part() -> None:
    result = evaluate.linear_evaluation(
        *clusters(300, noise=0.5), *clusters(40), epochs=5, lrs=[1e-6, 0.1], trials=range(1)
    )
    assert result["heldout_top1"]["0.1"] > result["heldout_top1"]["1e-06"] + 20
    assert result["learning_rate"] == 0.1


def test_the_held_out_part_was_not_trained_on() -> None:
    """Labels that have nothing to do with the features can be learnt by heart, but not told for others."""
    features = torch.randn(120, 200, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (120,), generator=torch.Generator().manual_seed(1))
    result = evaluate.linear_evaluation(
        features,
        labels,
        features,
        labels,
        epochs=60,
        lrs=[0.1, 0.2],
        trials=range(1),
        batch_size=32,
    )
    assert result["accuracy"][0, -1] == 100 and max(result["heldout_top1"].values()) < 70


def test_all_at_once_is_each_alone() -> None:
    views, labels = clusters(100, noise=1.0)
    views = torch.stack([views, views.flip(0).roll(3)]).double()
    test = (clusters(40, seed=1)[0].double(), clusters(40, seed=1)[1])
    lrs, trials, options = [0.003, 0.1, 1.0], [0, 3], {"epochs": 3, "seed": 5, "batch_size": 16}
    weight, bias, accuracy = evaluate.train_linear(
        views, labels, *test, lrs=lrs, trials=trials, **options
    )
    assert weight.shape == (2, 3, 4, 6) and bias.shape == (2, 3, 4) and accuracy.shape == (2, 3, 3)
    for t, trial in enumerate(trials):
        for i, lr in enumerate(lrs):
            alone = evaluate.train_linear(views, labels, *test, lrs=[lr], trials=[trial], **options)
            torch.testing.assert_close(weight[t, i], alone[0][0, 0], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(bias[t, i], alone[1][0, 0], rtol=1e-9, atol=1e-9)
            assert torch.equal(accuracy[t, i], alone[2][0, 0])


def test_it_is_sgd_on_the_cross_entropy() -> None:
    """The gradient written out against autograd and torch.optim.SGD, on the same order and first weights."""
    features, labels = clusters(50, noise=1.0)
    features, n, epochs = features.double(), 50, 4
    mean, std = features.mean(0), features.std(0, correction=0)
    layer = nn.Linear(6, 4).double()
    first = 0.01 * torch.randn(6, 4, generator=utils.generator(5, "linear weights", 2))
    layer.weight.data, layer.bias.data = (
        first.T.double().contiguous(),
        torch.zeros(4, dtype=torch.float64),
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3 * epochs)
    for epoch in range(epochs):
        order = evaluate._epoch_order(torch.arange(n), n, 1, 5, 2, epoch)
        assert sorted(order.tolist()) == list(range(n))
        for now in order[:48].split(16):
            optimizer.zero_grad()
            F.cross_entropy(layer((features[now] - mean) / std), labels[now]).backward()
            optimizer.step()
            schedule.step()
    weight, bias, _ = evaluate.train_linear(
        features[None],
        labels,
        features,
        labels,
        lrs=[0.2],
        trials=[2],
        epochs=epochs,
        seed=5,
        batch_size=16,
    )
    torch.testing.assert_close(weight[0, 0], (layer.weight / std).detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        bias[0, 0], (layer.bias - layer.weight @ (mean / std)).detach(), rtol=1e-6, atol=1e-6
    )


def test_an_epoch_meets_each_image_once_in_either_view() -> None:
    rows = torch.tensor([1, 4, 5, 7, 9] * 20) + 10 * torch.arange(20).repeat_interleave(5)
    order = evaluate._epoch_order(rows, 200, 2, seed=0, trial=0, epoch=0)
    assert sorted((order % 200).tolist()) == sorted(rows.tolist())
    assert 30 < int((order >= 200).sum()) < 70
    assert not torch.equal(order, evaluate._epoch_order(rows, 200, 2, seed=0, trial=0, epoch=1))
    assert not torch.equal(order, evaluate._epoch_order(rows, 200, 2, seed=0, trial=1, epoch=0))


def test_held_out_part_is_stratified() -> None:
    labels = torch.tensor([0] * 100 + [1] * 31 + [2] * 4 + [3] * 2 + [4])
    kept, held = evaluate.held_out(labels, 0.1, torch.Generator().manual_seed(0))
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(len(labels)))
    assert torch.bincount(labels[held], minlength=5).tolist() == [10, 3, 1, 1, 0]
    other = evaluate.held_out(labels, 0.1, torch.Generator().manual_seed(1))[1]
    assert not torch.equal(held, other)


def test_nothing_to_choose_on_is_said() -> None:
    features, labels = clusters(4)
    with pytest.raises(utils.UserError, match="--linear_lrs"):
        evaluate.linear_evaluation(
            features, labels, features, labels, epochs=1, lrs=[0.1, 1.0], trials=range(1)
        )
    evaluate.linear_evaluation(
        features, labels, features, labels, epochs=1, lrs=[0.1], trials=range(1)
    )


def test_constant_features_do_no_harm() -> None:
    train, test = clusters(100), clusters(40, seed=1)
    add = lambda x: torch.cat([x, torch.full((len(x), 2), 7.0)], dim=1)  # noqa: E731
    result = evaluate.linear_evaluation(
        add(train[0]), train[1], add(test[0]), test[1], epochs=10, lrs=[0.1], trials=range(1)
    )
    assert result["accuracy"][0, -1] == 100.0 and result["weight"].isfinite().all()


# ------------------------------------------------------------------------------------------------------------------------- features


def image_batches(n: int = 10, size: int = 4) -> list[dataloader.Batch]:
    images = torch.randint(
        256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return [
        dataloader.Batch(
            images=part, aspect=torch.ones(len(part)), labels=torch.arange(len(part)), failed=[]
        )
        for part in images.split(size)
    ]


MEAN, STD, CPU = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3], parallel.OneDevice()


def test_features_are_those_of_eval_mode_whatever_the_batches() -> None:
    encoder = model.backbone(model.build_encoder("resnet18", 8)).train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    encoder.layer1.eval()
    features, labels = evaluate.extract_features(
        encoder, evaluate.whole_images(image_batches(), MEAN, STD, CPU.device), CPU
    )
    assert (
        encoder.training and not encoder.layer1.training and encoder.layer2[0].bn1.training
    )  # the modes come back
    assert (
        features.shape == (1, 10, 512)
        and features.dtype == torch.float32
        and labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    )
    whole = image_batches(size=10)[0].images
    x = (whole / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = encoder.eval()(x), encoder(x.flip(-1))
    torch.testing.assert_close(features[0], expected[0], rtol=1e-4, atol=1e-5)
    both, _ = evaluate.extract_features(
        encoder,
        evaluate.whole_images(image_batches(size=3), MEAN, STD, CPU.device, mirror=True),
        CPU,
    )
    torch.testing.assert_close(both, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_an_encoder_that_changes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = model.backbone(model.build_encoder("resnet18", 8))
    monkeypatch.setattr(
        type(encoder), "eval", lambda self: self.train()
    )  # batch norm left in train mode
    with pytest.raises(RuntimeError, match="bn1.running_mean"):
        evaluate.extract_features(
            encoder, evaluate.whole_images(image_batches(), MEAN, STD, CPU.device), CPU
        )


def test_one_bit_of_change_is_noticed_and_nan_is_not() -> None:
    encoder = nn.Linear(3, 2)
    encoder.weight.data[0, 0] = float("nan")
    with evaluate.frozen(encoder):
        pass
    with pytest.raises(RuntimeError, match="weight"), evaluate.frozen(encoder):
        encoder.weight.view(-1)[5] *= 1 + 2**-22


# ---------------------------------------------------------------------------------------------------------------- test.py, in small

FAST = [
    "--linear_epochs",
    "3",
    "--linear_lrs",
    "0.01",
    "0.1",
    "--trials",
    "2",
    "--knn_k",
    "5",
    "--num_workers",
    "0",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (train/ and test/ class folders), other/ (the same with other images), and a run IMAGENET-64/v1 with epochs 1 and 2."""
    folder = tmp_path_factory.mktemp("evaluate")
    class_folders(folder / "data", seed=0)
    class_folders(folder / "other", seed=1)
    fabricated_run(folder / "output", "v1", epochs=(1, 2))
    return folder


def test_results_of_a_run(place: Path) -> None:
    home = place / "output" / "IMAGENET-64" / "v1" / "eval"
    flags = [f"--encoder_output_root={place}/output", f"--dataset_root={place}/data", *FAST]
    done = run("test.py", *flags, "--load_pretrained_epoch=1")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (home / "epoch_0001").iterdir()) == [
        "accuracy.csv",
        "accuracy.png",
        "confusion.csv",
        "confusion.png",
        "linear.pth.tar",
        "result.json",
    ]
    result = json.loads((home / "epoch_0001" / "result.json").read_text())
    assert (
        result["epoch"] == 1
        and result["protocol"] == "cached"
        and result["dataset"] == "data"
        and result["crop"] == 16
    )
    assert (result["train_images"], result["test_images"], result["knn_k"]) == (24, 12, 5)
    assert (
        result["checkpoint"].endswith("epoch_0001.pth.tar")
        and len(result["trials"]) == 2
        and result["provenance"]["torch"]
    )
    table = utils.read_csv(home / "epoch_0001" / "accuracy.csv")
    assert (
        list(table) == ["epoch", "trial", "top1"]
        and table["epoch"] == [1, 2, 3] * 2
        and table["trial"] == [1] * 3 + [2] * 3
    )
    assert [table["top1"][2], table["top1"][5]] == pytest.approx(result["trials"], abs=1e-3)
    linear = torch.load(home / "epoch_0001" / "linear.pth.tar", weights_only=True)
    assert linear["weight"].shape == (2, 3, 512) and linear["bias"].shape == (2, 3)
    assert (
        f"{result['linear_top1']:.2f}" in done.stdout and f"{result['knn_top1']:.2f}" in done.stdout
    )

    before = (
        home / "epoch_0001" / "result.json"
    ).read_text()  # another data set goes elsewhere; the last checkpoint is the default
    assert (
        run(
            "test.py",
            *flags[:1],
            f"--dataset_root={place}/other",
            *FAST,
            "--load_pretrained_epoch=1",
        ).returncode
        == 0
    )
    assert (home / "epoch_0001-other-cached" / "result.json").exists()
    assert run("test.py", *flags, "--encoder", "random").returncode == 0
    assert "untrained" in run("test.py", *flags).stdout
    done = run(
        "test.py", *flags, "--no-knn_weighted"
    )  # another vote than the untrained encoder's: not compared
    assert "untrained" not in done.stdout
    assert json.loads((home / "epoch_0002" / "result.json").read_text())["knn_weighted"] is False
    assert json.loads((home / "random" / "result.json").read_text())["checkpoint"] is None
    assert (home / "epoch_0001" / "result.json").read_text() == before


def test_a_checkpoint_file(place: Path) -> None:
    file = place / "elsewhere" / "mine.pth.tar"
    file.parent.mkdir()
    file.write_bytes(
        (
            place / "output" / "IMAGENET-64" / "v1" / "checkpoints" / "epoch_0001.pth.tar"
        ).read_bytes()
    )
    flags = [
        f"--encoder_output_root={place}/elsewhere/output",
        f"--dataset_root={place}/data",
        *FAST,
    ]
    done = run("test.py", *flags, f"--pretrained={file}")
    assert done.returncode == 0, done.stderr
    assert (place / "elsewhere" / "output" / "eval" / "mine" / "result.json").exists()
    file.parent.joinpath("b").mkdir()
    done = run("test.py", *flags, f"--pretrained={file.rename(file.parent / 'b' / file.name)}")
    assert one_line(done, "holds the result of")


def test_untrained_encoder_without_a_run(place: Path) -> None:
    done = run(
        "test.py",
        f"--encoder_output_root={place}/none",
        f"--dataset_root={place}/data",
        "--encoder=random",
        "--arch=resnet18",
        "--crop=16",
        *FAST,
        "--knn_k=200",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "--knn_k 200 is more than the 24 training images" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
    result = json.loads(
        (place / "none" / "IMAGENET-64" / "v1" / "eval" / "random" / "result.json").read_text()
    )
    assert (result["knn_k"], result["arch"], result["encoder"]) == (24, "resnet18", "random")


def test_untrained_encoder_is_the_one_that_the_run_started_from(place: Path) -> None:
    cfg = utils.load_config("test", [f"--encoder_output_root={place}/output", "--encoder=random"])
    encoder = evaluate.load_subject(cfg).encoder
    torch.manual_seed(
        utils.generator(7, "weights").initial_seed()
    )  # as train.py with the seed of the fabricated run
    moco = model.MoCo("resnet18", 8, 16)
    assert torch.equal(encoder.conv1.weight, moco.encoder_q.conv1.weight)


def test_a_checkpoint_between_epochs_has_a_folder_of_its_own_and_a_replaced_result_is_said(
    place: Path,
) -> None:
    folder = place / "output" / "IMAGENET-64" / "v1" / "checkpoints"
    between = utils.load_checkpoint(folder / "epoch_0002.pth.tar") | {
        "step": 263,
        "images": 100 * 256,
    }  # 100 steps an epoch
    utils.save_checkpoint(
        place / "between" / "IMAGENET-64" / "v1" / "checkpoints" / "last.pth.tar", between
    )
    flags = [f"--dataset_root={place}/data", *FAST]
    done = run("test.py", f"--encoder_output_root={place}/between", *flags)
    assert (
        done.returncode == 0
        and (place / "between/IMAGENET-64/v1/eval/step_000263/result.json").exists()
    ), done.stderr
    assert "replaces" not in done.stdout
    assert (
        "replaces the result"
        in (
            done := run("test.py", f"--encoder_output_root={place}/between", *flags, "--seed=3")
        ).stdout
        and "seed 0 -> 3" in done.stdout
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--load_pretrained_epoch=9"], "it has epochs 1, 2"),
        (["--encoder_exp_version=M9"], "runs there: v1"),
        (["--arch=resnet50"], "those of a resnet18, not of a resnet50"),
        (["--encoder=random", "--pretrained=x.pth"], "contradict each other"),
        (["--pretrained=missing.pth"], "missing.pth"),
        (["--dataset_root=nowhere"], "nowhere"),
        (["--knn_k=0"], "knn_k"),
        (["--linear_epoch=3"], "did you mean --linear_epochs"),
    ],
)
def test_bad_input_is_one_line(place: Path, flags: list[str], words: str) -> None:
    done = run(
        "test.py",
        f"--encoder_output_root={place}/output",
        f"--dataset_root={place}/data",
        *FAST,
        *flags,
    )
    assert one_line(done, words), done.stderr


def test_the_command_itself(place: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "test.py"),
        f"--encoder_output_root={place}/output",
        "--load_pretrained_epoch=9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert one_line(done, "it has epochs 1, 2") and not done.stdout


def test_a_run_that_diverged_is_said(place: Path) -> None:
    fabricated_run(place / "diverged", "v1", epochs=(1,), weight=float("nan"))
    done = run(
        "test.py", f"--encoder_output_root={place}/diverged", f"--dataset_root={place}/data", *FAST
    )
    assert one_line(done, "not finite")
    assert not (place / "diverged" / "IMAGENET-64" / "v1" / "eval").exists()
