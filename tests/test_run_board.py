"""TensorBoard's files, as its own reader sees them."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from miniature import write_folders
from scripts import assert_one_line_error
from training import pretrain

import utils
from run.board import Board

FLAGS = ["--num_keys=8", "--momentum=0.5", "--tensorboard"]


def read_events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes x 16 images: 3 steps of 16 an epoch."""
    root = tmp_path_factory.mktemp("data")
    write_folders(root, classes=3, train=16, test=6, size=20)
    return root


def test_what_a_resumed_run_wrote_after_its_checkpoint_goes(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    for step in (2, 4, 6):
        board.scalars({"step": step, "loss": step / 2, "knn_top1": math.nan})
    board.figure("views", Figure(), 2)
    board.features(torch.eye(3), ["a", "b", "c"], 2)
    board.close()
    resumed = Board(tmp_path, 4)
    resumed.scalars({"step": 5, "loss": 9.0, "knn_top1": 50.0})
    resumed.close()
    events = read_events(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 1), (4, 2), (5, 9)]
    assert [(e.step, e.value) for e in events.Scalars("knn_top1")] == [(5, 50)]
    assert set(events.Tags()["scalars"]) == {"loss", "knn_top1"}
    assert [e.step for e in events.Images("views")] == [2]
    (features,) = tmp_path.rglob("tensors.tsv")
    assert features.read_text().splitlines()[0].split() == ["1.0", "0.0", "0.0"]
    assert "features" in (tmp_path / "tensorboard/projector_config.pbtxt").read_text()


def test_a_disk_that_fills_up_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    board = Board(tmp_path, 0)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    for step in (1, 2):
        board.scalars({"step": step, "loss": 1.0})
    said = capsys.readouterr().err
    assert said.count("TensorBoard's files cannot be written (No space left on device)") == 1
    monkeypatch.undo()
    board.figure("views", Figure(), 3)
    assert not read_events(tmp_path).Tags()["images"]


def test_tensorboard_gets_scalars_views_neighbours_and_features(data: Path, tmp_path: Path) -> None:
    done = pretrain(data, tmp_path, *FLAGS, "--max_epoch=2", "--knn_every=1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "IMAGENET-64" / "v1"
    events, log = read_events(folder), utils.read_csv(folder / "log.csv")
    for name in ("loss", "effective_rank"):
        assert [0, *(event.step for event in events.Scalars(name))] == log["step"]
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx(log[name][1:], rel=1e-4)  # the first is of the untrained
    assert [event.step for event in events.Scalars("knn_top1")] == [0, 3, 6]
    assert [event.step for event in events.Images("views")] == [2, 3, 6]
    assert set(events.Tags()["images"]) == {"views", "neighbours"}
    assert list((folder / "tensorboard").rglob("tensors.tsv"))


def test_tensorboard_that_cannot_be_written_is_said_and_the_run_goes_on(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "IMAGENET-64" / "v1"
    folder.mkdir(parents=True)
    (folder / "tensorboard").write_text("a file")
    done = pretrain(data, tmp_path, *FLAGS, "--max_epoch=1")
    assert done.returncode == 0
    assert done.stderr.count("TensorBoard's files cannot be written") == 1, done.stderr


def test_without_tensorboard_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, *more: object) -> object:
        return None if name == "tensorboard" else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    done = pretrain(data, tmp_path / "x", *FLAGS)
    assert_one_line_error(done, "pip install tensorboard")
    assert not (tmp_path / "x").exists()
