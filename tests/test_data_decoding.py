"""Decoding: every mode of image, orientation, and sizes, against Pillow and torchvision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import open_center, open_square, pixels, smooth, write_class
from PIL import Image, ImageCms, ImageOps
from torchvision.transforms.v2 import functional as TF

import data.decoding
from data.base import Batch


def fetch_square(root: Path, *indices: int, resize: int = 20) -> Batch:
    return open_square(root, resize=resize).fetch(torch.tensor(indices))


def fetch_center(root: Path, *indices: int, resize: int, crop: int) -> Batch:
    dataset = open_center(root, "pretrain", resize=resize, crop=crop)
    return dataset.fetch(torch.tensor(indices))


def difference(a: torch.Tensor, b: torch.Tensor | np.ndarray) -> int:
    """The largest difference of two images, in 255ths."""
    return int((torch.as_tensor(a).int() - torch.as_tensor(b).int()).abs().max())


def to_lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


def in_mode(mode: str, grey: np.ndarray) -> Image.Image:
    """The grey values (uint8) as an image of a mode, built from the mode's own definition."""
    half = np.full_like(grey, 128)
    noise, opaque = pixels(3, *grey.shape), np.full_like(grey, 255)
    planes = {
        "RGB": (grey, grey, grey),
        "RGBA": (grey, grey, grey, opaque),
        "CMYK": (255 - grey, 255 - grey, 255 - grey, np.zeros_like(grey)),
        "YCbCr": (grey, half, half),
        "HSV": (noise, np.zeros_like(grey), grey),
        "LA": (grey, opaque),
    }
    if mode in planes:
        return Image.merge(mode, [Image.fromarray(plane) for plane in planes[mode]])
    if mode in ("P", "PA"):
        image = Image.fromarray(255 - grey).convert("P")
        image.putpalette([255 - i // 3 for i in range(768)])
        return image if mode == "P" else image.convert("PA")
    if mode == "LAB":
        return to_lab(in_mode("RGB", grey))
    if mode == "1":
        return Image.fromarray(grey >= 128)
    if mode.startswith("I;16"):
        values = grey.astype(np.uint32) * 257
        stored = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        return Image.frombytes(mode, grey.shape[::-1], stored)
    values = {"L": grey, "I": grey.astype(np.int32) * 257, "F": grey.astype(np.float32)}
    return Image.fromarray(values[mode])


@pytest.mark.parametrize(
    "mode",
    "1 L LA P PA RGB RGBA CMYK YCbCr LAB HSV".split(),  # noqa: SIM905
)
def test_every_mode_of_8_bits_becomes_rgb(mode: str) -> None:
    values = [0, 255] * 128 if mode == "1" else range(256)
    grey = np.array(values, np.uint8).reshape(16, 16)
    found = data.decoding.to_8_bits(in_mode(mode, grey), data.base.RGB)
    assert found.mode == "RGB"
    tolerance = {"LAB": 5, "YCbCr": 1}.get(mode, 0)
    assert difference(np.array(found), grey[..., None]) <= tolerance


FILES = (
    "1.png L.png LA.png P.png RGB.png RGBA.png I;16.png I.tif F.tif CMYK.tif YCbCr.tif LAB.tif "
    "I;16.tif I;16B.tif PA.tif L.pgm CMYK.jpg L.jpg RGBA.webp P.bmp"
)


@pytest.mark.parametrize("file", FILES.split())
def test_files_of_every_mode(tmp_path: Path, file: str) -> None:
    """Four flat quarters, which JPEG keeps too."""
    mode, ending = file.split(".")
    values = [[0, 255], [255, 0]] if mode == "1" else [[0, 255], [200, 90]]
    grey = np.kron(np.array(values, np.uint8), np.ones((16, 16), np.uint8))
    image = in_mode(mode, grey)
    image = image.convert("LA") if mode == "PA" else image  # which TIFF cannot hold
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(ending, {})
    write_class(tmp_path, (f"a.{ending}", image), **options)
    batch = fetch_square(tmp_path, 0, resize=32)
    assert batch.failed == []
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (1, 3, 32, 32)
    assert difference(batch.images[0], grey) <= 6


@pytest.mark.parametrize(
    "file", ["RGB.png", "RGBA.png", "P.png", "CMYK.jpg", "YCbCr.jpg", "LAB.tif"]
)
def test_channels_are_red_green_blue(tmp_path: Path, file: str) -> None:
    mode, ending = file.split(".")
    colour = Image.new("RGB", (20, 20), (200, 100, 30))
    image = to_lab(colour) if mode == "LAB" else colour.convert(mode)
    write_class(tmp_path, (f"a.{ending}", image), **({"quality": 100} if ending == "jpg" else {}))
    found = fetch_square(tmp_path, 0).images.float().mean(dim=(0, 2, 3))
    tolerance = 25 if mode == "P" else 6  # of a palette of 216 colours
    assert (found - torch.tensor([200.0, 100, 30])).abs().max() < tolerance


def test_transparent_palette_and_broken_metadata_are_no_failure(tmp_path: Path) -> None:
    image = smooth(20, 20)
    write_class(tmp_path, ("a.png", image.convert("P")), transparency=bytes(range(256)))
    write_class(tmp_path, ("b.jpg", image), exif=b"Exif\x00\x00garbage")
    write_class(tmp_path, ("c.jpg", image), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    batch = fetch_square(tmp_path, 0, 1, 2)
    assert batch.failed == []
    assert difference(batch.images[1:], TF.pil_to_tensor(image)) < 40


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("size", [(60, 40), (40, 60)])
def test_exif_orientation(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    tolerances = {"a.png": 1, "b.jpg": 12, "c.tif": 1}
    write_class(tmp_path, *((name, smooth(*size)) for name in tolerances), exif=exif)
    for index, (name, tolerance) in enumerate(tolerances.items()):
        with Image.open(tmp_path / "one" / name) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        batch = fetch_square(tmp_path, index, resize=16)
        expected = TF.pil_to_tensor(upright.resize((16, 16), Image.Resampling.BILINEAR))
        assert difference(batch.images[0], expected) <= tolerance
        assert batch.aspect.item() == pytest.approx(upright.width / upright.height)
        batch = fetch_center(tmp_path, index, resize=20, crop=16)
        resized = TF.resize(TF.pil_to_tensor(upright), 20, antialias=True)
        expected = TF.center_crop(resized, [16, 16])
        assert difference(batch.images[0], expected) <= tolerance + 2
        assert batch.aspect.item() == 1


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 20 * 20).reshape(20, 20).astype(np.uint16)
    write_class(tmp_path, ("a.png", Image.fromarray(ramp)), ("b.tif", Image.fromarray(ramp)))
    images = fetch_square(tmp_path, 0, 1).images
    assert difference(images, (ramp / 257).round()) <= 1


@pytest.mark.parametrize("size", [(640, 400), (401, 639), (300, 36), (32, 32), (129, 33), (20, 25)])
@pytest.mark.parametrize("fit", ["square", "center"])
def test_jpegs_are_decoded_small_but_not_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], fit: str
) -> None:
    write_class(tmp_path, ("a.jpg", smooth(*size)), ("b.png", smooth(*size)), quality=95)
    decoded, to_8_bits = [], data.decoding.to_8_bits

    def watch(image: Image.Image, pixels: data.base.Pixels) -> Image.Image:
        decoded.append(image.size)
        return to_8_bits(image, pixels)

    monkeypatch.setattr(data.decoding, "to_8_bits", watch)
    if fit == "square":
        batch = fetch_square(tmp_path, 0, 1, resize=32)
    else:
        batch = fetch_center(tmp_path, 0, 1, resize=32, crop=28)
    assert decoded[1] == size
    assert all(side >= min(32, whole) for side, whole in zip(decoded[0], size, strict=True))
    if min(size) >= 64:  # from 2 x 32 px on there is a smaller scale
        assert max(decoded[0]) < max(size) / 2
    jpeg, png = batch.images.float()
    assert (jpeg - png).abs().mean() < 2.5 and (jpeg - png).abs().max() < 25


def test_square_and_center_agree_with_pillow_and_torchvision(tmp_path: Path) -> None:
    wide, high = smooth(90, 60), smooth(57, 91)
    write_class(tmp_path, ("a.png", wide), ("b.png", high))
    batch = fetch_square(tmp_path, 0, 1, resize=32)
    assert batch.aspect.tolist() == pytest.approx([1.5, 57 / 91])
    assert batch.labels.tolist() == [0, 0]
    squeezed = wide.resize((32, 32), Image.Resampling.BILINEAR)
    assert torch.equal(batch.images[0], TF.pil_to_tensor(squeezed))
    batch = fetch_center(tmp_path, 0, 1, resize=40, crop=32)
    for found, image in zip(batch.images, (wide, high), strict=True):
        cropped = TF.center_crop(TF.resize(image, 40, antialias=True), [32, 32])
        assert difference(found, TF.pil_to_tensor(cropped)) <= 4
