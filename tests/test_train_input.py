"""What users give to train.py by mistake: one line, and nothing is left behind."""

import contextlib
import io
import os
from pathlib import Path

import pytest
from miniature import write_folders
from scripts import assert_last_line_is_error, assert_one_line_error, run
from training import pretrain

import config
import utils
from config import TrainSettings
from run import setup

ROOT = Path(utils.__file__).parent


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--dataset_root=/nowhere"], ["/nowhere"]),
        (["--num_keys=1000"], ["--num_keys 1000", "80"]),
        (["--batch_size=100", "--num_keys=8"], ["--batch_size 100"]),
        (["--batch_size=16", "--bn_groups=9"], ["batch_size 16", "--bn_groups 4 or 8"]),
        (["--momentum=1.5"], ["--momentum: '1.5'"]),
        (["--preset=M7"], ["M7", "M3"]),
        (["--arch=vgg11"], ["vgg11", "resnet50"]),
        (["--device=cuda:99"], ["'cuda:99'", "use another, or cpu"]),
        (["--device=tpu9"], ["tpu9"]),
        (["--resize=12"], ["12", "16"]),
        (["--crop_scale", "0.9", "0.2"], ["crop_scale"]),
        (["--mean", "0.5"], ["--mean"]),
        (["--device=meta"], ["meta", "cuda:N"]),
        (["--shuffle_bn=true"], ["--no-shuffle_bn"]),
        (["--shuffle_bn", "yes"], ["'yes'"]),
        (["--lr=2024-13-45"], ["2024-13-45"]),
        (["--seed=" + 400 * "9"], ["--seed"]),
        (["--resize=100000"], ["4096"]),
        (["--exp_version=../x"], ["'../x'"]),
        (["--exp_version=" + 300 * "x"], ["short"]),
        (["--exp_version=a\nb"], ["'a\\nb'", "plain letters"]),
        (["--exp_version=\udcff"], ["plain letters"]),  # a byte that is no UTF-8
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


@pytest.mark.parametrize("content, parts", [("empty", ["no"]), ("text", ["no"])])
def test_folders_without_a_data_set(tmp_path: Path, content: str, parts: list[str]):
    root = tmp_path / "data"
    root.mkdir()
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


def test_a_schedule_that_never_begins_is_warned_of():
    def advice(*flags: str) -> str:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            setup.advise(
                config.parse(TrainSettings, ["--num_keys=16", "--max_epoch=50", *flags]), 10**6
            )
        return said.getvalue()

    assert "--schedule 120 160 begins after --max_epoch 50" in advice()
    assert "try --schedule 30 40, or --cosine" in advice()
    assert (
        not advice("--cosine") and not advice("--schedule", "30", "90") and not advice("--schedule")
    )


@pytest.mark.parametrize("images", [4, 80, 2000, 1_281_167])
def test_the_queue_that_is_advised_passes_the_warning(images: int):
    assert 1 <= setup.fitting_keys(images) <= images / 4 < 2 * setup.fitting_keys(images)


def test_small_data_sets_are_advised(folders: Path, tmp_path: Path):
    done = pretrain(folders, tmp_path, "--max_epoch=1", "--num_keys=48", "--momentum=0.999")
    assert "--num_keys 48 is 60 % of the 80 images" in done.stderr and "try 16" in done.stderr
    assert (
        "with --momentum 0.999 the key encoder moves by 0.001 of the way to the query "
        "encoder in a step, and there are 5 steps: give it --max_epoch 1000, or a" in done.stderr
    )
    assert "learning rate never falls: try --schedule 1 1, or --cosine" in done.stderr
    for epochs, momentum, advice in (
        (10, 0.99, "give it --max_epoch 100, or a lower momentum (which may collapse)"),
        (100, 0.99, None),  # what was advised
        (10, 0.9, None),
        (9, 0.9, "give it --max_epoch 10, or a lower momentum (which may collapse)"),
        (100, 1.0, "use --momentum 0.999"),
    ):
        cfg = config.parse(
            TrainSettings,
            [
                f"--max_epoch={epochs}",
                f"--momentum={momentum}",
                "--num_keys=16",
                "--batch_size=16",
                "--cosine",
            ],
        )
        with contextlib.redirect_stderr(io.StringIO()) as said:
            setup.advise(cfg, 80)
        assert said.getvalue().strip().endswith(advice) if advice else not said.getvalue(), (
            epochs,
            momentum,
            said.getvalue(),
        )
    assert (
        pretrain(
            folders,
            tmp_path,
            "--max_epoch=2",
            "--num_keys=16",
            "--momentum=0.5",
            "--cosine",
            "--overwrite",
        ).stderr
        == ""
    )
