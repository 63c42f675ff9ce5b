"""A run that was stopped, damaged or changed, and goes on."""

import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from miniature import write_folders
from scripts import assert_last_line_is_error, assert_one_line_error, run
from training import TINY, assert_same_run, pretrain, state

import utils
from run import checkpoints
from run.log import COLUMNS

ROOT = Path(utils.__file__).parent


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
    """It goes on from the newest sound epoch, and says so; with none it stops."""
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


def test_a_cosine_is_not_stretched_but_goes_on_by_a_command(folders: Path, tmp_path: Path):
    """The command works as printed, and starts from the weights where the first run ended."""
    assert pretrain(folders, tmp_path, "--cosine", "--max_epoch=1").returncode == 0
    done = pretrain(folders, tmp_path, "--cosine", "--max_epoch=3", "--resume")
    assert_one_line_error(done, "made for 1 epochs", "--exp_version=v1-longer", "--max_epoch=2")
    command = shlex.split(done.stderr.split("is: ")[1])
    assert command[:2] == ["python", "train.py"]
    assert run("train", *command[2:]).returncode == 0
    last, first = (
        checkpoints.load(tmp_path / "IMAGENET-64" / name)["state_dict"]
        for name in ("v1/checkpoints/last.pth.tar", "v1-longer/checkpoints/epoch_0000.pth.tar")
    )
    assert all(torch.equal(last[name], first[name]) for name in last if "encoder_q" in name)
    assert len(utils.read_csv(tmp_path / "IMAGENET-64/v1-longer/log.csv")["step"]) > 1


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
    """Also one that is cut in its last number; and a log from before a column was new."""
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


def test_a_run_of_an_older_version_is_resumed(folders: Path, tmp_path: Path):
    """Its checkpoint lacks newer settings and the meter's third sum; its log has fewer columns."""
    assert pretrain(folders, tmp_path, "--max_epoch=2").returncode == 0
    whole = state(tmp_path)
    assert pretrain(folders, tmp_path / "old", "--max_epoch=1").returncode == 0
    folder = tmp_path / "old" / "IMAGENET-64" / "v1"
    content = checkpoints.load(folder / "checkpoints" / "last.pth.tar")
    content["config"] = {
        name: value
        for name, value in content["config"].items()
        if name not in ("small_stem", "symmetric", "knn_every", "knn_root", "knn_images")
    }
    content["meter"]["sums"] = content["meter"]["sums"][:2]
    checkpoints.save(folder / "checkpoints" / "last.pth.tar", content)
    log = utils.read_csv(folder / "log.csv")
    utils.write_csv(
        folder / "log.csv",
        COLUMNS[:6],
        zip(*[log[name] for name in COLUMNS[:6]], strict=True),
    )
    done = pretrain(folders, tmp_path / "old", "--max_epoch=2", "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, state(tmp_path / "old"))
    assert math.isnan(utils.read_csv(folder / "log.csv")["alignment"][0])
