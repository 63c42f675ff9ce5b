"""What an exact continuation needs: saved into a checkpoint, compared, and put back."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import config
from config import TrainSettings
from run.checkpoints import describe_last
from run.meters import REMEDY, Meter
from utils import UserError, provenance


def snapshot(
    settings: TrainSettings,
    step: int,
    state: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    images: int,
    folder: Path,
) -> dict[str, Any]:
    """A checkpoint's content. `state` is MoCo's, `images` the size of the data set.

    The state_dict has the reference's keys: module.encoder_q.*, module.queue. Raises UserError if
    a weight is not finite, which the loss would show only at the next step.
    """
    for name, value in state.items():
        if not value.isfinite().all():
            failure = f"after step {step} {name} is not finite"
            raise UserError(f"{failure}: {describe_last(folder)}; {REMEDY}")
    return {
        "epoch": step // (images // settings.batch_size),
        "step": step,
        "arch": settings.arch,
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": optimizer.state_dict(),
        "config": dataclasses.asdict(settings),
        "images": images,
        "meter": meter.state_dict(),
        "provenance": provenance(),
    }


def check(checkpoint: dict[str, Any], path: Path, settings: TrainSettings, images: int) -> None:
    """UserError if a checkpoint is of another run than these settings', or past its end."""
    needed = ("config", "step", "optimizer", "meter")
    if missing := ", ".join(name for name in needed if name not in checkpoint):
        raise UserError(f"checkpoint {str(path)!r} cannot be continued: it has no {missing}")
    free = config.names_with(TrainSettings, config.MAY_CHANGE)
    if not settings.cosine:
        free.append("max_epoch")  # only the cosine depends on it
    # a setting that is newer than the checkpoint had its default value
    old = dataclasses.asdict(config.from_values(TrainSettings, checkpoint["config"]))
    old["images"] = checkpoint.get("images")
    new = {**dataclasses.asdict(settings), "images": images}
    names = [name for name in new if name not in free and old[name] != new[name]]
    if names == ["max_epoch"]:
        raise UserError(f"--max_epoch {new['max_epoch']}: {_describe_lengthening(old, new, path)}")
    if changes := "; ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in names):
        remedy = "go back to them, or name another --exp_version"
        raise UserError(f"--resume with other settings than those of {path}: {changes}: {remedy}")
    end = settings.max_epoch * (images // settings.batch_size)
    if checkpoint["step"] > end:
        there = f"{str(path)!r} is already at step {checkpoint['step']}: use a larger one"
        raise UserError(f"--max_epoch {settings.max_epoch} ends at step {end}, but {there}")


def _describe_lengthening(old: dict[str, Any], new: dict[str, Any], path: Path) -> str:
    """What to do for more epochs where the schedule depends on their number."""
    epochs, version = new["max_epoch"] - old["max_epoch"], f"{old['exp_version']}-longer"
    values = {**new, "init": str(path), "exp_version": version, "max_epoch": max(1, epochs)}
    del values["images"]
    command = shlex.join(["python", "train.py", *config.words_of(TrainSettings, values)])
    return (
        f"the cosine of {path} was made for {old['max_epoch']} epochs and cannot be stretched: "
        f"a run from its weights, with a cosine of its own, is: {command}"
    )


def restore(
    checkpoint: dict[str, Any],
    moco: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
) -> int:
    """Put a checkpoint's state back; returns its step. UserError if it does not fit."""
    state = {k.removeprefix("module."): value for k, value in checkpoint["state_dict"].items()}
    try:
        moco.load_state_dict(state)
        optimizer.load_state_dict(checkpoint["optimizer"])
        meter.load_state_dict(checkpoint["meter"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the checkpoint does not fit its own settings: {reason}") from None
    for group in optimizer.param_groups:
        group["fused"] = optimizer.defaults["fused"]  # a matter of the device, not of the run
    return checkpoint["step"]
