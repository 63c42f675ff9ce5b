"""What a batch takes of memory, counted before the work."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from data.base import Crop, height_width
from utils import UserError

N = 16384  # images that are counted, beside which what does not grow with them is nothing
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, under Linux


def image_bytes(
    encoder: nn.Module, channels: int, crop: Crop, precision: str
) -> tuple[float, float]:
    """Bytes of an image's way through an encoder: with gradients, and without.

    With them, those of all that autograd keeps; without, the largest input and output of a layer.
    Found on PyTorch's meta device, where nothing is computed.
    """
    scale = {"fp64": 2, "fp32": 1}.get(precision, 0.5) / N  # they are counted in float32
    values = {name: _on_meta(value) for name, value in encoder.named_buffers()}
    for name, value in encoder.named_parameters():
        values[name] = _on_meta(value).requires_grad_()
    weights = {value.untyped_storage()._cdata for value in values.values()}
    kept: dict[int, Tensor] = {}  # by storage
    layers = []

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage()._cdata] = value
        return value

    def measure(_layer: nn.Module, inputs: tuple, output: object) -> None:
        layers.append(sum(x.nbytes for x in (*inputs, output) if torch.is_tensor(x)))

    images = torch.empty(N, channels, *height_width(crop), device="meta")
    hook = nn.modules.module.register_module_forward_hook(measure)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            torch.func.functional_call(encoder, values, images)
    finally:
        hook.remove()
    with_gradients = sum(v.untyped_storage().nbytes() for k, v in kept.items() if k not in weights)
    return with_gradients * scale, max(layers) * scale


def _on_meta(value: Tensor) -> Tensor:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, dtype=dtype, device="meta")


def check_memory(needed: float, device: torch.device, what: str, remedy: str) -> None:
    """UserError if a device has clearly less memory than is needed for a batch."""
    there = memory_of(device)
    if needed > 1.25 * there:  # a ViT's attention may keep a fifth less than is counted
        where = "this machine" if device.type == "cpu" else device
        raise UserError(
            f"{what} takes {needed / 1e9:,.0f} GB of memory, and {where} has "
            f"{there / 1e9:,.0f} GB: {remedy}"
        )


def memory_of(device: torch.device) -> float:
    """The bytes of a device's memory, for a CPU a process's part; infinite if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return math.inf
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text().strip()) != "max":
        limits.append(int(limit))
    return min(limits) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
