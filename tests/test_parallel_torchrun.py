"""torchrun: errors, deaths and stops of one process among several."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import ROOT, flags_of, run_of
from miniature import open_square
from scripts import free_ports

from data import store
from run import checkpoints
from utils import UserError


def torchrun(*flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={free_ports(1)[0]}",
            "train.py",
            *flags,
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_says_an_error_of_all_processes_once(
    launch_data: dict[str, Path], tmp_path: Path
) -> None:
    process = torchrun(*flags_of("v1 shuffled", launch_data, tmp_path), "--bn_groups=3")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--bn_groups 2 or 4" in lines[0], err
    assert not (tmp_path / "v1_shuffled").exists()


def test_the_first_process_finds_changed_images_for_all(
    launch_data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = tmp_path / "data", tmp_path / "packed"
    shutil.copytree(launch_data["v1 shuffled"], data)
    files = open_square(data, resize=33, crop=33)
    store.pack(files, str(data), str(folder), 0)
    os.utime(files.paths[0], (0, 0))
    monkeypatch.setenv("LOCAL_RANK", "1")  # alone it is the first, whatever is left from a job
    with pytest.raises(UserError, match="made from other images"):
        store.pack(files, str(data), str(folder), 0)
    with monkeypatch.context() as second:
        second.setenv("WORLD_SIZE", "2")
        second.setenv("RANK", "1")
        assert len(store.pack(files, str(data), str(folder), 0)) == len(files)
    places = launch_data | {"v1 shuffled": data}
    process = torchrun(*flags_of("v1 shuffled", places, tmp_path), f"--pack={folder}")
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "made from other images" in lines[0], err
    assert process.returncode != 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_torchrun_ends_when_a_process_dies_and_saves_when_it_is_told_to_stop(
    number: int, launch_data: dict[str, Path], tmp_path: Path
) -> None:
    """SIGKILL to one process ends the job; SIGTERM to torchrun, which passes it on, saves first."""
    process = torchrun(*flags_of("v1 shuffled", launch_data, tmp_path), "--max_epoch=1000")
    log = run_of("v1 shuffled", tmp_path) / "log.csv"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]) if number == signal.SIGKILL else process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if number == signal.SIGKILL:
        assert (
            "error: another process of this launch has ended" in err
            and err.count("Traceback") == err.count("<frozen runpy>") // 2
        ), err  # torchrun's own
    if number == signal.SIGTERM:
        assert "stopped by signal 15" in out, (out, err)
        assert checkpoints.load(log.with_name("checkpoints") / "last.pth.tar")["step"] >= 3


@pytest.mark.parametrize(
    "difference, part",
    [
        (["--lr=0.1"], "checksum of the settings"),
        (["--dataset_root={small}"], "number of images"),
        (["--dataset_root={other}"], "names of the images"),
    ],
)
def test_processes_that_see_different_things_stop_before_the_first_step(
    difference: list[str], part: str, launch_data: dict[str, Path], tmp_path: Path
) -> None:
    """The second process has other flags, as on a machine with another copy of the data."""
    port, flags = (
        str(free_ports(1)[0]),
        flags_of("v1 shuffled", launch_data, tmp_path, "--num_keys=16"),
    )
    small, other, started = launch_data["float32, one step"], tmp_path / "other", []
    shutil.copytree(launch_data["v1 shuffled"], other)
    image = next((other / "train").rglob("*.png"))
    image.rename(image.with_stem("renamed"))
    for rank, more in enumerate(
        ([], [flag.format(small=small, other=other) for flag in difference])
    ):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "train.py", *flags, *more],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for rank, process in enumerate(started):
        _, err = process.communicate(timeout=120)
        assert (
            process.returncode == 2
            and f"error: {'process 1: ' * rank}the processes disagree on the {part}" in err
        ), err
