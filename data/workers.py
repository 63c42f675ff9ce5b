"""Worker processes that decode images."""

import atexit
import functools
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.base import Batch, Dataset
from run.signals import STOPS, Stopped
from utils import UserError, warn

SHARED = Path("/dev/shm")  # where workers leave their batches, on Linux
AHEAD = 2  # batches that a worker decodes ahead
# PyTorch raises a RuntimeError for a worker that died or found no room, as for any error of code.
DEAD_WORKER = (
    r"DataLoader worker.*(exited unexpectedly|killed by signal)"
    r"|Pin memory thread exited unexpectedly"
)
NO_ROOM = r"shared memory.*No space left on device"


def count_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fetch_all(
    dataset: Dataset, batches: Iterable[Tensor], num_workers: int | str, pin: bool = False
) -> Iterator[Batch]:
    """The batches in order, by so many workers (0: by this process).

    There are fewer of them where /dev/shm has no room for what they decode ahead. Raises UserError
    if a worker dies, or finds no room later.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    batches = itertools.chain([first], batches)
    num_workers = count_workers(dataset, len(first), num_workers)
    if num_workers == 0:
        yield from map(dataset.fetch, batches)
        return
    try:
        yield from _start(dataset, batches, num_workers, pin)
    except Stopped:
        _end_workers()  # or PyTorch would wait for each that hangs
        raise
    except OSError as error:  # no more processes or files, as ulimit says
        sys.unraisablehook = lambda _: None  # PyTorch's half-made loader would complain at the exit
        reason = f"the processes that decode images cannot be started: {error.strerror}"
        raise UserError(f"{reason}: use fewer than --num_workers {num_workers}") from None
    except RuntimeError as error:
        if re.search(NO_ROOM, str(error)):
            reason = f"{SHARED} is full, so the processes that decode images cannot hand them over"
            remedy = (
                f"give it more room (docker run --shm-size), or lower --num_workers {num_workers}"
            )
        elif re.search(DEAD_WORKER, str(error)):
            reason = "a process that decodes images was killed, probably out of memory"
            remedy = f"use fewer than --num_workers {num_workers}"
        else:
            raise
        raise UserError(f"{reason}: {remedy}") from None


def count_workers(dataset: Dataset, rows: int, num_workers: int | str) -> int:
    """How many workers there are for batches of so many images: those for which there is room."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun, on this machine
    if num_workers == "auto":
        num_workers = min(8, max(1, count_cores() // processes))
    if num_workers == 0 or not SHARED.is_dir():
        return num_workers
    batch = rows * dataset.image_bytes + 4 * 4096  # with aspect ratios and labels, in whole pages
    free = shutil.disk_usage(SHARED).free // processes
    fitting = max(0, free // batch - 1) // AHEAD  # besides the batch in use
    if fitting < num_workers:
        _warn_once(
            f"{SHARED} has room for the batches of {fitting} of {num_workers} processes that "
            "decode images: the others are not started (docker run --shm-size gives it more)"
        )
    return min(num_workers, fitting)


_warn_once = functools.cache(warn)


def _start(
    dataset: Dataset, batches: Iterator[Tensor], num_workers: int, pin: bool
) -> Iterator[Batch]:
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on more workers than cores, which a slow disk may need
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=map(Tensor.tolist, batches),
            num_workers=num_workers,
            collate_fn=_share,
            prefetch_factor=AHEAD,
            worker_init_fn=_start_worker,
            pin_memory=pin,
            generator=torch.Generator(),  # or it would draw from the global stream
        )
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # the last one runs first: before multiprocessing's
        iterator = iter(loader)
    on_main_thread = threading.current_thread() is threading.main_thread()
    if hasattr(signal, "SIGCHLD") and on_main_thread:
        # PyTorch's would raise in the middle of a step when a worker dies: the next batch tells
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return iterator


def _share(batch: Batch) -> Batch:
    """Move a batch to shared memory: later a thread would do it, and could not say if it fails."""
    for tensor in (batch.images, batch.aspect, batch.labels):
        tensor.share_memory_()
    return batch


def _start_worker(_: int) -> None:
    """Workers take one core each and leave signals to the main process."""
    torch.set_num_threads(1)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """At a stop, or at the exit after an error, whose traceback keeps the loader alive.

    multiprocessing would send SIGTERM, which workers ignore, and wait for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
