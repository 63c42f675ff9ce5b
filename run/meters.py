"""What a run measures while it trains: loss, contrast accuracy, collapse, time, memory."""

import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel import Launch
from run.checkpoints import describe_last
from utils import UserError


@torch.no_grad()
def contrast_hits(logits: Tensor) -> Tensor:
    """How many positives, column 0 of logits (N, 1+K), are above all their negatives: a scalar."""
    return (logits[:, 0] > logits[:, 1:].amax(dim=1)).sum()


def alignment(logits: Tensor, temperature: float) -> Tensor:
    """Mean of |q - k|^2 = 2 - 2 q.k from logits (N, 1+K): a scalar, 0 to 4 (arXiv:2005.10242)."""
    return 2 - 2 * temperature * logits.detach()[:, 0].mean()


@torch.no_grad()
def uniformity(keys: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over pairs of unit keys (N, C): a scalar.

    0 if all are one point, about -3.9 if they spread evenly over the sphere in 128 dimensions
    (Wang and Isola 2020, arXiv:2005.10242, section 4).
    """
    pairs = torch.triu_indices(len(keys), len(keys), offset=1, device=keys.device)
    similarity = (keys @ keys.T)[tuple(pairs)]
    return (-2 * (2 - 2 * similarity)).exp().mean().log()


@torch.no_grad()
def effective_rank(queue: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of keys (C, K): a scalar.

    From 1, if all keys are along one direction, to C (Roy and Vetterli 2007). nan if the keys are
    such that it cannot be computed.
    """
    if queue.device.type != "mps":  # which has no float64
        queue = queue.double()
    try:
        singular = torch.linalg.eigvalsh((queue @ queue.T).cpu())  # C x C is small
    except torch.linalg.LinAlgError:
        return queue.new_tensor(math.nan)
    singular = singular.clamp_min(0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp()


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far: PyTorch's on a GPU, else this process's, without its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


REMEDY = "try a lower --lr, fewer --bn_groups or a larger --batch_size"


class Meter:
    """Sums over the steps since the last row of the log, kept on the device of each process."""

    def __init__(
        self, launch: Launch, dtype: torch.dtype, batch_size: int, temperature: float
    ) -> None:
        self.launch, self.dtype = launch, dtype
        self.batch_size, self.temperature = batch_size, temperature
        self.reset()

    def reset(self) -> None:
        device = self.launch.device
        self.sums = torch.zeros(3, dtype=self.dtype, device=device)  # loss, hits, alignment
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.steps, self.queries = 0, 0
        self.seconds = 0.0  # since the last row, before the run was resumed
        self.start()

    def start(self) -> None:
        """Measure the time from now on, and count what was measured before the run was resumed."""
        self.since = time.monotonic() - self.seconds

    def add(self, loss: Tensor, logits: Tensor, queries: int) -> None:
        """Add a step, without waiting for the device; `queries` counts those of all processes.

        `loss` is this process's mean times `launch.loss_weight`, `logits` (n, 1+K) are its own.
        """
        aligned = alignment(logits, self.temperature) * self.launch.loss_weight
        loss, aligned = loss.detach() / self.launch.processes, aligned / self.launch.processes
        self.sums += torch.stack([loss, contrast_hits(logits), aligned])
        self.finite_steps += self.sums[0].isfinite()  # a non-finite sum stays non-finite
        self.steps, self.queries = self.steps + 1, self.queries + queries

    def read(self, step: int, folder: Path) -> dict[str, float]:
        """Means over all processes since the last row, of which `step` is the last.

        Raises UserError, with the step, if a loss was not finite.
        """
        loss, hits, aligned = self.launch.total(self.sums).tolist()
        if not math.isfinite(loss):
            (finite_steps,) = self.launch.largest([-int(self.finite_steps)])
            first = f"the loss of step {step - self.steps + 1 - finite_steps} was not finite"
            raise UserError(f"{first}: {describe_last(folder)}; {REMEDY}")
        seconds = max(1e-9, time.monotonic() - self.since)
        return {
            "loss": loss / max(1, self.steps),
            "contrast_top1": 100 * hits / max(1, self.queries),
            "alignment": aligned / max(1, self.steps),
            "images_per_second": self.batch_size * self.steps / seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        sums = self.launch.total(self.sums)
        seconds = time.monotonic() - self.since
        return {"sums": sums, "steps": self.steps, "images": self.queries, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self.steps, self.queries = state["steps"], state["images"]
        self.seconds = state.get("seconds", 0.0)
        self.finite_steps += self.steps
        if self.launch.rank == 0:  # which holds the sums of all processes
            saved = state["sums"].to(self.sums)  # older checkpoints have no alignment
            self.sums[: len(saved)] = saved


class Stopwatch:
    """Where the time goes, lap by lap; on a GPU by events, so that only `read` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._laps = device.type == "cuda", []
        self.total: dict[str, float] = {}
        self.lap("start")

    def lap(self, name: str) -> None:
        moment = time.perf_counter()
        if self._on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._laps.append((name, moment))

    def read(self) -> dict[str, float]:
        """Seconds by name since the last call, which are added to `total`."""
        if self._on_gpu:
            self._laps[-1][1].synchronize()
        spent: dict[str, float] = {}
        for (_, start), (name, end) in itertools.pairwise(self._laps):
            seconds = start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            spent[name] = spent.get(name, 0.0) + seconds
            self.total[name] = self.total.get(name, 0.0) + seconds
        self._laps = self._laps[-1:]
        return spent
