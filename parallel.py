"""Where the work runs: devices, precision, batch-norm groups, what the devices exchange, and the processes that decode images.

A launch is one of three, with the same methods, so that training reads the same for all and gives the same curve:

    OneDevice      a CPU, one GPU
    Replicas       plain `python` with several GPUs visible: `nn.DataParallel` around each encoder
    Processes      `torchrun`, on one or several machines: a process for each device, `DistributedDataParallel` around the query encoder

A batch of N images is split into contiguous shares, one a device, as `torch.chunk` does: 256 over 6 is 43 x 5 + 41.
"""

import atexit
import contextlib
import datetime
import inspect
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

TIMEOUT = datetime.timedelta(minutes=10)  # of a process that waits for the others; one that died ends the job at once, by torchrun


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

    `auto` is the number of devices, or 8 on one device (8 GPUs, as in the paper). A device holds G / devices of them. On one device, and
    with one group a device, groups follow `torch.chunk`; else G must divide the batch. Raises ValueError, with the nearest values that
    fit, if the batch does not give every device its share, or G groups of at least 2 images.
    """
    groups = (devices if devices > 1 else 8) if bn_groups == "auto" else int(bn_groups)
    if not _fits(groups, batch_size, devices):
        fitting = [g for g in range(1, batch_size // 2 + 1) if _fits(g, batch_size, devices)]
        near = sorted(sorted(fitting, key=lambda g: (abs(g - groups), g))[:2])
        advice = f"use --bn_groups {' or '.join(map(str, near))}, or another batch size" if near else "use a larger batch"
        over = f" over {devices} devices" if devices > 1 else ""
        raise ValueError(f"batch_size {batch_size}{over} does not split into {groups} batch-norm groups of at least 2 images: {advice}")
    return groups


def _fits(groups: int, batch_size: int, devices: int) -> bool:
    sizes = shares(batch_size, groups)
    even_or_one_each = devices == 1 or groups == devices or batch_size % groups == 0
    return groups % devices == 0 and len(sizes) == groups and min(sizes) >= 2 and even_or_one_each


def shares(n: int, parts: int) -> list[int]:
    """The sizes of the parts that `torch.chunk` makes of n rows (possibly fewer than asked for): 256 over 6 is 43 x 5 + 41."""
    return [len(chunk) for chunk in torch.empty(n).chunk(parts)]


# ----------------------------------------------------------------------------------------------------------------------- launches

def launch(name: str = "auto") -> "OneDevice":
    """What this process was started for, by the environment of torchrun and the visible devices; ValueError as `pick_device`.

    Use it as a context (`with launch(...) as devices:`): several processes meet when it opens and part when it closes.
    """
    device = pick_device(name)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"device {name!r} names one GPU, but torchrun gives each process one of its own: use cuda or auto")
            device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        return Processes(device)
    if device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1:
        return Replicas(torch.device("cuda:0"), torch.cuda.device_count())
    return OneDevice(device)


class OneDevice:
    """The whole batch on one device. The other launches change what is said here."""

    devices = 1    # over which a batch is split
    processes = 1  # of this launch
    rank = 0       # of this process; the first one prints and writes
    note = ""      # what a user should know of this launch

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self.device = device
        self.batch_size = 0  # of the global batch, when training
        self._wrapped: dict[nn.Module, Callable] = {}

    @property
    def name(self) -> str:
        return str(self.device)

    def __enter__(self) -> "OneDevice":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def attach(self, moco: nn.Module, batch_size: int) -> None:
        """Let a `model.MoCo` run on all devices, with batches of `batch_size` images over all of them."""
        moco.launch, self.batch_size = self, batch_size
        self.wrap(moco.encoder_q)
        self.wrap(moco.encoder_k)

    def wrap(self, encoder: nn.Module) -> None:
        """Make `encode` run this encoder on all devices. The wrapper is kept here, so the encoder's names stay."""

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """encoder(x) on the devices of this process, in the order of x."""
        return self._wrapped.get(encoder, encoder)(x)

    def rows(self, n: int) -> slice:
        """The rows of n that this process holds."""
        return slice(0, n)

    def weight(self) -> float:
        """By how much this process's mean loss counts, where gradients are averaged over processes: 1 if all shares are even."""
        return 1.0

    def shuffle(self, x: Tensor, permutation: Tensor) -> Tensor:
        """Row i of the global result is row permutation[i] of the global batch; of both, x (N, C, H, W) and the result are this process's rows."""
        return shuffle(x, permutation)

    def gather(self, x: Tensor, n: int = 0) -> Tensor:
        """All n rows (by default the batch), on every process, of which each holds its own in x."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over processes, on every process."""
        return x

    def agreed(self, wishes: Sequence[int], meeting: bool = True) -> list[int]:
        """The largest of each wish over processes. Several processes ask each other only at a `meeting`, all at the same step; else 0."""
        return list(wishes)

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of a module, with the running statistics of all processes averaged."""
        return module.state_dict()


class Replicas(OneDevice):
    """`nn.DataParallel` around each encoder; all else is on the first GPU. Never run here on real GPUs: the tests use a stand-in on the CPU."""

    note = "nn.DataParallel copies the encoders to every GPU at every step: torchrun --nproc_per_node=GPUS train.py ... is faster"

    def __init__(self, device: torch.device, devices: int, data_parallel: Callable[[nn.Module], Callable] = nn.DataParallel) -> None:
        super().__init__(device)
        self.devices, self._data_parallel = devices, data_parallel

    @property
    def name(self) -> str:
        return f"{self.devices} GPUs with nn.DataParallel"

    def wrap(self, encoder: nn.Module) -> None:
        self._wrapped[encoder] = self._data_parallel(encoder)

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        out = super().encode(encoder, x)
        for module in encoder.modules():
            if hasattr(module, "take_statistics_of_replicas"):
                module.take_statistics_of_replicas()
        return out


class Processes(OneDevice):
    """A process for each device. Every process holds the same queue and the same key encoder; neither is ever sent.

    Beside the gradients a step sends the key views to where the permutation puts them (one all-to-all; none without
    shuffling), and all keys to all processes (one all-gather). Every process draws the permutation itself, from (seed, step).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.devices = self.processes

    @property
    def name(self) -> str:
        return f"{self.processes} process{'es' * (self.processes > 1)} on {self.device.type}"

    def __enter__(self) -> "Processes":
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # 1 x 1 kernels: two ways to write the strides of the same memory
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or kind is SystemExit:  # all of them come here; after an error, torchrun ends the others
            dist.barrier()
            dist.destroy_process_group()

    def wrap(self, encoder: nn.Module) -> None:
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            return  # nothing to average
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        no_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}  # renamed in torch 2.15
        self._wrapped[encoder] = nn.parallel.DistributedDataParallel(
            encoder, device_ids=None if self.device.type == "cpu" else [self.device], gradient_as_bucket_view=True, **no_buffers)

    def rows(self, n: int) -> slice:
        sizes = self._sizes(n)
        return slice(sum(sizes[:self.rank]), sum(sizes[:self.rank + 1]))

    def weight(self) -> float:
        return self._sizes(self.batch_size)[self.rank] * self.devices / self.batch_size

    def shuffle(self, x: Tensor, permutation: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the first convolution would do it: half the bytes, the same result
        target = torch.arange(self.devices).repeat_interleave(torch.tensor(self._sizes(len(permutation))))
        source, own = target[permutation], self.rows(len(permutation))  # row i of the result goes from process source[i] to target[i]
        leaving, arriving = source == self.rank, source[own]
        counts = [torch.bincount(part, minlength=self.devices).tolist() for part in (arriving, target[leaving])]
        sent = x.permute(0, 2, 3, 1)[(permutation[leaving] - own.start).to(x.device)].contiguous()  # channels last, target by target
        got = sent.new_empty(len(arriving), *sent.shape[1:])
        dist.all_to_all_single(got, sent, *counts)
        order = arriving.argsort(stable=True).to(x.device)  # they arrive source by source
        return torch.empty_like(got).index_copy_(0, order, got).permute(0, 3, 1, 2)

    def gather(self, x: Tensor, n: int = 0) -> Tensor:
        sizes = self._sizes(n or self.batch_size)
        padded = torch.zeros(max(sizes), *x.shape[1:], dtype=x.dtype, device=self.device)  # NCCL knows no other memory
        padded[:len(x)] = x
        parts = padded.new_empty(self.devices * len(padded), *x.shape[1:])
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(parts, padded)  # renamed in torch 2.14
        return torch.cat([part[:size] for part, size in zip(parts.to(x.device).split(len(padded)), sizes)])

    def total(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    def agreed(self, wishes: Sequence[int], meeting: bool = True) -> list[int]:
        largest = torch.tensor(wishes, device=self.device)
        if not meeting:
            return [0] * len(wishes)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        state = module.state_dict()
        names = [name for name in state if name.endswith(("running_mean", "running_var"))]
        means = self.total(torch.cat([state[name].flatten() for name in names])) / self.devices  # each process has as many groups
        parts = means.split([state[name].numel() for name in names])
        return {**state, **{name: part.view_as(state[name]) for name, part in zip(names, parts)}}

    def _sizes(self, n: int) -> list[int]:
        """The shares of n rows, padded with zeros to one a process."""
        sizes = shares(n, self.devices) if n else []
        return sizes + [0] * (self.devices - len(sizes))


def shuffle(x: Tensor, permutation: Tensor) -> Tensor:
    """Row i of the result is row permutation[i] of x (N, ...)."""
    return x[permutation.to(x.device, non_blocking=True)]


def unshuffle(x: Tensor, permutation: Tensor) -> Tensor:
    """The inverse of `shuffle`: row permutation[i] of the result is row i of x (N, ...)."""
    return torch.empty_like(x).index_copy_(0, permutation.to(x.device, non_blocking=True), x)


# ------------------------------------------------------------------------------------------------------------- decoding processes

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
