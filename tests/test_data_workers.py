"""Loading: batches in order, worker processes and what may happen to them, fetching ahead."""

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from miniature import open_square, write_fashion_mnist, write_folders, write_plain

import dataloader
from data import workers
from data.base import Dataset
from data.folders import FolderImages
from dataloader import Failures, epoch_batches, fetch_ahead, iterate
from utils import UserError


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


def test_workers_are_as_many_as_shared_memory_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two batches a worker, and the one in use; as containers have 64 MB by default."""
    write_plain(tmp_path, 4)
    dataset, batch = open_square(tmp_path), 256 * 20 * 20 * 3 + 4 * 4096
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(workers, "SHARED", tmp_path)
    for batches, asked, given in ((100, 4, 4), (9, 4, 4), (8, 4, 3), (2, 4, 0), (0, 0, 0)):
        free = usage._replace(free=batches * batch)
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda path, free=free: free)
        assert workers.count_workers(dataset, 256, asked) == given
        said = f"has room for the batches of {given} of {asked} processes"
        assert (said in capsys.readouterr().err) == (given < asked)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: usage._replace(free=9 * batch))
    assert workers.count_workers(dataset, 256, 4) == 1, "of the two processes each has half"


def test_more_workers_than_cores_are_no_warning(tmp_path: Path) -> None:
    write_plain(tmp_path, 8)
    many = workers.count_cores() + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(load_pairs(open_square(tmp_path), 4, num_workers=many))) == 2


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
        ("unable to allocate shared memory(shm) for file </t>: No space left on device (28)", True),
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
