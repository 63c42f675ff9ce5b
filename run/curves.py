"""What the log of a run says: its loss as a curve, and means for a table."""

import math
from pathlib import Path
from typing import Any

import numpy as np

import config
import utils


def read_loss(folder: Path) -> dict[str, Any]:
    """The columns of a run's log.csv, and what figures.curves.loss_figure draws beside the loss.

    `chance` is log(K + 1), the loss if no key could be told from another, where the settings say
    K; `drops` are the steps at which a learning rate that was constant fell. Raises UserError
    where there is no log, or none with a row.
    """
    path = folder / "log.csv"
    if not path.exists():
        runs = sorted(other.parent.name for other in folder.parent.glob("*/log.csv"))
        there = f"runs with one: {', '.join(runs) or 'none'}"
        raise utils.UserError(f"{str(folder)!r} has no log.csv; {there}")
    log: dict[str, Any] = utils.read_csv(path, ("step", "loss"))
    if not log["step"]:
        raise utils.UserError(f"{str(path)!r} has no rows yet: the run just began")
    if num_keys := read_settings(folder).get("num_keys"):
        log["chance"] = math.log(num_keys + 1)
    rates = log.get("lr", [])
    falls = (i for i in range(2, len(rates)) if rates[i - 2] == rates[i - 1] > 2 * rates[i])
    log["drops"] = [log["step"][i - 1] for i in falls]
    return log


def read_curve(folder: Path) -> dict[str, Any]:
    """The loss alone, as `read_loss` has it, in few digits: what is kept for a figure."""
    log = read_loss(folder)
    steps, losses = map(int, log["step"]), (round(loss, 4) for loss in log["loss"])
    marks = {name: log[name] for name in ("chance", "drops") if name in log}
    return {"step": list(steps), "loss": list(losses), **marks}


def summarize(folder: Path, epoch: int | None) -> dict[str, float]:
    """Means of `loss` and `contrast_top1` over an epoch, and `minutes`, the time of all steps.

    What the log does not tell is left out.
    """
    if not (folder / "log.csv").exists():
        return {}
    log = utils.read_csv(folder / "log.csv", ("step", "loss"))
    if not log["step"] or not {"epoch", "contrast_top1", "images_per_second"} <= log.keys():
        return {}
    steps = np.diff(log["step"], prepend=0)  # a row holds means over the steps since the last one
    images = steps * read_settings(folder).get("batch_size", 0)
    summary = {"minutes": round(float((images / log["images_per_second"]).sum()) / 60, 1)}
    weights = steps * (np.asarray(log["epoch"]) == epoch)
    if weights.any():
        for name in ("loss", "contrast_top1"):
            summary[name] = round(float(np.average(log[name], weights=weights)), 3)
    return summary


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run, as saved with it; none if they are gone."""
    path = folder / "config.yaml"
    content = config.read_yaml(path) if path.exists() else None
    return content if isinstance(content, dict) else {}
