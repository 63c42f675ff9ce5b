"""Runs of train.py to which something happens, as processes, and the one to which nothing did."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from miniature import write_folders
from scripts import run
from training import TINY

import utils
from run import checkpoints
from run.log import COLUMNS

ROOT = Path(utils.__file__).parent
TRAIN = [sys.executable, "train.py"]
STEPS = 20  # 4 epochs of 5
RUN = [*TINY, "--shuffle_bn", "--log_every=5", "--max_epoch=4", "--save_weight_epoch=100"]


def write_data(root: Path) -> Path:
    """4 classes x 20 images: 5 steps of 16 an epoch."""
    write_folders(root, classes=4, train=20, test=1, size=20)
    return root


def flags(data: Path, out: Path, *more: str) -> list[str]:
    return [f"--dataset_root={data}", f"--output_root={out}", *RUN, *more]


def run_whole(data: Path, out: Path) -> Path:
    """The run that nothing happened to."""
    done = run("train", *flags(data, out))
    assert done.returncode == 0, done.stderr
    return out


def home(out: Path) -> Path:
    return out / "IMAGENET-64" / "v1"


def last(out: Path) -> Path:
    return home(out) / "checkpoints" / "last.pth.tar"


def rows(out: Path) -> int:
    log = home(out) / "log.csv"
    return max(0, log.read_bytes().count(b"\n") - 1) if log.exists() else 0


def assert_same(out: Path, whole: Path) -> None:
    """Bit for bit: both encoders, queue, pointer, optimizer; and the log, but for the speed."""
    ours, theirs = checkpoints.load(last(out)), checkpoints.load(last(whole))
    assert ours["step"] == theirs["step"] == STEPS
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name
    for i, state in theirs["optimizer"]["state"].items():
        momentum = ours["optimizer"]["state"][i]["momentum_buffer"]
        assert torch.equal(momentum, state["momentum_buffer"])
    ours, theirs = (utils.read_csv(home(folder) / "log.csv", COLUMNS) for folder in (out, whole))
    assert ours["step"] == [5, 10, 15, 20]
    for name in ("epoch", "loss", "contrast_top1", "alignment", "lr"):
        assert ours[name] == theirs[name], name


@contextlib.contextmanager
def started(*command: str, **how: object) -> Iterator[subprocess.Popen]:
    """A command as a process, at the head of a group of its own, which is gone at the end."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **{"cwd": ROOT, **how},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def wait(process: subprocess.Popen, ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.005)


def children(process: subprocess.Popen) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in text.split()]


def workers(process: subprocess.Popen) -> list[int]:
    """Those of its children that decode images: others run git, and before that look like these."""

    def name(child: int) -> str:
        with contextlib.suppress(OSError):  # it may be gone
            return Path(f"/proc/{child}/comm").read_text().strip()
        return ""

    return [child for child in children(process) if name(child) == "pt_data_worker"]
