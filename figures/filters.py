"""The filters of the first layer, as small pictures."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from figures import style


def filters_data(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The first-layer weights (F, C, k, k) of E encoders, as pictures; 128 stands for weight 0.

    Returns encoders (E,) and filters uint8 (E, F, 3, k, k), each filter on its own scale; of other
    channels C than three the mean is shown.
    """
    pictures = []
    for weight in weights.values():
        weight = weight.detach().float().cpu()
        if weight.shape[1] != 3:
            weight = weight.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-20)  # it may be 0
        pictures.append((128 + 127 * weight / largest).round().to(torch.uint8).numpy())
    return {"encoders": np.array(list(weights)), "filters": np.stack(pictures)}


def filters_figure(data: Mapping[str, np.ndarray]) -> Figure:
    """Of `filters_data`: a panel for each encoder, its filters as tiles, row by row."""
    panels, count, _, k, _ = data["filters"].shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = (8 if panels > 1 else 5, 0.7 + 7.6 / max(1.6, panels) * rows / columns)
    figure = Figure(figsize=size, layout="constrained")
    for e, axes in enumerate(figure.subplots(1, panels, squeeze=False)[0]):
        for i, picture in enumerate(data["filters"][e]):
            style.tile(axes, picture, 1.1 * (i % columns), 1.1 * (i // columns))
        xlim, ylim = (-0.05, 1.1 * columns - 0.05), (1.1 * rows - 0.05, -0.05)
        style.place_tiles(axes, xlim, ylim)
        axes.set_title(str(data["encoders"][e]), parse_math=False)
    scale = "each on its own scale; mid grey: weight 0"
    note = f"the {count} filters of the first layer, {k} × {k} px, {scale}"
    figure.supxlabel(note, fontsize=10)
    return figure
