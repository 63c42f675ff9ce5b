"""Draw what the runs did: loss, accuracy per version, accuracy per pretraining epoch.

    python visualize.py --dataset_root=ROOT/STL-10 --multiple_encoder_exp_version M1 M2 M3
    python visualize.py --dataset_root=ROOT/STL-10 --encoder_exp_version M3 --multiple_pretrained_epoch 20 40 60
    python visualize.py --help                                                every flag with its default

Writes RESULT_PATH/ (default img/): loss.png, accr_model_compare.png, and with --multiple_pretrained_epoch accr_epoch_compare.png.
Results of test.py with the same settings are used as they are; what is missing is evaluated first, with --trials classifiers.
Without --dataset_root only results that are there are drawn. The functions take data and return a matplotlib Figure.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import dataloader
import evaluate
import parallel
import utils

# Okabe and Ito's colours, which stay apart for colour-blind readers; a version keeps its colour in every figure
COLOURS = {"M0": "#CC79A7", "M1": "#E69F00", "M2": "#009E73", "M3": "#0072B2"}
OTHER_COLOURS = ["#D55E00", "#56B4E9", "#000000", "#999933", "#882255"]
GREY = "0.45"


def main(argv: list[str]) -> None:
    cfg = evaluate.settled(utils.load_config("visualize", argv))
    if cfg.pretrained is not None or cfg.encoder == "random":
        flag = "--encoder random" if cfg.encoder == "random" else f"--pretrained {cfg.pretrained!r}"
        raise utils.UserError(f"{flag} is for test.py: name runs with --multiple_encoder_exp_version")
    launch = utils.checked(parallel.launch, cfg.device)
    if launch.processes > 1:
        raise utils.UserError("visualize.py runs as one process: evaluate with torchrun and test.py first, its results are reused")
    versions = [cfg.encoder_exp_version] if cfg.multiple_encoder_exp_version == ["auto"] else list(dict.fromkeys(cfg.multiple_encoder_exp_version))
    epochs = [] if "none" in cfg.multiple_pretrained_epoch else sorted(set(cfg.multiple_pretrained_epoch))
    runs = {version: utils.run_folder(cfg.encoder_output_root, cfg.encoder_dataset_name, version) for version in versions}
    for version, epoch in [(v, cfg.load_pretrained_epoch) for v in versions] + [(cfg.encoder_exp_version, e) for e in epochs]:
        utils.checkpoint_path(utils.run_folder(cfg.encoder_output_root, cfg.encoder_dataset_name, version), epoch)  # all errors before any work
    logs = {version: read_loss(folder) for version, folder in loss_runs(cfg, runs).items()}
    if cfg.download and cfg.dataset_root is not None:
        dataloader.open_dataset(cfg.dataset_root, "train", view="center", resize="auto", crop=8, download=True)
    dataset = None if cfg.dataset_root is None else evaluate.data_name(cfg.dataset_root)
    results = Path(cfg.result_path)
    evaluate.check_writable(results, "--result_path")

    found = {version: accuracy_of(cfg, launch, version, cfg.load_pretrained_epoch, dataset) for version in versions}
    found_epochs = {epoch: accuracy_of(cfg, launch, cfg.encoder_exp_version, epoch, dataset) for epoch in epochs}
    untrained = random_result(runs, found)
    curves = {version: accuracy for version, (_, accuracy) in found.items()}
    figures = {"loss.png": loss_figure(logs),
               "accr_model_compare.png": accuracy_by_version_figure(curves, untrained[1] if untrained else None, one_dataset(found))}
    if epochs:
        curves = {epoch: accuracy for epoch, (_, accuracy) in found_epochs.items()}
        figures["accr_epoch_compare.png"] = accuracy_by_epoch_figure(curves, f"{cfg.encoder_exp_version} on {one_dataset(found_epochs)}")
    for name, figure in figures.items():  # last, when nothing can fail any more
        write_figure(results / name, figure)
    print(summary(found, untrained))
    print(f"written  {results}/{', '.join(figures)}")


# ------------------------------------------------------------------------------------------------------------- where data comes from

def loss_runs(cfg: SimpleNamespace, runs: dict[str, Path]) -> dict[str, Path]:
    """The runs whose loss is drawn: those asked for, or the compared ones and M0 where it exists."""
    root = next(iter(runs.values())).parent
    if cfg.loss_exp_version != ["auto"]:
        chosen = {version: root / version for version in cfg.loss_exp_version}
    else:
        chosen = ({"M0": root / "M0"} if (root / "M0" / "log.csv").exists() else {}) | runs
    for version, folder in chosen.items():
        if not (folder / "log.csv").exists():
            there = ", ".join(sorted(path.parent.name for path in root.glob("*/log.csv"))) or "none"
            raise utils.UserError(f"--loss_exp_version {version!r}: {str(folder)!r} has no log.csv; runs with one: {there}")
    return chosen


def read_loss(folder: Path) -> dict[str, Any]:
    """The columns of a run's log.csv, and `chance`: log(K + 1), the loss when no key can be told from another."""
    log: dict[str, Any] = utils.read_csv(folder / "log.csv", ("step", "loss"))
    if not log["step"]:
        raise utils.UserError(f"{str(folder / 'log.csv')!r} has no rows yet: its run has just begun")
    config = utils.read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else None
    num_keys = config.get("num_keys") if isinstance(config, dict) else None
    if isinstance(num_keys, int) and num_keys > 0:
        log["chance"] = math.log(num_keys + 1)
    return log


def accuracy_of(cfg: SimpleNamespace, launch: parallel.OneDevice, version: str, epoch: int | None,
                dataset: str | None) -> tuple[dict[str, Any], torch.Tensor]:
    """Result and accuracy (trials, epochs) of a checkpoint: the stored one, or a new evaluation that stores its own."""
    cfg = SimpleNamespace(**vars(cfg) | {"encoder_exp_version": version, "load_pretrained_epoch": epoch})
    subject = evaluate.load_subject(cfg)
    stored = stored_accuracy(cfg, subject, dataset)
    if stored is not None:
        print(f"{version}, epoch {subject.record['epoch']}: stored result on {stored[0]['dataset']}", flush=True)
        return stored
    if dataset is None:
        raise utils.UserError(f"{str(subject.home / subject.stem)!r} has no result with these settings and {cfg.trials} trials: "
                              "give --dataset_root, so that it can be evaluated")
    print(f"{version}, epoch {subject.record['epoch']}: evaluating", flush=True)
    folder, result, linear = evaluate.evaluate_subject(cfg, subject, launch)
    draw_evaluation(folder, result, linear)
    return result, linear["accuracy"]


def stored_accuracy(cfg: SimpleNamespace, subject: evaluate.Subject, dataset: str | None) -> tuple[dict[str, Any], torch.Tensor] | None:
    """An earlier evaluation with the same settings and at least as many trials, or None; `dataset` None takes that of the plain folder."""
    kind = evaluate.kind_of(cfg.protocol, cfg.train_fraction, cfg.folds)
    folder = subject.home / subject.stem if dataset is None else evaluate.result_folder(subject, dataset, kind)
    result = evaluate.read_result(folder)
    if result is None or len(result["trials"]) < cfg.trials or not (folder / "accuracy.csv").exists():
        return None
    wanted = evaluate.settings(cfg, subject) | ({"dataset": dataset, "dataset_root": evaluate.data_path(cfg.dataset_root)} if dataset else {})
    if any(result.get(name) != value for name, value in wanted.items() if name != "checkpoint"):
        return None
    return result, read_accuracy(folder / "accuracy.csv")


def read_accuracy(path: Path) -> torch.Tensor:
    """An accuracy.csv (epoch, trial, top1) as (trials, epochs)."""
    table = utils.read_csv(path, ("trial", "top1"))
    if not table["trial"] or len(table["top1"]) % int(max(table["trial"])):
        raise utils.UserError(f"{str(path)!r} is damaged: evaluate again with test.py")
    return torch.tensor(table["top1"]).view(int(max(table["trial"])), -1)


def random_result(runs: dict[str, Path], found: Mapping[str, tuple[dict[str, Any], torch.Tensor]]) -> tuple[dict[str, Any], torch.Tensor] | None:
    """An untrained encoder's result and accuracy (trials, epochs), measured as the others were, from the first run that has one."""
    reference = next(iter(found.values()))[0]
    for folder in (path.parent for run in runs.values() for path in sorted(run.glob("eval/random*/result.json"))):
        result = evaluate.read_result(folder)
        if result and evaluate.same_measure(result, reference):
            return result, read_accuracy(folder / "accuracy.csv")
    return None


def summary(found: Mapping[str, tuple[dict[str, Any], torch.Tensor]], untrained: tuple[dict[str, Any], torch.Tensor] | None) -> str:
    """kNN and linear accuracy of each version, as aligned lines."""
    named = ({"untrained": untrained} if untrained else {}) | dict(found)
    lines = [f"{'top-1 (%)':<16} {'kNN':>7} {'linear':>7}"]
    lines += [f"{name:<16} {result['knn_top1']:>7.2f} {result['linear_top1']:>7.2f}" for name, (result, _) in named.items()]
    return "\n".join(lines)


def one_dataset(found: Mapping[Any, tuple[dict[str, Any], torch.Tensor]]) -> str:
    """The data set of all results of a figure; UserError if they differ."""
    names = sorted({result["dataset"] for result, _ in found.values()})
    if len(names) > 1:
        raise utils.UserError(f"the stored results are of different data sets ({', '.join(names)}): give --dataset_root")
    return names[0]


def draw_evaluation(folder: Path, result: Mapping[str, Any], linear: Mapping[str, Any]) -> None:
    """The figures of one evaluation, beside its result."""
    write_figure(folder / "accuracy.png", accuracy_figure(linear["accuracy"], result))
    write_figure(folder / "confusion.png", confusion_figure(linear["confusion"], result))


def write_figure(path: Path, figure: Figure) -> None:
    utils.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=200))


# --------------------------------------------------------------------------------------------------------------------------- figures

def loss_figure(logs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Contrastive loss over steps, a panel for each version, one y axis; dashed: the loss at chance.

    A log holds the columns `step` and `loss` and, if known, `chance`. Long logs are drawn pale, with their running mean on top.
    """
    columns = min(len(logs), 4)
    rows = math.ceil(len(logs) / columns)
    figure = Figure(figsize=(8 if columns > 1 else 6, 0.6 + 2.6 * rows + 0.6 * (columns == 1)), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    chances = {round(log["chance"], 6) for log in logs.values() if "chance" in log}
    label = "chance, log(K + 1)" + (f" = {chances.copy().pop():.2f}" if len(chances) == 1 else "")
    for axes, (version, log) in zip(panels, logs.items()):
        long = len(log["loss"]) > 200
        colour, unit = colour_of(version, logs), 1000 if max(log["step"], default=0) >= 5000 else 1
        steps = [step / unit for step in log["step"]]
        axes.plot(steps, log["loss"], color=colour, linewidth=1 if long else 1.6, alpha=0.3 if long else 1)
        if long:
            axes.plot(steps, running_mean(log["loss"], len(log["loss"]) // 80), color=colour, linewidth=1.6)
        if "chance" in log:
            axes.axhline(log["chance"], color=GREY, linestyle="--", linewidth=1.2, label=label)
        axes.set_title(version)
        axes.set_xlabel("step (thousands)" if unit == 1000 else "step")
        tidy(axes, ticks=4 if columns > 2 else 6)
    for axes in panels[len(logs):]:
        axes.remove()
    for axes in panels[:len(logs):columns]:
        axes.set_ylabel("contrastive loss (nats)")
    with_chance = next((axes for axes, log in zip(panels, logs.values()) if "chance" in log), None)
    if with_chance is not None:
        figure.legend(*with_chance.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    return figure


def accuracy_by_version_figure(accuracies: Mapping[str, torch.Tensor], random: torch.Tensor | None = None, dataset: str = "") -> Figure:
    """Test top-1 (percent) over the classifier's epochs, a line for each version: mean and standard deviation of (trials, epochs).

    `random` (trials, epochs) is the untrained encoder's, dashed.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for version, accuracy in accuracies.items():
        draw_curve(axes, accuracy, colour_of(version, accuracies), version)
    if random is not None:
        draw_curve(axes, random, GREY, "untrained", linestyle="--")
    axes.set(xlabel="epoch of the linear classifier", ylabel=f"test top-1{f' on {dataset}' * bool(dataset)} (%)")
    axes.set_title(spread_note([*accuracies.values(), *([] if random is None else [random])]), fontsize=10, color=GREY, loc="right")
    tidy(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, title="last epoch")
    return figure


def accuracy_by_epoch_figure(accuracies: Mapping[int, torch.Tensor], name: str = "") -> Figure:
    """Left: top-1 (percent) at the classifier's last epoch over the pretraining epoch, mean and every trial of (trials, epochs).
    Right: over the classifier's epochs, a line for each pretraining epoch."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = sorted(accuracies)
    last = {epoch: accuracies[epoch][:, -1] for epoch in epochs}
    left.plot(epochs, [float(last[epoch].mean()) for epoch in epochs], color="0.25", linewidth=1.6, zorder=2)
    colours = epoch_colours(len(epochs))
    for colour, epoch in zip(colours, epochs):
        left.scatter([epoch] * len(last[epoch]), last[epoch].tolist(), color=colour, s=22, zorder=3)
        draw_curve(right, accuracies[epoch], colour, str(epoch))
    left.set(xlabel="epoch of pretraining", ylabel="test top-1 (%)")
    right.set(xlabel="epoch of the linear classifier", ylabel="test top-1 (%)")
    left.set_title("last epoch of the classifier, every trial", fontsize=10)
    right.set_title(spread_note(list(accuracies.values())), fontsize=10)
    tidy(left, ticks=6)
    if len(epochs) <= 8:
        left.set_xticks(epochs)
    tidy(right, ticks=6)
    figure.suptitle(name)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(epochs)), frameon=False,
                  title="epoch of pretraining: top-1 at the last epoch")
    return figure


def accuracy_figure(accuracy: torch.Tensor, result: Mapping[str, Any]) -> Figure:
    """One evaluation: test top-1 (percent) over the classifier's epochs, a line for each trial of (trials, epochs), and the kNN's."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    trials = len(accuracy)
    for i, curve in enumerate(accuracy.tolist()):
        axes.plot(range(1, len(curve) + 1), curve, color=COLOURS["M3"], linewidth=1.3, alpha=0.8, marker="o" if len(curve) == 1 else None,
                  label=f"linear, {trials} trial{'s' * (trials > 1)}: {result['linear_top1']:.1f} %" if i == 0 else None)
    axes.axhline(result["knn_top1"], color=OTHER_COLOURS[0], linestyle="--", label=f"kNN, k = {result['knn_k']}: {result['knn_top1']:.1f} %")
    name = "untrained" if result["encoder"] == "random" else f"epoch {result['epoch']}"
    axes.set(xlabel="epoch of the linear classifier", ylabel="test top-1 (%)", title=f"{result['arch']}, {name}, on {result['dataset']}")
    tidy(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def confusion_figure(confusion: torch.Tensor, result: Mapping[str, Any]) -> Figure:
    """Counts (C, C), row the true class, as shares of the row in percent; numbers and names where there is room for them."""
    share = 100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    classes, names = len(share), result["class_names"]
    side = 8 if classes > 6 else 6
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    if classes <= 20:
        for i, row in enumerate(share.tolist()):
            for j, value in enumerate(row):
                if value >= 0.05:
                    axes.text(j, i, f"{value:.0f}" if classes > 10 else f"{value:.1f}", ha="center", va="center", fontsize=8, color="white" if value > 55 else "0.1")
    if classes <= 50:
        axes.set_xticks(range(classes), [name[:16] for name in names], rotation=90 if classes > 3 else 0, fontsize=9 if classes <= 20 else 6)
        axes.set_yticks(range(classes), [name[:16] for name in names], fontsize=9 if classes <= 20 else 6)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{result['arch']} on {result['dataset']}: share of the true class (%), top-1 {result['linear_top1']:.1f} %", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.6, label="%")
    return figure


def knn_figure(log: Mapping[str, Sequence[float]]) -> Figure:
    """kNN top-1 (percent) and effective rank while training, over steps: of the columns `step`, `knn_top1` and `effective_rank` of a log."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    seen = [(step, top1) for step, top1 in zip(log["step"], log["knn_top1"]) if not math.isnan(top1)]
    left.plot(*zip(*seen), color=COLOURS["M3"], linewidth=1.6, marker="o", markersize=4)
    right.plot(log["step"], log["effective_rank"], color=COLOURS["M2"], linewidth=1.6)
    left.set(xlabel="step", ylabel="kNN top-1 (%)")
    right.set(xlabel="step", ylabel="effective rank of the queue")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        tidy(axes, ticks=5)
    return figure


def draw_curve(axes: Axes, accuracy: torch.Tensor, colour: str, label: str, linestyle: str = "-") -> None:
    """Mean over trials of (trials, epochs) as a line, its standard deviation as a band, the last value in the label."""
    mean = accuracy.double().mean(dim=0)
    std = accuracy.double().std(dim=0) if len(accuracy) > 1 else torch.zeros_like(mean)
    epochs = list(range(1, len(mean) + 1))
    text = f"{label}: {mean[-1]:.1f}" + (f" ± {std[-1]:.1f} %" if len(accuracy) > 1 else " %")
    axes.plot(epochs, mean.tolist(), color=colour, linewidth=1.8, linestyle=linestyle, marker="o" if len(epochs) == 1 else None, label=text)
    axes.fill_between(epochs, (mean - std).tolist(), (mean + std).tolist(), color=colour, alpha=0.2, linewidth=0)


def spread_note(accuracies: Sequence[torch.Tensor]) -> str:
    trials = sorted({len(accuracy) for accuracy in accuracies})
    if trials[-1] == 1:
        return "one trial"
    return f"mean ± standard deviation, {' to '.join(map(str, sorted({trials[0], trials[-1]})))} trials"


def colour_of(version: str, versions: Mapping[str, Any]) -> str:
    """M0 to M3 have fixed colours; others take the remaining ones in their order."""
    others = [name for name in versions if name not in COLOURS]
    return COLOURS.get(version) or OTHER_COLOURS[others.index(version) % len(OTHER_COLOURS)]


def epoch_colours(count: int) -> list[str]:
    """So many colours from dark (early) to light (late)."""
    return [to_hex(colormaps["viridis"](0.85 * i / max(1, count - 1))) for i in range(count)]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over each value and up to `reach` values on either side."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), torch.tensor(values, dtype=torch.float64).cumsum(0)])
    at = torch.arange(len(values))
    low, high = (at - reach).clamp_min(0), (at + reach + 1).clamp_max(len(values))
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def tidy(axes: Axes, ticks: int = 8) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    utils.main_guard(main)
