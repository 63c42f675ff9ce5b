"""Where the work runs: devices, precision, batch-norm groups, what the devices exchange, and the processes that decode images.

A launch is one of three, with the same methods, so that training reads the same for all and gives the same curve:

    OneDevice      a CPU, one GPU
    Replicas       plain `python` with several GPUs visible: `nn.DataParallel` around each encoder
    Processes      `torchrun`, on one or several machines: a process for each device, `DistributedDataParallel` around the query encoder

A batch is split into G batch-norm groups as `torch.chunk` does, 256 over 6 into 43 x 5 + 41, and each device holds as many
neighbouring groups; without groups, as in evaluation, each device holds one chunk.
"""

import atexit
import contextlib
import datetime
import inspect
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

GATHER = 1 << 24  # numbers that a process sends at once where it gathers
TIMEOUT = datetime.timedelta(
    minutes=10
)  # of a process that waits for the others; one that died ends the job at once, by torchrun


def pick_device(name: str = "auto") -> torch.device:
    """The device named, or for `auto` the first of cuda, mps, cpu that is there.

    Raises ValueError if the named device is not known or not available.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device {name!r} is not known: use auto, cpu, cuda, cuda:N or mps"
        ) from None
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "cpu" and device.index):
        raise ValueError(f"device {name!r} is not supported: use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        if several_processes():
            raise ValueError(
                f"torchrun started more processes on this machine than it has GPUs ({torch.cuda.device_count()}): "
                f"use --nproc_per_node={torch.cuda.device_count()}, or --device cpu"
            )
        raise ValueError(
            f"device {name!r} is not available: PyTorch sees {torch.cuda.device_count()} CUDA devices (use --device cpu)"
        )
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
    return (
        torch.autocast(device.type, dtype=torch.bfloat16)
        if precision == "bf16"
        else contextlib.nullcontext()
    )


def resolve_bn_groups(bn_groups: int | str, batch_size: int, launch: "OneDevice") -> int:
    """The number G of groups of the global batch with batch-norm statistics of their own (paper, section 3.3).

    `auto` is the number of devices, or 8 on one device (8 GPUs, as in the paper). Raises ValueError, with the nearest values that
    fit, if the batch does not split into G groups of at least 2 images, as many on each device of the launch.
    """
    groups = (
        (launch.devices if launch.devices > 1 else 8) if bn_groups == "auto" else int(bn_groups)
    )
    if not launch.fits(batch_size, groups):
        fitting = [
            g
            for g in range(launch.devices, batch_size // 2 + 1, launch.devices)
            if launch.fits(batch_size, g)
        ]
        near = sorted(sorted(fitting, key=lambda g: (abs(g - groups), g))[:2])
        advice = (
            f"use --bn_groups {' or '.join(map(str, near))}, or another batch size"
            if near
            else "use a larger batch"
        )
        each = f", as many on each of {launch.devices} devices" if launch.devices > 1 else ""
        raise ValueError(
            f"batch_size {batch_size} does not split into {groups} batch-norm groups of at least 2 images{each}: {advice}"
        )
    return groups


def chunks(n: int, parts: int) -> list[int]:
    """The sizes of the parts into which `torch.chunk` splits n rows (possibly fewer than asked for): 256 over 6 is 43 x 5 + 41."""
    size = max(1, -(-n // parts))
    return [min(size, n - start) for start in range(0, n, size)]


def shares(n: int, devices: int, groups: int) -> list[int]:
    """The rows of n that each device holds: those of groups / devices neighbouring groups; a device may be left without any."""
    sizes, each = chunks(n, groups), groups // devices
    return [sum(sizes[i * each : (i + 1) * each]) for i in range(devices)]


def peak_memory_mb(device: torch.device) -> float:
    """The most memory in use so far: PyTorch's on a GPU, else this process's resident memory, without its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def compile_encoder(encoder: nn.Module, example: Tensor, precision: str) -> str:
    """Let torch.compile make kernels for an encoder, tried on an example (N, 3, H, W) forward and (if it is trained) backward.

    Names and weights stay. Where it fails the encoder runs as before: returns the reason, or nothing.
    """
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.compile(dynamic=False)
    try:
        trained = any(parameter.requires_grad for parameter in encoder.parameters())
        with torch.set_grad_enabled(trained):
            with autocast(precision, example.device):
                out = encoder(example)
            if trained:
                out.float().sum().backward()
        reason = ""
    except Exception as error:  # a missing compiler, a kernel that cannot be made: there are many
        encoder._compiled_call_impl = None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    encoder.zero_grad(set_to_none=True)
    encoder.load_state_dict(state)
    return reason


# ----------------------------------------------------------------------------------------------------------------------- launches


def several_processes() -> bool:
    """Whether torchrun started this process, be it with one or with many."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(name: str = "auto") -> "OneDevice":
    """What this process was started for, by the environment of torchrun and the visible devices; ValueError as `pick_device`.

    Use it as a context (`with launch(...) as devices:`): several processes meet when it opens and part when it closes.
    """
    device = pick_device(name)
    if several_processes():
        if device.type == "mps":
            raise ValueError(
                "torchrun runs on cuda and cpu, not on mps: use --device cpu, or plain python"
            )
        if device.type == "cuda":
            if device.index is not None:
                raise ValueError(
                    f"device {name!r} names one GPU, but torchrun gives each process one of its own: use cuda or auto"
                )
            device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        return Processes(device)
    if device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1:
        return Replicas(torch.device("cuda:0"), torch.cuda.device_count())
    return OneDevice(device)


class OneDevice:
    """The whole batch on one device. The other launches change what is said here."""

    devices = 1  # over which a batch is split
    processes = 1  # of this launch
    rank = 0  # of this process; the first one prints and writes
    note = ""  # what a user should know of this launch

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self.device = device
        self.batch_size = self.bn_groups = 0  # of the global batch, when training
        self._wrapped: dict[nn.Module, Callable] = {}

    @property
    def name(self) -> str:
        return str(self.device)

    @property
    def float64_device(self) -> torch.device:
        """Where to compute in float64, which mps does not have."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def __enter__(self) -> "OneDevice":
        if (
            self.device.type == "cuda" and self.device.index is not None
        ):  # plain cuda is the current one
            torch.cuda.set_device(self.device)
        torch.backends.cudnn.benchmark = (
            True  # the fastest convolutions for the shapes at hand, which stay the same
        )
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def fits(self, batch_size: int, groups: int) -> bool:
        """Whether a batch gives `groups` batch-norm groups of 2 images or more, as many on each device, that each device can find in its share."""
        sizes, each = chunks(batch_size, groups), groups // self.devices
        parts = shares(batch_size, self.devices, groups) if each else []
        return (
            groups % self.devices == 0
            and len(sizes) == groups
            and min(sizes) >= 2
            and [size for part in parts for size in chunks(part, each)] == sizes
        )

    def attach(self, moco: nn.Module, batch_size: int, bn_groups: int) -> None:
        """Let a `model.MoCo` run on all devices, with batches of `batch_size` images in `bn_groups` groups over all of them."""
        moco.launch, self.batch_size, self.bn_groups = self, batch_size, bn_groups
        self.wrap(moco.encoder_q)
        self.wrap(moco.encoder_k)

    def wrap(self, encoder: nn.Module) -> None:
        """Make `encode` run this encoder on all devices. The wrapper is kept here, so the encoder's names stay."""

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """encoder(x) on the devices of this process, in the order of x."""
        return self._wrapped.get(encoder, encoder)(x)

    def rows(self, n: int = 0) -> slice:
        """The rows that this process holds of n in evaluation, or (0) of the batch in training."""
        return slice(0, n or self.batch_size or None)

    def weight(self) -> float:
        """By how much this process's mean loss counts, where gradients are averaged over processes: 1 if all shares are even."""
        return 1.0

    def shuffle(self, x: Tensor, permutation: Tensor) -> Tensor:
        """Row i of the global result is row permutation[i] of the global batch; of both, x (N, C, H, W) and the result are this process's rows."""
        return shuffle(x, permutation)

    def gather(self, x: Tensor, n: int = 0) -> Tensor:
        """All n rows (0: of the batch), on every process, of which each holds its own in x."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over processes, on every process."""
        return x

    def collect(self, items: list[str]) -> list[str]:
        """The items of all processes, on every process."""
        return items

    def agreed(self, wishes: Sequence[int], meeting: bool = True) -> list[int]:
        """The largest of each wish over processes. Several processes ask each other only at a `meeting`, all at the same step; else 0."""
        return list(wishes)

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of a module, with the running statistics of all processes averaged."""
        return module.state_dict()


class Replicas(OneDevice):
    """`nn.DataParallel` around each encoder; all else is on the first GPU. Never run here on real GPUs: the tests use a stand-in on the CPU."""

    note = "nn.DataParallel copies the encoders to every GPU at every step: torchrun --standalone --nproc_per_node=GPUS is faster"

    def __init__(
        self,
        device: torch.device,
        devices: int,
        data_parallel: Callable[[nn.Module], Callable] = nn.DataParallel,
    ) -> None:
        super().__init__(device)
        self.devices, self._data_parallel = devices, data_parallel
        self._in_thread: dict[nn.Module, AutocastInThread] = {}

    @property
    def name(self) -> str:
        return f"{self.devices} GPUs with nn.DataParallel"

    def fits(self, batch_size: int, groups: int) -> bool:
        return super().fits(batch_size, groups) and shares(
            batch_size, self.devices, groups
        ) == chunks(batch_size, self.devices)

    def wrap(self, encoder: nn.Module) -> None:
        self._in_thread[encoder] = AutocastInThread(encoder)
        self._wrapped[encoder] = self._data_parallel(self._in_thread[encoder])

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        kind = x.device.type
        self._in_thread[encoder].dtype = (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        )
        out = super().encode(encoder, x)
        for module in encoder.modules():
            if hasattr(module, "take_statistics_of_replicas"):
                module.take_statistics_of_replicas()
        return out


class AutocastInThread(nn.Module):
    """An encoder in a thread of nn.DataParallel, which tells its threads that autocast is on, but not in which type: float16 would be theirs."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(
            x.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None
        ):
            return self.encoder(x)


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
        super().__enter__()
        on_gpu = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=self.device if on_gpu else None
        )
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (
            kind is None or kind is SystemExit
        ):  # all of them come here; after an error, torchrun ends the others
            dist.barrier()
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and re.search(
            r"gloo|NCCL|[Cc]onnection (closed|reset)|[Tt]imed out", str(error)
        ):
            raise ConnectionError(
                "another process of this launch has ended or hangs, its own message says why; go on with --resume"
            ) from None

    def wrap(self, encoder: nn.Module) -> None:
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            return  # nothing to average
        # of 1 x 1 kernels: two ways to write the strides of the same memory
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        no_buffers = {
            "forward_sync_buffers"
            if "forward_sync_buffers" in known
            else "broadcast_buffers": False
        }  # renamed in torch 2.15
        self._wrapped[encoder] = nn.parallel.DistributedDataParallel(
            encoder,
            device_ids=None if self.device.type == "cpu" else [self.device],
            gradient_as_bucket_view=True,
            **no_buffers,
        )

    def rows(self, n: int = 0) -> slice:
        sizes = self._sizes(n)
        return slice(sum(sizes[: self.rank]), sum(sizes[: self.rank + 1]))

    def weight(self) -> float:
        return self._sizes()[self.rank] * self.devices / self.batch_size

    def shuffle(self, x: Tensor, permutation: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(
                torch.get_autocast_dtype(x.device.type)
            )  # the first convolution would do it: half the bytes, the same result
        target = torch.arange(self.devices).repeat_interleave(torch.tensor(self._sizes()))
        source, own = (
            target[permutation],
            self.rows(),
        )  # row i of the result goes from process source[i] to target[i]
        leaving, arriving = source == self.rank, source[own]
        counts = [
            torch.bincount(part, minlength=self.devices).tolist()
            for part in (arriving, target[leaving])
        ]
        sent = x.permute(0, 2, 3, 1)[
            (permutation[leaving] - own.start).to(x.device, non_blocking=True)
        ].contiguous()  # channels last, target by target
        got = sent.new_empty(len(arriving), *sent.shape[1:])
        dist.all_to_all_single(got, sent, *counts)
        order = arriving.argsort(stable=True).to(
            x.device, non_blocking=True
        )  # they arrive source by source
        return torch.empty_like(got).index_copy_(0, order, got).permute(0, 3, 1, 2)

    def gather(self, x: Tensor, n: int = 0) -> Tensor:
        sizes, parts = self._sizes(n), []
        step = max(
            1, GATHER // max(1, x[:1].numel())
        )  # rows at a time: all features of a large data set have no room on a GPU
        for first in range(0, max(sizes), step):
            padded = torch.zeros(
                min(step, max(sizes) - first), *x.shape[1:], dtype=x.dtype, device=self.device
            )  # NCCL knows no other memory
            mine = x[first : first + step]
            padded[: len(mine)] = mine
            part = padded.new_empty(self.devices * len(padded), *x.shape[1:])
            getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(
                part, padded
            )  # renamed in torch 2.14
            parts.append(part.to(x.device).split(len(padded)))
        return torch.cat(
            [
                part[rank][: max(0, size - i * step)]
                for rank, size in enumerate(sizes)
                for i, part in enumerate(parts)
            ]
        )

    def total(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    def collect(self, items: list[str]) -> list[str]:
        parts: list[list[str]] = [[]] * self.processes
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def agreed(self, wishes: Sequence[int], meeting: bool = True) -> list[int]:
        if not meeting:
            return [0] * len(wishes)
        largest = torch.tensor(wishes, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        state = module.state_dict()
        names = [name for name in state if name.endswith(("running_mean", "running_var"))]
        means = (
            self.total(torch.cat([state[name].flatten() for name in names])) / self.devices
        )  # each process has as many groups
        parts = means.split([state[name].numel() for name in names])
        return {**state, **{name: part.view_as(state[name]) for name, part in zip(names, parts)}}

    def _sizes(self, n: int = 0) -> list[int]:
        """The rows that each process holds of n in evaluation, or (0) of the batch in training."""
        return (
            shares(n, self.devices, self.devices)
            if n
            else shares(self.batch_size, self.devices, self.bn_groups)
        )


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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
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
