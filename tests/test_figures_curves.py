"""Figures of losses and accuracies show the data that they are given."""

import math

import numpy as np
import pytest
import torch
from figure_checks import read_figure
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from figures import curves, style
from figures.confusion import confusion_figure


def make_log(rows: int, start: float = 9.0, num_keys: int = 4096) -> dict:
    return {
        "step": [20.0 * (i + 1) for i in range(rows)],
        "loss": [start - 0.001 * i for i in range(rows)],
        "chance": math.log(num_keys + 1),
    }


def make_curves(trials: int = 3, epochs: int = 5, top: float = 70.0) -> torch.Tensor:
    return top + torch.arange(epochs) + torch.arange(trials)[:, None] ** 2 / 10


def of_versions(accuracy: dict, untrained: torch.Tensor | None = None) -> dict:
    return {
        "accuracy": {version: values.tolist() for version, values in accuracy.items()},
        "untrained": None if untrained is None else untrained.tolist(),
        "dataset": "stl10",
        "spread": "trial",
    }


def lines_of(axes: Axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


# ------------------------------------------------------------------------------------ loss


def test_loss_panels() -> None:
    logs = {f"M{i}": make_log(50, start=9 - i) for i in range(4)}
    figure = curves.loss_figure({version: [log] for version, log in logs.items()})
    assert [axes.get_title() for axes in figure.axes] == ["M0", "M1", "M2", "M3"]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    for axes, (version, log) in zip(figure.axes, logs.items(), strict=True):
        loss, chance = axes.get_lines()
        assert list(loss.get_ydata()) == log["loss"] and list(loss.get_xdata()) == log["step"]
        assert to_hex(loss.get_color()).upper() == style.COLOURS[version]
        assert set(chance.get_ydata()) == {math.log(4097)} and "8.32" in chance.get_label()
        assert "step" in axes.get_xlabel()
    assert "loss" in figure.axes[0].get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "chance, log(K + 1) = 8.32"
    ]
    read_figure(figure)


def test_long_loss_is_shown_with_its_running_mean_in_thousands() -> None:
    log = make_log(1000)
    figure = curves.loss_figure({"v1": [log]})
    raw, mean = figure.axes[0].get_lines()[:2]
    assert list(raw.get_ydata()) == log["loss"] and max(raw.get_xdata()) == 20.0
    assert raw.get_alpha() < 0.5
    assert mean.get_ydata()[500] == pytest.approx(log["loss"][500])
    assert "thousands" in figure.axes[0].get_xlabel()
    read_figure(figure)


def test_loss_of_seeds_is_told_apart_by_lines() -> None:
    logs = [make_log(50, start=9 - i) for i in range(3)]
    figure = curves.loss_figure({"M1": logs, "M3": logs})
    styles = [line.get_linestyle() for line in figure.axes[0].get_lines()[:3]]
    assert styles == ["-", ":", "--"]
    assert "3 seeds each (solid, dotted, dashed)" in read_figure(figure)


def test_loss_of_many_runs_and_without_chance() -> None:
    figure = curves.loss_figure({f"run{i}": [{"step": [1.0], "loss": [3.0]}] for i in range(6)})
    assert len(figure.axes) == 6 and not figure.legends
    read_figure(figure)


def test_steps_at_which_the_learning_rate_falls_are_marked() -> None:
    figure = curves.loss_figure({"v1": [make_log(8) | {"drops": [40, 100]}]})
    marks = [line.get_xdata()[0] for line in figure.axes[0].get_lines()[2:]]
    assert marks == [40, 100]
    assert len(read_figure(figure)["the learning rate falls"]) == 1


def test_running_mean_by_hand() -> None:
    assert curves.running_mean([0.0, 3.0, 6.0, 0.0], 1).tolist() == [1.5, 3.0, 3.0, 3.0]
    assert curves.running_mean([5.0], 3).tolist() == [5.0]


def test_knn_while_training() -> None:
    """Means over the seeds where all were measured; the untrained encoders are a line."""
    knn = {"epoch": [0, 2, 4], "rank_epoch": [1, 2, 3, 4], "effective_rank": [2.0, 3.0, 4.0, 5.0]}
    runs = [knn | {"knn_top1": [30.0, 40.0, 50.0]}, knn | {"knn_top1": [34.0, 44.0, 58.0]}]
    shorter = {name: values[:2] for name, values in runs[1].items()}
    figure = curves.knn_figure({"M1": runs, "M3": [runs[0], shorter]})
    left, right = figure.axes
    m1, m3, untrained = left.get_lines()
    assert list(m1.get_xdata()) == [0, 2, 4] and list(m1.get_ydata()) == [32, 42, 54]
    assert list(m3.get_xdata()) == [0, 2] and list(m3.get_ydata()) == [32, 42]
    assert list(untrained.get_ydata()) == [32, 32] and "32.0 %" in untrained.get_label()
    assert list(right.get_lines()[0].get_ydata()) == [2, 3, 4, 5]
    read_figure(figure)
    old = {"epoch": [2], "knn_top1": [40.0], "rank_epoch": [1, 2], "effective_rank": [2.0, 3.0]}
    figure = curves.knn_figure({"v1": [old]})  # of before the untrained encoder was measured
    assert len(figure.axes[0].get_lines()) == 1
    read_figure(figure)
    mixed = curves.knn_figure({"v1": [old, runs[0]]}).axes[0].get_lines()[0]
    assert list(mixed.get_xdata()) == [2] and list(mixed.get_ydata()) == [40]


def test_a_tenth_of_a_point_does_not_look_large() -> None:
    accuracy = {"M1": torch.tensor([[70.0, 70.1]]), "M3": torch.tensor([[70.0, 70.2]])}
    low, high = curves.accuracy_by_version_figure(of_versions(accuracy)).axes[0].get_ylim()
    assert high - low == pytest.approx(10)


# ------------------------------------------------------------------------------ accuracies


def test_accuracy_by_version() -> None:
    accuracy, untrained = {"M1": make_curves(), "M3": make_curves(top=75.0)}, make_curves(top=40.0)
    figure = curves.accuracy_by_version_figure(of_versions(accuracy, untrained))
    axes = figure.axes[0]
    shown = lines_of(axes)
    for label, values in zip(shown, [*accuracy.values(), untrained], strict=True):
        assert shown[label] == pytest.approx(values.mean(0).tolist())
        assert f"{values[:, -1].mean():.1f} ± {values[:, -1].std():.1f} %" in label
    assert [label.split(":")[0] for label in shown] == ["M1", "M3", "untrained"]
    colours = [to_hex(line.get_color()).upper() for line in axes.get_lines()[:2]]
    assert colours == [style.COLOURS["M1"], style.COLOURS["M3"]]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    mean, std = accuracy["M1"].mean(0), accuracy["M1"].std(0)
    assert band.min() == pytest.approx(float((mean - std).min()))
    assert band.max() == pytest.approx(float((mean + std).max()))
    assert "%" in axes.get_ylabel() and "STL-10" in axes.get_ylabel()
    assert "3 trials" in axes.get_title(loc="right")
    read_figure(figure)


def test_different_numbers_of_trials_are_said() -> None:
    accuracy = {"M1": make_curves(trials=2), "M3": make_curves(trials=4)}
    figure = curves.accuracy_by_version_figure(of_versions(accuracy))
    assert figure.axes[0].get_title(loc="right").endswith("2 to 4 trials")


def test_one_trial_has_no_spread() -> None:
    accuracy = {"a": make_curves(trials=1), "b": make_curves(trials=1, epochs=1)}
    axes = curves.accuracy_by_version_figure(of_versions(accuracy)).axes[0]
    assert list(lines_of(axes)) == ["a: 74.0 %", "b: 70.0 %"]
    assert axes.get_title(loc="right") == "one trial"
    colours = {line.get_color() for line in axes.get_lines()}
    assert len(colours) == 2 and not colours & set(style.COLOURS.values())


def test_accuracy_by_epoch() -> None:
    accuracy = {"60": make_curves(top=72.0), "20": make_curves(), "40": make_curves(top=71.0)}
    data = {"accuracy": accuracy, "name": "M3 on STL-10", "spread": "trial"}
    figure = curves.accuracy_by_epoch_figure(data)
    left, right = figure.axes
    ordered = [accuracy[epoch] for epoch in ("20", "40", "60")]
    (line,) = left.get_lines()
    assert list(line.get_xdata()) == [20, 40, 60]
    assert list(line.get_ydata()) == pytest.approx([float(v[:, -1].mean()) for v in ordered])
    for points, values in zip(left.collections, ordered, strict=True):
        shown = sorted(points.get_offsets()[:, 1].tolist())
        assert shown == pytest.approx(sorted(values[:, -1].tolist()))
    assert [label.split(":")[0] for label in lines_of(right)] == ["20", "40", "60"]
    assert list(lines_of(right).values())[1] == pytest.approx(accuracy["40"].mean(0).tolist())
    read_figure(figure)
    many = data | {"accuracy": {str(20 * i): make_curves() for i in range(1, 11)}}
    read_figure(curves.accuracy_by_epoch_figure(many))


RESULT = {
    "linear_top1": 74.2,
    "knn_top1": 61.0,
    "knn_k": 200,
    "encoder": "trained",
    "checkpoint": "some/where/foreign.pth",
    "epoch": 100,
    "arch": "resnet50",
    "dataset": "stl10",
    "protocol": "cached",
}


def test_accuracy_of_one_evaluation() -> None:
    figure = curves.accuracy_figure(make_curves(), RESULT)
    lines = figure.axes[0].get_lines()
    for line, curve in zip(lines[:3], make_curves().tolist(), strict=True):
        assert list(line.get_ydata()) == pytest.approx(curve)
    assert set(lines[3].get_ydata()) == {61.0}
    assert figure.axes[0].get_title() == "resnet50, epoch 100, on STL-10"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["linear, 3 trials: 74.2 %", "kNN, k = 200: 61.0 %"]
    read_figure(figure)


@pytest.mark.parametrize(
    "change, title",
    [
        ({"epoch": None}, "resnet50, foreign.pth, on STL-10"),
        (
            {"encoder": "random", "checkpoint": None, "epoch": None},
            "resnet50, untrained, on STL-10",
        ),
    ],
)
def test_the_title_says_which_encoder_was_evaluated(change: dict, title: str) -> None:
    figure = curves.accuracy_figure(make_curves(trials=1), RESULT | change)
    assert figure.axes[0].get_title() == title


@pytest.mark.parametrize("classes", [3, 10, 16, 60])
def test_confusion_shows_shares_of_the_true_class(classes: int) -> None:
    counts = torch.eye(classes, dtype=torch.long) * 3
    counts[0, 1], counts[2] = 1, 0  # of class 2 there is no image
    names = [f"a $\\name$ of {c}" for c in range(classes)]
    figure = confusion_figure(counts, RESULT | {"class_names": names})
    axes = figure.axes[0]
    share = np.asarray(axes.get_images()[0].get_array())
    assert share[0, :2].tolist() == [75.0, 25.0] and not share[2].any() and share[1, 1] == 100.0
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(numbers) == (classes if classes <= 20 else 0)
    if numbers:
        assert numbers[1, 0] == ("25" if classes > 10 else "25.0")
    labels = [label.get_text() for label in axes.get_yticklabels()]
    names[2] += " (none)"
    assert (labels == names) == (classes <= 50)
    read_figure(figure)
