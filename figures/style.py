"""What the figures share: colours, axes, tiles of pixels, and how a figure becomes a file."""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import utils

# Okabe and Ito's colours, which colour-blind readers can tell apart. M0 to M3 keep theirs.
COLOURS = {"M0": "#CC79A7", "M1": "#E69F00", "M2": "#009E73", "M3": "#0072B2"}
OTHER_COLOURS = ["#D55E00", "#56B4E9", "#000000", "#999933", "#882255"]
GREY = "0.45"
TITLES = {"cifar10": "CIFAR-10", "stl10": "STL-10", "fashion_mnist": "Fashion-MNIST"}
TITLES |= {"shapes": "the built-in images"}


def render(figure: Figure, dpi: int = 200) -> bytes:
    """A figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def save(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all."""
    png = render(figure)
    utils.atomic_write(path, lambda file: file.write(png))


def write_data(path: Path, content: Mapping[str, Any]) -> None:
    """Arrays as .npz; numbers as .json, a line for each key."""
    if path.suffix == ".npz":
        utils.atomic_write(path, lambda file: np.savez_compressed(file, **content))
    else:
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        utils.atomic_write(path, lambda file: file.write(text.encode()))


def read_data(path: Path) -> dict[str, Any]:
    """What `write_data` wrote; UserError if that cannot be read."""
    content = None
    with contextlib.suppress(Exception):  # damaged bytes raise all kinds of errors
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                content = dict(arrays)
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content:
        reason = f"{str(path)!r} is missing or damaged"
        raise utils.UserError(f"{reason}: draw without --redraw")
    return content


@contextlib.contextmanager
def reading(path: Path, trusted: bool) -> Iterator[dict[str, Any]]:
    """The data of a figure, to be drawn inside; UserError if these, unless `trusted`, cannot be."""
    content = read_data(path)
    try:
        yield content
    except Exception as error:
        if trusted or isinstance(error, utils.UserError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        remedy = "draw without --redraw"
        raise utils.UserError(f"{str(path)!r} is damaged ({reason}): {remedy}") from None


def colour_of(version: str, versions: Iterable[str]) -> str:
    """The colour of a version: M0 to M3 have their own, the others share the rest in order."""
    if version in COLOURS:
        return COLOURS[version]
    others = [name for name in versions if name not in COLOURS]
    return OTHER_COLOURS[others.index(version) % len(OTHER_COLOURS)]


def tidy(axes: Axes, ticks: int = 8) -> None:
    """Axes of curves: a pale grid, no box, at most about so many whole numbers below."""
    steps = [1, 2, 4, 5, 10] if ticks <= 4 else [1, 2, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=steps))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def widen(axes: Axes, least: float = 10.0) -> None:
    """At least so many points of percent from bottom to top, or a tenth of one would look large."""
    low, high = axes.get_ylim()
    missing = max(0.0, least - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def with_label(version: str, label: str | None) -> str:
    """A version's name, and what sets it apart from the others."""
    return f"{version}: {label}" if label else version


def legend_below(figure: Figure, panels: Iterable[Axes], ncols: int, title: str = "") -> None:
    """A legend of the panels below them, duplicates are shown once."""
    entries = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=ncols,
            frameon=False,
            title=title,
        )


# ---------------------------------------------------------------------------------- tiles


def tile(axes: Axes, pixels: np.ndarray, x: float, y: float, aspect: float | None = None) -> None:
    """Draw uint8 (1 or 3, H, W) into the unit square right of and below (x, y).

    It is fitted into the square; `aspect` is its width / height where its pixels are not square.
    """
    aspect = aspect or pixels.shape[2] / pixels.shape[1]
    width, height = min(1.0, aspect), min(1.0, 1 / aspect)
    left, top = x + (1 - width) / 2, y + (1 - height) / 2
    rgb = np.broadcast_to(pixels.transpose(1, 2, 0), (*pixels.shape[1:], 3))
    axes.imshow(rgb, extent=(left, left + width, top + height, top))


def place_tiles(axes: Axes, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    """Axes that hold tiles and nothing else: no frame, no ticks; names of columns stand above."""
    axes.set(xlim=xlim, ylim=ylim, xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)


def thumbnails(images: Tensor, side: int) -> np.ndarray:
    """Images uint8 (n, C, H, W) as (n, 1 or 3, h, w), scaled down to `side` px if they are larger.

    Of more channels than three the first three are shown, of two the first.
    """
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    longest = max(images.shape[2:])
    if longest > side:
        size = [max(1, round(length * side / longest)) for length in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.contiguous().numpy()


def choose_images(labels: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Rows of `count` random images in the order of their classes, as different as possible."""
    order = torch.randperm(len(labels), generator=random).tolist()
    seen, first, more = set(), [], []
    for row in order:
        label = int(labels[row])
        (more if label in seen else first).append(row)
        seen.add(label)
    chosen = (first + more)[:count]
    return torch.tensor(sorted(chosen, key=lambda row: int(labels[row])), dtype=torch.long)


def class_names(classes: Sequence[str], labels: Tensor) -> np.ndarray:
    """The names of labels (n,), "" for -1, as text that np.savez stores without pickle."""
    names = [classes[label] if label >= 0 else "" for label in labels.tolist()]
    return np.array(names, dtype=np.str_)


def title_of(dataset: str) -> str:
    """A data set's name as people write it."""
    return TITLES.get(dataset, dataset)


def shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
