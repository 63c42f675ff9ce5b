"""Curves: the loss of pretraining, the accuracy of linear classifiers, kNN while training."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from figures import style

LINES = {"solid": "-", "dotted": ":", "dashed": "--", "dash-dotted": "-."}  # of seeds, in order
LONG = 200  # rows of a log from which on its running mean says more than its values


def loss_figure(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Contrastive loss over steps: a panel for each version, a line for each of its runs.

    A log holds the columns `step` and `loss`, and may hold `chance`, the loss if no key could be
    told from another, `drops`, the steps at which the learning rate falls, and `label`, what sets
    the version apart.
    """
    columns = min(len(logs), 4)
    rows = math.ceil(len(logs) / columns)
    size = (8, 0.6 + 2.6 * rows) if columns > 1 else (6, 1.2 + 2.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, version in zip(panels, logs, strict=False):
        _draw_losses(axes, logs[version], style.colour_of(version, logs))
        label = logs[version][0].get("label")
        axes.set_title(version + (f"\n{label}" if label else ""), fontsize=10, parse_math=False)
        style.tidy(axes, ticks=4 if columns > 2 else 6)
    for axes in panels[len(logs) :]:
        axes.remove()
    for axes in panels[: len(logs) : columns]:
        axes.set_ylabel("contrastive loss (nats)")
    style.legend_below(figure, panels[: len(logs)], ncols=2)
    seeds = max(map(len, logs.values()))
    if seeds > 1:
        names = ", ".join(list(LINES)[:seeds])
        figure.suptitle(f"{seeds} seeds each ({names})", fontsize=10, color=style.GREY)
    return figure


def _draw_losses(axes: Axes, logs: Sequence[Mapping[str, Any]], colour: str) -> None:
    unit = 1000 if max(log["step"][-1] for log in logs) >= 5000 else 1
    for log, linestyle in zip(logs, itertools.cycle(LINES.values()), strict=False):
        steps, loss = np.divide(log["step"], unit), log["loss"]
        if len(loss) > LONG:
            axes.plot(steps, loss, color=colour, linewidth=1, alpha=0.3 / len(logs))
            loss = running_mean(loss, reach=len(loss) // 80)
        marker = "o" if len(loss) == 1 else None
        axes.plot(steps, loss, color=colour, linewidth=1.6, linestyle=linestyle, marker=marker)
    axes.set_xlabel("step (thousands)" if unit == 1000 else "step")
    if "chance" in logs[0]:
        chance = logs[0]["chance"]
        label = f"chance, log(K + 1) = {chance:.2f}"
        axes.axhline(chance, color=style.GREY, linestyle="--", linewidth=1.2, label=label)
    for step in logs[0].get("drops", []):
        label = "the learning rate falls"
        axes.axvline(step / unit, color="0.75", linewidth=1, zorder=0, label=label)


def running_mean(values: Sequence[float], reach: int) -> np.ndarray:
    """Mean over each value and up to `reach` values on either side of it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def knn_figure(versions: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Left: kNN top-1 while training over the epochs, with the untrained encoders'. Right: the
    effective rank of the queue. A line for each version: the mean of its runs, and their deviation.

    A run holds `epoch` and `knn_top1`, in percent, `rank_epoch` and `effective_rank`. Epoch 0 is
    the untrained encoder; runs of before it was measured have none.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for version, runs in versions.items():
        look = {"color": style.colour_of(version, versions), "linewidth": 1.6}
        look["label"] = style.with_label(version, runs[0].get("label"))
        _draw_mean(left, runs, "epoch", "knn_top1", marker="o", markersize=4, **look)
        _draw_mean(right, runs, "rank_epoch", "effective_rank", **look)
    every = [run for runs in versions.values() for run in runs]
    untrained = [run["knn_top1"][0] for run in every if run["epoch"][0] == 0]
    if untrained:
        mean = np.mean(untrained)
        label = f"untrained: {mean:.1f} %"
        left.axhline(mean, color=style.GREY, linestyle="--", linewidth=1.2, label=label)
    left.set(xlabel="epoch", ylabel="kNN top-1 while training (%)")
    right.set(xlabel="epoch", ylabel="effective rank of the queue")
    style.tidy(left, ticks=5)
    style.tidy(right, ticks=5)
    style.widen(left)
    right.set_ylim(bottom=0)
    style.legend_below(figure, [left], ncols=3 if len(versions) > 1 else 2)
    return figure


def _draw_mean(
    axes: Axes, runs: Sequence[Mapping[str, Any]], x: str, y: str, color: str, **look: Any
) -> None:
    """The mean of runs where all of them were measured, and their sample deviation as a band."""
    curves = [dict(zip(run[x], run[y], strict=True)) for run in runs]
    places = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[place] for place in places] for curve in curves])
    mean = values.mean(axis=0)
    if len(runs) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(places, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    axes.plot(places, mean, color=color, **look)


# ---------------------------------------------- accuracies: (trials or seeds, epochs), in percent


def accuracy_by_version_figure(data: Mapping[str, Any]) -> Figure:
    """Test top-1 over the classifier's epochs, a line for each version: mean and deviation.

    data: `accuracy`, {version: (n, epochs)}; `untrained`, (n, epochs) of the encoder that training
    started from, or None; `dataset`; `spread`, what the n curves differ in: "trial" or "seed"; and
    perhaps `labels`, what sets each version apart.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    curves = dict(data["accuracy"])
    labels = data.get("labels", {})
    for version, accuracy in curves.items():
        name = style.with_label(version, labels.get(version))
        _draw_curve(axes, accuracy, name, color=style.colour_of(version, data["accuracy"]))
    if data["untrained"] is not None:
        curves["untrained"] = data["untrained"]
        _draw_curve(axes, data["untrained"], "untrained", color=style.GREY, linestyle="--")
    axes.set(
        xlabel="epoch of the linear classifier",
        ylabel=f"test top-1 on {style.title_of(data['dataset'])} (%)",
    )
    note = _describe_spread(curves.values(), data["spread"])
    axes.set_title(note, fontsize=10, color=style.GREY, loc="right")
    style.tidy(axes)
    style.widen(axes)
    style.legend_below(figure, [axes], ncols=2, title="last epoch")
    return figure


def accuracy_by_epoch_figure(data: Mapping[str, Any]) -> Figure:
    """Left: top-1 of the finished classifiers over the epochs of pretraining, mean and each alone.
    Right: top-1 over the classifier's epochs, a line for each epoch of pretraining.

    data: `accuracy`, {epoch of pretraining: (n, epochs)}; `name`, the title; `spread` as above.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = {int(epoch): np.asarray(curve) for epoch, curve in data["accuracy"].items()}
    epochs, spread = sorted(curves), data["spread"]
    means = [curves[epoch][:, -1].mean() for epoch in epochs]
    left.plot(epochs, means, color="0.25", linewidth=1.6, zorder=2)
    for i, epoch in enumerate(epochs):
        colour = colormaps["viridis"](0.85 * i / max(1, len(epochs) - 1))
        last = curves[epoch][:, -1]
        left.scatter([epoch] * len(last), last, color=colour, s=22, zorder=3)
        _draw_curve(right, curves[epoch], str(epoch), color=colour)
    left.set(xlabel="epoch of pretraining", ylabel="test top-1 (%)")
    right.set(xlabel="epoch of the linear classifier", ylabel="test top-1 (%)")
    left.set_title(f"last epoch of the classifier, every {spread}", fontsize=10)
    right.set_title(_describe_spread(curves.values(), spread), fontsize=10)
    for axes in (left, right):
        style.tidy(axes, ticks=6)
        style.widen(axes)
    if len(epochs) <= 8:
        left.set_xticks(epochs)
    figure.suptitle(data["name"])
    title = "epoch of pretraining: top-1 at the last epoch"
    style.legend_below(figure, [right], ncols=min(4, len(epochs)), title=title)
    return figure


def accuracy_figure(accuracy: ArrayLike, result: Mapping[str, Any]) -> Figure:
    """One evaluation: top-1 over the classifier's epochs, a line for each trial, and the kNN's.

    accuracy (trials, epochs), in percent; result: what result.json holds.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    curves = np.asarray(accuracy)
    trials, epochs = curves.shape
    number = "1 trial" if trials == 1 else f"{trials} trials"
    for curve in curves:
        axes.plot(
            range(1, epochs + 1),
            curve,
            color=style.COLOURS["M3"],
            linewidth=1.3,
            alpha=0.8,
            marker="o" if epochs == 1 else None,
            label=f"linear, {number}: {result['linear_top1']:.1f} %",
        )
    when = ", before the finetuning" if result["protocol"] == "finetune" else ""
    label = f"kNN, k = {result['knn_k']}{when}: {result['knn_top1']:.1f} %"
    axes.axhline(result["knn_top1"], color=style.OTHER_COLOURS[0], linestyle="--", label=label)
    title = f"{result['arch']}, {_describe_encoder(result)}, on {style.title_of(result['dataset'])}"
    axes.set(xlabel="epoch of the linear classifier", ylabel="test top-1 (%)", title=title)
    style.tidy(axes)
    style.widen(axes)
    style.legend_below(figure, [axes], ncols=2)
    return figure


def _describe_encoder(result: Mapping[str, Any]) -> str:
    if result["encoder"] == "random":
        return "untrained"
    return (
        Path(result["checkpoint"]).name if result["epoch"] is None else f"epoch {result['epoch']}"
    )


def _draw_curve(axes: Axes, accuracy: ArrayLike, name: str, **line: Any) -> None:
    """Mean of the curves (n, epochs), their sample deviation as a band, the last value's label."""
    curves = np.asarray(accuracy)
    mean, epochs = curves.mean(axis=0), range(1, curves.shape[1] + 1)
    label = f"{name}: {mean[-1]:.1f} %"
    if len(curves) > 1:
        std = curves.std(axis=0, ddof=1)
        label = f"{name}: {mean[-1]:.1f} ± {std[-1]:.1f} %"
        axes.fill_between(
            epochs, mean - std, mean + std, color=line["color"], alpha=0.2, linewidth=0
        )
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, mean, linewidth=1.8, marker=marker, label=label, **line)


def _describe_spread(curves: Sequence[ArrayLike], spread: str) -> str:
    counts = sorted({len(each) for each in curves})
    if counts[-1] == 1:
        return f"one {spread}"
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"mean ± standard deviation, {number} {spread}s"
