"""What all tests share: the repository on the path, one thread a process, runs to compare with."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in parallel, and start scripts
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def launch_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data set of each job in launches.py."""
    from launches import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def alone(
    launch_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The run of a job in launches.py by one process on one device; each is run once."""
    from launches import flags_of, run_of
    from scripts import run

    out, done = tmp_path_factory.mktemp("alone"), {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = run("train", *flags_of(name, launch_data, out))
            assert done[name].returncode == 0, done[name].stderr
            for kept in run_of(name, out).glob("checkpoints/epoch_*"):
                kept.unlink()  # 270 MB each
        return run_of(name, out)

    return get


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes x 20 images: 5 steps of 16 an epoch."""
    from miniature import write_folders

    root = tmp_path_factory.mktemp("folders")
    write_folders(root, classes=4, train=20, test=5, size=20)
    return root
