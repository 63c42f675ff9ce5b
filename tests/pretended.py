"""A pretended GPU: tensors on cuda have a shape and no numbers; those on the CPU are real.

So a tensor on the wrong device fails as on a GPU, and whatever waits for the device is seen.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from run import checkpoints, compute

ROOT = Path(__file__).resolve().parents[1]
FILES = {str(path) for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)}


class PretendedGPU(FakeTensorMode):
    """Within it cuda is there.

    `waits` has the functions on the stack at each time that the host waited for the device, and
    `pageable` those at each copy to it from memory that is not pinned, which waits, too.
    """

    avoid_device_init = True  # there is no driver

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[list[str]] = []
        self.pageable: list[list[str]] = []
        self.pinned: set[int] = set()
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, FakeTensor) for x in tensors)
        target = kwargs.get("device")
        to_gpu = target is not None and torch.device(target).type == "cuda"
        if not on_gpu and not to_gpu:
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal"):  # .item() and what reads a number by it
            self.waits.append(stack())
            return 1.0 if args[0].is_floating_point() and name != "equal" else 1
        if on_gpu and target is not None and not to_gpu:
            self.waits.append(stack())
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "_to_copy" and not on_gpu and args[0].numel():
            if not kwargs.get("non_blocking"):
                self.waits.append(stack())
            if args[0].untyped_storage().data_ptr() not in self.pinned:
                self.pageable.append(stack())
        if name.startswith("_fused_"):  # optimizers, in place
            return None
        return super().__torch_dispatch__(function, types, args, kwargs)

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        """A copy whose memory counts as pinned, and stays so."""
        x = x.clone()
        self._kept.append(x)
        self.pinned.add(x.untyped_storage().data_ptr())
        return x


def stack() -> list[str]:
    """The project's functions that called, the outermost first."""
    frames = traceback.extract_stack()[:-2]
    return [frame.name for frame in frames if frame.filename in FILES]


class Moment:
    """torch.cuda.Event, in a second that never passes."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Moment") -> float:
        return 1.0


def backward(loss: torch.Tensor) -> None:
    """Gradients without numbers for the leaves; the engine's threads need a GPU's driver."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)
        nodes += [after for after, _ in node.next_functions]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGPU:
    """One GPU, of compute capability 9.0, without Triton."""
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_arch_list": [],
        "get_device_capability": (9, 0),
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "mem_get_info": (2**40, 2**40),
        "set_device": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, a=answer, **kwargs: a)
    monkeypatch.setattr(torch.cuda, "Event", Moment)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch._subclasses.fake_tensor, "init_gpu_context", lambda device: None)
    mode = PretendedGPU()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: mode.pin(self))
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(compute, "HAS_TRITON", False)
    monkeypatch.setattr(checkpoints, "save", lambda path, content: None)
    return mode
