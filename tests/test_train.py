"""train.py as users run it, on miniature data."""

from pathlib import Path

import pytest
import torch
from scripts import assert_one_line_error, run
from training import TINY, assert_same_run, pretrain, state

import config
import dataloader
import parallel
import train
import utils
from config import TrainSettings
from model import MoCo, unit
from run import setup
from run.log import COLUMNS

ROOT = Path(utils.__file__).parent


def test_a_run_writes_what_it_promises(folders: Path, tmp_path: Path):
    done = pretrain(folders, tmp_path, "--max_epoch=3", "--save_weight_epoch=2", "--shuffle_bn")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "IMAGENET-64" / "v1"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "log.csv",
        "loss.png",
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "epoch_0002.pth.tar",
        "epoch_0003.pth.tar",
        "last.pth.tar",
    ]
    log = utils.read_csv(folder / "log.csv")
    assert (
        list(log) == COLUMNS
        and log["step"] == [2, 4, 6, 8, 10, 12, 14, 15]
        and log["epoch"] == [1, 1, 2, 2, 2, 3, 3, 3]
    )
    assert all(0 < loss < 20 for loss in log["loss"]) and all(
        0 <= hit <= 100 for hit in log["contrast_top1"]
    )
    checkpoint = state(tmp_path)
    assert {"epoch", "step", "arch", "state_dict", "optimizer", "config"} <= set(checkpoint)
    assert (checkpoint["epoch"], checkpoint["step"], checkpoint["arch"]) == (3, 15, "resnet18")
    assert (
        all(name.startswith("module.") for name in checkpoint["state_dict"])
        and "auto" not in checkpoint["config"].values()
    )
    assert checkpoint["state_dict"]["module.encoder_q.bn1.num_batches_tracked"] == 15
    assert "configuration:" in done.stdout and "num_keys=48" in done.stdout
    assert str(folder) in done.stdout


def test_same_seed_same_curve_whatever_the_workers_and_another_seed_another(
    folders: Path, tmp_path: Path
):
    for name, flags in (("a", []), ("b", ["--num_workers=2"]), ("c", ["--seed=1"])):
        done = pretrain(folders, tmp_path / name, "--max_epoch=1", "--shuffle_bn", *flags)
        assert done.returncode == 0, done.stderr
    assert_same_run(state(tmp_path / "a"), state(tmp_path / "b"))
    assert not torch.equal(
        state(tmp_path / "a")["state_dict"]["module.queue"],
        state(tmp_path / "c")["state_dict"]["module.queue"],
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--mlp", "--aug_plus", "--cosine"],
        ["--momentum=0"],
        ["--queue_init=random", "--bn_groups=1"],
        ["--precision=bf16"],
        ["--precision=fp64"],
        ["--arch=resnext50_32x4d"],
    ],
)
def test_variants_train(folders: Path, tmp_path: Path, flags: list[str]):
    done = pretrain(folders, tmp_path, "--max_epoch=1", "--crop=32", "--resize=32", *flags)
    assert done.returncode == 0, done.stderr
    final = state(tmp_path)["state_dict"]
    if (
        "--momentum=0" in flags
    ):  # M0: at the last forward pass, the key encoder was the query encoder
        names = [n for n, _ in torch.nn.Module.named_parameters(MoCo("resnet18", 8, 48).encoder_k)]
        log = utils.read_csv(tmp_path / "IMAGENET-64/v1/log.csv")
        assert names and len(log["step"]) == 3
    assert all(torch.isfinite(v).all() for v in final.values() if v.is_floating_point())
    if "--precision=fp64" in flags:
        assert (
            final["module.encoder_q.conv1.weight"].dtype
            == final["module.queue"].dtype
            == torch.float64
        )


def test_shuffling_matters_with_groups_and_not_without(folders: Path, tmp_path: Path):
    ends = {}
    for groups in (1, 2):
        for flag in ("--shuffle_bn", "--no-shuffle_bn"):
            out = tmp_path / f"{groups}{flag}"
            done = pretrain(
                folders, out, "--max_epoch=1", f"--bn_groups={groups}", "--precision=fp64", flag
            )
            assert done.returncode == 0 and ("no effect" in done.stderr) == (
                groups == 1 and flag == "--shuffle_bn"
            ), done.stderr
            ends[groups, flag] = state(out)["state_dict"]["module.encoder_q.conv1.weight"]
    difference = {
        g: (ends[g, "--shuffle_bn"] - ends[g, "--no-shuffle_bn"]).abs().max().item() for g in (1, 2)
    }
    assert difference[1] < 1e-9 and difference[2] > 1e-6


@pytest.mark.parametrize(
    "cosine, moments",
    [(False, {0: 1, 119.9: 1, 120: 0.1, 159.9: 0.1, 160: 0.01}), (True, {0: 1, 100: 0.5, 200: 0})],
)
def test_learning_rate(cosine: bool, moments: dict[float, float]):
    cfg = config.parse(TrainSettings, ["--cosine"] if cosine else [])
    for epoch, factor in moments.items():
        assert train.learning_rate(cfg, epoch) == pytest.approx(0.03 * factor, abs=1e-12)


def test_a_symmetric_step_is_both_directions_and_one_update(folders: Path, tmp_path: Path):
    """Five losses against the definition: CE of q1 k2 and of q2 k1, the queue as it was, one
    momentum update, keys enqueued once."""
    flags = [
        "--symmetric",
        "--shuffle_bn",
        "--queue_init=random",
        "--precision=fp64",
        "--max_epoch=1",
        "--log_every=1",
        "--momentum=0.9",
    ]
    assert pretrain(folders, tmp_path, *flags).returncode == 0
    log = utils.read_csv(tmp_path / "IMAGENET-64/v1/log.csv")
    cfg = config.parse(
        TrainSettings, [f"--dataset_root={folders}", f"--output_root={tmp_path}/x", *TINY, *flags]
    )
    launch = parallel.OneDevice()
    dataset = setup.resolve(cfg, launch, None)
    torch.manual_seed(utils.generator(0, "weights").initial_seed())
    moco = MoCo("resnet18", 8, 48, 0.9, 0.07, bn_groups=2).double().train()
    launch.attach(moco, 16, 2)
    optimizer = torch.optim.SGD(
        moco.encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4
    )
    queue = moco.queue.clone()
    for step, rows in enumerate(dataloader.epoch_batches(len(dataset), 16, 0, 0), start=1):
        one, two = train.make_views(dataset.fetch(rows), cfg, step, launch)
        losses, keys = [], []
        with torch.no_grad():
            for k, q in zip(moco.encoder_k.parameters(), moco.encoder_q.parameters(), strict=True):
                k.mul_(0.9).add_(q, alpha=0.1)
        for query, key, stream in ((one, two, "shuffle"), (two, one, "shuffle back")):
            order = torch.randperm(16, generator=utils.generator(0, stream, step))
            q = unit(moco.encoder_q(query))
            with torch.no_grad():
                k = torch.empty(16, 8, dtype=torch.float64)
                k[order] = unit(moco.encoder_k(key[order]))
            scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.07
            losses.append(-(scores[:, 0] - scores.logsumexp(1)).mean())
            keys.append(k)
        loss = sum(losses) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat([queue, *[k.T for k in keys]], 1)[
            :, -48:
        ]  # the order of columns does not matter
        assert log["loss"][step - 1] == pytest.approx(loss.item(), rel=1e-7), step
    assert step == 5


def test_a_small_stem_is_trained_and_evaluated(folders: Path, tmp_path: Path):
    assert pretrain(folders, tmp_path, "--max_epoch=1", "--small_stem").returncode == 0
    assert state(tmp_path)["state_dict"]["module.encoder_k.conv1.weight"].shape == (64, 3, 3, 3)
    done = run(
        "test",
        f"--dataset_root={folders}",
        f"--encoder_output_root={tmp_path}",
        "--encoder=random",
        "--linear_epochs=1",
        "--trials=1",
        "--linear_lrs",
        "0.1",
        "--num_workers=0",
        "--device=cpu",
        "--knn_k=5",
    )
    assert done.returncode == 0, done.stderr
    done = pretrain(folders, tmp_path, "--max_epoch=1", "--no-small_stem", "--resume")
    assert_one_line_error(done, "small_stem True -> False")


@pytest.mark.parametrize("preset", ["cifar10", "stl10", "mocov2"])
def test_presets_start(folders: Path, tmp_path: Path, preset: str):
    done = run(
        "train",
        f"--preset={preset}",
        f"--dataset_root={folders}",
        f"--output_root={tmp_path}",
        *TINY,
        "--num_keys=16",
        "--max_epoch=1",
    )
    assert done.returncode == 0, done.stderr
