"""Worker processes that decode images."""

import atexit
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.base import Batch, Dataset
from utils import UserError

# PyTorch raises a RuntimeError for a worker that died, as for any error of the code.
DEAD_WORKER = (
    r"DataLoader worker.*(exited unexpectedly|killed by signal)"
    r"|Pin memory thread exited unexpectedly"
)


def count_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fetch_all(
    dataset: Dataset, batches: Iterable[Tensor], num_workers: int | str, pin: bool = False
) -> Iterator[Batch]:
    """The batches in order, by so many workers (0: by this process); UserError if one dies."""
    if num_workers == "auto":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun, on this machine
        num_workers = min(8, max(1, count_cores() // processes))
    if num_workers == 0:
        yield from map(dataset.fetch, batches)
        return
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=map(Tensor.tolist, batches),
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=pin,
        generator=torch.Generator(),  # or it would draw from the global stream
    )
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # PyTorch's would raise in the middle of a step when a worker dies: the next batch tells
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # what is registered last runs first: before multiprocessing's
    try:
        yield from iterator
    except RuntimeError as error:
        if not re.search(DEAD_WORKER, str(error)):
            raise
        raise UserError(
            "a process that decodes images was killed, probably out of memory "
            f"(or of /dev/shm): use fewer than --num_workers {num_workers}"
        ) from None


def _start_worker(_: int) -> None:
    """Workers take one core each and leave signals to the main process."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """At the exit after an error, whose traceback keeps the loader alive.

    multiprocessing would send SIGTERM, which workers ignore, and wait for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
