"""What a run survives: disks that are full, stay full or take nothing, and lost messages."""

import contextlib
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import assert_last_line_is_error, assert_one_line_error, run
from survival import (
    ROOT,
    TRAIN,
    assert_same,
    flags,
    home,
    last,
    rows,
    run_whole,
    started,
    wait,
    workers,
    write_data,
)

from run import checkpoints
from run.log import Lines
from utils import UserError, duration


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_whole(data, tmp_path_factory.mktemp("whole"))


class SmallDisk:
    """A file system of 480 MB (a checkpoint of the test has 134).

    Where none may be mounted, the size of files is limited instead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.limits = folder, resource.getrlimit(resource.RLIMIT_FSIZE)
        command = ["mount", "-t", "tmpfs", "-o", "size=480m", "none", folder]
        self.mounted = subprocess.run(command, capture_output=True).returncode == 0

    def fill(self, leave: int) -> None:
        if self.mounted:
            stat = os.statvfs(self.folder)
            with open(self.folder / "filler", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - leave)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (leave, self.limits[1]))

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def close(self) -> None:
        self.free()
        if self.mounted:
            subprocess.run(["umount", "-l", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = SmallDisk(folder)
    yield disk
    disk.close()


def run_one_epoch(data: Path, disk: SmallDisk) -> None:
    assert run("train", *flags(data, disk.folder, "--max_epoch=1")).returncode == 0
    (home(disk.folder) / "checkpoints/epoch_0001.pth.tar").unlink()


def test_a_full_disk_is_tried_again(
    data: Path, whole: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the run waits for its second try, somebody makes room."""
    pauses = []
    monkeypatch.setattr(
        checkpoints.time, "sleep", lambda seconds: (pauses.append(seconds), disk.free())
    )
    run_one_epoch(data, disk)
    disk.fill(leave=2**20)
    done = run("train", *flags(data, disk.folder, "--resume"))
    assert done.returncode == 0 and pauses == [checkpoints.RETRY_S], done.stderr
    assert done.stderr.count("cannot be written: ") == 1
    assert "last good checkpoint is of step 5" in done.stderr
    assert_same(disk.folder, whole)


def test_a_disk_that_stays_full_ends_the_run_and_loses_nothing(
    data: Path, whole: Path, disk: SmallDisk
) -> None:
    run_one_epoch(data, disk)
    before = last(disk.folder).read_bytes()
    disk.fill(leave=2**20)
    done = run("train", *flags(data, disk.folder, "--resume", "--save_every_minutes=0"))
    good = "twice in a row; the last good checkpoint is of step 5: make room"
    assert_last_line_is_error(done, good)
    assert done.stderr.count("the next try comes in") == 1
    waits = f"next try comes in {duration(0)}"
    assert waits in done.stderr, "it went on after the first failure, to the next save"
    assert last(disk.folder).read_bytes() == before and not list(disk.folder.rglob("*.tmp"))
    disk.free()
    assert run("train", *flags(data, disk.folder, "--resume")).returncode == 0
    assert_same(disk.folder, whole)


def test_rows_of_the_log_wait_for_room(disk: SmallDisk, capsys: pytest.CaptureFixture) -> None:
    lines = Lines(disk.folder / "log")
    lines.append("one")
    disk.fill(leave=0 if disk.mounted else 6)
    long = ["two " * 2000, "three"]
    for line in long:
        lines.append(line)
    assert (disk.folder / "log").read_bytes().startswith(b"one\n")
    assert capsys.readouterr().err.count("warning") == 1
    with pytest.raises(UserError, match="log' cannot be written"):
        lines.flush(to_disk=True)
    disk.free()
    lines.append("four")
    assert (disk.folder / "log").read_text().splitlines() == ["one", *long, "four"]


@pytest.mark.parametrize("script", ["train", "test"])
def test_shared_memory_that_fills_up_is_one_line(script: str, data: Path, tmp_path: Path) -> None:
    """Somebody else fills /dev/shm; here one of 2 MB, which only this run sees."""
    mount = "mount -t tmpfs -o size=2m none /dev/shm && "
    if subprocess.run(["unshare", "-m", "bash", "-c", mount + "true"]).returncode:
        pytest.skip("a file system can be mounted by root alone")
    base = flags(data, tmp_path, "--num_workers=1", "--log_every=1")
    command = [*TRAIN, *base, "--resize=64", "--max_epoch=10000"]
    if script == "test":
        assert run("train", *flags(data, tmp_path, "--max_epoch=1")).returncode == 0
        command = [sys.executable, "test.py", f"--dataset_root={data}", "--num_workers=1"]
        command += [f"--encoder_output_root={tmp_path}", "--protocol=original", "--trials=1"]
        command += ["--linear_epochs=10000", "--linear_batch_size=16"]
    shell = ["unshare", "-m", "bash", "-c", f"{mount}exec {shlex.join(command)}"]
    with started(*shell) as process:
        if script == "train":  # its first workers are those of the first queue
            wait(process, lambda: rows(tmp_path) and workers(process))
        filler, deadline = Path(f"/proc/{process.pid}/root/dev/shm/filler"), time.monotonic() + 120
        while process.poll() is None:
            assert time.monotonic() < deadline, "it hangs"
            with contextlib.suppress(OSError):  # it is full, or gone
                if workers(process):
                    with open(filler, "ab") as file:
                        file.write(bytes(2**20))
                else:  # without room the next epoch would start none
                    filler.unlink()
            time.sleep(0.005)
        said, _ = process.communicate(timeout=60)
    error = said.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in said, said
    assert error.startswith("error: /dev/shm is full") and "--shm-size" in error, said


def test_a_disk_that_takes_nothing_is_one_line(data: Path) -> None:
    done = run("train", *flags(data, Path("/proc/output")))
    assert_one_line_error(done, "'/proc/output/IMAGENET-64/v1' cannot be written", "--output_root")


@pytest.mark.parametrize("how", ["full disk", "closed pipe"])
def test_messages_that_go_nowhere_do_not_end_the_run(
    how: str, data: Path, whole: Path, tmp_path: Path
) -> None:
    """The terminal's log lies on a disk that is full, or its reader has gone."""
    with open("/dev/full", "w") as full:
        out = full if how == "full disk" else subprocess.PIPE
        command = [*TRAIN, *flags(data, tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
    assert process.wait(timeout=100) == 0
    assert_same(tmp_path, whole)
