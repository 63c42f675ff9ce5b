"""The interface to data: what a folder holds, sizes, unreadable images, order, and loading."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from miniature import (
    damage,
    open_square,
    write_fashion_mnist,
    write_folders,
    write_plain,
    write_stl10,
)

import dataloader
from data import workers
from data.base import Dataset, Size
from data.folders import FolderImages
from dataloader import Failures, detect, epoch_batches, epoch_order, fetch_ahead, iterate
from utils import UserError

# -------------------------------------------------------------------- what a folder holds


def test_detect(tmp_path: Path) -> None:
    write_folders(tmp_path / "both", classes=2, train=1, test=1)
    write_stl10(tmp_path / "stl", 1, 1, 1)
    write_fashion_mnist(tmp_path / "plain", 10, 10, gz=False)
    write_fashion_mnist(tmp_path / "gz", 10, 10)
    kinds = {
        "both": "folders",
        "both/train": "folders",
        "stl": "stl10",
        "stl/stl10_binary": "stl10",
        "plain": "fashion_mnist",
        "gz": "fashion_mnist",
    }
    assert {name: detect(str(tmp_path / name)) for name in kinds} == kinds
    assert detect("shapes") == "shapes"


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ["is not a folder", "shapes", "--download", "train/"]),
        ([], ["no data set", ".jpg"]),
        (["one/notes.txt"], ["no data set"]),
        (["file"], ["no data set"]),
    ],
)
def test_a_folder_without_data(tmp_path: Path, content: list[str] | None, parts: list[str]) -> None:
    root = tmp_path / "data"
    if content is not None:
        root.mkdir()
        for name in content:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        open_square(root)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in [str(root), *parts])


def test_a_file_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a folder"):
        open_square(tmp_path / "a.png")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        open_square(tmp_path)


@pytest.mark.parametrize(
    "resize, crop, native, fit, expected",
    [
        ("auto", 64, None, "square", 128),
        ("auto", 64, 96, "square", 96),
        ("auto", 32, 28, "square", 28),
        ("auto", 32, 40, "square", 40),
        ("auto", 16, 96, "square", 32),
        ("auto", 224, None, "center", 256),
        ("auto", 64, None, "center", 73),
        ("auto", 64, 96, "center", 73),
        ("auto", 32, 28, "center", 32),
        ("auto", 96, 96, "center", 96),
        ("auto", 88, 96, "center", 96),
        (100, 64, None, "square", 100),
        (64, 64, None, "square", 64),
        (200, 64, 96, "square", 200),
        (28, 32, 28, "square", 28),
        (28, 32, 28, "center", 32),
    ],
)
def test_sizes(resize: int | str, crop: int, native: int | None, fit: str, expected: int) -> None:
    assert Size(fit, resize, crop).resolve(native) == expected


@pytest.mark.parametrize(
    "resize, crop, native, fit",
    [
        (63, 64, None, "square"),
        (63, 64, None, "center"),
        (40, 64, 96, "square"),
        (20, 32, 28, "square"),
    ],
)
def test_sizes_that_are_too_small(resize: int, crop: int, native: int | None, fit: str) -> None:
    with pytest.raises(UserError, match=f"--resize {resize} .*--crop {crop}"):
        Size(fit, resize, crop).resolve(native)


# ---------------------------------------------------------------------- unreadable images


@pytest.mark.parametrize(
    "total, allowed",
    [(1, 0), (50, 0), (99, 0), (100, 1), (199, 1), (200, 2), (300, 3), (2900, 29), (5700, 57)],
)
def test_more_than_one_percent_stops(total: int, allowed: int) -> None:
    failures = Failures(total)
    paths = [f"/data/{i}.jpg" for i in range(allowed + 1)]
    failures.add(paths[:allowed])
    failures.add(paths[:allowed])  # the same ones in the next epoch
    assert list(failures.paths) == paths[:allowed]
    percent = 100 * (allowed + 1) / total
    message = (
        rf"^{allowed + 1} of {total} images \({percent:.1f} %\) cannot be read, first '/data/0"
    )
    with pytest.raises(UserError, match=message):
        failures.add([paths[allowed]])


def test_ten_failures_are_named_once_and_others_counted(capsys: pytest.CaptureFixture) -> None:
    failures = Failures(10_000)
    for i in range(15):
        failures.add([f"/data/{i}.jpg"] * 2)
        failures.add([f"/data/{i}.jpg"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and len(failures.paths) == 15
    assert all(f"'/data/{i}.jpg'" in line for i, line in enumerate(lines))


def test_failures_are_listed_in_a_file_across_runs(tmp_path: Path) -> None:
    file = tmp_path / "unreadable.txt"
    Failures(1000, file).add(["/data/a.jpg", "/data/b\nc.jpg"])
    Failures(1000, file).add(["/data/b\nc.jpg", "/data/d.jpg"])
    assert file.read_text().splitlines() == ["/data/a.jpg", "/data/b\\nc.jpg", "/data/d.jpg"]


def test_processes_share_their_failures_once(capsys: pytest.CaptureFixture) -> None:
    class TwoProcesses:
        def collect(self, items: list[str]) -> list[str]:
            sent.append(items)
            return [*items, "/data/theirs.jpg"]

    sent, failures = [], Failures(1000)
    failures.add(["/data/ours.jpg"])
    failures.share(TwoProcesses())
    failures.share(TwoProcesses())
    assert sent == [["/data/ours.jpg"], []]
    assert list(failures.paths) == ["/data/ours.jpg", "/data/theirs.jpg"]
    assert "theirs" not in capsys.readouterr().err  # the process that met it has named it


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterate_counts_failures_and_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture, num_workers: int
) -> None:
    paths = write_plain(tmp_path, 100)
    damage(paths[7], "text")
    dataset, failures = open_square(tmp_path), Failures(100)

    def count(epoch: int) -> int:
        batches = epoch_batches(100, 10, seed=0, epoch=epoch)
        loader = iterate(dataset, batches, num_workers=num_workers, failures=failures)
        return sum(len(batch.images) for batch in loader)

    assert count(epoch=0) == count(epoch=1) == 100
    assert list(failures.paths) == [str(paths[7])]
    assert capsys.readouterr().err.count(str(paths[7])) == 1
    damage(paths[50], "text")
    with pytest.raises(UserError, match="2 of 100 images"):
        count(epoch=2)


def test_nothing_readable_ends(tmp_path: Path) -> None:
    for path in write_plain(tmp_path, 4):
        damage(path, "empty")
    dataset = open_square(tmp_path)
    with pytest.raises(UserError, match="of 4 images"):
        list(iterate(dataset, [torch.arange(2)], num_workers=0, failures=Failures(4)))


# ------------------------------------------------------------------------------ the order


def test_the_order_of_an_epoch_is_a_permutation_by_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    order = epoch_order(1000, seed=3, epoch=4)
    assert sorted(order.tolist()) == list(range(1000)) and order.tolist() != list(range(1000))
    torch.manual_seed(2)
    assert torch.equal(order, epoch_order(1000, seed=3, epoch=4))
    for seed, epoch in [(3, 5), (4, 4), (4, 3), (0, 0), (3, 2**32)]:
        assert (order == epoch_order(1000, seed, epoch)).float().mean() < 0.02


def test_batches_drop_the_last_and_start_anywhere() -> None:
    batches = epoch_batches(103, 10, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == [10] * 10
    assert torch.equal(torch.cat(batches), epoch_order(103, 0, 1)[:100])
    for start in (0, 3, 9, 10):
        rest = epoch_batches(103, 10, seed=0, epoch=1, start=start)
        assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in batches[start:]]
    assert epoch_batches(9, 10, seed=0, epoch=0) == []


# -------------------------------------------------------------------------------- loading


def load_pairs(dataset: Dataset, batch_size: int, num_workers: int) -> Iterator[dataloader.Batch]:
    batches = iter(epoch_batches(len(dataset), batch_size, seed=0, epoch=0))
    return iterate(dataset, batches, num_workers=num_workers, failures=Failures(len(dataset)))


def test_workers_change_nothing(tmp_path: Path) -> None:
    write_folders(tmp_path, classes=3, train=6, test=1)
    dataset, state = open_square(tmp_path), torch.get_rng_state()
    alone, by_two = (list(load_pairs(dataset, 4, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(by_two) == 4
    for a, b, indices in zip(alone, by_two, epoch_batches(18, 4, seed=0, epoch=0), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.aspect, b.aspect)
        assert torch.equal(a.labels, b.labels) and torch.equal(a.labels, dataset.labels[indices])
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the global stream


def test_sets_in_memory_start_no_process(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    for batch in load_pairs(open_square(tmp_path, resize=28), 8, num_workers=4):
        assert not multiprocessing.active_children() and batch.images.shape == (8, 1, 28, 28)


def test_batches_are_pinned_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(dataloader.Batch, "pin_memory", lambda self: pinned.append(self) or self)
    dataset, failures = open_square("shapes", resize="auto"), Failures(100)
    for pin in (False, True):
        assert len(pinned) == 0
        found = list(
            iterate(dataset, [torch.arange(3)] * 4, num_workers=0, failures=failures, pin=pin)
        )
    assert len(found) == len(pinned) == 4


def test_a_killed_worker_is_one_line_at_the_next_batch(tmp_path: Path) -> None:
    write_plain(tmp_path, 40)
    loader = load_pairs(open_square(tmp_path), 2, num_workers=1)
    next(loader)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.3)  # the main process is in the middle of a step: no exception here
    with pytest.raises(UserError, match="killed.*--num_workers 1"):
        list(loader)


@pytest.mark.parametrize(
    "message, hidden",
    [
        ("DataLoader worker (pid(s) 3, 4) exited unexpectedly", True),
        ("DataLoader worker (pid 3) is killed by signal: Killed.", True),
        ("Pin memory thread exited unexpectedly", True),
        ("a bug", False),
    ],
)
def test_only_errors_of_dead_workers_are_for_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, hidden: bool
) -> None:
    def fail(*args: object, **kwargs: object) -> Iterator[None]:
        raise RuntimeError(message)
        yield

    write_plain(tmp_path, 4)
    monkeypatch.setattr(workers, "DataLoader", fail)
    with pytest.raises(UserError if hidden else RuntimeError):
        list(load_pairs(open_square(tmp_path), 2, num_workers=1))


def test_an_error_of_the_code_in_a_worker_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FolderImages, indices: torch.Tensor) -> None:
        raise RuntimeError("a bug")

    write_plain(tmp_path, 4)
    monkeypatch.setattr(FolderImages, "fetch", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        list(load_pairs(open_square(tmp_path), 2, num_workers=1))


def test_an_error_of_the_main_process_ends_the_program(tmp_path: Path) -> None:
    """The traceback keeps the loader alive, whose workers ignore SIGTERM: it must not wait."""
    write_plain(tmp_path, 80)
    script = f"""
import dataloader
dataset = dataloader.open_dataset({str(tmp_path)!r}, "pretrain", fit="square", resize=20, crop=16)
batches, failures = dataloader.epoch_batches(80, 4, 0, 0), dataloader.Failures(80)
def main():
    for batch in dataloader.iterate(dataset, batches, num_workers=2, failures=failures):
        raise ValueError("a bug")
main()
"""
    folder = Path(dataloader.__file__).parent
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: a bug\n"), done.stderr


def test_fetching_ahead_keeps_the_order_raises_in_place_and_ends_its_thread() -> None:
    def fail() -> Iterator[int]:
        yield from range(3)
        raise UserError("in its place")

    threads, found = threading.active_count(), []
    assert list(fetch_ahead(iter(range(100)), pin=False)) == list(range(100))
    with pytest.raises(UserError, match="in its place"):
        for item in fetch_ahead(fail(), pin=False):
            found.append(item)
    assert found == [0, 1, 2]
    endless = fetch_ahead(itertools.count(), pin=False)
    assert [next(endless) for _ in range(3)] == [0, 1, 2]
    endless.close()
    assert threading.active_count() == threads
