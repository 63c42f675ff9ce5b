"""Run the scripts as the command line does, but in this process: PyTorch starts only once."""

import contextlib
import importlib.util
import io
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import utils

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(script: str, *flags: object) -> Done:
    """`python SCRIPT.py FLAGS`, script with or without .py; signal handlers are put back."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, handlers = sys.argv, [signal.getsignal(number) for number in SIGNALS]
    sys.argv = [script, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            utils.guard(script_module(script).main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    return Done(code or 0, out.getvalue(), err.getvalue())


def script_module(script: str) -> ModuleType:
    """The script by its file, since `import test` means a module of Python's own."""
    name = Path(script).stem
    spec = importlib.util.spec_from_file_location(
        f"script_{name}", Path(utils.__file__).with_name(f"{name}.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("localhost", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def assert_one_line_error(done: Done, *parts: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), (
        done.returncode,
        done.stderr,
    )
    assert all(part in lines[0] for part in parts), lines[0]


def assert_last_line_is_error(done: Done, part: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        done.stderr.splitlines()[-1].startswith("error: ") and part in done.stderr.splitlines()[-1]
    )
