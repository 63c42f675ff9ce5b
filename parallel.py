"""Where the work runs: device, precision, batch-norm groups, the shuffle of the keys, and the processes that decode images.

One device here; the functions take the number of devices so that a launch on several only changes what it passes.
"""

import atexit
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator

import torch


def pick_device(name: str = "auto") -> torch.device:
    """The device named, or for `auto` the first of cuda, mps, cpu that is there.

    Raises ValueError if the named device is not known or not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not known: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not available: PyTorch sees {torch.cuda.device_count()} CUDA devices (use --device cpu)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available on this machine (use --device cpu)")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp64`; `auto` is bf16 where the hardware computes in it (emulation does not count), else fp32.

    Raises ValueError for float64 on mps, which has none.
    """
    if name == "fp64" and device.type == "mps":
        raise ValueError("precision fp64 does not exist on mps: use fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return "bf16" if native is not None and native() else "fp32"
    return "fp32"


def precision_dtype(precision: str) -> torch.dtype:
    """The type that weights and views are kept in: float64 for fp64, else float32 (bf16 is autocast's)."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context that the encoders' forward passes run in."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def resolve_bn_groups(bn_groups: int | str, batch_size: int, devices: int = 1) -> int:
    """The number G of groups of the global batch with batch-norm statistics of their own (paper, section 3.3).

    `auto` is the number of devices, or 8 on one device (8 GPUs, as in the paper). Groups follow `torch.chunk`, as `nn.DataParallel`
    splits a batch. Raises ValueError if the batch does not give G groups of at least 2 images.
    """
    groups = (devices if devices > 1 else 8) if bn_groups == "auto" else int(bn_groups)
    sizes = group_sizes(batch_size, groups)
    if len(sizes) != groups or min(sizes) < 2:
        fits = max((g for g in range(1, groups) if len(s := group_sizes(batch_size, g)) == g and min(s) >= 2), default=None)
        advice = f"use --bn_groups {fits}, or a larger batch" if fits else "use a larger batch"
        raise ValueError(f"batch_size {batch_size} does not split into {groups} batch-norm groups of at least 2 images: {advice}")
    return groups


def group_sizes(batch_size: int, groups: int) -> list[int]:
    """The sizes of the groups that `torch.chunk` makes (possibly fewer than asked for): 256 over 6 is 43 x 5 + 41."""
    return [len(chunk) for chunk in torch.empty(batch_size).chunk(groups)]


def shuffle(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Row i of the result is row permutation[i] of x (N, ...)."""
    return x[permutation]


def unshuffle(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """The inverse of `shuffle`: row permutation[i] of the result is row i of x (N, ...)."""
    return torch.empty_like(x).index_copy_(0, permutation, x)


def start_worker(_: int) -> None:
    """Workers take one core each and leave signals to the main process."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def child_signals_as_before() -> Iterator[None]:
    """Keep PyTorch from raising at once, wherever the main process is, when a worker dies: the next batch tells, in `dataloader.iterate`."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def end_workers_at_exit() -> None:
    """Register `_end_workers` once, and as the last: what is registered last runs first."""
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)


def _end_workers() -> None:
    """At the exit after an error, which keeps the loader alive: multiprocessing sends SIGTERM, ignored by workers, and would wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
