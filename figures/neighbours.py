"""The nearest neighbours of some test images among the training images."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

import utils
from figures import style

SIDE = 64  # of the largest thumbnails that are kept, px
RIGHT, WRONG = style.COLOURS["M3"], style.OTHER_COLOURS[0]
FRAMES = {
    True: {"edgecolor": RIGHT, "linestyle": "-", "linewidth": 1.8, "fill": False},
    False: {"edgecolor": WRONG, "linestyle": (0, (2, 1)), "linewidth": 1.8, "fill": False},
}
CROSS = {"marker": "X", "markersize": 8, "color": WRONG, "linestyle": "none"}
CROSS |= {"markeredgecolor": "white", "markeredgewidth": 0.8}
PITCH, GAP, ROW = 1.1, 1.25, 1.48  # between tiles; test image and neighbours; rows


class Subset(Protocol):
    """Some images of a data set, by their indices (n,), as evaluation.subsets has them."""

    dataset: Any  # classes, fetch(indices)
    indices: Tensor
    labels: Tensor


def neighbours_data(
    neighbours: Mapping[str, Tensor], bank: Subset, queries: Subset, seed: int, count: int = 6
) -> dict[str, np.ndarray]:
    """`count` test images of different classes with their k nearest training images, by encoder.

    neighbours: for each encoder the k nearest of the bank to each of the queries, as rows (m, k),
    closest first. Returns, for E encoders and c images: encoders (E,); share float32 (E,), percent
    of all m k neighbours that are of the query's class; tests () m, bank () n; rows and labels
    int32 (c,), names (c,), images uint8 (c, 1 or 3, s, s) of the test images; neighbour_rows and
    neighbour_labels int32 (E, c, k), neighbour_images uint8 (E, c, k, 1 or 3, s, s).
    """
    labels, bank_labels = queries.labels, bank.labels
    rows = style.choose_images(labels, count, utils.generator(seed, "neighbours"))
    found = torch.stack(list(neighbours.values())).cpu()  # E x m x k
    right = (bank_labels[found] == labels[:, None]).double()
    shown = found[:, rows]
    pictures = _read(bank, shown.flatten())
    return {
        "encoders": np.array(list(neighbours)),
        "share": (100 * right.mean(dim=(1, 2))).numpy().astype(np.float32),
        "tests": np.array(len(labels), np.int32),
        "bank": np.array(len(bank_labels), np.int32),
        "rows": rows.numpy().astype(np.int32),
        "labels": labels[rows].numpy().astype(np.int32),
        "names": style.class_names(queries.dataset.classes, labels[rows]),
        "images": _read(queries, rows),
        "neighbour_rows": shown.numpy().astype(np.int32),
        "neighbour_labels": bank_labels[shown].numpy().astype(np.int32),
        "neighbour_images": pictures.reshape(*shown.shape, *pictures.shape[1:]),
    }


def _read(images: Subset, rows: Tensor) -> np.ndarray:
    return style.thumbnails(images.dataset.fetch(images.indices[rows]).images, SIDE)


def neighbours_figure(data: Mapping[str, np.ndarray]) -> Figure:
    """Of `neighbours_data`: a block for each encoder, in it two columns of test images, each with
    its neighbours; those of another class are dashed and crossed."""
    encoders, count, k = data["neighbour_labels"].shape
    lines = math.ceil(count / 2)
    width = GAP + PITCH * k + 0.5  # of a test image and its neighbours, in tiles
    inch = 7.8 / (2 * width - 0.6)
    height = 0.35 + encoders * (0.5 + inch * ROW * lines)
    figure = Figure(figsize=(8, height), layout="constrained")
    for e, axes in enumerate(figure.subplots(encoders, 1, squeeze=False)[:, 0]):
        for i in range(count):
            _draw_row(axes, data, e, i, corner=(width * (i // lines), ROW * (i % lines)))
        style.place_tiles(axes, xlim=(-0.05, 2 * width - 0.55), ylim=(ROW * lines - 0.2, -0.42))
        share = f"{data['encoders'][e]}: {data['share'][e]:.1f} %"
        if e == 0 and encoders > 1:
            gain = data["share"][0] - data["share"][1]
            share += f" ({gain:+.1f} points)"
        title = f"{share} of the {k} nearest are of the test image's class"
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold", parse_math=False)
    right, wrong = (Rectangle((0, 0), 1, 1, **FRAMES[each]) for each in (True, False))
    bank, tests = int(data["bank"]), int(data["tests"])
    nearest = f"test image, then its nearest of {bank:,} training images"
    figure.legend(
        [right, (wrong, Line2D([], [], **CROSS))],
        ["of the class", "of another class"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        title=f"{nearest}; percentages over {tests:,} test images",
    )
    return figure


def _draw_row(
    axes: Axes, data: Mapping[str, np.ndarray], e: int, i: int, corner: tuple[float, float]
) -> None:
    """The i-th test image, with its neighbours by the e-th encoder, right of and below a corner."""
    x, y = corner
    name = style.shorten(data["names"][i], 40)
    axes.text(x, y - 0.1, name, fontsize=9, va="bottom", parse_math=False)
    style.tile(axes, data["images"][i], x, y)
    for j, label in enumerate(data["neighbour_labels"][e, i]):
        left, right = x + GAP + PITCH * j, bool(label == data["labels"][i])
        style.tile(axes, data["neighbour_images"][e, i, j], left, y)
        axes.add_patch(Rectangle((left, y), 1, 1, **FRAMES[right]))
        if not right:
            axes.plot(left + 0.86, y + 0.14, **CROSS)
