"""Fashion-MNIST in its four idx files, `.gz` or not, or MNIST in files of the same names."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from data.arrays import ArrayImages
from data.base import Size
from utils import UserError

NAME = "fashion_mnist"


def matches(root: str) -> bool:
    return any(Path(root).glob("*-images-idx3-ubyte*"))


def open_split(root: str, split: str, size: Size) -> ArrayImages:
    prefix = Path(root) / ("t10k" if split == "test" else "train")
    images = _read_idx(f"{prefix}-images-idx3-ubyte", dims=3)
    labels = _read_idx(f"{prefix}-labels-idx1-ubyte", dims=1)
    is_fashion = "fashion" in str(Path(root).resolve()).lower()
    classes = FashionMNIST.classes if is_fashion else list("0123456789")
    return ArrayImages(NAME, images[:, None], labels, classes, size)


def _read_idx(path: str, dims: int) -> np.ndarray:
    """An idx file: bytes 0, 0, 8 (for uint8), dims; each dimension as big-endian int32; data."""
    path = path if Path(path).exists() else f"{path}.gz"
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
        if content[:4] != bytes([0, 0, 8, dims]):
            raise ValueError(f"not a {dims}-D uint8 idx file")
        shape = np.frombuffer(content, dtype=">i4", count=dims, offset=4)
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path!r} cannot be read ({error}): fetch it again") from None
