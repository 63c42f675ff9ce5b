"""What the training sees: images, and two random views of each."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from figures import style

SIDE = 96  # of the largest thumbnails that are kept, px


def views_data(
    images: Tensor,
    aspect: Tensor,
    views: Sequence[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    names: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Images as they are stored, with their query and key views as the encoders get them.

    images: uint8 (n, 1 or 3, S, S), aspect (n,): their original width / height, views: two of
    (n, 3, crop, crop), normalised by `mean` and `std`; names: of the images' classes, if known.
    Returns images, query and key as uint8 of at most SIDE px, aspect float32, and names (n,).
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    pixels = [(255 * (view.float().cpu() * std + mean)).round().clamp(0, 255) for view in views]
    query, key = (style.thumbnails(view.to(torch.uint8), SIDE) for view in pixels)
    return {
        "images": style.thumbnails(images, SIDE),
        "aspect": aspect.numpy().astype(np.float32),
        "query": query,
        "key": key,
        "names": np.array([""] * len(images) if names is None else names, dtype=np.str_),
    }


def views_figure(data: dict[str, np.ndarray]) -> Figure:
    """Of `views_data`: a column for each image, in it the image, its query view, its key view."""
    names, aspect = data["names"], data["aspect"].tolist()
    count = len(names)
    height = 0.2 + (0.25 if any(names) else 0) + 3 * 7 / max(6, count)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    step = 1.06  # from tile to tile
    for x in range(count):
        style.tile(axes, data["images"][x], step * x, 0, aspect[x])
        style.tile(axes, data["query"][x], step * x, step)
        style.tile(axes, data["key"][x], step * x, 2 * step)
    style.place_tiles(axes, xlim=(-0.01, step * count - 0.05), ylim=(3.13, -0.01))
    axes.set_yticks([0.5, 1.56, 2.62], ["image", "query\nview", "key\nview"], fontsize=10)
    short = [style.shorten(name, 90 // max(6, count)) for name in names]
    axes.set_xticks(step * np.arange(count) + 0.5, short, fontsize=9, parse_math=False)
    return figure
