"""train.py as users run it, on miniature data."""

import contextlib
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data import write_folders
from scripts import Done, assert_last_line_is_error, assert_one_line_error, run

import train
import utils

ROOT = Path(train.__file__).parent
TINY = [
    "--arch=resnet18",
    "--crop=16",
    "--resize=16",
    "--feature_dim=8",
    "--num_keys=48",
    "--batch_size=16",
    "--bn_groups=2",
    "--num_workers=0",
    "--log_every=2",
    "--device=cpu",
    "--precision=fp32",
]


def pretrain(root: Path, out: Path, *flags: object) -> Done:
    return run("train", f"--dataset_root={root}", f"--output_root={out}", *TINY, *flags)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes x 20 images: 5 steps of 16 an epoch."""
    root = tmp_path_factory.mktemp("folders")
    write_folders(root, classes=4, train=20, test=5, size=20)
    return root


def state(out: Path, name: str = "IMAGENET-64/v1", file: str = "last.pth.tar") -> dict:
    return utils.load_checkpoint(out / name / "checkpoints" / file)


def assert_same_run(a: dict, b: dict) -> None:
    assert a["step"] == b["step"]
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for i, buffers in a["optimizer"]["state"].items():
        assert torch.equal(
            buffers["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"]
        )


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
        list(log) == train.LOG_COLUMNS
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


def test_stopped_and_resumed_is_the_run_that_never_stopped(folders: Path, tmp_path: Path):
    flags = ["--max_epoch=8", "--shuffle_bn", "--save_weight_epoch=100", "--log_every=1"]
    whole = pretrain(folders, tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    command = [
        sys.executable,
        "train.py",
        f"--dataset_root={folders}",
        f"--output_root={tmp_path / 'cut'}",
        *TINY,
        *flags,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "cut" / "IMAGENET-64" / "v1" / "log.csv"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 1):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "saved; continue with --resume" in out
    assert 0 < state(tmp_path / "cut")["step"] < 40
    again = pretrain(folders, tmp_path / "cut", *flags, "--resume", "--num_workers=2")
    assert again.returncode == 0 and "resumed after step" in again.stdout, again.stderr
    assert_same_run(state(tmp_path / "whole"), state(tmp_path / "cut"))
    ours, theirs = (
        utils.read_csv(tmp_path / name / "IMAGENET-64" / "v1" / "log.csv")
        for name in ("whole", "cut")
    )
    assert all(
        ours[column] == theirs[column]
        for column in ("step", "epoch", "loss", "contrast_top1", "lr")
    )


def test_an_earlier_run_is_never_overwritten_unasked(folders: Path, tmp_path: Path):
    assert pretrain(folders, tmp_path, "--max_epoch=1").returncode == 0
    before = (tmp_path / "IMAGENET-64/v1/log.csv").read_bytes()
    again = pretrain(folders, tmp_path, "--max_epoch=1")
    assert_one_line_error(again, "--resume", "--overwrite")
    assert (tmp_path / "IMAGENET-64/v1/log.csv").read_bytes() == before
    changed = pretrain(
        folders, tmp_path, "--max_epoch=2", "--resume", "--lr=0.5", "--temperature=0.1"
    )
    assert_one_line_error(changed, "lr 0.03 -> 0.5", "temperature 0.07 -> 0.1")
    assert pretrain(folders, tmp_path, "--max_epoch=2", "--resume").returncode == 0
    assert state(tmp_path)["epoch"] == 2
    assert pretrain(folders, tmp_path, "--max_epoch=1", "--overwrite").returncode == 0
    assert state(tmp_path)["epoch"] == 1


def test_resume_without_a_sound_last_checkpoint(folders: Path, tmp_path: Path):
    """It goes on from the newest sound epoch, and says so; with none it stops, and overwrites nothing."""
    flags = ["--max_epoch=3", "--save_weight_epoch=1", "--shuffle_bn"]
    assert pretrain(folders, tmp_path, *flags).returncode == 0
    home = tmp_path / "IMAGENET-64" / "v1"
    whole, last = state(tmp_path), home / "checkpoints" / "last.pth.tar"
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
    ):
        damage(last)
        (home / "checkpoints" / "epoch_0003.pth.tar").unlink(missing_ok=True)
        done = pretrain(folders, tmp_path, *flags, "--resume")
        assert (
            done.returncode == 0
            and "going on from epoch_0002" in done.stderr
            and "resumed after step 10" in done.stdout
        ), done.stderr
        assert_same_run(whole, state(tmp_path))
        assert utils.read_csv(home / "log.csv")["step"] == [2, 4, 6, 8, 10, 12, 14, 15]
    for path in (home / "checkpoints").iterdir():
        path.write_bytes(b"no checkpoint")
    done, before = pretrain(folders, tmp_path, *flags, "--resume"), (home / "log.csv").read_bytes()
    assert_last_line_is_error(done, "none of the 4 checkpoints")
    assert (home / "log.csv").read_bytes() == before


def test_resume_past_the_end_or_with_a_damaged_log_is_one_line(folders: Path, tmp_path: Path):
    assert pretrain(folders, tmp_path, "--max_epoch=2").returncode == 0
    assert_one_line_error(
        pretrain(folders, tmp_path, "--max_epoch=1", "--resume"), "--max_epoch 1", "step 10"
    )
    log = tmp_path / "IMAGENET-64/v1/log.csv"
    log.write_text("hello\nworld\n")
    assert_last_line_is_error(
        pretrain(folders, tmp_path, "--max_epoch=3", "--resume"), "log.csv' is damaged"
    )
    for loss in (log.unlink, lambda: log.write_text("")):
        loss()
        done = pretrain(folders, tmp_path, "--max_epoch=3", "--resume", "--exp_version=v1")
        assert done.returncode == 0 and "its rows up to step 10 are lost" in done.stderr, (
            done.stderr
        )
        assert utils.read_csv(log)["step"] == [12, 14, 15]
        (log.with_name("checkpoints") / "last.pth.tar").unlink()
        (log.with_name("checkpoints") / "epoch_0003.pth.tar").unlink()


@pytest.mark.parametrize(
    "torn",
    [
        "12,2,4.1,5.0,0.03,",
        "12,2,4.1,5.0,0.03,31,1,1",
        "12,2,4.1,5.0,0.03,31\0\0\0",
        "\0\0\0\0",
        "12",
    ],
)
def test_a_torn_row_of_the_log_goes(folders: Path, tmp_path: Path, torn: str):
    """Also one that is cut in its last number, which would be another number; and a log from before a column was new."""
    assert pretrain(folders, tmp_path, "--max_epoch=2").returncode == 0
    log = tmp_path / "IMAGENET-64/v1/log.csv"
    lines = [",".join(line.split(",")[:6]) for line in log.read_text().splitlines()]
    log.write_text("\n".join(lines) + "\n" + torn)
    assert pretrain(folders, tmp_path, "--max_epoch=3", "--resume").returncode == 0
    rows = utils.read_csv(log)
    assert (
        rows["step"] == [2, 4, 6, 8, 10, 12, 14, 15]
        and math.isnan(rows["peak_memory_mb"][0])
        and rows["peak_memory_mb"][-1] > 0
    )


def test_overwrite_takes_links_for_what_they_are(folders: Path, tmp_path: Path):
    assert pretrain(folders, tmp_path / "out", "--max_epoch=1").returncode == 0
    run_of = tmp_path / "out" / "IMAGENET-64" / "v1"
    for name in ("checkpoints", "eval"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    shutil.rmtree(run_of / "checkpoints")
    for name in ("checkpoints", "eval"):
        (run_of / name).symlink_to(tmp_path / name)
    assert pretrain(folders, tmp_path / "out", "--max_epoch=1", "--overwrite").returncode == 0
    assert (
        (tmp_path / "checkpoints" / "mine").exists()
        and (tmp_path / "eval" / "mine").exists()
        and not (run_of / "eval").exists()
    )


def test_a_list_of_unreadable_files_that_cannot_be_read_is_one_line(folders: Path, tmp_path: Path):
    assert pretrain(folders, tmp_path, "--max_epoch=1").returncode == 0
    (tmp_path / "IMAGENET-64/v1/unreadable.txt").mkdir()
    assert_last_line_is_error(
        pretrain(folders, tmp_path, "--max_epoch=2", "--resume"), "unreadable.txt' cannot be read"
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("meter"),
        lambda c: c.update(step="5"),
        lambda c: c.update(config=[1]),
        lambda c: c["state_dict"].popitem(),
        lambda c: c.update(format="x"),
        lambda c: c["optimizer"].clear(),
    ],
)
def test_a_checkpoint_with_missing_or_wrong_parts_is_refused(folders: Path, tmp_path: Path, damage):
    assert pretrain(folders, tmp_path, "--max_epoch=1").returncode == 0
    folder = tmp_path / "IMAGENET-64/v1/checkpoints"
    content = state(tmp_path)
    damage(content)
    for path in folder.iterdir():
        torch.save(content, path)
    assert_last_line_is_error(
        pretrain(folders, tmp_path, "--max_epoch=2", "--resume"), "checkpoint"
    )


def test_a_run_that_failed_at_its_start_leaves_no_earlier_run(folders: Path, tmp_path: Path):
    write_folders(tmp_path / "bad", classes=2, train=40, test=2, size=16)
    for image in (tmp_path / "bad" / "train").rglob("*.png"):
        image.write_bytes(b"no image")
    assert_last_line_is_error(pretrain(tmp_path / "bad", tmp_path / "out"), "cannot be read")
    assert pretrain(folders, tmp_path / "out", "--max_epoch=1").returncode == 0


def test_resume_in_an_empty_folder_starts_afresh_and_says_so(folders: Path, tmp_path: Path):
    done = pretrain(folders, tmp_path, "--max_epoch=1", "--resume")
    assert done.returncode == 0 and "a fresh start" in done.stdout


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
        names = [
            n for n, _ in torch.nn.Module.named_parameters(train.MoCo("resnet18", 8, 48).encoder_k)
        ]
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
    cfg = utils.load_config("train", ["--cosine"] if cosine else [])
    for epoch, factor in moments.items():
        assert train.learning_rate(cfg, epoch) == pytest.approx(0.03 * factor, abs=1e-12)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--dataset_root=/nowhere"], ["/nowhere"]),
        (["--num_keys=1000"], ["--num_keys 1000", "80"]),
        (["--batch_size=100", "--num_keys=8"], ["--batch_size 100"]),
        (["--batch_size=16", "--bn_groups=9"], ["batch_size 16", "--bn_groups 4 or 8"]),
        (["--momentum=1.5"], ["--momentum 1.5"]),
        (["--preset=M7"], ["M7", "M3"]),
        (["--arch=vgg11"], ["vgg11", "resnet50"]),
        (["--device=cuda"], ["cuda", "--device cpu"]),
        (["--device=tpu9"], ["tpu9"]),
        (["--resize=12"], ["12", "16"]),
        (["--crop_scale", "0.9", "0.2"], ["crop_scale"]),
        (["--mean", "0.5"], ["--mean"]),
        (["--device=meta"], ["meta", "cuda:N"]),
        (["--shuffle_bn=true"], ["--no-shuffle_bn"]),
        (["--shuffle_bn", "yes"], ["'yes'", "--no-shuffle_bn"]),
        (["--lr=2024-13-45"], ["2024-13-45"]),
        (["--seed=" + 400 * "9"], ["--seed"]),
        (["--resize=100000"], ["4096"]),
        (["--exp_version=../x"], ["'../x'"]),
        (["--exp_version=" + 300 * "x"], ["short"]),
        (["--resume", "--overwrite"], ["exclude each other"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    folders: Path, tmp_path: Path, flags: list[str], parts: list[str]
):
    done = pretrain(folders, tmp_path / "out", *flags)
    assert_one_line_error(done, *parts)
    assert not (tmp_path / "out").exists()


def test_missing_dataset_root_is_one_line(tmp_path: Path):
    assert_one_line_error(run("train", f"--output_root={tmp_path}"), "--dataset_root", "shapes")


@pytest.mark.parametrize(
    "content, parts", [("empty", ["no"]), ("flat", ["folder"]), ("text", ["no"])]
)
def test_folders_without_a_data_set(tmp_path: Path, content: str, parts: list[str]):
    root = tmp_path / "data"
    write_folders(tmp_path / "real", classes=1, train=3, test=1, size=8)
    root.mkdir()
    if content == "flat":
        for image in (tmp_path / "real").rglob("*.png"):
            image.rename(root / image.name)
    if content == "text":
        (root / "notes.txt").write_text("no images here")
    assert_one_line_error(pretrain(root, tmp_path / "out"), str(root), *parts)


def test_no_write_permission_is_one_line(folders: Path, tmp_path: Path):
    (tmp_path / "file").write_text("a file where a folder should be")
    assert_one_line_error(pretrain(folders, tmp_path / "file"), "cannot be written")


def test_a_broken_image_is_reported_once_and_too_many_stop_the_run(tmp_path: Path):
    write_folders(tmp_path / "data", classes=2, train=64, test=2, size=16)
    images = sorted((tmp_path / "data" / "train").rglob("*.png"))
    images[5].write_bytes(images[5].read_bytes()[:40])
    one = pretrain(tmp_path / "data", tmp_path / "one", "--max_epoch=2")
    assert one.returncode == 0 and one.stderr.count(str(images[5])) == 1
    for image in images[10:14]:
        image.write_bytes(b"not an image")
    assert_last_line_is_error(
        pretrain(tmp_path / "data", tmp_path / "many", "--max_epoch=2"), "of 128 images"
    )


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(folders: Path, tmp_path: Path):
    done = pretrain(folders, tmp_path, "--max_epoch=20", "--lr=1e38")
    assert_last_line_is_error(done, "not finite")
    assert not os.listdir(tmp_path / "IMAGENET-64/v1/checkpoints")


# ---------------------------------------------------------------------------------------------------------------- options of the method


def test_a_symmetric_step_is_both_directions_and_one_update(folders: Path, tmp_path: Path):
    """The losses of five steps against the definition written out: CE of q1 k2 and of q2 k1, the queue as it was, one momentum update, keys enqueued once."""
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
    cfg = utils.load_config(
        "train", [f"--dataset_root={folders}", f"--output_root={tmp_path}/x", *TINY, *flags]
    )
    launch = train.parallel.OneDevice()
    dataset, recipe, _ = train.set_up(cfg, launch, None)
    torch.manual_seed(utils.generator(0, "weights").initial_seed())
    moco = train.MoCo("resnet18", 8, 48, 0.9, 0.07, bn_groups=2).double().train()
    launch.attach(moco, 16, 2)
    optimizer = torch.optim.SGD(
        moco.encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4
    )
    queue, unit = moco.queue.clone(), lambda x: torch.nn.functional.normalize(x, dim=1)
    for step, rows in enumerate(train.dataloader.epoch_batches(len(dataset), 16, 0, 0), start=1):
        one, two = train.two_views(dataset.fetch(rows), recipe, cfg, step, launch)
        losses, keys = [], []
        with torch.no_grad():
            for k, q in zip(moco.encoder_k.parameters(), moco.encoder_q.parameters()):
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


def test_small_data_sets_are_advised(folders: Path, tmp_path: Path):
    done = pretrain(folders, tmp_path, "--max_epoch=1", "--num_keys=48", "--momentum=0.999")
    assert "--num_keys 48 is 60 % of the 80 images" in done.stderr and "try 8" in done.stderr
    assert (
        "with --momentum 0.999 the key encoder moves by 0.001 of the way to the query encoder in a step, and there are 5 steps: give it more epochs"
        in done.stderr
    )
    for epochs, momentum, advice in (
        (10, 0.99, "try 0.9, or more epochs"),
        (10, 0.9, None),
        (9, 0.9, "give it more epochs"),
        (100, 1.0, "try 0.99, or more epochs"),
    ):
        cfg = utils.load_config(
            "train",
            [f"--max_epoch={epochs}", f"--momentum={momentum}", "--num_keys=16", "--batch_size=16"],
        )
        with contextlib.redirect_stderr(io.StringIO()) as said:
            train.advise(cfg, 80)
        assert said.getvalue().strip().endswith(advice) if advice else not said.getvalue(), (
            epochs,
            momentum,
            said.getvalue(),
        )
    assert (
        pretrain(
            folders, tmp_path, "--max_epoch=2", "--num_keys=16", "--momentum=0.5", "--overwrite"
        ).stderr
        == ""
    )


def test_a_run_of_an_older_version_is_resumed(folders: Path, tmp_path: Path):
    """Its checkpoint knows neither the newer settings nor the third sum of the meter; its log has fewer columns."""
    assert pretrain(folders, tmp_path, "--max_epoch=2").returncode == 0
    whole = state(tmp_path)
    assert pretrain(folders, tmp_path / "old", "--max_epoch=1").returncode == 0
    folder = tmp_path / "old" / "IMAGENET-64" / "v1"
    content = utils.load_checkpoint(folder / "checkpoints" / "last.pth.tar")
    content["config"] = {
        name: value
        for name, value in content["config"].items()
        if name not in ("small_stem", "symmetric", "knn_every", "knn_root", "knn_images")
    }
    content["meter"]["sums"] = content["meter"]["sums"][:2]
    utils.save_checkpoint(folder / "checkpoints" / "last.pth.tar", content)
    log = utils.read_csv(folder / "log.csv")
    utils.write_csv(
        folder / "log.csv",
        train.LOG_COLUMNS[:6],
        zip(*[log[name] for name in train.LOG_COLUMNS[:6]]),
    )
    done = pretrain(folders, tmp_path / "old", "--max_epoch=2", "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, state(tmp_path / "old"))
    assert math.isnan(utils.read_csv(folder / "log.csv")["alignment"][0])


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
