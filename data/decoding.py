"""Image files of any kind that Pillow reads, decoded to RGB bytes of one size."""

import math
import os
import warnings

import numpy as np
from PIL import Image

from data.base import Size

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
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
    """A file as uint8 (S, S, 3), and its original width / height (1 after a centre crop).

    `size.resize` is a number of px. Raises whatever Pillow raises on a file that it cannot read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd metadata of images that Pillow reads well
        with open(path, "rb", opener=_open_at_once) as file, Image.open(file) as image:
            if image.format == "TIFF":
                image.load()  # as Pillow does so, it turns the image upright
            orientation = _orientation(image)
            if size.fit == "square":
                width, height = image.size if orientation < 5 else image.size[::-1]
                pixels, aspect = _squeeze(image, size.resize), width / height
            else:
                pixels, aspect = _crop_center(image, size.resize, size.crop), 1.0
    if orientation in EXIF_TURNS:  # turned last, when it is small
        pixels = pixels.transpose(EXIF_TURNS[orientation])
    return np.asarray(pixels), aspect


def _open_at_once(path: str, flags: int) -> int:
    """As `open` does, but a pipe with an image's name does not make the run wait for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _squeeze(image: Image.Image, side: int) -> Image.Image:
    image.draft(None, (side, side))  # JPEG: the smallest DCT scale that is no smaller
    return as_rgb(image).resize((side, side), Image.Resampling.BILINEAR)


def _crop_center(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """The crop of the image whose shorter side is `resize`, in one resampling."""
    scale = resize / min(image.size)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    width, height = image.size
    half = min(width, height) * crop / resize / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    return as_rgb(image).resize((crop, crop), Image.Resampling.BILINEAR, box=box)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB: 16-bit grey is scaled, transparency dropped."""
    if image.mode.startswith("I"):
        return _grey(np.asarray(image) / 257)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        return _grey(values * 255 if values.max() <= 1 else values)
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """1 to 8, by the EXIF tag: 1 is upright, from 5 on width and height change places."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # ignore broken EXIF
        return 1
    return orientation if orientation in EXIF_TURNS else 1
