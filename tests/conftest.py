"""The modules under test are the files of the repository's top folder; each test process keeps to one thread."""

import os
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the tests run in parallel, and start scripts of their own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config) -> None:
    config.addinivalue_line("filterwarnings", "error::UserWarning")
