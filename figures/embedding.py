"""A map of the features in two dimensions."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import utils
from figures import style

# of up to ten classes; markers tell apart what the eye cannot
CLASS_COLOURS = [*style.COLOURS.values(), *style.OTHER_COLOURS, "#888888"]
CLASS_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<", "p"]


def embedding_data(
    features: Mapping[str, Tensor],
    labels: Tensor,
    classes: Sequence[str],
    seed: int,
    count: int = 2000,
) -> dict[str, np.ndarray]:
    """t-SNE (from the principal components) of the unit features (m, D) of each encoder.

    Of up to `count` labelled images drawn at random, the same for all encoders, of at most ten
    classes drawn at random. Returns, for E encoders and n images: encoders (E,), points float16
    (E, n, 2), rows int32 (n,), ascending, labels int16 (n,), which count in classes (C,).
    Raises UserError where scikit-learn is missing, or for fewer than 5 labelled images.
    """
    try:
        from sklearn.manifold import TSNE  # an optional extra
    except ImportError:
        reason = "the map of the features needs scikit-learn, which is not installed"
        raise utils.UserError(f"{reason}: pip install scikit-learn") from None
    rows, kept = _choose_points(labels, count, utils.generator(seed, "embedding"))
    if len(rows) < 5:
        reason = f"{len(rows)} labelled test images are too few for a map of the features"
        raise utils.UserError(f"{reason}: 5 are needed")
    perplexity = min(30, (len(rows) - 1) / 3)
    points = []
    for values in features.values():
        tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed)
        points.append(tsne.fit_transform(F.normalize(values[rows].float(), dim=1).numpy()))
    return {
        "encoders": np.array(list(features)),
        "points": np.stack(points).astype(np.float16),
        "rows": rows.numpy().astype(np.int32),
        "labels": torch.searchsorted(kept, labels[rows]).numpy().astype(np.int16),
        "classes": style.class_names(classes, kept),
    }


def _choose_points(labels: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of up to `count` images of at most ten classes, and those classes (C,)."""
    known = labels[labels >= 0].unique()
    kept = known[torch.randperm(len(known), generator=random)[: len(CLASS_COLOURS)]]
    rows = torch.isin(labels, kept).nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=random)[:count]].sort().values
    return rows, labels[rows].unique()  # of a rare class perhaps no image was drawn


def embedding_figure(data: Mapping[str, np.ndarray]) -> Figure:
    """Of `embedding_data`: a panel for each encoder, a point for each image."""
    points, labels = data["points"].astype(np.float32), data["labels"]
    names = [style.shorten(name, 15) for name in data["classes"]]
    points -= (points.max(axis=1, keepdims=True) + points.min(axis=1, keepdims=True)) / 2
    panels = len(points)
    width = 8 if panels > 1 else 6
    longest = max(map(len, names))
    columns = min(5, int(width / (0.5 + 0.085 * longest)))  # about so wide are entries, in inches
    height = 0.55 + 0.18 * math.ceil(len(names) / columns) + 7.8 / max(1.4, panels)
    figure = Figure(figsize=(width, height), layout="constrained")
    for e, axes in enumerate(figure.subplots(1, panels, squeeze=False)[0]):
        marks = []
        for c in range(len(names)):
            look = {"color": CLASS_COLOURS[c], "marker": CLASS_MARKERS[c], "s": 12}
            x, y = points[e, labels == c].T
            marks.append(axes.scatter(x, y, alpha=0.75, linewidths=0, **look))
        reach = 1.04 * np.abs(points[e]).max()
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_color("0.8")
        axes.set_title(str(data["encoders"][e]), parse_math=False)
    legend = figure.legend(
        marks,
        names,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        markerscale=2,
        handletextpad=0.2,
        title=f"t-SNE of the features of {len(labels):,} test images; distances have no unit",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.draw_without_rendering()  # above such a legend the layout takes two passes
    return figure
