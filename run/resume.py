"""What an exact continuation needs: saved into a checkpoint, compared, and put back."""

import dataclasses
import math
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
    if not _is_count(checkpoint["step"]):
        odd = f"its step is {str(checkpoint['step'])[:40]!r}"
        raise UserError(f"checkpoint {str(path)!r} cannot be continued: {odd}")
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
    """Put a checkpoint's state back; returns its step.

    UserError if it is not what this run would have written: names, shapes, types and ranges are
    checked before anything uses them, because the fused optimizer reads whatever it is given.
    """
    state = {k.removeprefix("module."): value for k, value in checkpoint["state_dict"].items()}
    try:
        for name, value in state.items():
            _check_tensor(name, value)
        moco.load_state_dict(state)
        if not 0 <= int(moco.queue_ptr) < moco.K:
            raise ValueError(f"queue_ptr is {int(moco.queue_ptr)}, of {moco.K} keys")
        fitting = check_optimizer(checkpoint["optimizer"], optimizer)
        optimizer.load_state_dict(fitting)
        _check_meter(checkpoint["meter"])
        meter.load_state_dict(checkpoint["meter"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the checkpoint does not fit its own settings: {reason}") from None
    return checkpoint["step"]


def check_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer as `load_state_dict` takes it; its groups are this run's own.

    Raises ValueError unless it has a tensor for each that the optimizer keeps, of its parameter's
    shape and finite; KeyError, TypeError or AttributeError if it is no such state at all.
    """
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
        raise ValueError("the optimizer has other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in own for number in group["params"]]
    kept = {"exp_avg", "exp_avg_sq", "step"}
    if isinstance(optimizer, torch.optim.SGD):
        kept = {"momentum_buffer"} if own[0]["momentum"] else set()
    state = {number: values for number, values in saved["state"].items() if values or kept}
    if state and set(state) != set(numbers):
        raise ValueError(f"the optimizer has the state of {len(state)} of {len(numbers)} weights")
    for number, parameter in zip(numbers, parameters, strict=True):
        values = state.get(number, {})
        if values and {name for name, value in values.items() if value is not None} != kept:
            raise ValueError(
                f"the optimizer keeps {', '.join(map(str, values))} of weight {number}"
            )
        for name, value in values.items():
            if value is None:
                continue
            _check_tensor(f"the optimizer's {name}", value)
            shape = torch.Size() if name == "step" else parameter.shape
            if (
                value.shape != shape
                or not value.is_floating_point()
                or name == "step"
                and value < 0
            ):
                odd = f"{tuple(value.shape)} of {value.dtype}"
                raise ValueError(f"the optimizer's {name} of a weight {tuple(shape)} is {odd}")
    scaler = saved.get("scaler", {})  # of a loss in fp16
    if not all(
        isinstance(value, (int, float)) and 0 <= value < math.inf for value in scaler.values()
    ):
        raise ValueError("the scale of the loss is no number")
    return {**saved, "state": state, "param_groups": own}


def _check_tensor(name: str, value: Any) -> None:
    if not torch.is_tensor(value) or value.layout is not torch.strided:
        raise ValueError(f"{name} is no plain tensor")
    if not value.isfinite().all():
        raise ValueError(f"{name} is not finite")


def _check_meter(saved: dict[str, Any]) -> None:
    if not isinstance(saved, dict):
        raise TypeError("the meter has no names")
    _check_tensor("the meter's sums", saved["sums"])
    if saved["sums"].ndim != 1 or len(saved["sums"]) > 3:
        raise ValueError(f"the meter has {tuple(saved['sums'].shape)} sums")
    seconds = saved.get("seconds", 0.0)
    good = isinstance(seconds, (int, float)) and 0 <= seconds < math.inf
    if not good or not all(_is_count(saved[name]) for name in ("steps", "images")):
        raise ValueError("the meter counts no steps, images or seconds")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62
