"""What the log of a run says: its loss as a curve, and means for a table."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import config
import run.log
import utils
from run.flags import show

# what the paper calls settings
SYMBOLS = {"momentum": "m", "num_keys": "K", "temperature": "T", "bn_groups": "groups"}
SYMBOLS |= {"batch_size": "batch", "max_epoch": "epochs"}


def read_log(folder: Path) -> dict[str, list[float]]:
    """The columns of a run's log.csv; UserError where there is none, or none with a row."""
    path = folder / "log.csv"
    if not path.exists():
        runs = sorted(other.parent.name for other in folder.parent.glob("*/log.csv"))
        there = f"runs with one: {', '.join(runs) or 'none'}"
        raise utils.UserError(f"{str(folder)!r} has no log.csv; {there}")
    log = run.log.read(path)
    if not any(log["step"]):
        raise utils.UserError(f"{str(path)!r} has no rows yet: the run just began")
    return log


def read_loss(folder: Path) -> dict[str, Any]:
    """The loss of a run, as figures.curves.loss_figure draws it: step, loss, chance, drops.

    `chance` is log(K + 1), the loss if no key could be told from another, where the settings say
    K; `drops` are the steps at which a learning rate that was constant fell.
    """
    log = read_log(folder)
    rows = [i for i, step in enumerate(log["step"]) if step]  # the first may be of no step
    steps = [int(log["step"][i]) for i in rows]
    curve: dict[str, Any] = {"step": steps, "loss": [round(log["loss"][i], 4) for i in rows]}
    if num_keys := read_settings(folder).get("num_keys"):
        curve["chance"] = math.log(num_keys + 1)
    rates = [log["lr"][i] for i in rows] if "lr" in log else []
    falls = (i for i in range(2, len(rates)) if rates[i - 2] == rates[i - 1] > 2 * rates[i])
    return curve | {"drops": [steps[i - 1] for i in falls]}


def read_knn(folder: Path) -> dict[str, Any] | None:
    """kNN while training, as figures.curves.knn_figure draws it; None if it was not measured.

    `epoch` and `knn_top1`, from epoch 0, the untrained encoder, on; `rank_epoch` and
    `effective_rank` of the queue.
    """
    log = read_log(folder)
    if not {"epoch", "knn_top1", "effective_rank"} <= log.keys():
        return None
    top1 = log["knn_top1"]
    measured = [i for i, value in enumerate(top1) if not math.isnan(value)]
    ends = [i for i in measured if log["step"][i]]  # kNN is measured where an epoch ends
    if not ends:
        return None
    steps_per_epoch = log["step"][ends[0]] / log["epoch"][ends[0]]
    epochs = [round(step / steps_per_epoch, 3) for step in log["step"]]
    ranks = [i for i, step in enumerate(log["step"]) if step]
    return {
        "epoch": [epochs[i] for i in measured],
        "knn_top1": [round(top1[i], 2) for i in measured],
        "rank_epoch": [epochs[i] for i in ranks],
        "effective_rank": [round(log["effective_rank"][i], 2) for i in ranks],
    }


def summarize(folder: Path, epoch: int | None) -> dict[str, float]:
    """Means of `loss` and `contrast_top1` over an epoch, and `minutes`, the time of all steps.

    What the log does not tell is left out.
    """
    if not (folder / "log.csv").exists():
        return {}
    log = run.log.read(folder / "log.csv")
    needed = {"epoch", "contrast_top1", "images_per_second"}
    if not any(log["step"]) or not needed <= log.keys():
        return {}
    log = {name: np.array(values) for name, values in log.items()}
    log = {name: values[log["step"] > 0] for name, values in log.items()}
    steps = np.diff(log["step"], prepend=0)  # a row holds means over the steps since the last one
    images = steps * read_settings(folder).get("batch_size", 0)
    summary = {"minutes": round(float((images / log["images_per_second"]).sum()) / 60, 1)}
    weights = steps * (log["epoch"] == epoch)
    if weights.any():
        for name in ("loss", "contrast_top1"):
            summary[name] = round(float(np.average(log[name], weights=weights)), 3)
    return summary


def describe_differences(runs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """For each version, given by a run of it, the settings in which the versions differ."""
    settings = {version: read_settings(folder) for version, folder in runs.items()}
    free = {"seed", *config.names_with(config.TrainSettings, config.MAY_CHANGE)}
    names = [name for name in config.names_of(config.TrainSettings) if name not in free]
    differ = [n for n in names if len({repr(each.get(n)) for each in settings.values()}) > 1]
    return {version: {n: each.get(n) for n in differ} for version, each in settings.items()}


def label_versions(runs: Mapping[str, Path]) -> dict[str, str]:
    """What sets each version apart, in few words: m = 0.9, shuffled."""
    return {version: label(each) for version, each in describe_differences(runs).items()}


def label(settings: Mapping[str, Any]) -> str:
    shuffled = {True: "shuffled", False: "not shuffled"}
    return ", ".join(
        shuffled[value] if name == "shuffle_bn" else f"{SYMBOLS.get(name, name)} = {show(value)}"
        for name, value in settings.items()
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run, as saved with it; none if they are gone, UserError for odd ones."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    content = config.read_config(str(path))
    try:
        settings = config.from_values(config.TrainSettings, content)
    except utils.UserError as error:
        raise utils.UserError(f"{str(path)!r} is damaged: {error}") from None
    return dataclasses.asdict(settings)
