"""Protocols of test.py, parts of the labels, folds, finetuning, what a result says, and the kNN while training."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data import write_folders, write_stl10
from evaluation_data import class_folders, fabricated_run, one_line
from scripts import run

import dataloader
import evaluate
import model
import parallel
import utils

FAST = ["--linear_epochs=2", "--knn_k=5", "--num_workers=0", "--device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocols")
    class_folders(folder / "data", seed=0, per_class=20)
    fabricated_run(folder / "output", "v1", epochs=(1,))
    write_stl10(folder / "stl", train=40, test=20, unlabeled=8)
    return folder


def result(place: Path, *flags: str, data: str = "data") -> tuple[dict, str]:
    done = run(
        "test",
        f"--encoder_output_root={place}/output",
        f"--dataset_root={place / data}",
        *FAST,
        *flags,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1].split()[1].removesuffix(","))
    return json.loads(folder.read_text()), folder.parent.name


# ------------------------------------------------------------------------------------------------------------ what a result says


def test_scores_are_counted_by_hand() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (40,), generator=random)
    labels[labels == 4] = 5  # a class without test images
    predicted = torch.stack(
        [
            torch.stack([torch.randperm(7, generator=random)[:5] for _ in range(40)])
            for _ in range(3)
        ]
    )
    found = evaluate.scores(predicted, labels, classes=7)
    trials = [
        100 * sum(int(p[0]) == int(c) for p, c in zip(trial, labels)) / 40 for trial in predicted
    ]
    assert found["trials"] == pytest.approx(trials) and found["linear_top1"] == pytest.approx(
        sum(trials) / 3
    )
    assert found["linear_top1_std"] == pytest.approx(
        math.sqrt(sum((t - sum(trials) / 3) ** 2 for t in trials) / 2)
    )
    assert found["linear_top5"] == pytest.approx(
        100 * sum(int(c) in p.tolist() for trial in predicted for p, c in zip(trial, labels)) / 120
    )
    for true in range(7):
        for guess in range(7):
            count = sum(
                int(p[0]) == guess and int(c) == true
                for trial in predicted
                for p, c in zip(trial, labels)
            )
            assert found["confusion"][true, guess] == count
    assert found["per_class_top1"][4] is None
    assert found["per_class_top1"][2] == pytest.approx(
        100 * int(found["confusion"][2, 2]) / (3 * int((labels == 2).sum()))
    )
    assert "linear_top5" not in evaluate.scores(predicted[..., :3] % 3, labels % 3, classes=3)


def test_wilson_s_interval_holds_the_shares_that_are_within_z_deviations() -> None:
    """Its ends are the p for which the seen share is exactly z standard deviations away, sqrt(p (1 - p) / n) each."""
    for share, n in ((0.83, 8000), (0.0, 50), (1.0, 50), (0.5, 10)):
        low, high = (bound / 100 for bound in evaluate.wilson(share, n))
        assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1
        for bound in (low, high):
            assert abs(share - bound) == pytest.approx(
                1.959964 * math.sqrt(bound * (1 - bound) / n), abs=1e-7
            )


def test_stratified_takes_its_share_of_each_class_and_the_seed_decides_which() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)[
        torch.randperm(153, generator=torch.Generator().manual_seed(3))
    ]
    parts = [evaluate.stratified(labels, 0.1, utils.generator(seed, "x")) for seed in (0, 0, 1)]
    assert torch.equal(parts[0], parts[1]) and not torch.equal(parts[0], parts[2])
    for part in parts:
        assert torch.bincount(labels[part]).tolist() == [10, 5, 1] and len(part.unique()) == 16
    assert torch.equal(evaluate.stratified(labels, 1.0, utils.generator(0, "x")), torch.arange(153))


# ----------------------------------------------------------------------------------------------------------------------- protocols


def test_each_kind_has_its_folder_and_says_what_it_is(place: Path) -> None:
    plain, name = result(place)
    assert (
        name == "epoch_0001"
        and len(plain["trials"]) == 3
        and plain["train_images"] == 60
        and len(plain["per_class_top1"]) == 3
    )
    assert plain["linear_top1_ci95"][0] < plain["linear_top1"] <= plain["linear_top1_ci95"][1]
    tenth, name = result(place, "--train_fraction=0.1", "--linear_lrs", "0.1")
    assert (
        name == "epoch_0001-data-cached-10percent"
        and tenth["train_images"] == 6
        and tenth["train_fraction"] == 0.1
    )
    online, name = result(place, "--protocol=original", "--trials=2")
    assert (
        name == "epoch_0001-data-original"
        and online["linear_lrs"] == [10.0]
        and len(online["trials"]) == 2
    )
    assert result(place, "--protocol=reference")[0]["linear_lrs"] == [30.0]
    tuned, name = result(place, "--finetune", "--train_fraction=0.5")
    assert (
        name == "epoch_0001-data-finetune-50percent"
        and tuned["finetune_lr"] == 0.01
        and tuned["protocol"] == "finetune"
    )
    assert (
        json.loads((place / "output/IMAGENET-64/v1/eval/epoch_0001/result.json").read_text())
        == plain
    )


@pytest.mark.parametrize(
    "protocol, shares",
    [
        ("original", [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008, 0.0016, 0.0016]),
        ("reference", [1] * 6 + [0.1] * 2 + [0.01] * 2),
    ],
)
def test_learning_rates_are_those_of_the_scripts(protocol: str, shares: list[float]) -> None:
    epochs, _, _, rate, _ = evaluate.PROTOCOLS[protocol]
    assert epochs == 100
    assert [rate(epoch / 100) for epoch in range(0, 100, 10)] == pytest.approx(shares)
    assert [rate(epoch / 100) for epoch in range(9, 100, 10)] == pytest.approx(
        shares
    )  # no epoch too early or too late


def online(square, encoder, **changes) -> dict:
    cfg = evaluate.settled(
        utils.load_config(
            "test",
            [
                *FAST,
                "--protocol=original",
                "--linear_epochs=5",
                "--linear_lrs",
                "0.1",
                "--linear_batch_size=16",
            ],
        )
    )
    cfg = SimpleNamespace(**vars(cfg) | {"precision": "fp32"} | changes)
    recipe = evaluate.crop_recipe(16, [0.5] * 3, [0.25] * 3)
    tests = torch.rand(12, 512, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    return evaluate.train_on_crops(
        cfg,
        encoder,
        square,
        recipe,
        torch.arange(len(square)),
        1,
        lambda: tests[0],
        tests[1],
        parallel.OneDevice(),
    )


def test_the_online_classifier_is_sgd_on_random_crops_of_a_frozen_encoder(place: Path) -> None:
    """Against a loop written out with torchvision-free parts: views by augment, nn.Linear, torch.optim.SGD."""
    square = dataloader.open_dataset(
        str(place / "data"), "train", view="square", resize="auto", crop=16
    )
    encoder = model.backbone(model.build_encoder("resnet18", 8))
    before = copy.deepcopy(encoder.state_dict())
    found = online(square, encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    import augment

    layer = torch.nn.Linear(512, 3)
    layer.weight.data, layer.bias.data = (
        0.01 * torch.randn(3, 512, generator=utils.generator(0, "linear weights", 1)),
        torch.zeros(3),
    )
    optimizer, step = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9), 0
    encoder.eval()
    for epoch in range(5):
        order = torch.randperm(60, generator=utils.generator(0, "linear order 1", epoch))
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.2**epoch
        for rows in order[:48].split(16):
            batch = square.fetch(rows)
            recipe = evaluate.crop_recipe(16, [0.5] * 3, [0.25] * 3)
            views = augment.augment(
                batch.images,
                augment.draw(batch.aspect, recipe, utils.generator(0, "linear views 1", step)),
                recipe,
            )
            with torch.no_grad():
                out = encoder(views)
            optimizer.zero_grad()
            F.cross_entropy(layer(out), batch.labels).backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(found["weight"], layer.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["bias"], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_finetuning_moves_the_encoder_at_its_own_rate(place: Path) -> None:
    square = dataloader.open_dataset(
        str(place / "data"), "train", view="square", resize="auto", crop=16
    )
    first = model.backbone(model.build_encoder("resnet18", 8))
    moved = []
    for rate in (0.0, 1e-4, 1e-3):
        encoder = copy.deepcopy(first).train()
        online(
            square, encoder, finetune=True, finetune_lr=rate, protocol="finetune", linear_epochs=1
        )
        assert not torch.equal(encoder.bn1.running_mean, first.bn1.running_mean)  # train mode
        moved.append(float((encoder.conv1.weight - first.conv1.weight).norm().detach()))
    assert moved[0] == 0 < moved[1] and moved[2] == pytest.approx(10 * moved[1], rel=0.2)


def test_finetuned_encoders_are_saved_and_give_the_reported_accuracy(place: Path) -> None:
    found, name = result(place, "--finetune", "--finetune_lr=0.003", "--linear_lrs", "0.05")
    saved = torch.load(
        place / f"output/IMAGENET-64/v1/eval/{name}/linear.pth.tar", weights_only=True
    )
    encoder = model.backbone(model.build_encoder("resnet18", 8))
    encoder.load_state_dict(saved["encoders"][0])
    test = dataloader.open_dataset(
        str(place / "data"), "test", view="center", resize="auto", crop=16
    )
    batch = test.fetch(torch.arange(len(test)))
    config = utils.load_config("train", [])
    x = (batch.images / 255 - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[
        :, None, None
    ]
    with torch.no_grad():
        top1 = (
            100
            * (
                F.linear(encoder.eval()(x), saved["weight"][0], saved["bias"][0]).argmax(1)
                == batch.labels
            )
            .double()
            .mean()
        )
    assert float(top1) == pytest.approx(found["linear_top1"])


def test_the_untrained_column_is_of_the_encoder_from_which_the_run_started(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", seed=0, per_class=4)
    flags = [f"--encoder_output_root={tmp_path}/output", f"--dataset_root={tmp_path}/data", *FAST]
    fabricated_run(tmp_path / "output", "v1", epochs=(1,))  # its seed is 7
    assert run("test", *flags, "--encoder=random").returncode == 0
    header = "top-1 (%)         untrained   cached"
    assert header in run("test", *flags).stdout
    assert header not in run("test", *flags, "--precision=bf16").stdout
    assert header in run("test", *flags).stdout
    last = tmp_path / "output/IMAGENET-64/v1/checkpoints/last.pth.tar"
    content = utils.load_checkpoint(last)
    utils.save_checkpoint(last, content | {"config": content["config"] | {"seed": 8}})
    assert header not in run("test", *flags).stdout  # trained anew from others
    for name in ("random_moco", "other"):  # files from elsewhere, one of which is called so
        torch.save(
            {"state_dict": content["state_dict"], "config": content["config"]},
            tmp_path / f"{name}.pth",
        )
        assert header not in run("test", *flags, f"--pretrained={tmp_path}/{name}.pth").stdout


def test_the_result_says_what_was_computed_not_what_was_asked(place: Path) -> None:
    found, _ = result(place, "--precision=auto")
    assert found["precision"] == parallel.pick_precision("auto", torch.device("cpu"))


def test_finetuning_says_whose_neighbours_vote(place: Path) -> None:
    done = run(
        "test",
        f"--encoder_output_root={place}/output",
        f"--dataset_root={place}/data",
        *FAST,
        "--finetune",
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("kNN")][0].endswith(
        "before the finetuning"
    ), done.stdout


def test_the_curves_end_with_the_accuracy_that_is_reported(place: Path) -> None:
    for flags in ([], ["--protocol=reference"]):
        found, name = result(place, *flags)
        rows = utils.read_csv(place / f"output/IMAGENET-64/v1/eval/{name}/accuracy.csv")
        assert [
            top1 for top1, epoch in zip(rows["top1"], rows["epoch"]) if epoch == 2
        ] == pytest.approx(found["trials"], abs=1e-4)


def test_a_run_whose_settings_are_not_valid_is_not_taken_for_a_foreign_file(tmp_path: Path) -> None:
    last = fabricated_run(tmp_path, "v1", epochs=(1,)) / "checkpoints" / "last.pth.tar"
    content = utils.load_checkpoint(last)
    utils.save_checkpoint(last, content | {"config": content["config"] | {"batch_size": 0}})
    assert one_line(
        run("test", f"--encoder_output_root={tmp_path}", "--dataset_root=shapes", *FAST),
        "has settings that are not valid: --batch_size 0",
    )
    utils.save_checkpoint(
        last, {name: value for name, value in content.items() if name != "config"}
    )
    done = run(
        "test",
        f"--encoder_output_root={tmp_path}",
        "--dataset_root=shapes",
        "--encoder_exp_version=v1",
        "--linear_batch_size=0",
        *FAST,
    )
    assert done.returncode == 2  # (bad flags come first)
    cfg = evaluate.settled(utils.load_config("test", [f"--encoder_output_root={tmp_path}"]))
    assert "does not say its settings: crop 224 px" in evaluate.load_subject(cfg).found


def test_folds_are_ten_trainings_each_on_its_thousand(place: Path) -> None:
    folds = [np.random.default_rng(i).permutation(40)[:20] for i in range(10)]
    (place / "stl" / "stl10_binary" / "fold_indices.txt").write_text(
        "\n".join(" ".join(map(str, fold)) for fold in folds) + "\n"
    )
    found, name = result(place, "--folds", "--linear_lrs", "0.01", data="stl")
    assert (
        name == "epoch_0001-stl10-cached-folds"
        and len(found["trials"]) == 10
        and found["folds"]
        and found["knn_k"] == 5
    )
    cfg = evaluate.settled(
        utils.load_config("test", [f"--encoder_output_root={place}/output", *FAST])
    )
    cfg.precision, subject = "fp32", evaluate.load_subject(cfg)
    parts = [
        dataloader.open_dataset(str(place / "stl"), split, view="center", resize="auto", crop=16)
        for split in ("train", "test")
    ]
    (views, labels), (tests, truth) = [
        evaluate.dataset_features(cfg, subject, part, parallel.OneDevice(), mirror=part is parts[0])
        for part in parts
    ]
    for number in (0, 7):  # a training on a fold is one that never saw the rest
        rows = torch.from_numpy(folds[number])
        alone = evaluate.linear_evaluation(
            views[:, rows],
            labels[rows],
            tests[0],
            truth,
            epochs=2,
            lrs=[0.01],
            trials=[number],
            classes=10,
        )
        assert float(alone["accuracy"][0, -1]) == pytest.approx(found["trials"][number])
    votes = [
        evaluate.knn_hits(views[0, fold], labels[fold], tests[0], truth, k=5)
        for fold in map(torch.from_numpy, folds)
    ]
    assert found["knn_top1"] == pytest.approx(100 * sum(votes) / 10 / 20)


def test_more_stored_views_are_random_crops_of_the_same_images_whatever_the_batches(
    place: Path,
) -> None:
    flags = [f"--encoder_output_root={place}/output", *FAST, "--linear_views=4"]
    square = dataloader.open_dataset(
        str(place / "data"), "train", view="square", resize="auto", crop=16
    )
    train = dataloader.open_dataset(
        str(place / "data"), "train", view="center", resize="auto", crop=16
    )
    cfg = evaluate.settled(utils.load_config("test", flags))
    cfg.precision, subject = "fp32", evaluate.load_subject(cfg)
    views, labels = evaluate.stored_views(
        cfg, subject, train, square, torch.arange(60), parallel.OneDevice()
    )
    assert views.shape == (4, 60, 512) and torch.equal(labels, train.labels)
    assert not torch.equal(views[2], views[3])
    cfg.eval_batch_size = 7
    again, _ = evaluate.stored_views(
        cfg, subject, train, square, torch.arange(60), parallel.OneDevice()
    )
    torch.testing.assert_close(again, views, rtol=1e-4, atol=1e-4)
    cosine = F.cosine_similarity(views[2] - views[2].mean(0), views[0] - views[0].mean(0))
    assert (
        cosine.mean()
        > F.cosine_similarity(
            views[2] - views[2].mean(0), (views[0] - views[0].mean(0)).roll(7, 0)
        ).mean()
        + 0.05
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--finetune", "--protocol=original"], "contradict each other"),
        (["--folds"], "--folds are STL-10's"),
        (["--folds", "--train_fraction=0.1"], "contradict each other"),
        (["--folds", "--trials=3"], "leave --trials 3 out"),
        (["--protocol=original", "--linear_lrs", "1", "10"], "takes one learning rate"),
        (["--protocol=mine"], "--protocol 'mine' is not valid"),
        (["--train_fraction=0"], "--train_fraction 0"),
        (["--train_fraction=0.01", "--linear_views=0"], "--linear_views 0"),
        (["--protocol=original", "--linear_lrs", "3e38"], "diverged at learning rate 3e+38"),
        (["--linear_lrs", "auto", "0.5"], "--linear_lrs auto 0.5: auto stands alone"),
        (["--finetune", "--linear_batch_size=1"], "--finetune needs batches of two images or more"),
        (["--finetune", "--finetune_lr=1e30"], "give smaller --linear_lrs and --finetune_lr"),
        (["--train_fraction=0.01"], "leave none to choose a learning rate on"),
    ],
)
def test_contradictions_are_one_line(place: Path, flags: list[str], words: str) -> None:
    done = run(
        "test",
        f"--encoder_output_root={place}/output",
        f"--dataset_root={place}/data",
        *FAST,
        *flags,
    )
    assert one_line(done, words), done.stderr


def test_classes_that_do_not_fit_are_one_line(place: Path, tmp_path: Path) -> None:
    for change, words in (
        (
            lambda d: (d / "test" / "class2").rename(d / "test" / "other"),
            "different classes: only one of them has class2, other",
        ),
        (
            lambda d: [p.unlink() for p in (d / "train" / "class1").iterdir()],
            "class1' has no images",
        ),
    ):
        data = tmp_path / words[:5].strip("'")
        class_folders(data, seed=0, per_class=4)
        change(data)
        done = run("test", f"--encoder_output_root={place}/output", f"--dataset_root={data}", *FAST)
        assert one_line(done, words), done.stderr


def test_folds_that_are_damaged_are_one_line(place: Path, tmp_path: Path) -> None:
    write_stl10(tmp_path, train=20, test=10, unlabeled=8)
    flags = [
        f"--encoder_output_root={place}/output",
        f"--dataset_root={tmp_path}",
        *FAST,
        "--folds",
    ]
    assert one_line(run("test", *flags), "fold_indices.txt")
    (tmp_path / "stl10_binary" / "fold_indices.txt").write_text("0 1 2\n" * 9 + "0 1 20\n")
    assert one_line(run("test", *flags), "does not hold ten folds of indices below 20")


def test_features_that_do_not_fit_into_memory_are_said_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(utils.UserError, match="--linear_views 1"):
        evaluate.check_memory(10**15, "use --linear_views 1")
    evaluate.check_memory(10**6, "")


def test_what_has_no_room_is_said_before_any_feature_is_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *more, real=Path.read_text, **named: (
            "MemAvailable: 300 kB" if str(self) == "/proc/meminfo" else real(self, *more, **named)
        ),
    )
    monkeypatch.setattr(evaluate, "extract_features", None)
    done = run(
        "test", f"--encoder_output_root={place}/output", f"--dataset_root={place}/data", *FAST
    )  # 60 x 2 + 30 features of 512
    assert one_line(
        done,
        "0.0 GB of memory, and 0.0 are free: use --linear_views 1, or a smaller --train_fraction",
    ), (done.stdout, done.stderr)
    done = run(
        "train",
        f"--dataset_root={place}/data",
        f"--output_root={tmp_path}",
        *TINY,
        "--knn_every=1",
        f"--knn_root={place}/data",
    )
    assert one_line(done, "use fewer --knn_images") and not list(tmp_path.iterdir()), done.stderr


# ------------------------------------------------------------------------------------------------------------------ while training

TINY = [
    "--arch=resnet18",
    "--crop=16",
    "--resize=16",
    "--feature_dim=8",
    "--num_keys=16",
    "--batch_size=16",
    "--bn_groups=2",
    "--num_workers=0",
    "--log_every=3",
    "--device=cpu",
    "--precision=fp32",
    "--momentum=0.5",
    "--max_epoch=3",
]


def test_knn_while_training_is_measured_and_changes_nothing(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", classes=4, train=20, test=5, size=20)
    states = []
    for name, flags in (
        ("without", []),
        ("with", ["--knn_every=2", f"--knn_root={tmp_path}/data"]),
    ):
        done = run(
            "train",
            f"--dataset_root={tmp_path}/data",
            f"--output_root={tmp_path}",
            f"--exp_version={name}",
            *TINY,
            *flags,
        )
        assert done.returncode == 0, done.stderr
        states.append(
            utils.load_checkpoint(tmp_path / "IMAGENET-64" / name / "checkpoints" / "last.pth.tar")[
                "state_dict"
            ]
        )
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    log = utils.read_csv(tmp_path / "IMAGENET-64/with/log.csv")
    assert log["step"] == [3, 6, 9, 10, 12, 15] and [
        not math.isnan(top1) for top1 in log["knn_top1"]
    ] == [False, False, False, True, False, True]
    assert (tmp_path / "IMAGENET-64/with/knn.png").exists() and not (
        tmp_path / "IMAGENET-64/without/knn.png"
    ).exists()
    done = run(
        "test",
        f"--dataset_root={tmp_path}/data",
        f"--encoder_output_root={tmp_path}",
        "--encoder_exp_version=with",
        "--num_workers=0",
        "--device=cpu",
        "--linear_epochs=1",
        "--trials=1",
        "--knn_k=80",
    )
    result = json.loads((tmp_path / "IMAGENET-64/with/eval/epoch_0003/result.json").read_text())
    assert result["knn_top1"] == pytest.approx(log["knn_top1"][-1]), (
        done.stderr
    )  # the same encoder, images, and vote


@pytest.mark.parametrize("below", ["", "train"])
def test_a_tenth_of_the_training_images_asks(tmp_path: Path, below: str) -> None:
    write_folders(tmp_path, classes=3, train=20, test=5, size=20)
    cfg = utils.load_config("train", [f"--dataset_root={tmp_path / below}", *TINY, "--knn_every=1"])
    monitor = evaluate.Monitor(cfg, parallel.OneDevice())
    (dataset, voters), (_, askers) = monitor.parts
    assert all("/train/" in path for path in dataset.paths)
    assert torch.bincount(dataset.labels[askers]).tolist() == [2, 2, 2] and torch.bincount(
        dataset.labels[voters]
    ).tolist() == [18, 18, 18]
    assert not set(voters.tolist()) & set(askers.tolist())
    cfg.knn_images = 20
    assert [len(rows) for _, rows in evaluate.Monitor(cfg, parallel.OneDevice()).parts] == [20, 5]


def test_alignment_uniformity_and_rank_have_their_closed_forms() -> None:
    q, k = (
        F.normalize(torch.randn(10, 6, generator=torch.Generator().manual_seed(i)).double(), dim=1)
        for i in (0, 1)
    )
    logits = torch.cat([(q * k).sum(1, keepdim=True) / 0.07, torch.zeros(10, 3)], 1)
    assert float(model.alignment(logits, 0.07)) == pytest.approx(
        float((q - k).square().sum(1).mean())
    )
    pairs = [
        math.exp(-2 * float((q[i] - q[j]).square().sum())) for i in range(10) for j in range(i)
    ]
    assert float(model.uniformity(q)) == pytest.approx(math.log(sum(pairs) / len(pairs)))
    assert float(model.uniformity(q[:1].expand(5, 6))) == pytest.approx(0)
    assert float(model.effective_rank(torch.eye(6)[:, :4].repeat(1, 5))) == pytest.approx(4)
    assert float(model.effective_rank(q[:1].T.expand(6, 30))) == pytest.approx(1, abs=1e-3)
    singular = torch.linalg.svdvals(q.T)
    p = singular / singular.sum()
    assert float(model.effective_rank(q.T)) == pytest.approx(
        float(torch.exp(-(p * p.log()).sum())), rel=1e-6
    )


def test_the_log_holds_what_the_keys_of_the_queue_show(tmp_path: Path) -> None:
    """The last row against the checkpoint, whose queue of 16 holds the keys of the last batch of 16."""
    write_folders(tmp_path / "data", classes=4, train=20, test=5, size=20)
    assert (
        run(
            "train", f"--dataset_root={tmp_path}/data", f"--output_root={tmp_path}", *TINY
        ).returncode
        == 0
    )
    log = utils.read_csv(tmp_path / "IMAGENET-64/v1/log.csv")
    queue = utils.load_checkpoint(tmp_path / "IMAGENET-64/v1/checkpoints/last.pth.tar")[
        "state_dict"
    ]["module.queue"].double()
    singular = torch.linalg.svdvals(queue)
    p = singular / singular.sum()
    assert (
        run(
            "train",
            f"--dataset_root={tmp_path}/data",
            f"--output_root={tmp_path}/both",
            *TINY,
            "--symmetric",
            "--num_keys=32",
        ).returncode
        == 0
    )
    both = utils.read_csv(tmp_path / "both/IMAGENET-64/v1/log.csv")
    whole = utils.load_checkpoint(tmp_path / "both/IMAGENET-64/v1/checkpoints/last.pth.tar")[
        "state_dict"
    ]
    first = (
        whole["module.queue"].double().roll(-int(whole["module.queue_ptr"]), 1)[:, :16]
    )  # the keys of one view alone: pairs of views are no pairs of images
    assert both["uniformity"][-1] == pytest.approx(
        float((-2 * torch.pdist(first.T).square()).exp().mean().log()), rel=1e-3
    )
    assert log["effective_rank"][-1] == pytest.approx(
        float(torch.exp(-(p * p.log()).sum())), rel=1e-3
    )
    distances = torch.pdist(queue.T).square()
    assert log["uniformity"][-1] == pytest.approx(
        float((-2 * distances).exp().mean().log()), rel=1e-3
    )
    assert all(0 < a < 4 for a in log["alignment"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--knn_every=1", "--knn_root=nowhere"], "--knn_root 'nowhere' is no folder"),
        (["--knn_root=x"], "no use without --knn_every"),
        (["--knn_every=-1"], "--knn_every -1"),
        (["--knn_every=1", "--knn_images=3"], "--knn_images 3"),
    ],
)
def test_bad_questions_are_one_line(tmp_path: Path, flags: list[str], words: str) -> None:
    write_folders(tmp_path / "data", classes=4, train=20, test=5, size=20)
    done = run(
        "train", f"--dataset_root={tmp_path}/data", f"--output_root={tmp_path}/out", *TINY, *flags
    )
    assert one_line(done, words) and not (tmp_path / "out").exists(), done.stderr
