"""STL-10 (Coates et al. 2011) in its official binary files, with its unlabelled split."""

from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from data.arrays import ArrayImages, map_records
from data.base import Size
from utils import UserError

NAME = "stl10"
SIDE = 96  # px
FILES = {"pretrain": "unlabeled", "train": "train", "test": "test"}


def matches(root: str) -> bool:
    files = (Path(root) / f"{name}_X.bin" for name in FILES.values())
    return (Path(root) / "stl10_binary").is_dir() or any(file.exists() for file in files)


def open_split(root: str, split: str, size: Size) -> ArrayImages:
    folder, name = _folder(root), FILES[split]
    images = map_records(folder / f"{name}_X.bin", 3 * SIDE * SIDE)
    images = images.reshape(-1, 3, SIDE, SIDE).transpose(0, 1, 3, 2)  # stored column by column
    labels = np.full(len(images), -1)
    if split != "pretrain":
        labels = map_records(folder / f"{name}_y.bin", 1)[:, 0] - 1  # 1 to 10; a 0 becomes 255
    names = folder / "class_names.txt"
    classes = names.read_text().split() if names.exists() else [str(i) for i in range(1, 11)]
    return ArrayImages(NAME, images, labels, classes, size)


def read_folds(root: str, images: int) -> list[Tensor]:
    """The ten official folds: 1,000 indices each of the `images` in the training split."""
    if not matches(root):
        raise UserError(
            f"--folds are STL-10's, and --dataset_root {root!r} is another data set: "
            "leave --folds out, or see --train_fraction"
        )
    path = _folder(root) / "fold_indices.txt"
    try:
        folds = np.loadtxt(path, dtype=np.int64, ndmin=2)
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}): fetch it again") from None
    if len(folds) != 10 or folds.min() < 0 or folds.max() >= images:
        raise UserError(
            f"{str(path)!r} does not hold ten folds of indices below {images}: fetch it again"
        )
    return list(torch.from_numpy(folds))


def download(root: str) -> None:
    """Fetch STL-10 (2.6 GB) into a folder, unless it is there; UserError if it cannot be had."""
    folder = Path(root).parent if Path(root).name == "stl10_binary" else Path(root)
    try:
        torchvision.datasets.STL10(folder, split="train", download=True)
    except Exception as error:  # of urllib, tarfile and the disk
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"STL-10 cannot be fetched into {root!r}: {reason}") from None


def _folder(root: str) -> Path:
    below = Path(root) / "stl10_binary"
    return below if below.is_dir() else Path(root)
