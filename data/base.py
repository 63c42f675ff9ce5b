"""What all data sets share. A new one is a file like cifar10.py, and an entry in dataloader.py."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from utils import UserError


@dataclass
class Batch:
    """Images of one size, so that the augmentation runs batched on the device."""

    images: Tensor  # uint8 (n, 1 or 3, S, S)
    aspect: Tensor  # original width / height (n,)
    labels: Tensor  # int64 (n,), -1 where there is none
    failed: list[str]  # files that could not be read, and were replaced

    def pin_memory(self) -> "Batch":
        return replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class Size:
    """How images are brought to one size.

    fit "square": squeezed to resize x resize; random views are cut from it in the original aspect.
    fit "center": shorter side to `resize`, then a centre crop of `crop` px; for evaluation.
    """

    fit: str
    resize: int | str  # px, or "auto"
    crop: int  # px

    def resolve(self, native: int | None) -> int:
        """The side to resize to, for images of `native` px (None: of many sizes).

        "auto" is 2 x crop ("square") or 8/7 x crop ("center"), at most the native side. UserError
        for a side smaller than the crop, unless the data set itself is smaller.
        """
        side = self.resize
        if side == "auto":
            side = 2 * self.crop if self.fit == "square" else round(self.crop * 8 / 7)
            side = min(side, native or side)
        elif side < min(self.crop, native or self.crop):
            raise UserError(
                f"--resize {side} is smaller than --crop {self.crop}: "
                f"use at least {self.crop}, or auto"
            )
        return side if self.fit == "square" else max(side, self.crop)


class Dataset(ABC):
    """A split of a data set, whose images are fetched by their indices."""

    in_memory = True  # nothing to decode: worker processes would not help

    def __init__(
        self, name: str, labels: Tensor, classes: list[str], size: Size, native: int | None = None
    ) -> None:
        self.name, self.labels, self.classes = name, labels, classes
        self.native = native  # side of the images in px, None if they are of many sizes
        self.size = replace(size, resize=size.resolve(native))
        self.resize, self.crop = self.size.resize, self.size.crop

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def fetch(self, indices: Tensor) -> Batch:
        """The images of some indices (n,), in their order."""
