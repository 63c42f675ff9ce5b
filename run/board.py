"""TensorBoard's files in a run's folder."""

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from utils import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Board:
    """Writes for TensorBoard; what a resumed run wrote after `step` goes.

    If its files cannot be written, it warns, and the run goes on without them.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        self._writer = None
        try:
            self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        except OSError as error:
            self._give_up(error)

    def scalars(self, row: dict[str, float]) -> None:
        """The numbers of a row of the log."""
        for name, value in row.items():
            if name != "step" and not math.isnan(value):
                self._call("add_scalar", name, value, int(row["step"]))
        self._call("flush")

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self._call("add_figure", name, figure, step)

    def features(self, features: Tensor, labels: list[str], step: int) -> None:
        """Features (n, D) for the projector."""
        self._call("add_embedding", features, labels, None, step, "features")

    def close(self) -> None:
        """Write the rest, and end the writer's thread."""
        self._call("close")

    def _call(self, method: str, *arguments: object) -> None:
        """Call the writer, as long as there is one."""
        try:
            if self._writer is not None:
                getattr(self._writer, method)(*arguments)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()
        reason = error.strerror or error
        warn(f"TensorBoard's files cannot be written ({reason}): the run goes on without them")
