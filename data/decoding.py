"""Image files of any kind, decoded to uint8 of one size: by Pillow, numpy (.npy) or tifffile."""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import torchvision
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLESPERPIXEL

from data.base import Pixels, Size, height_width
from utils import UserError, say

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
EXTENSIONS += (".npy",)
MEGAPIXELS = 1000  # of the largest image that is read
Image.MAX_IMAGE_PIXELS = MEGAPIXELS * 10**6 // 2  # Pillow refuses more than twice this
LOOKED_AT = 100  # files, before the work
EXIF_ORIENTATION = 0x0112
EXIF_TURNS = {  # what brings a photograph upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: str, size: Size) -> tuple[np.ndarray, float]:
    """A file as uint8 (H, W, C), and its original width / height (1 after a centre crop).

    `size.resize` is a number of px. Raises whatever a decoder raises on a file that it cannot read,
    and ValueError for one of other channels.
    """
    with open_image(path, size.pixels.channels) as (image, orientation):
        lies = orientation >= 5
        planes = [image] if isinstance(image, Image.Image) else split_bands(image, size.pixels)
        width, height = planes[0].size[::-1] if lies else planes[0].size
        planes = [_resample(plane, size, lies) for plane in planes]
    if orientation in EXIF_TURNS:  # turned last, when it is small
        planes = [plane.transpose(EXIF_TURNS[orientation]) for plane in planes]
    values = np.dstack([np.asarray(plane) for plane in planes])
    if values.dtype != np.uint8:
        values = values.clip(0, 255).round().astype(np.uint8)
    return values, width / height if size.fit == "square" else 1.0


def _resample(image: Image.Image, size: Size, lies: bool) -> Image.Image:
    """An image squeezed to a square, or its centre crop, in one resampling."""
    square = size.fit == "square"
    height, width = (size.resize, size.resize) if square else height_width(size.crop)
    out = (height, width) if lies else (width, height)
    margin = 1 if square else size.resize / min(out)

    def box() -> tuple[float, float, float, float]:
        w, h = image.size
        if square:
            return 0, 0, w, h
        unit = min(w / out[0], h / out[1]) / margin  # px of the image to one of the crop
        w2, h2 = unit * out[0] / 2, unit * out[1] / 2
        return w / 2 - w2, h / 2 - h2, w / 2 + w2, h / 2 + h2

    left, top, right, bottom = box()
    scale = out[0] / (right - left), out[1] / (bottom - top)
    # of a JPEG the smallest DCT scale that is no smaller; others stay as they are
    image.draft(None, tuple(math.ceil(n * s) for n, s in zip(image.size, scale, strict=True)))
    where = box()
    if image.mode != "F":
        image = to_8_bits(image, size.pixels)
    return image.resize(out, Image.Resampling.BILINEAR, box=where)


def to_8_bits(image: Image.Image, pixels: Pixels) -> Image.Image:
    """An image of 8 bits in any mode as RGB, or for one channel as grey; on the background."""
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*[pixels.background] * 3, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert("RGB" if pixels.channels == 3 else "L")


def split_bands(bands: np.ndarray, pixels: Pixels) -> list[Image.Image]:
    """Bands (H, W, C) of any type as C images of mode F, from 0 to 255; one band makes three."""
    low, high = (0, 255) if bands.dtype == np.uint8 else pixels.value_range or guess_range(bands)
    known = np.nan_to_num(bands.astype(np.float32), posinf=high, neginf=low)
    scaled = (known - low) * (255 / (high - low))
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(scaled, 2, 0)]
    return planes * pixels.channels if len(planes) == 1 else planes


def guess_range(values: np.ndarray) -> tuple[float, float]:
    """The range of which some values are: of 12 or 16 bits, from 0 to 1, or their own."""
    values = values[np.isfinite(values)]
    if not values.size:  # as of a tile without data
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if low < 0:
        return low, max(high, low + 1)
    if values.dtype.kind == "f":
        return 0.0, 1.0 if high <= 1 else max(high, 255.0)
    return 0.0, float(2 ** max(8, math.ceil(math.log2(high + 1))) - 1)


# ------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def open_image(path: str, channels: int) -> Iterator[tuple[Image.Image | np.ndarray, int]]:
    """A file as an image of 8 bits, or as bands (H, W, C), and its EXIF orientation (1 to 8).

    An image of 8 bits can become grey or RGB, and bands are as many as `channels`, or one for
    three: else ValueError.
    """
    with warnings.catch_warnings(), open(path, "rb", opener=_open_at_once) as file:
        warnings.simplefilter("ignore")  # on odd metadata of images that Pillow reads well
        if path.lower().endswith(".npy"):
            yield _bands(np.load(file, allow_pickle=False), channels), 1
            return
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            if not path.lower().endswith((".tif", ".tiff")):
                raise
            yield _bands(_read_tiff(file), channels), 1  # more bands than Pillow takes
            return
        with image:
            if image.format == "TIFF":
                tags, bands = image.tag_v2, len(image.getbands())
                wide = max(tags.get(BITSPERSAMPLE, (8,))) > 8 and bands > 1
                if wide or tags.get(SAMPLESPERPIXEL, 1) != bands:  # Pillow would drop some of it
                    yield _bands(_read_tiff(file), channels), 1
                    return
                image.load()  # as Pillow does so, it turns the image upright
            deep = image.mode == "RGB" and ";16" in str(image.tile)
            orientation = _orientation(image)
            if deep:  # Pillow would drop 8 bits
                pixels = torchvision.io.decode_image(path, mode="UNCHANGED")
                yield _bands(pixels.permute(1, 2, 0).numpy(), channels), orientation
            elif image.mode[0] in "FI" or image.mode == "RGBX" or channels not in (1, 3):
                yield _bands(np.asarray(image), channels), orientation
            else:
                yield image, orientation


def describe_failure(path: str) -> str:
    """Why a file cannot be read, as far as that is known."""
    if not os.path.lexists(path):
        return "is no longer there"
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            Image.open(file)
    except Exception as error:  # whatever a decoder raises
        if isinstance(error, Image.DecompressionBombError):
            return f"has more than {MEGAPIXELS:,} megapixels (cut it into several)"
    return "cannot be read as an image"


def _open_at_once(path: str, flags: int) -> int:
    """As `open` does, but a pipe with an image's name does not make the run wait for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read_tiff(file: BinaryIO) -> np.ndarray:
    try:
        import tifffile  # an optional extra
    except ImportError:
        raise UserError(
            "TIFF files of many bands, or of 16 bits in colour, need a package: "
            "pip install tifffile imagecodecs"
        ) from None
    file.seek(0)
    return tifffile.imread(file)


def _bands(values: np.ndarray, channels: int) -> np.ndarray:
    """Values (H, W), (H, W, C) or (C, H, W) as (H, W, C)."""
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype.kind not in "uif":
        raise ValueError(f"its values are of type {values.dtype}")
    if values.ndim == 2:
        values = values[..., None]
    taken = {channels, 1} if channels == 3 else {channels}
    if values.ndim == 3 and values.shape[2] not in taken and values.shape[0] in taken:
        values = np.moveaxis(values, 0, 2)
    if values.ndim != 3 or values.shape[2] not in taken or not values.size:
        raise BandsError(values.shape)
    return values


class BandsError(ValueError):
    """Values of a shape that is not (H, W, C)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        super().__init__(f"its values are of shape {shape}")


def _orientation(image: Image.Image) -> int:
    """1 to 8, by the EXIF tag: 1 is upright, from 5 on width and height change places."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # ignore broken EXIF
        return 1
    return orientation if orientation in EXIF_TURNS else 1


# --------------------------------------------------------------------------- before the work


def look(paths: Sequence[str], size: Size) -> tuple[int | None, Size]:
    """What a hundred of the files are like: the largest side in px, and the range of their values.

    Of a centre crop it is the shorter side that counts. The size comes back with a value range
    where it had none and the values have more than 8 bits. UserError for another number of bands.
    """
    longest, lows, highs = None, [], []
    pick = max if size.fit == "square" else min
    for path in paths[:: max(1, len(paths) // LOOKED_AT)][:LOOKED_AT]:
        try:
            with open_image(path, size.pixels.channels) as (image, _):
                if isinstance(image, np.ndarray):
                    sides = image.shape[:2]
                    if image.dtype != np.uint8:
                        low, high = guess_range(image)
                        lows.append(low)
                        highs.append(high)
                else:
                    sides = image.size
        except UserError as error:
            raise UserError(f"{path!r} cannot be read: {error}") from None
        except BandsError as error:
            n = min(error.shape[0], error.shape[-1]) if len(error.shape) == 3 else 1
            bands = f"{n} band{'s' if n > 1 else ''} ({' x '.join(map(str, error.shape))} values)"
            raise UserError(
                f"{path!r} has {bands}, not --channels {size.pixels.channels}: give --channels {n}"
            ) from None
        except Exception:  # an unreadable file is counted when it is needed
            continue
        longest = max(longest or 0, pick(sides))
    if not lows or size.pixels.value_range is not None:
        return longest, size
    low, high = min(lows), max(highs)
    say(
        f"data: {len(lows)} of the images looked at have more than 8 bits: their values from "
        f"{low:g} to {high:g} are taken as black to white (--value_range)"
    )
    return longest, replace(size, pixels=replace(size.pixels, value_range=(low, high)))
