"""The interface to data: data sets by the content of their folder, the order of samples, batches.

`open_dataset` gives a split of a data set (data/base.py) with `name`, `classes`, `labels`, `len()`
and `fetch(indices) -> Batch`; `epoch_batches` the indices of an epoch; `iterate` their batches.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from data import cifar10, fashion_mnist, folders, shapes, stl10, store
from data.base import RGB, Batch, Crop, Dataset, Pixels, Size
from data.decoding import EXTENSIONS
from data.failures import Failures
from data.workers import fetch_all
from utils import UserError, generator

# The first whose `matches(root)` holds is opened by its `open_split(root, split, size)`.
KINDS = [shapes, store, stl10, cifar10, fashion_mnist, folders]


def detect(root: str) -> str:
    """The name of the data set's kind, such as stl10 or folders; UserError if there is none."""
    return _find_kind(root).NAME


def open_dataset(
    root: str,
    split: str,
    *,
    fit: str,
    resize: int | str,
    crop: Crop,
    pixels: Pixels | None = RGB,
    download: bool = False,
) -> Dataset:
    """A split (pretrain, train or test) of the data set in `root`; for the rest see data.base.Size.

    `download` fetches STL-10 first. UserError if the split is not there or not sound.
    """
    if download:
        kind = next((kind for kind in KINDS if kind.matches(root)), stl10)
        if kind is not stl10:
            raise UserError(
                f"--download fetches STL-10, but --dataset_root {root!r} is another data set "
                f"({kind.NAME}): leave --download out"
            )
        stl10.download(root)
    return _find_kind(root).open_split(root, split, Size(fit, resize, crop, pixels))


def _find_kind(root: str) -> ModuleType:
    for kind in KINDS:
        if kind.matches(root):
            return kind
    if not Path(root).is_dir():
        raise UserError(
            f"--dataset_root {root!r} is not a folder: give one with class folders, train/ and "
            "val/, STL-10 (or --download it), CIFAR-10, Fashion-MNIST idx files, or the word shapes"
        )
    raise UserError(
        f"--dataset_root {root!r} holds no data set that is known here: put images "
        f"({', '.join(EXTENSIONS)}) into class folders, or for pretraining into one"
    )


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of n samples of an epoch: a function of (seed, epoch) alone."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, start: int = 0) -> list[Tensor]:
    """An epoch's batches of indices from batch `start` on, without the last, incomplete one."""
    order = epoch_order(n, seed, epoch)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(start, n // batch_size)]


def iterate(
    dataset: Dataset,
    batches: Iterable[Tensor],
    *,
    num_workers: int | str,
    failures: Failures,
    pin: bool = False,
) -> Iterator[Batch]:
    """The batches of these indices in their order, whatever the number of worker processes.

    `pin` puts images into page-locked memory, for a GPU. UserError for too many unreadable images,
    or a worker that died.
    """
    if isinstance(dataset, store.PackedImages) or (dataset.in_memory and pin):
        loaded = fetch_ahead(map(dataset.fetch, batches), pin)
    else:
        loaded = fetch_all(dataset, batches, 0 if dataset.in_memory else num_workers, pin)
    for batch in loaded:
        failures.add(batch.failed)
        yield batch


def fetch_ahead(batches: Iterator[Batch], pin: bool, depth: int = 2) -> Iterator[Batch]:
    """The same batches, fetched (and pinned) by a thread while the caller uses an earlier one."""

    def fetch() -> Batch | None:
        batch = next(batches, None)
        return batch.pin_memory() if pin and batch is not None else batch

    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(fetch) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(fetch))
            yield batch
