"""How a script was launched, and what its devices exchange.

A launch is one of three. They have the same methods, so training reads the same for all of them,
and gives the same curve:

    OneDevice     a CPU, one GPU
    Replicas      plain `python` with several GPUs visible: nn.DataParallel around each encoder
    Processes     `torchrun`, on one or several machines: a process for each device, and
                  DistributedDataParallel around the query encoder
"""

import contextlib
import datetime
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import GroupBatchNorm2d, MoCo, shuffle, unshuffle
from run.compute import autocast_dtype, pick_device, set_backends
from run.splits import chunks, rows_of, shares
from utils import UserError

BLOCK = 1 << 24  # numbers sent at once: all features at once may not fit on a GPU twice
TIMEOUT = datetime.timedelta(minutes=10)  # of waiting for the others; torchrun ends a job sooner


def several_processes() -> bool:
    """Whether torchrun started this process, even if it is the only one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def open_launch(name: str = "auto") -> "Launch":
    """The launch that this process is part of, by torchrun's environment and the visible devices.

    A context: processes meet when it opens, and part when it closes. UserError as `pick_device`.
    """
    device, gpus = pick_device(name), torch.cuda.device_count()
    if not several_processes():
        several = device == torch.device("cuda") and gpus > 1
        return Replicas(torch.device("cuda:0"), gpus) if several else OneDevice(device)
    if device.type == "mps":
        raise UserError("torchrun does not run on mps: use --device cpu, or plain python")
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(f"--device {name!r} is one GPU for all torchrun processes: use cuda")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= gpus:
            raise UserError(f"more processes than GPUs are here: use --nproc_per_node={gpus}")
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not all(map(str.isdigit, given)):
        raise UserError(f"RANK, WORLD_SIZE, MASTER_PORT are {given}: use torchrun, or unset them")
    return Processes(device)


class OneDevice:
    """The whole batch on one device. The other launches override what is different there."""

    devices = 1  # over which a training batch is split
    processes = 1
    rank = 0  # of this process; the first one prints and writes
    note = ""  # what a user should know about the launch

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self.device = device

    @property
    def name(self) -> str:
        return str(self.device)

    def __enter__(self) -> "OneDevice":
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # plain cuda is the current one
        # the shapes stay, but nn.DataParallel starts new threads at every call
        set_backends(tune=self.devices == self.processes)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        pass

    def device_rows(self, batch_size: int, groups: int) -> list[int]:
        """How many rows of a training batch each device holds."""
        return shares(batch_size, self.devices, groups)

    def wrap(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        """The encoder on all devices of this process: rows in, rows out in the same order."""
        return encoder.__call__

    def attach(self, moco: MoCo, batch_size: int, bn_groups: int) -> None:
        """Spread the training of a MoCo, with batches in `bn_groups` groups, over all devices."""
        moco.connect(
            encode_q=self.wrap(moco.encoder_q),
            encode_k=self.wrap(moco.encoder_k),
            shuffle=self.shuffle,
            gather=self.gather_batch,
            rows=self.batch_rows,
        )

    @property
    def batch_rows(self) -> slice:
        """This process's rows of a training batch."""
        return slice(None)

    @property
    def loss_weight(self) -> float:
        """The factor of this process's mean loss, as gradients are averaged over processes."""
        return 1.0

    def shuffle(self, x: Tensor, permutation: Tensor) -> Tensor:
        """This process's rows of a permuted training batch: row i was row permutation[i].

        x (N, C, H, W) are its rows before; the permutation is that of the global batch.
        """
        return shuffle(x, permutation)

    def gather_batch(self, x: Tensor) -> Tensor:
        """All rows of a training batch, on every process, of which each has its own in x."""
        return x

    def rows(self, n: int) -> slice:
        """This process's rows of n in evaluation."""
        return slice(0, n)

    def gather(self, x: Tensor, n: int) -> Tensor:
        """All n rows in evaluation, on every process, of which each has its own in x."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes, on every process."""
        return x

    def collect(self, items: list[str]) -> list[str]:
        """The items of all processes, on every process."""
        return items

    def largest(self, values: list[int]) -> list[int]:
        """The largest of each value over processes, which all ask at the same step."""
        return values

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's state, its running statistics averaged over processes."""
        return module.state_dict()


class Replicas(OneDevice):
    """nn.DataParallel around each encoder; all else is on the first GPU.

    It copies the encoder to every GPU at every call, runs each copy in a thread of its own, and
    throws the copies' buffers away, except for the first one's. So their batch-norm statistics
    are collected, for one update a call. `data_parallel` is another class in the tests.
    """

    note = (
        "nn.DataParallel copies the encoders to every GPU at every step: "
        "torchrun --standalone --nproc_per_node=GPUS is faster"
    )

    def __init__(
        self,
        device: torch.device,
        devices: int,
        data_parallel: Callable[[nn.Module], nn.Module] = nn.DataParallel,
    ) -> None:
        super().__init__(device)
        self.devices, self._data_parallel = devices, data_parallel

    @property
    def name(self) -> str:
        return f"{self.devices} GPUs with nn.DataParallel"

    def device_rows(self, batch_size: int, groups: int) -> list[int]:
        return chunks(batch_size, self.devices)

    def wrap(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        copies = self._data_parallel(_InThread(encoder))
        layers = [layer for layer in encoder.modules() if isinstance(layer, GroupBatchNorm2d)]
        statistics: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
        for layer in layers:
            layer.defer = statistics[layer].append  # the copies share it: they copy __dict__

        def encode(x: Tensor) -> Tensor:
            out = copies(x, autocast_dtype(x.device))
            for layer, parts in statistics.items():
                if parts:  # in train mode
                    parts.sort(key=Tensor.get_device)  # threads end in any order
                    parts = [part.to(x.device) for part in parts]
                    layer.update_running(torch.cat(parts, dim=1))
                    statistics[layer].clear()
            return out

        return encode


class _InThread(nn.Module):
    """An encoder in a thread of nn.DataParallel, which autocasts there, but in float16."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            return self.encoder(x)


class Processes(OneDevice):
    """A process for each device. All hold the same queue and key encoder; neither is ever sent.

    Beside the gradients a step sends the key views to where the permutation puts them (one
    all-to-all; none without shuffling), and the keys to all processes (one all-gather). Every
    process draws the permutation itself, from (seed, step).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.devices = self.processes

    @property
    def name(self) -> str:
        return f"{self.device.type}, processes: {self.processes}"

    def __enter__(self) -> "Processes":
        super().__enter__()
        on_gpu = self.device.type == "cuda"
        backend, device_id = ("nccl", self.device) if on_gpu else ("gloo", None)
        with _explain_lost_process():
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        with _explain_lost_process():
            if error is not None and kind is not SystemExit:
                raise error  # re-raised here so that _explain_lost_process translates it
            dist.barrier()  # every process reaches this: after an error torchrun ends them
            dist.destroy_process_group()

    def wrap(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            return encoder.__call__  # no gradients to average
        # of 1 x 1 kernels, where two strides mean the same memory
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        known = inspect.signature(DistributedDataParallel).parameters
        renamed = "forward_sync_buffers" in known  # since torch 2.13
        wrapper = DistributedDataParallel(
            encoder,
            device_ids=None if self.device.type == "cpu" else [self.device],
            gradient_as_bucket_view=True,
            **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
        )
        return wrapper.__call__

    def attach(self, moco: MoCo, batch_size: int, bn_groups: int) -> None:
        self._batch = self.device_rows(batch_size, bn_groups)
        super().attach(moco, batch_size, bn_groups)

    @property
    def batch_rows(self) -> slice:
        return rows_of(self._batch, self.rank)

    @property
    def loss_weight(self) -> float:
        return self._batch[self.rank] * self.processes / sum(self._batch)

    def shuffle(self, x: Tensor, permutation: Tensor) -> Tensor:
        # as the first convolution would do it: half the bytes to send
        x = x.to(autocast_dtype(x.device) or x.dtype)
        own = self.batch_rows
        holder = torch.arange(self.processes).repeat_interleave(torch.tensor(self._batch))
        source = holder[permutation]  # row i of the result comes from process source[i]
        leaving, arriving = source == self.rank, source[own]
        count = partial(torch.bincount, minlength=self.processes)
        sent = shuffle(x.permute(0, 2, 3, 1), permutation[leaving] - own.start).contiguous()
        got = sent.new_empty(len(arriving), *sent.shape[1:])
        sizes = count(arriving).tolist(), count(holder[leaving]).tolist()
        dist.all_to_all_single(got, sent, *sizes)
        return unshuffle(got, arriving.argsort(stable=True)).permute(0, 3, 1, 2)

    def gather_batch(self, x: Tensor) -> Tensor:
        return self._gather(x, self._batch)

    def rows(self, n: int) -> slice:
        return rows_of(shares(n, self.processes, self.processes), self.rank)

    def gather(self, x: Tensor, n: int) -> Tensor:
        return self._gather(x, shares(n, self.processes, self.processes))

    def _gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """The rows (sum of sizes, ...) of all processes, sent in blocks of one size for all."""
        out = x.new_empty(sum(sizes), *x.shape[1:])
        step = max(1, BLOCK // max(1, x[:1].numel()))
        for start in range(0, max(sizes), step):
            rows = min(step, max(sizes) - start)
            block = x.new_zeros(rows, *x.shape[1:], device=self.device)  # NCCL: on the GPU only
            block[: max(0, len(x) - start)] = x[start : start + rows]
            blocks = [torch.empty_like(block) for _ in sizes]
            dist.all_gather(blocks, block)
            for part, got in zip(out.split(sizes), blocks, strict=True):
                place = part[start : start + rows]
                place.copy_(got[: len(place)])
        return out

    def total(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    def collect(self, items: list[str]) -> list[str]:
        parts: list[list[str]] = [[] for _ in range(self.processes)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def largest(self, values: list[int]) -> list[int]:
        found = torch.tensor(values, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        state = module.state_dict()
        names = [name for name in state if name.endswith(("running_mean", "running_var"))]
        if not names:  # no batch norm
            return state
        flat = torch.cat([state[name].flatten() for name in names])
        means = self.total(flat) / self.processes  # each process has as many groups
        parts = means.split([state[name].numel() for name in names])
        averaged = {n: p.view_as(state[n]) for n, p in zip(names, parts, strict=True)}
        return {**state, **averaged}


Launch = OneDevice | Replicas | Processes


@contextlib.contextmanager
def _explain_lost_process() -> Iterator[None]:
    """UserError in place of what a collective raises when another process has ended or hangs."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, which name the file of gloo that they come from
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            lost = "another process of this launch has ended or hangs, its own message says why"
            raise UserError(f"{lost}; go on with --resume") from None
        raise
