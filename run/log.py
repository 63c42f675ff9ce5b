"""log.csv, and other text files that grow by lines while a run goes on."""

import itertools
import math
import os
from pathlib import Path
from typing import BinaryIO

from utils import UserError, read_csv, warn, write_csv

COLUMNS = ["step", "epoch", "loss", "contrast_top1", "lr", "images_per_second"]
COLUMNS += ["data_wait_percent", "peak_memory_mb"]
COLUMNS += ["alignment", "uniformity", "effective_rank", "knn_top1"]


class Lines:
    """A text file that grows by lines, each of which waits until it can be written.

    `lines` are those already in the file; a line cut short by a crash is dropped. UserError if
    the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            reason = f"{str(path)!r} cannot be read: {error.strerror}"
            raise UserError(f"{reason}: move it away") from None
        whole = content[: content.rfind(b"\n") + 1]
        self.path, self.lines = path, os.fsdecode(whole).split("\n")[:-1]
        self._size, self._waiting = len(whole), b""
        self._first = b""  # the first line, of a file that has a header

    def append(self, line: str) -> None:
        """Write a line, or warn, once, that it must wait."""
        first = not self._waiting
        self._waiting += os.fsencode(line) + b"\n"
        try:
            self.flush()
        except UserError as error:
            if first:
                warn(f"{error}: will retry with the next line")

    def _mend(self, file: BinaryIO) -> None:
        """Somebody cut the file short, or deleted it: keep its whole lines, and the first."""
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1] or self._first
        file.truncate(0)
        file.write(whole)
        self._size = len(whole)
        warn(f"{str(self.path)!r} was deleted or cut short: the lines that are missing are lost")

    def flush(self, to_disk: bool = False) -> None:
        """Write what waits, to outlive a power cut if `to_disk`; UserError if that fails."""
        try:
            with open(self.path, "a+b") as file:
                if file.tell() < self._size:
                    self._mend(file)
                start = min(self._size, file.tell())
                file.truncate(start)  # drop half a line, of a try that failed
                file.write(self._waiting)
                file.flush()
                if to_disk:
                    os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{str(self.path)!r} cannot be written: {error.strerror}") from None
        self._size, self._waiting = start + len(self._waiting), b""


def read(path: Path) -> dict[str, list[float]]:
    """The columns of a log.csv; UserError for what no run has written."""
    log = read_csv(path, ["step", "loss"])
    rows = [0, *log["step"]] if log["step"][:1] != [0] else log["step"]  # step 0 is untrained
    sound = all(step.is_integer() and step < 2**53 for step in log["step"])
    sound &= all(low < high for low, high in itertools.pairwise(rows))
    for name in ("epoch", "images_per_second"):
        pairs = zip(log["step"], log.get(name, []), strict=False)
        sound &= all(0 < value < math.inf for step, value in pairs if step)
    if not sound:
        reason = "its steps do not rise, or an epoch or a speed is no number above 0"
        raise UserError(f"{str(path)!r} is damaged: {reason}: move it away")
    return log


class Log(Lines):
    """log.csv, with a row every `log_every` steps. Rows after `step`, of a resumed run, go."""

    def __init__(self, path: Path, columns: list[str], step: int) -> None:
        self.columns, old = columns, {"step": []}
        if step and path.exists() and path.stat().st_size:
            old = read(path)
        if step and not old["step"]:
            warn(f"{str(path)!r} is gone: its rows up to step {step} are lost")
        missing = [math.nan] * len(old["step"])  # of a column that is newer than the run
        rows = zip(*(old.get(name, missing) for name in columns), strict=True)
        kept = [row for row in rows if row[columns.index("step")] <= step]
        write_csv(path, columns, [[f"{value:.10g}" for value in row] for row in kept])
        super().__init__(path)
        self._first = os.fsencode(",".join(columns)) + b"\n"

    def add(self, row: dict[str, float]) -> None:
        self.append(",".join(f"{row[name]:.10g}" for name in self.columns))
