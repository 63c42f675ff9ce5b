"""The scripts where what only Unix has is missing: as on Windows, but it was not tried there."""

import os
import subprocess
import sys
from pathlib import Path

from survival import ROOT, flags, last, write_data

WINDOWS = """
import os, signal, sys, types
for name in ("fcntl", "resource", "termios"):
    sys.modules[name] = None  # importing it raises ImportError
for holder, names in (
    (signal, ["SIGUSR1", "SIGUSR2", "SIGHUP"]),
    (os, ["sched_getaffinity", "O_NONBLOCK", "getuid", "killpg"]),
):
    for name in names:
        delattr(holder, name)
open_file = os.open
def open_no_folder(path, *args, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *args, **more)
os.open = open_no_folder
import multiprocessing
multiprocessing.set_start_method("spawn")
"""


def test_the_scripts_need_nothing_of_unix(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WINDOWS)
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    train = ["train.py", *flags(data, out, "--num_workers=1", "--max_epoch=1")]
    test = ["test.py", f"--dataset_root={data}", f"--encoder_output_root={out}", "--knn_k=5"]
    test += ["--linear_epochs=1", "--linear_lrs=0.1", "--trials=1", "--num_workers=0"]
    draw = ["visualize.py", *test[1:], f"--result_path={tmp_path / 'figures'}"]
    export = ["export.py", str(last(out)), str(tmp_path / "x.pth"), "--format=torchvision"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "USERNAME": "user"}
    for command in (train, [*train, "--resume"], test, draw, export):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
