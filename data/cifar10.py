"""CIFAR-10, in its binary version or in its python version."""

from pathlib import Path

import numpy as np
import torchvision

from data.arrays import ArrayImages, map_records
from data.base import Size
from utils import UserError

NAME = "cifar10"
PYTHON, BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def matches(root: str) -> bool:
    return _folder(root) is not None


def open_split(root: str, split: str, size: Size) -> ArrayImages:
    folder = _folder(root)
    read = _read_python if folder.name == PYTHON else _read_binary
    return ArrayImages(NAME, *read(folder, split), CLASSES, size)


def _read_binary(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Each record is a byte for the label, and three planes of 32 x 32."""
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    records = np.concatenate([map_records(folder / f"{name}.bin", 3073) for name in names])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _read_python(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """By torchvision, which unpickles only files that have the official checksums."""
    try:
        found = torchvision.datasets.CIFAR10(folder.parent, train=split != "test")
    except (RuntimeError, OSError):
        raise UserError(
            f"{str(folder)!r} is not CIFAR-10's official python version: fetch it again"
        ) from None
    return np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)), np.array(found.targets)


def _folder(root: str) -> Path | None:
    """The folder of one version or the other, at or below `root`."""
    for folder in (Path(root) / BINARY, Path(root) / PYTHON, Path(root)):
        file = "data_batch_1" if folder.name == PYTHON else "data_batch_1.bin"
        if (folder / file).exists():
            return folder
    return None
