"""A run's folder: names, the lock, and an earlier run in its place; and what stops a run."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import utils
from run.folder import FolderLock, claim, clear, path_of
from run.signals import StopSignal
from utils import UserError

ROOT = Path(utils.__file__).parent
OWNER = """
import os, sys, time
from pathlib import Path
from run.folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take()
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\0b", "x" * 201, "\u732b" * 67])
def test_a_name_that_is_no_folder_s_is_refused(name: str) -> None:
    for names in ((name, "v1"), ("DATA", name)):
        with pytest.raises(UserError, match="use plain letters, no /"):
            path_of("out", *names)
    assert path_of("any/path", "DATA", "v 1") == Path("any/path/DATA/v 1")


def test_a_lock_is_free_as_soon_as_its_owner_is_killed(tmp_path: Path) -> None:
    """Its forked worker lives on, as those of a killed run do."""
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    owner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(owner.stdout.readline())
    try:
        who = f"in use by process {owner.pid} on {socket.gethostname()}: wait"
        for _ in range(2):  # who fails to lock it does not wipe out the owner's name
            with pytest.raises(UserError, match=who):
                FolderLock(tmp_path).take()
        owner.kill()
        owner.wait()
        os.kill(worker, 0)
        lock = FolderLock(tmp_path)
        lock.take()
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        lock.release()
    finally:
        os.kill(worker, signal.SIGKILL)
        owner.kill()


def test_a_lock_is_taken_once_and_released_once(tmp_path: Path) -> None:
    lock, other = FolderLock(tmp_path), FolderLock(tmp_path)
    lock.take()
    lock.take()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        other.take()
    FolderLock(tmp_path, ".another").take()
    (tmp_path / ".lock").write_text("")  # as on a full disk
    with pytest.raises(UserError, match="in use by another process: "):
        other.take()
    lock.release()
    other.take()
    other.release()
    other.release()


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    lock, taken = FolderLock(tmp_path), tmp_path / "taken"
    lock.take()
    process = multiprocessing.get_context("spawn").Process(target=wait_for, args=(tmp_path, taken))
    process.start()
    time.sleep(0.5)
    assert not taken.exists()
    lock.release()
    process.join(timeout=60)
    assert process.exitcode == 0 and taken.exists()


def wait_for(folder: Path, taken: Path) -> None:
    FolderLock(folder).take(wait=True)
    taken.touch()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", raise_error(number))
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has no locks" in said and str(tmp_path) in said


def raise_error(number: int) -> Callable:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        FolderLock(tmp_path).take()


def prepare(folder: Path, lock: FolderLock, resume: bool, overwrite: bool) -> None:
    claim(folder, lock, resume, overwrite)
    clear(folder, resume, overwrite)


def test_an_earlier_run_is_continued_deleted_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "D" / "v1"
    lock = FolderLock(folder)
    prepare(folder, lock, resume=False, overwrite=False)
    (folder / "eval").mkdir()  # of an untrained encoder, evaluated before
    prepare(folder, lock, resume=False, overwrite=False)
    assert (folder / "eval").exists()
    for name in ("config.yaml", "notes.txt", "unreadable.txt", ".log.csv.x.tmp"):
        (folder / name).write_text("x")
    (folder / "checkpoints" / ".last.pth.tar.x.tmp").write_text("half")
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        prepare(folder, lock, resume=False, overwrite=False)
    prepare(folder, lock, resume=True, overwrite=False)
    assert (folder / "config.yaml").exists() and (folder / "unreadable.txt").exists()
    assert not list(folder.rglob("*.tmp"))
    prepare(folder, lock, resume=False, overwrite=True)
    there = {path.name for path in folder.iterdir()}
    assert there == {".lock", "checkpoints", "notes.txt"}, "only what a run wrote is deleted"
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "v1"
    with pytest.raises(UserError, match="cannot be written.*--output_root"):
        prepare(inside, FolderLock(inside), resume=False, overwrite=False)


@pytest.mark.parametrize("ignored", [False, True])
def test_the_first_signal_counts_and_nohup_s_is_ignored(ignored: bool) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        stop = StopSignal()
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == (None if ignored else signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == (signal.SIGTERM if ignored else signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
