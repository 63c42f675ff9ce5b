"""run/kernels.py against the loop over groups, by Triton's interpreter: a process of its own.

Prints, for each case, the largest difference of each result, as JSON.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GroupBatchNorm2d
from run import compute

# type, N, C, side, groups, channels last, taken by another (defer)
CASES = {
    "even": ("float64", 8, 5, 3, 4, True, False),
    "uneven, more columns and rows than a tile": ("float64", 14, 70, 9, 4, True, False),
    "one pixel": ("float64", 15, 8, 1, 2, True, False),
    "one group, deferred": ("float64", 9, 3, 20, 1, True, True),
    "planes": ("float64", 8, 5, 3, 2, False, False),
    "float32": ("float32", 16, 64, 8, 8, True, False),
    "bfloat16": ("bfloat16", 16, 16, 8, 2, True, False),
    "float16": ("float16", 16, 16, 8, 2, True, False),
}


def results(
    case: tuple, at_once: bool, x: torch.Tensor, dy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """All that a layer gives and changes, by the kernels or by the loop."""
    compute.has_kernels = lambda device: at_once
    _, _, channels, _, groups, _, deferred = case
    dtype = torch.promote_types(x.dtype, torch.float32)
    torch.manual_seed(1)
    layer, taken = GroupBatchNorm2d(channels, groups, momentum=0.3).to(dtype), []
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if deferred:
        layer.defer = taken.append
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(dy)
    if deferred:
        layer.update_running(*taken)
    assert at_once == (type(out.grad_fn).__name__ == "GroupBatchNormBackward")
    found = {"y": out, "dx": x.grad, **dict(layer.named_buffers())}
    return found | {f"d{name}": p.grad for name, p in layer.named_parameters()}


def compare(case: tuple) -> dict[str, float]:
    torch.manual_seed(0)
    name, n, channels, side, _, last, _ = case
    form = torch.channels_last if last else torch.contiguous_format
    x = 2 * torch.randn(n, channels, side, side, dtype=torch.float64) + 5
    x, dy = (v.to(getattr(torch, name), memory_format=form) for v in (x, torch.randn_like(x)))
    loop, kernels = (results(case, at_once, x, dy) for at_once in (False, True))
    assert kernels["y"].is_contiguous(memory_format=torch.channels_last)
    assert all(kernels[key].dtype == value.dtype for key, value in loop.items())
    return {key: (value - kernels[key]).double().abs().max().item() for key, value in loop.items()}


if __name__ == "__main__":
    print(json.dumps({name: compare(case) for name, case in CASES.items()}))
