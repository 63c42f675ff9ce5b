"""Checkpoints as files: written atomically, verified, found; and when they are saved."""

import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from run import checkpoints
from run.log import Log
from utils import UserError, duration


def test_a_checkpoint_that_finds_no_room_is_one_line_and_keeps_the_old_one(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk, whose error torch.save hides."""
    path = tmp_path / "last.pth.tar"
    checkpoints.save(path, {"state_dict": {}, "step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match="last.pth.tar' cannot be written: File too large"):
            checkpoints.save(path, {"state_dict": {"x": torch.zeros(1_000_000)}, "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints.load(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pth.tar"]


def test_path_of_lists_what_exists(tmp_path: Path) -> None:
    folder = tmp_path / "DATA" / "v1"
    for name in ("epoch_0020", "epoch_0040", "last"):
        checkpoints.save(folder / "checkpoints" / f"{name}.pth.tar", {"state_dict": {}})
    assert checkpoints.path_of(folder, 40).name == "epoch_0040.pth.tar"
    assert checkpoints.path_of(folder, None).name == "last.pth.tar"
    with pytest.raises(UserError, match="no checkpoint of epoch 30: it has epochs 20, 40"):
        checkpoints.path_of(folder, 30)
    with pytest.raises(UserError, match=r"no run .*v9.*: runs there: v1$"):
        checkpoints.path_of(folder.parent / "v9", None)
    with pytest.raises(UserError, match=r"no run .*: train one with train.py"):
        checkpoints.path_of(tmp_path / "OTHER" / "v1", None)
    (folder.parent / "v2").mkdir()
    with pytest.raises(UserError, match="v2' has no checkpoints yet"):
        checkpoints.path_of(folder.parent / "v2", None)


class _Code:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return print, ("this must not run",)


def test_checkpoints_that_cannot_be_trusted_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = tmp_path / "good"
    checkpoints.save(good, {"state_dict": {"a": torch.ones(1000)}, "epoch": 1})
    assert checkpoints.load(good)["epoch"] == 1
    torch.save({"state_dict": {}, "x": _Code()}, tmp_path / "code")
    old_format = {"_use_new_zipfile_serialization": False}
    torch.save({"state_dict": {}, "x": _Code()}, tmp_path / "old code", **old_format)
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-500])
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"state_dict": {}}))
    (tmp_path / "folder").mkdir()
    torch.save([1], tmp_path / "list")
    torch.save({"state_dict": {}, "format": 99}, tmp_path / "new")
    expected = {
        "code": "pickled code",
        "old code": "pickled code",
        "cut": "damaged",
        "text": "refused",
        "empty": "refused",
        "pickle": "refused",
        "folder": "Is a directory",
        "list": "no state_dict",
        "new": "newer version",
        "missing": "cannot be read: No such file",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as error:
            checkpoints.load(tmp_path / name)
        assert "\n" not in str(error.value)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bare_state_dict_is_taken_where_it_may_be(zipped: bool, tmp_path: Path) -> None:
    """In the format of before PyTorch 1.6, too."""
    path, weights = tmp_path / "resnet.pth", {"conv1.weight": torch.ones(3)}
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(
        checkpoints.load(path, bare=True)["state_dict"]["conv1.weight"], torch.ones(3)
    )
    with pytest.raises(UserError, match="no state_dict"):
        checkpoints.load(path)
    torch.save({**weights, "epoch": 3}, path)
    with pytest.raises(UserError, match="no state_dict"):
        checkpoints.load(path, bare=True)


def test_a_flipped_bit_anywhere_is_one_line_or_harmless(tmp_path: Path) -> None:
    """Whatever bit of a checkpoint flips: it is refused, or what it holds is what was saved."""
    good, bad, refused = tmp_path / "good", tmp_path / "bad", 0
    weights, plain = torch.arange(40.0), {"epoch": 1, "step": 2, "config": {"lr": 0.1}}
    checkpoints.save(good, {"state_dict": {"a": weights}, "arch": "resnet18", **plain})
    data = good.read_bytes()
    for position, byte in enumerate(data):
        flipped = bytes([byte ^ (1 << position % 8)])
        bad.write_bytes(data[:position] + flipped + data[position + 1 :])
        try:
            loaded = checkpoints.load(bad)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert torch.equal(loaded["state_dict"]["a"], weights)
        assert {name: loaded[name] for name in plain} == plain
    assert refused > len(data) / 4  # the rest is padding and what nobody reads


def test_the_last_one_is_found_and_epochs_are_sorted_by_number(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoints.load_last(tmp_path) == (None, folder / "last.pth.tar")
    for epoch in (9999, 10000, 2):
        content = {"state_dict": {}, "epoch": epoch}
        checkpoints.save(folder / f"epoch_{epoch:04d}.pth.tar", content)
    found, path = checkpoints.load_last(tmp_path)
    assert found["epoch"] == 10000 and path.name == "epoch_10000.pth.tar"
    assert "last.pth.tar' cannot be used: going on from epoch_10000" in capsys.readouterr().err
    path.write_bytes(b"damaged")
    assert checkpoints.load_last(tmp_path)[0]["epoch"] == 9999
    checkpoints.save(folder / "last.pth.tar", {"state_dict": {}, "epoch": 7})
    capsys.readouterr()
    assert checkpoints.load_last(tmp_path)[0]["epoch"] == 7 and not capsys.readouterr().err
    for path in folder.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="none of the 4 checkpoints"):
        checkpoints.load_last(tmp_path)


def test_the_last_one_is_a_second_name_of_the_epochs_file(tmp_path: Path) -> None:
    """And where there are no links, a copy; a later save changes the last one alone."""
    saver = checkpoints.Saver(tmp_path, Log(tmp_path / "log.csv", ["step"], 0), 10, step=None)
    epoch, last = (checkpoints._path(tmp_path, number) for number in (1, None))
    saver.save({"state_dict": {}, "step": 5, "epoch": 1}, epoch=1)
    assert epoch.samefile(last) and len(list(epoch.parent.iterdir())) == 2
    saver.save({"state_dict": {}, "step": 6, "epoch": 1})
    assert [checkpoints.load(path)["step"] for path in (epoch, last)] == [5, 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "link", lambda *_: os.link("/nowhere", tmp_path / "x"))
        saver.save({"state_dict": {}, "step": 10, "epoch": 1}, epoch=1)
    assert not epoch.samefile(last) and checkpoints.load(last)["step"] == 10


@pytest.mark.parametrize("keep, left", [(None, [0, 1, 2, 3, 10]), (2, [0, 3, 10]), (9, None)])
def test_of_the_epochs_the_newest_stay(
    tmp_path: Path, keep: int | None, left: list[int] | None
) -> None:
    """And epoch 0, of a run that started from weights, which an evaluation needs."""
    log = Log(tmp_path / "log.csv", ["step"], 0)
    saver = checkpoints.Saver(tmp_path, log, 10, step=None, keep=keep)
    for epoch in (0, 1, 2, 3, 10):
        saver.save({"state_dict": {}, "step": epoch, "epoch": epoch}, epoch=epoch)
    assert checkpoints._epochs(tmp_path) == (left or [0, 1, 2, 3, 10])
    assert checkpoints.load(checkpoints.path_of(tmp_path, None))["step"] == 10


class Disk:
    """Fails to take the next checkpoints, as often as it is told to; pauses last no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures, self.saved, self.pauses = 0, [], []
        monkeypatch.setattr(checkpoints, "save", self.save)
        monkeypatch.setattr(checkpoints.time, "sleep", self.pauses.append)

    def save(self, path: Path, content: dict) -> None:
        if self.failures:
            self.failures -= 1
            raise UserError(f"{path.name!r} cannot be written: full")
        self.saved.append((path.name, content["step"]))


def test_a_save_that_fails_waits_for_the_next_and_the_second_failure_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    disk = Disk(monkeypatch)
    log = Log(tmp_path / "log.csv", ["step"], 0)
    saver = checkpoints.Saver(tmp_path, log, every_minutes=10, step=None)
    disk.failures = 1
    saver.save({"step": 1})
    said = f"there is no checkpoint yet, and the next try comes in {duration(600)}"
    assert said in capsys.readouterr().err
    saver.save({"step": 2}, epoch=1)
    assert disk.saved == [("epoch_0001.pth.tar", 2), ("last.pth.tar", 2)] and not disk.pauses
    for how in ({"epoch": 2}, {"last_chance": True}):  # cannot wait
        disk.failures = 1
        saver.save({"step": 3}, **how)
        assert disk.saved[-1] == ("last.pth.tar", 3) and disk.pauses.pop() == checkpoints.RETRY_S
        assert f"next try comes in {duration(10)}" in capsys.readouterr().err
    disk.failures = 2
    saver.save({"step": 4})
    assert "the last good checkpoint is of step 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="twice in a row; the last good checkpoint is of step 3"):
        saver.save({"step": 5})


def test_no_checkpoint_is_saved_before_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    log = Log(tmp_path / "log.csv", ["step"], 0)
    saver = checkpoints.Saver(tmp_path, log, every_minutes=10, step=None)
    (tmp_path / "log.csv").unlink()
    (tmp_path / "log.csv").mkdir()
    log.add({"step": 1})
    saver.save({"step": 1})
    assert not disk.saved and saver.failed
    (tmp_path / "log.csv").rmdir()
    saver.save({"step": 2})
    assert disk.saved and (tmp_path / "log.csv").read_text().endswith("1\n")
