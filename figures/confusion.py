"""Which classes a linear classifier mistakes for which."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from figures import style


def confusion_figure(confusion: ArrayLike, result: Mapping[str, Any]) -> Figure:
    """Counts (C, C), row the true class and column the predicted, as shares of the row in percent.

    result: what result.json holds. Numbers and names stand where there is room for them.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    share = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    classes = len(share)
    side = 8 if classes > 6 else 6
    figure = Figure(figsize=(side, 0.87 * side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    if classes <= 20:
        look = {"ha": "center", "va": "center", "fontsize": 8}
        for i, j in np.argwhere(share >= 0.05):
            number = f"{share[i, j]:.0f}" if classes > 10 else f"{share[i, j]:.1f}"
            axes.text(j, i, number, color="white" if share[i, j] > 55 else "0.1", **look)
    if classes <= 50:
        names = [style.shorten(name, 16) for name in result["class_names"]]
        look = {"fontsize": 9 if classes <= 20 else 6, "parse_math": False}
        axes.set_xticks(range(classes), names, rotation=90 if classes > 3 else 0, **look)
        tested = counts.any(axis=1)
        names = [name if tested[c] else f"{name} (none)" for c, name in enumerate(names)]
        axes.set_yticks(range(classes), names, **look)
    axes.set(xlabel="predicted class", ylabel="true class")
    title = f"{result['arch']} on {style.title_of(result['dataset'])}: share of the true class (%)"
    axes.set_title(f"{title}, top-1 {result['linear_top1']:.1f} %", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.6, label="%")
    return figure
