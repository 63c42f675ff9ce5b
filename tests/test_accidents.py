"""What a hostile tester found, each in a line of its own: nothing is lost, misread or hangs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import open_square, smooth, write_class, write_folders
from scripts import assert_one_line_error, run
from survival import ROOT, flags, home, last, write_data
from training import pretrain

import config
import encoders
from data import decoding, store
from run.log import Log


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, and in out/ a run of one epoch."""
    place = tmp_path_factory.mktemp("accidents")
    write_data(place / "data")
    assert pretrain(place / "data", place / "out", "--max_epoch=1").returncode == 0
    return place


def test_overwrite_deletes_nothing_before_all_is_checked(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    mine = last(tmp_path / "out")
    (tmp_path / "file").write_text("no store")
    for more, words in (
        (f"--init={mine}", "is of the run that --overwrite deletes"),
        (f"--pack={tmp_path / 'file'}", "holds no packed store"),
    ):
        done = pretrain(made / "data", tmp_path / "out", "--max_epoch=1", "--overwrite", more)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr
        assert mine.read_bytes() == last(made / "out").read_bytes()


@pytest.mark.parametrize("out", ["{}/feats/", "{}/.", "{}/.npy"])
def test_out_must_name_a_file(made: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "feats.npy").write_text("precious")
    flags = [last(made / "out"), out.format(tmp_path), "--device=cpu"]
    for how in (f"--features={made / 'data'}", "--format=torchvision"):
        assert_one_line_error(run("export", *flags, how), "names no file")
    assert (tmp_path / "feats.npy").read_text() == "precious"


@pytest.mark.parametrize("how", ["deleted", "emptied", "cut in a line"])
def test_a_log_that_loses_lines_keeps_its_header(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "log.csv"
    log = Log(path, ["step", "loss"], 0)
    for step in (1, 2, 3):
        log.add({"step": step, "loss": 0.5})
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "emptied" else path.read_bytes()[:-3])
    log.add({"step": 4, "loss": 0.25})
    kept = "1,0.5\n2,0.5\n" if how == "cut in a line" else ""
    assert path.read_text() == f"step,loss\n{kept}4,0.25\n"
    assert "was deleted or cut short" in capsys.readouterr().err


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_set_no_range(tmp_path: Path, odd: float) -> None:
    values = np.linspace(0, 1, 24 * 24 * 3, dtype=np.float32).reshape(24, 24, 3)
    for i in range(5):
        np.save(tmp_path / f"{i}.npy", np.full_like(values, odd) if i == 0 else values)
    images = open_square(tmp_path)
    assert images.size.pixels.value_range == (0, 1)
    fetched = images.fetch(torch.arange(5)).images
    assert fetched[1].max() > 250 and fetched[1].min() < 5
    assert (fetched[0] == (255 if odd == np.inf else 0)).all()


def test_masks_are_black_and_white_and_complex_numbers_no_image(tmp_path: Path) -> None:
    mask = np.arange(24 * 24).reshape(24, 24) % 2 == 0
    np.save(tmp_path / "mask.npy", mask)
    with decoding.open_image(str(tmp_path / "mask.npy"), 3) as (bands, _):
        assert np.array_equal(bands[..., 0], 255 * mask)
    np.save(tmp_path / "complex.npy", mask * 1j)
    with (
        pytest.raises(ValueError, match="complex"),
        decoding.open_image(str(tmp_path / "complex.npy"), 3),
    ):
        pass


@pytest.mark.parametrize("low", [-1e-5, -2.5e20, -0.5, -3])
def test_a_small_negative_number_is_a_value(low: float) -> None:
    values = {"value_range": [low, 1.0]}
    settings = config.from_values(config.TrainSettings, values)
    assert settings.value_range == [low, 1.0]
    given = config.parse(config.TrainSettings, ["--value_range", str(low), "1"])
    assert given.value_range == [low, 1.0]


def test_images_beside_class_folders_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_folders(tmp_path, classes=2, train=2, test=1)
    smooth(20, 20).save(tmp_path / "train" / "loose.png")
    (tmp_path / "train" / "._loose.png").write_bytes(b"of a Mac")
    (tmp_path / "train" / "class0" / "folder.png").mkdir()
    assert len(open_square(tmp_path)) == 4
    assert "images beside its class folders, which are left out: 1\n" in capsys.readouterr().err


def test_a_folder_called_shapes_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_class(tmp_path, ("a.png", smooth(20, 20)))
    (tmp_path / "one").rename(tmp_path / "shapes")
    assert open_square("shapes").name == "shapes"
    assert "the folder here is ./shapes" in capsys.readouterr().err
    assert len(open_square("./shapes")) == 1


@pytest.mark.parametrize("fault", ["nan", "int32"])
def test_weights_that_are_none_are_refused(made: Path, tmp_path: Path, fault: str) -> None:
    weights = encoders.load(last(made / "out")).encoder.state_dict()
    odd = weights["layer1.0.conv1.weight"]
    weights["layer1.0.conv1.weight"] = odd * torch.nan if fault == "nan" else odd.int()
    torch.save(weights, tmp_path / "odd.pth")
    done = pretrain(made / "data", tmp_path / "out", f"--init={tmp_path / 'odd.pth'}")
    assert_one_line_error(done, "odd.pth", "layer1.0.conv1.weight")


def test_a_pipe_in_place_of_a_checkpoint(made: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for done in (
        run("export", tmp_path / "pipe", tmp_path / "x", "--format=timm"),
        pretrain(made / "data", tmp_path / "out", f"--init={tmp_path / 'pipe'}"),
    ):
        assert_one_line_error(done, "is a pipe or a device")


def test_a_store_is_of_the_same_images_from_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(tmp_path, classes=2, train=2, test=1)
    monkeypatch.chdir(tmp_path / "train")
    sums = {
        store.checksum(open_square(root), str(root))
        for root in (".", "./", "../train", tmp_path / "train")
    }
    assert len(sums) == 1


@pytest.mark.parametrize(
    "script, flag",
    [
        ("train", "--max_epoch=1e18"),
        ("train", "--feature_dim=1e12"),
        ("train", "--channels=1e9"),
        ("test", "--eval_batch_size=1e30"),
        ("test", "--load_pretrained_epoch=1e300"),
        ("visualize", "--seeds=1e300"),
    ],
)
def test_numbers_have_bounds(script: str, flag: str) -> None:
    name, _, value = flag.partition("=")
    assert_one_line_error(run(script, flag), name, value, "must be")


@pytest.mark.parametrize("rank", ["0", "abc", ""])
def test_a_rank_without_torchrun(made: Path, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = pretrain(made / "data", made / "new")
    assert done.returncode == 2 and "use torchrun, or unset them" in done.stderr, done


def test_a_group_count_that_fits_is_found_at_once() -> None:
    done = run("train", "--dataset_root=shapes", "--batch_size=10_000_000", "--bn_groups=4001")
    assert_one_line_error(done, "--bn_groups 4000 or 4002")


def process(command: list[str], before: str = "", after: str = "") -> subprocess.CompletedProcess:
    line = f"{before} exec {sys.executable} {' '.join(command)} {after}"
    return subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams(made: Path, tmp_path: Path, closed: str) -> None:
    command = ["train.py", *flags(made / "data", tmp_path, "--max_epoch=1")]
    done = process(command, after=closed)
    assert done.returncode == 0 and last(tmp_path).exists(), done


def test_no_more_files_for_workers(made: Path, tmp_path: Path) -> None:
    command = ["train.py", *flags(made / "data", tmp_path, "--max_epoch=1", "--num_workers=32")]
    done = process(command, before="ulimit -n 64;")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "use fewer than --num_workers 32" in done.stderr.splitlines()[-1], done.stderr
    assert not (home(tmp_path) / "checkpoints" / "last.pth.tar").exists()


def test_out_of_memory_on_a_cpu_is_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(encoders, "load", fail)
    done = run("export", last(made / "out"), made / "y", "--format=timm")
    assert_one_line_error(done, "this machine is out of memory", "smaller --batch_size")
