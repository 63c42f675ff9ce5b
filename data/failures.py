"""Images that could not be read."""

from pathlib import Path

from data.decoding import describe_failure
from parallel import Launch
from run.log import Lines
from utils import UserError, warn

NAMED = 10  # how many are named on the terminal


class Failures:
    """The unreadable images of a run, each named once, and listed in `file` if one is given."""

    def __init__(
        self, total: int, file: Path | None = None, fate: str = "another one takes its place"
    ) -> None:
        self.total, self.fate = total, fate  # images of the data set; what becomes of these
        self.paths: dict[str, None] = {}  # an ordered set
        self.unshared: list[str] = []  # of which other processes do not know yet
        self._lines = Lines(file) if file else None

    def add(self, paths: list[str], named: bool = False) -> None:
        """Count those that are new; UserError if they are more than 1 % of the data set.

        `named`: another process, or an earlier one, has named them.
        """
        for path in paths:
            if path not in self.paths:
                self.paths[path] = None
                line = path.replace("\n", "\\n")
                if self._lines and line not in self._lines.lines:  # of an earlier process
                    self._lines.append(line)
                if not named:
                    self.unshared.append(path)
                    self._name(path)
        share = 100 * len(self.paths) / self.total
        if share > 1:
            first = next(iter(self.paths))
            raise UserError(
                f"{len(self.paths)} of {self.total} images ({share:.1f} %) cannot be read: mend "
                f"or remove them (1 % are allowed); the first, {first!r}, {describe_failure(first)}"
            )

    def share(self, launch: Launch) -> None:
        """Let all processes count what each has found; all of them call this at the same step."""
        found = launch.collect(self.unshared)
        self.unshared = []
        self.add(found, named=True)

    def _name(self, path: str) -> None:
        if len(self.paths) <= NAMED:
            more = "; further ones are not shown" if len(self.paths) == NAMED else ""
            warn(f"{path!r} {describe_failure(path)}: {self.fate}{more}", everywhere=True)
