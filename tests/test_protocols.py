"""Protocols of test.py, parts of the labels, folds, finetuning, and what a result says."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_data import class_folders, fabricated_run, one_line
from miniature import write_stl10
from scripts import run

import augment
import config
import dataloader
import encoders
import parallel
import utils
from data.base import RGB
from evaluation.evaluate import check_sizes, resolve, score, wilson_interval
from evaluation.features import Extractor, Features, dataset_features
from evaluation.knn import knn_hits
from evaluation.linear import Classifiers, LinearSettings, linear_evaluation
from evaluation.online import PROTOCOLS, train_online
from evaluation.subject import load_subject
from evaluation.subsets import Subset, open_images

FAST = ["--linear_epochs=2", "--knn_k=5", "--num_workers=0", "--device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocols")
    class_folders(folder / "data", seed=0, per_class=20)
    fabricated_run(folder / "output", "v1", epochs=(1,))
    write_stl10(folder / "stl", train=40, test=20, unlabeled=8)
    return folder


def evaluate(place: Path, *flags: str, data: str = "data") -> tuple[dict, Path]:
    """The result of test.py, and its folder."""
    where = [f"--encoder_output_root={place}/output", f"--dataset_root={place / data}"]
    done = run("test", *where, *FAST, *flags)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.splitlines()[-1].split()[1].removesuffix(","))
    return json.loads(file.read_text()), file.parent


def settings_of(*flags: str) -> config.TestSettings:
    return resolve(config.parse(config.TestSettings, [*FAST, *flags]))


# ------------------------------------------------------------------------- what a result says


def test_scores_are_counted_by_hand() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (40,), generator=random)
    labels[labels == 4] = 5  # a class without test images
    orders = [torch.randperm(7, generator=random)[:5] for _ in range(3 * 40)]
    predicted = torch.stack(orders).view(3, 40, 5)
    found, confusion = score(predicted, labels, classes=7)
    pairs = [list(zip(trial.tolist(), labels.tolist(), strict=True)) for trial in predicted]
    trials = [100 * sum(p[0] == c for p, c in trial) / 40 for trial in pairs]
    mean = sum(trials) / 3
    assert found["trials"] == pytest.approx(trials)
    assert found["linear_top1"] == pytest.approx(mean)
    deviation = math.sqrt(sum((t - mean) ** 2 for t in trials) / 2)
    assert found["linear_top1_std"] == pytest.approx(deviation)
    everything = [pair for trial in pairs for pair in trial]
    top5 = 100 * sum(c in p for p, c in everything) / 120
    assert found["linear_top5"] == pytest.approx(top5)
    for true in range(7):
        for guess in range(7):
            count = sum(p[0] == guess and c == true for p, c in everything)
            assert confusion[true, guess] == count
    assert found["per_class_top1"][4] is None
    share = 100 * int(confusion[2, 2]) / (3 * int((labels == 2).sum()))
    assert found["per_class_top1"][2] == pytest.approx(share)
    assert "linear_top5" not in score(predicted[..., :3] % 3, labels % 3, classes=3)[0]


def test_wilson_s_interval_holds_the_shares_that_are_within_z_deviations() -> None:
    """At its ends p, the seen share is z standard deviations away: z sqrt(p (1 - p) / n)."""
    for share, n in ((0.83, 8000), (0.0, 50), (1.0, 50), (0.5, 10)):
        low, high = (bound / 100 for bound in wilson_interval(share, n))
        assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1
        for p in (low, high):
            deviation = math.sqrt(p * (1 - p) / n)
            assert abs(share - p) == pytest.approx(1.959964 * deviation, abs=1e-7)


# ---------------------------------------------------------------------------------- protocols


def test_each_kind_has_its_folder_and_says_what_it_is(place: Path) -> None:
    plain, folder = evaluate(place)
    assert folder.name == "epoch_0001" and plain["train_images"] == 60
    assert len(plain["trials"]) == 3 == len(plain["per_class_top1"])
    low, high = plain["linear_top1_ci95"]
    assert low < plain["linear_top1"] <= high
    tenth, other = evaluate(place, "--train_fraction=0.1", "--linear_lrs", "0.1")
    assert other.name == "epoch_0001-data-cached-10percent"
    assert (tenth["train_images"], tenth["train_fraction"]) == (6, 0.1)
    online, other = evaluate(place, "--protocol=original", "--trials=2")
    assert other.name == "epoch_0001-data-original"
    assert online["linear_lrs"] == [10.0] and len(online["trials"]) == 2
    assert evaluate(place, "--protocol=reference")[0]["linear_lrs"] == [30.0]
    tuned, other = evaluate(place, "--finetune", "--train_fraction=0.5")
    assert other.name == "epoch_0001-data-finetune-50percent"
    assert (tuned["finetune_lr"], tuned["protocol"]) == (0.01, "finetune")
    assert json.loads((folder / "result.json").read_text()) == plain


@pytest.mark.parametrize(
    "protocol, factors",
    [
        ("original", [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008, 0.0016, 0.0016]),
        ("reference", [1] * 6 + [0.1] * 2 + [0.01] * 2),
    ],
)
def test_learning_rates_are_those_of_the_scripts(protocol: str, factors: list[float]) -> None:
    auto = PROTOCOLS[protocol]
    assert auto.epochs == 100
    for first in (0, 9):  # of each ten epochs the first and the last
        found = [auto.schedule(epoch / 100) for epoch in range(first, 100, 10)]
        assert found == pytest.approx(factors)


@pytest.fixture(scope="module")
def square(place: Path) -> Subset:
    root = str(place / "data")
    dataset = dataloader.open_dataset(root, "train", fit="square", resize="auto", crop=16)
    return Subset(dataset, torch.arange(60))


@pytest.fixture(scope="module")
def unseen(place: Path) -> Subset:
    root = str(place / "data")
    dataset = dataloader.open_dataset(root, "test", fit="center", resize="auto", crop=16)
    return Subset(dataset, torch.arange(30))


def resnet() -> torch.nn.Module:
    return encoders.remove_head(encoders.build_encoder("resnet18", 8))


def online(square: Subset, unseen: Subset, encoder: torch.nn.Module, *flags: str) -> Classifiers:
    extractor = Extractor(encoder, [0.5] * 3, [0.25] * 3, parallel.OneDevice())
    settings = settings_of("--linear_batch_size=16", "--linear_lrs", "0.1", *flags)
    random = torch.Generator().manual_seed(0)
    features = Features(torch.rand(1, 30, 512, generator=random), torch.arange(30) % 3)
    return train_online(settings, extractor, square, unseen, features, trial=1)


def test_the_online_classifier_is_sgd_on_random_crops_of_a_frozen_encoder(
    square: Subset, unseen: Subset
) -> None:
    """Against a loop written out: views by augment, nn.Linear, torch.optim.SGD."""
    encoder = resnet()
    before = copy.deepcopy(encoder.state_dict())
    found = online(square, unseen, encoder, "--protocol=original", "--linear_epochs=5")
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())

    layer = torch.nn.Linear(512, 3)
    random = utils.generator(0, "linear weights", 1)
    layer.weight.data, layer.bias.data = (
        0.01 * torch.randn(3, 512, generator=random),
        torch.zeros(3),
    )
    optimizer, step = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9), 0
    colours = {"jitter_p": 0.0, "grayscale": 0.0, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    recipe = augment.recipe("v1", 16, scale=(0.2, 1.0), **colours)
    encoder.eval()
    for epoch in range(5):
        order = torch.randperm(60, generator=utils.generator(0, "linear order 1", epoch))
        optimizer.param_groups[0]["lr"] = 0.1 * 0.2**epoch
        for rows in order[:48].split(16):
            batch, random = square.dataset.fetch(rows), utils.generator(0, "linear views 1", step)
            params = augment.draw(batch.aspect, recipe, random)
            with torch.no_grad():
                outputs = encoder(augment.augment(batch.images, params, recipe))
            optimizer.zero_grad()
            F.cross_entropy(layer(outputs), batch.labels).backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(found.weight[0], layer.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias[0], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_finetuning_moves_a_copy_of_the_encoder_at_its_own_rate(
    square: Subset, unseen: Subset
) -> None:
    encoder = resnet()
    first = copy.deepcopy(encoder.state_dict())
    moved = []
    for rate in (0.0, 1e-5, 1e-4):
        flags = ["--finetune", f"--finetune_lr={rate}", "--linear_epochs=1"]
        tuned = online(square, unseen, encoder, *flags).encoder
        assert not torch.equal(tuned["bn1.running_mean"], first["bn1.running_mean"])  # train mode
        moved.append(float((tuned["conv1.weight"] - first["conv1.weight"]).norm()))
    assert moved[0] == 0 < moved[1] and moved[2] == pytest.approx(10 * moved[1], rel=0.2)
    assert all(torch.equal(value, first[name]) for name, value in encoder.state_dict().items())


def test_finetuned_encoders_are_saved_and_give_the_reported_accuracy(
    place: Path, unseen: Subset
) -> None:
    found, folder = evaluate(place, "--finetune", "--finetune_lr=0.003", "--linear_lrs", "0.05")
    saved = torch.load(folder / "linear.pth.tar", weights_only=True)
    encoder = resnet()
    encoder.load_state_dict(saved["encoders"][0])
    batch = unseen.dataset.fetch(unseen.indices)
    x = augment.normalize(batch.images, augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    with torch.no_grad():
        logits = F.linear(encoder.eval()(x), saved["weight"][0], saved["bias"][0])
    top1 = 100 * (logits.argmax(1) == batch.labels).double().mean()
    assert float(top1) == pytest.approx(found["linear_top1"])


def test_the_table_says_that_knn_is_before_the_finetuning(place: Path) -> None:
    where = [f"--encoder_output_root={place}/output", f"--dataset_root={place}/data"]
    done = run("test", *where, *FAST, "--finetune")
    row = next(line for line in done.stdout.splitlines() if line.startswith("kNN"))
    assert row.endswith("before the finetuning")


def test_the_curves_end_with_the_accuracy_that_is_reported(place: Path) -> None:
    for flags in ([], ["--protocol=reference"]):
        found, folder = evaluate(place, *flags)
        rows = utils.read_csv(folder / "accuracy.csv")
        pairs = zip(rows["epoch"], rows["top1"], strict=True)
        last = [top1 for epoch, top1 in pairs if epoch == 2]
        assert last == pytest.approx(found["trials"], abs=1e-4)


# -------------------------------------------------------------------------------------- folds


def test_folds_are_ten_trainings_each_on_its_thousand(place: Path) -> None:
    folds = [np.random.default_rng(i).permutation(40)[:20] for i in range(10)]
    lines = [" ".join(map(str, fold)) for fold in folds]
    (place / "stl" / "stl10_binary" / "fold_indices.txt").write_text("\n".join(lines) + "\n")
    found, folder = evaluate(place, "--folds", "--linear_lrs", "0.01", data="stl")
    assert folder.name == "epoch_0001-stl10-cached-folds" and found["folds"]
    assert len(found["trials"]) == 10 and found["knn_k"] == 5

    flags = [f"--encoder_output_root={place}/output", f"--dataset_root={place}/stl"]
    settings = settings_of(*flags)
    subject = load_subject(settings)
    training = subject.settings
    extractor = Extractor(subject.encoder, training.mean, training.std, parallel.OneDevice())
    images = open_images(settings, crop=16, pixels=RGB)
    train = dataset_features(extractor, images.train, mirror=True)
    test = dataset_features(extractor, images.test)
    banks = [train.take(torch.from_numpy(fold)) for fold in folds]
    for number in (0, 7):  # a training on a fold is one that never saw the rest
        alone = linear_evaluation(banks[number], test, LinearSettings(2, [0.01]), [number], 10)
        assert float(alone.accuracy[0, -1]) == pytest.approx(found["trials"][number])
    hits = sum(knn_hits(bank, test, k=5) for bank in banks)
    assert found["knn_top1"] == pytest.approx(100 * hits / 10 / 20)


def test_folds_that_are_damaged_are_one_line(place: Path, tmp_path: Path) -> None:
    write_stl10(tmp_path, train=20, test=10, unlabeled=8)
    flags = [f"--encoder_output_root={place}/output", f"--dataset_root={tmp_path}", "--folds"]
    assert one_line(run("test", *flags, *FAST), "fold_indices.txt")
    path = tmp_path / "stl10_binary" / "fold_indices.txt"
    path.write_text("0 1 2\n" * 9 + "0 1 20\n")
    assert one_line(run("test", *flags, *FAST), "below 20")


# --------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--finetune", "--protocol=original"], "contradict each other"),
        (["--folds"], "--folds are STL-10's"),
        (["--folds", "--train_fraction=0.1"], "contradict each other"),
        (["--folds", "--trials=3"], "--trials 3"),
        (["--protocol=original", "--linear_lrs", "1", "10"], "takes one learning rate"),
        (["--protocol=mine"], "--protocol"),
        (["--train_fraction=0"], "--train_fraction"),
        (["--linear_views=0"], "--linear_views"),
        (["--linear_views=3"], "--linear_views"),
        (["--protocol=original", "--linear_lrs", "3e38"], "diverged at learning rate 3e+38"),
        (["--linear_lrs", "auto", "0.5"], "--linear_lrs"),
        (["--finetune", "--linear_batch_size=1"], "--finetune needs batches of two images or more"),
        (["--finetune", "--finetune_lr=1e30"], "give smaller --linear_lrs and --finetune_lr"),
        (["--train_fraction=0.01"], "leave none to choose a learning rate on"),
    ],
)
def test_contradictions_are_one_line(place: Path, flags: list[str], words: str) -> None:
    where = [f"--encoder_output_root={place}/output", f"--dataset_root={place}/data"]
    done = run("test", *where, *FAST, *flags)
    assert one_line(done, words), done.stderr


def test_batches_that_are_too_small_for_the_processes_are_refused(place: Path) -> None:
    flags = [f"--dataset_root={place}/data", "--protocol=original", "--linear_batch_size=3"]
    settings = settings_of(*flags)
    with pytest.raises(utils.UserError, match="3 images a batch are too few for 2 processes"):
        check_sizes(settings, open_images(settings, crop=16, pixels=RGB), processes=2)
