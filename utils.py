"""What every file uses: messages and errors, random streams, progress, provenance, whole files."""

import contextlib
import csv
import datetime
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import torch
from tqdm import tqdm

QUIET_S = 20.0  # off a terminal, progress is shown this often, and not at all for what takes less


class UserError(Exception):
    """What is wrong, with which value, and what to do: one line for the user."""


# ------------------------------------------------------------------------------- messages


def guard(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main`: an error the user can fix becomes one line and exit status 2."""
    streams = _open_stream(sys.stdout), _open_stream(sys.stderr)
    sys.stdout, sys.stderr = map(_Messages, streams)
    try:
        main(sys.argv[1:])
    except (UserError, PermissionError, ConnectionError) as error:
        if isinstance(error, PermissionError):
            error = f"{error.filename!r}: permission denied"
        _stop(error)
    except RuntimeError as error:
        if (remedy := _remedy(error)) is None:
            raise
        _stop(remedy)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.finish()
        sys.stdout, sys.stderr = streams


def _open_stream(stream: TextIO | None) -> TextIO:
    """A stream that takes names of any bytes; the null device for one that is closed."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream or open(os.devnull, "w")  # noqa: SIM115


# What libraries of a GPU say that get no memory; cuDNN finds no engine without a place to work in.
NO_HOST_MEMORY = r"DefaultCPUAllocator: (can't allocate|not enough) memory"
NO_MEMORY = r"CUDA error: out of memory|STATUS_ALLOC_FAILED|unable to find an engine"


def _remedy(error: RuntimeError) -> str | None:
    """What to do about an error of a GPU that is no fault of the code, or None."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or re.search(NO_MEMORY, text):
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        asked = f", which was asked for {asked[1]} more" if asked else ""
        smaller = "a smaller --batch_size (of test.py --eval_batch_size)"
        return f"a GPU is out of memory{asked}: use {smaller}, or more GPUs"
    if re.search(NO_HOST_MEMORY, text):
        return "this machine is out of memory: use a smaller --batch_size, --crop or --feature_dim"
    if "no kernel image" in text:
        return "PyTorch has no kernels for this GPU: install another build (docs/devices.md)"
    return None


def _stop(error: Exception | str) -> None:
    message = f"error: {f'process {rank()}: ' if rank() else ''}{error}"
    if rank():
        time.sleep(5)  # the first process likely stops for the same reason, and says so for all
    print(message, file=sys.stderr)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(2)  # a regular exit may abort in the threads of a process group left open
    sys.exit(2)


class _Messages:
    """A stream for messages: a full disk or a closed terminal must not end days of work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def finish(self) -> None:
        """Drop what cannot be written, or Python would complain about it as it exits."""
        try:
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def rank() -> int:
    """The number of this process among those that torchrun started; 0 if it was started alone."""
    rank = os.environ.get("RANK", "")
    return int(rank) if "WORLD_SIZE" in os.environ and rank.isdigit() else 0


def say(text: str) -> None:
    """Tell the user, once for all processes."""
    if rank() == 0:
        print(text, flush=True)


def warn(text: str, everywhere: bool = False) -> None:
    """Warn the user, once for all processes, or from each of them (`everywhere`)."""
    if everywhere or rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def progress(iterable: Iterable, desc: str, total: int | None = None) -> Iterable:
    """The items, with a progress bar; off a terminal it moves every QUIET_S seconds."""
    every = 0.1 if sys.stderr.isatty() else QUIET_S
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        leave=False,
        dynamic_ncols=True,
        delay=0 if sys.stderr.isatty() else QUIET_S,
        mininterval=every,
        maxinterval=max(10.0, every),
        disable=rank() > 0,
    )


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 0:03:05."""
    return str(datetime.timedelta(seconds=round(seconds)))


@functools.cache
def provenance() -> dict[str, str | bool]:
    """What made a result: commit, whether the tree was changed since, versions, machine."""

    def git(*args: str) -> str:
        command = ["git", *args]
        try:
            folder = Path(__file__).parent
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
            return done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    return {
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(git("status", "--porcelain", "-uno")),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


# ------------------------------------------------------------------------- random streams


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose at one step. Streams are mixed, so they never overlap."""
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    state = np.random.SeedSequence([seed, name, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def cosine(done: float, total: float = 1.0) -> float:
    """The factor of the cosine schedule, from 1 to 0, after `done` of `total` steps."""
    return 0.5 * (1 + math.cos(math.pi * done / total))


# ----------------------------------------------------------------------------------- files


def atomic_write(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    A link is followed: its target is replaced. Raises UserError if the file cannot be written.
    """
    check_replaceable(path)
    path = Path(os.path.realpath(path))
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save on a full disk raises a RuntimeError on top of the OSError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{str(path)!r} cannot be written: {cause.strerror or cause}") from None
    finally:
        with contextlib.suppress(OSError):  # after os.replace it is not there
            os.unlink(temporary)


def check_replaceable(path: str | Path) -> None:
    """UserError, before any work, if there is something at a path that is no regular file.

    A pipe or a device would be replaced by a file, and so lost to whoever uses it.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device"
        raise UserError(f"{str(path)!r} cannot be written: it is {kind}")


def sync_folder(folder: Path) -> None:
    """Let the names in a folder outlive a power cut."""
    with contextlib.suppress(OSError):  # some systems cannot, and need not
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def link(path: Path, other: Path) -> None:
    """Give a file a second name, whoever had it before; OSError where there are no links."""
    temporary = other.parent / f".{other.name}.{secrets.token_hex(4)}.tmp"
    os.link(path, temporary)
    try:
        os.replace(temporary, other)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(other.parent)


def check_writable(folder: Path, flag: str) -> None:
    """UserError before any work if the folder that a flag names cannot be written."""
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"{str(folder)!r} cannot be written: {error.strerror}"
        raise UserError(f"{reason}: choose another {flag}") from None


def write_json(path: str | Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, None if it is not there or not whole."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_csv(path: str | Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    atomic_write(path, lambda file: file.write(os.fsencode(text.getvalue())))


def read_csv(path: str | Path, needed: Iterable[str] = ()) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers, without a last line that a crash cut short.

    Raises UserError if it cannot be read, or lacks one of the columns `needed`.
    """
    try:
        whole = Path(path).read_bytes().rpartition(b"\n")[0].decode()
        header, *rows = list(csv.reader(io.StringIO(whole, newline=""))) or [[]]
        rows = [list(map(float, row)) for row in rows if len(row) == len(header)]
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{str(path)!r} is damaged: {error}: move it away") from None
    if repeated := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{str(path)!r} is damaged: column {repeated[0]!r} is there twice")
    if missing := [name for name in needed if name not in header]:
        absent = ", ".join(missing)
        raise UserError(f"{str(path)!r} is damaged: it has no column {absent}: move it away")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}
