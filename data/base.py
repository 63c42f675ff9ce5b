"""What all data sets share. A new one is a file like cifar10.py, and an entry in dataloader.py."""

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from utils import UserError


@dataclass
class Batch:
    """Images of one size, so that the augmentation runs batched on the device."""

    images: Tensor  # uint8 (n, C, S, S); C may be 1 where the encoder takes three channels
    aspect: Tensor  # original width / height (n,)
    labels: Tensor  # int64 (n,), -1 where there is none
    failed: list[str]  # files that could not be read, and were replaced

    def pin_memory(self) -> "Batch":
        return replace(self, images=self.images.pin_memory())


Crop = int | list[int]  # px: the side of a square, or height and width


def height_width(crop: Crop) -> tuple[int, int]:
    return (crop, crop) if isinstance(crop, int) else (crop[0], crop[1])


def in_px(crop: Crop) -> str:
    return f"{crop} px" if isinstance(crop, int) else f"{crop[0]} x {crop[1]} px"


@dataclass(frozen=True)
class Pixels:
    """What the values in a file become: uint8 of some channels."""

    channels: int = 3
    value_range: tuple[float, float] | None = None  # 0 and 255, of values of more than 8 bits
    background: int = 0  # grey value under what is transparent


RGB = Pixels()


@dataclass(frozen=True)
class Size:
    """How images are brought to one size.

    fit "square": squeezed to resize x resize; random views are cut from it in the original aspect.
    fit "center": shorter side to `resize`, then a centre crop of `crop` px; for evaluation.
    """

    fit: str
    resize: int | str  # px, or "auto"
    crop: Crop
    pixels: Pixels | None = RGB  # None: the images are only counted

    def resolve(self, native: int | None) -> int:
        """The side to resize to, for images of at most `native` px (None: not known).

        "auto" is 2 x crop ("square") or 8/7 x crop ("center"), at most the native side. UserError
        for a side smaller than the crop, unless the data set itself is smaller.
        """
        side, lengths = self.resize, height_width(self.crop)
        crop = max(lengths) if self.fit == "square" else min(lengths)
        if side == "auto":
            side = 2 * crop if self.fit == "square" else round(crop * 8 / 7)
            side = min(side, native or side)
        elif side < min(crop, native or crop):
            raise UserError(
                f"--resize {side} is smaller than --crop {crop}: use at least {crop}, or auto"
            )
        return side if self.fit == "square" else max(side, crop)


class Dataset(ABC):
    """A split of a data set, whose images are fetched by their indices."""

    in_memory = True  # nothing to decode: worker processes would not help

    def __init__(
        self,
        name: str,
        labels: Tensor,
        classes: list[str],
        size: Size,
        native: int | None = None,
        largest: int | None = None,
    ) -> None:
        self.name, self.labels, self.classes = name, labels, classes
        self.native = native  # side of the images in px, None if they may be of many sizes
        self.size = replace(size, resize=size.resolve(native or largest))
        self.resize, self.crop = self.size.resize, self.size.crop

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def checksum(self) -> int:
        """Another one for other images, as far as their order, labels and names tell."""
        return zlib.crc32(self.labels.numpy())

    @property
    def image_bytes(self) -> int:
        """The bytes of an image as `fetch` gives it, if it is decoded."""
        height, width = height_width(self.resize if self.size.fit == "square" else self.crop)
        return self.size.pixels.channels * height * width

    @abstractmethod
    def fetch(self, indices: Tensor) -> Batch:
        """The images of some indices (n,), in their order."""
