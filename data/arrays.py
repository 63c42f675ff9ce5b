"""Images of one size, in an array or a memory map."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from data.base import Batch, Dataset, Size, height_width
from utils import UserError


class ArrayImages(Dataset):
    """Images uint8 (n, 1 or 3, S, S) in memory or in a memory map.

    Raises UserError for wrong labels, and for other channels than are asked for.
    """

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray, classes: list[str], size: Size
    ) -> None:
        labels = torch.from_numpy(labels.astype(np.int64))
        super().__init__(name, labels, classes, size, native=images.shape[-1])
        self.images = images
        channels, pixels = images.shape[1], size.pixels
        if pixels and channels != pixels.channels and (channels, pixels.channels) != (1, 3):
            raise UserError(f"--channels {pixels.channels}: the images of {name} have {channels}")
        if len(labels) != len(images) or labels.max() >= len(classes):
            raise UserError(
                f"{name} is damaged, it has {len(images)} images with {len(labels)} labels up to "
                f"{labels.max()} for {len(classes)} classes: fetch it again"
            )

    def fetch(self, indices: Tensor) -> Batch:
        images = torch.from_numpy(np.ascontiguousarray(self.images[indices.numpy()]))
        lengths, side = height_width(self.crop), self.resize
        if self.size.fit == "center":  # so that the crop lies within the image
            side = round(side * max(lengths) / min(lengths))
        if side != self.native:
            images = TF.resize(images, [side, side], antialias=True)
        if self.size.fit == "center":
            images = TF.center_crop(images, list(lengths))
        return Batch(images, torch.ones(len(indices)), self.labels[indices], [])


def map_records(path: Path, width: int) -> np.ndarray:
    """A file of records of `width` bytes as a memory map (n, width); UserError if not whole."""
    try:
        return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, width)
    except (OSError, ValueError) as error:  # missing; empty, or not a multiple of the width
        raise UserError(f"{str(path)!r} cannot be read ({error}): fetch it again") from None
