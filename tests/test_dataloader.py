"""Data sets of every kind, what is wrong with them, decoding, and the order of samples."""

import gzip
import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from data import pixels, write_cifar10, write_fashion_mnist, write_folders, write_stl10
from PIL import Image, ImageCms, ImageOps
from torchvision.transforms.v2 import functional as TF

import dataloader
from dataloader import (
    Failures,
    detect,
    epoch_batches,
    epoch_order,
    iterate,
    open_dataset,
    resolve_resize,
)
from utils import UserError


def square(root: Path, split: str = "pretrain", resize: int = 20, crop: int = 16):
    return open_dataset(str(root), split, view="square", resize=resize, crop=crop)


def center(root: Path, split: str = "train", resize: int | str = "auto", crop: int = 16):
    return open_dataset(str(root), split, view="center", resize=resize, crop=crop)


def class_of(root: Path, *images: tuple[str, Image.Image], **options) -> Path:
    """A data set of one class with these files."""
    (root / "one").mkdir(parents=True, exist_ok=True)
    for name, image in images:
        image.save(root / "one" / name, **options)
    return root


def flat(root: Path, count: int, size: int = 20) -> list[Path]:
    """`count` images, half of them in each of two classes; their paths in order."""
    paths = [root / f"class{i // (count // 2)}" / f"{i:04}.png" for i in range(count)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size, 3), i % 251, np.uint8)).save(path)
    return paths


def smooth(width: int, height: int) -> Image.Image:
    """A colourful picture without sharp edges, without any symmetry."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    planes = [
        128 + 100 * np.sin(5 * x + 3 * y),
        60 + 150 * x * y + 40 * y,
        200 - 120 * x + 30 * np.cos(9 * y),
    ]
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------------------- what is there


def test_detect(tmp_path: Path) -> None:
    write_folders(tmp_path / "both", classes=2, train=1, test=1)
    write_stl10(tmp_path / "stl", 1, 1, 1)
    write_fashion_mnist(tmp_path / "plain", 10, 10, gz=False)
    write_fashion_mnist(tmp_path / "gz", 10, 10)
    for name, kind in {
        "both": "folders",
        "both/train": "classes",
        "stl": "stl10",
        "stl/stl10_binary": "stl10",
        "plain": "fashion_mnist",
        "gz": "fashion_mnist",
    }.items():
        assert detect(str(tmp_path / name)) == kind
    assert detect("shapes") == "shapes"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    class_of(tmp_path)
    (tmp_path / "one").rename(tmp_path / "train")
    smooth(20, 20).save(tmp_path / "train" / "a.png")
    (tmp_path / "bus").mkdir()
    smooth(20, 20).save(tmp_path / "bus" / "a.png")
    assert square(tmp_path).classes == ["bus", "train"]


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ["is no folder", "shapes", "--download", "train/"]),
        ([], ["no images", ".jpg"]),
        (["a.png"], ["no class folders", "sub-folders"]),
        (["one/notes.txt"], ["no images"]),
        (["file"], ["no images"]),
    ],
)
def test_nothing_to_read_is_one_line(
    tmp_path: Path, content: list[str] | None, parts: list[str]
) -> None:
    root = tmp_path / "data"
    for name in content or []:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    if content == []:
        root.mkdir()
    with pytest.raises(UserError) as error:
        square(root)
    assert (
        str(root) in str(error.value)
        and "\n" not in str(error.value)
        and all(part in str(error.value) for part in parts)
    )


def test_a_file_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="is no folder"):
        square(tmp_path / "a.png")


def test_a_folder_that_may_not_be_listed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        square(tmp_path)


@pytest.mark.parametrize(
    "resize, crop, native, purpose, expected",
    [
        ("auto", 64, None, "pretrain", 128),
        ("auto", 64, 96, "pretrain", 96),
        ("auto", 32, 28, "pretrain", 28),
        ("auto", 32, 40, "pretrain", 40),
        ("auto", 16, 96, "pretrain", 32),
        ("auto", 224, None, "evaluate", 256),
        ("auto", 64, None, "evaluate", 73),
        ("auto", 64, 96, "evaluate", 73),
        ("auto", 32, 28, "evaluate", 32),
        ("auto", 96, 96, "evaluate", 96),
        ("auto", 88, 96, "evaluate", 96),
        (100, 64, None, "pretrain", 100),
        (64, 64, None, "pretrain", 64),
        (200, 64, 96, "pretrain", 200),
        (28, 32, 28, "pretrain", 28),
        (28, 32, 28, "evaluate", 32),
        (63, 64, None, "pretrain", None),
        (63, 64, None, "evaluate", None),
        (40, 64, 96, "pretrain", None),
        (20, 32, 28, "pretrain", None),
    ],
)
def test_resolve_resize(
    resize: int | str, crop: int, native: int | None, purpose: str, expected: int | None
) -> None:
    if expected is not None:
        assert resolve_resize(resize, crop, native, purpose) == expected
    else:
        with pytest.raises(UserError, match=f"--resize {resize} .*--crop {crop}"):
            resolve_resize(resize, crop, native, purpose)


# ------------------------------------------------------------------------------------------------------------------------ folders


def test_train_and_val_folders(tmp_path: Path) -> None:
    write_folders(tmp_path, classes=3, train=4, test=2)
    train, test, pretrain = center(tmp_path, "train"), center(tmp_path, "test"), square(tmp_path)
    assert (
        train.name == "folders"
        and train.classes == test.classes == ["class0", "class1", "class2"]
        and train.native is None
    )
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and test.labels.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert len(pretrain) == 12 and pretrain.paths[5] == str(
        tmp_path / "train" / "class1" / "001.png"
    )
    assert all("/val/" in test.paths[i] for i in range(len(test)))
    (tmp_path / "val").rename(tmp_path / "test")
    assert all("/test/" in center(tmp_path, "test").paths[i] for i in range(6))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_evaluation_needs_two_folders_with_the_same_classes(tmp_path: Path, split: str) -> None:
    write_folders(tmp_path, classes=2, train=2, test=2)
    with pytest.raises(UserError, match="needs train/ and val/"):
        center(tmp_path / "train", split)
    (tmp_path / "val" / "class1").rename(tmp_path / "val" / "klass1")
    with pytest.raises(UserError, match="different classes.*class1, klass1"):
        center(tmp_path, split)
    assert len(square(tmp_path)) == 4  # pretraining does not look at val/
    (tmp_path / "val").rename(tmp_path / "validation")
    with pytest.raises(UserError, match="no val/ or test/"):
        center(tmp_path, split)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    write_folders(tmp_path, classes=2, train=1, test=1)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="train/empty' has no images"):
        square(tmp_path)


def test_val_without_class_folders(tmp_path: Path) -> None:
    write_folders(tmp_path, classes=2, train=1, test=1)
    for path in sorted((tmp_path / "val").glob("*/*")):
        path.rename(tmp_path / "val" / f"{path.parent.name}{path.name}")
    for path in (tmp_path / "val").glob("*/"):
        if path.is_dir():
            path.rmdir()
    assert len(square(tmp_path)) == 2
    with pytest.raises(UserError, match="val' has no class folders"):
        center(tmp_path, "test")


def test_only_image_files_count_in_sorted_order_and_below(tmp_path: Path) -> None:
    png, folder = smooth(20, 20), tmp_path / "one"
    class_of(
        tmp_path,
        ("b.png", png),
        ("C.JPG", png),
        ("a.webp", png),
        ("d.tiff", png),
        ("e.bmp", png),
        ("f.ppm", png),
        (".hidden.png", png),
        ("gif.gif", png),
    )
    (folder / "notes.txt").write_text("no image")
    (folder / "png").write_bytes(b"x")
    for name in ("deep/er", ".cache"):
        (folder / name).mkdir(parents=True)
        png.save(folder / name / "z.jpeg")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.png").write_bytes(b"x")
    dataset = square(tmp_path)
    names = [os.path.relpath(dataset.paths[i], folder) for i in range(len(dataset))]
    assert names == [
        "C.JPG",
        "a.webp",
        "b.png",
        "d.tiff",
        "e.bmp",
        "f.ppm",
        "deep/er/z.jpeg",
    ] and dataset.classes == ["one"]
    assert dataset.fetch(torch.arange(7)).failed == []


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    class_of(tmp_path / "store", ("a.png", smooth(20, 20)))
    (tmp_path / "data" / "two").mkdir(parents=True)
    (tmp_path / "data" / "one").symlink_to(tmp_path / "store" / "one")
    (tmp_path / "data" / "two" / "linked").symlink_to(tmp_path / "store" / "one")
    (tmp_path / "store" / "one" / "circle").symlink_to(tmp_path / "store" / "one")
    dataset = square(tmp_path / "data")
    assert dataset.labels.tolist() == [0, 1] and dataset.fetch(torch.tensor([0, 1])).failed == []


def test_odd_file_names_survive(tmp_path: Path) -> None:
    names = ["ä ö.png", "a\nb.png", os.fsdecode(b"\xff.png")]
    class_of(tmp_path, *((name, smooth(20, 20)) for name in names))
    dataset = square(tmp_path)
    assert (
        sorted(os.path.basename(dataset.paths[i]) for i in range(3)) == sorted(names)
        and dataset.fetch(torch.arange(3)).failed == []
    )


# ----------------------------------------------------------------------------------------------------------------------- decoding


def in_mode(mode: str, grey: np.ndarray) -> Image.Image:
    """The grey values (uint8) as an image of a mode, built from the mode's own definition."""
    full, zero, half = np.full_like(grey, 255), np.zeros_like(grey), np.full_like(grey, 128)
    noise = pixels(3, *grey.shape)  # transparency, which must not matter
    planes = {
        "RGB": (grey, grey, grey),
        "RGBA": (grey, grey, grey, noise),
        "RGBX": (grey, grey, grey, noise),
        "CMYK": (full - grey,) * 3 + (zero,),
        "YCbCr": (grey, half, half),
        "HSV": (noise, zero, grey),
        "LA": (grey, noise),
    }
    if mode in planes:
        return Image.merge(mode, [Image.fromarray(plane) for plane in planes[mode]])
    if mode in ("P", "PA"):
        image = Image.fromarray(255 - grey).convert("P")
        image.putpalette([255 - i // 3 for i in range(768)])
        return image if mode == "P" else image.convert("PA")
    if mode in ("RGBa", "La"):
        return Image.merge(
            {"RGBa": "RGBA", "La": "LA"}[mode],
            [Image.fromarray(grey)] * (3 if mode == "RGBa" else 1) + [Image.fromarray(full)],
        ).convert(mode)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(in_mode("RGB", grey), *profiles, outputMode="LAB")
    if mode == "1":
        return Image.fromarray(grey >= 128)
    if mode.startswith("I;16"):
        return Image.frombytes(
            mode,
            grey.shape[::-1],
            (grey.astype(np.uint32) * 257).astype(">u2" if mode == "I;16B" else "<u2").tobytes(),
        )
    return Image.fromarray(
        {"L": grey, "I": grey.astype(np.int32) * 257, "F": grey.astype(np.float32)}[mode]
    )


ALL_MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "I;16B",
    "I;16L",
    "F",
]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = (
        np.arange(256, dtype=np.uint8) if mode != "1" else np.array([0, 255] * 128, np.uint8)
    ).reshape(16, 16)
    found = dataloader.as_rgb(in_mode(mode, grey))
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - grey[..., None]).max() <= {
        "LAB": 5,
        "YCbCr": 1,
    }.get(mode, 0)


@pytest.mark.parametrize(
    "mode, name",
    [
        ("1", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("RGB", "png"),
        ("RGBA", "png"),
        ("I;16", "png"),
        ("I", "tif"),
        ("F", "tif"),
        ("CMYK", "tif"),
        ("YCbCr", "tif"),
        ("LAB", "tif"),
        ("I;16", "tif"),
        ("I;16B", "tif"),
        ("L", "pgm"),
        ("CMYK", "jpg"),
        ("L", "jpg"),
        ("RGBA", "webp"),
        ("P", "bmp"),
        ("PA", "tif"),
    ],
)
def test_files_of_every_mode(tmp_path: Path, mode: str, name: str) -> None:
    """Through a file: four flat quarters, so that JPEG keeps them too."""
    grey = np.kron(
        np.array([[0, 255], [200, 90] if mode != "1" else [255, 0]], np.uint8),
        np.ones((16, 16), np.uint8),
    )
    options = {"quality": 100} if name == "jpg" else {"lossless": True} if name == "webp" else {}
    image = in_mode(mode, grey)
    class_of(tmp_path, (f"a.{name}", image.convert("LA") if mode == "PA" else image), **options)
    batch = square(tmp_path, resize=32).fetch(torch.tensor([0]))
    assert (
        batch.failed == []
        and batch.images.dtype == torch.uint8
        and batch.images.shape == (1, 3, 32, 32)
    )
    assert (batch.images[0].int() - torch.from_numpy(grey).int()).abs().max() <= 6


@pytest.mark.parametrize(
    "mode, name",
    [
        ("RGB", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("CMYK", "jpg"),
        ("YCbCr", "jpg"),
        ("LAB", "tif"),
    ],
)
def test_channels_are_red_green_blue(tmp_path: Path, mode: str, name: str) -> None:
    colour = Image.new("RGB", (20, 20), (200, 100, 30))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = (
        ImageCms.profileToProfile(colour, *profiles, outputMode="LAB")
        if mode == "LAB"
        else colour.convert(mode)
    )
    class_of(tmp_path, (f"a.{name}", image), **({"quality": 100} if name == "jpg" else {}))
    found = square(tmp_path).fetch(torch.tensor([0])).images.float().mean(dim=(0, 2, 3))
    assert (found - torch.tensor([200.0, 100, 30])).abs().max() < (25 if mode == "P" else 6)


def test_transparent_palette_and_broken_metadata_are_no_failure(tmp_path: Path) -> None:
    palette = smooth(20, 20).convert("P")
    class_of(tmp_path, ("a.png", palette), transparency=bytes(range(256)))
    class_of(tmp_path, ("b.jpg", smooth(20, 20)), exif=b"Exif\x00\x00garbage")
    class_of(tmp_path, ("c.jpg", smooth(20, 20)), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    batch = square(tmp_path).fetch(torch.arange(3))
    assert (
        batch.failed == []
        and (batch.images[1:].int() - TF.pil_to_tensor(smooth(20, 20)).int()).abs().max() < 40
    )


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("size", [(60, 40), (40, 60)])
def test_exif_rotation(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    class_of(tmp_path, ("a.png", smooth(*size)), ("b.jpg", smooth(*size)), exif=exif)
    for index, (name, tolerance) in enumerate({"a.png": 1, "b.jpg": 12}.items()):
        with Image.open(tmp_path / "one" / name) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        batch = square(tmp_path, resize=16).fetch(torch.tensor([index]))
        expected = np.asarray(upright.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(batch.images[0].permute(1, 2, 0).numpy() - expected).max() <= tolerance
        assert batch.aspect.item() == pytest.approx(upright.width / upright.height)
        batch = open_dataset(str(tmp_path), "pretrain", view="center", resize=20, crop=16).fetch(
            torch.tensor([index])
        )
        expected = TF.center_crop(
            TF.resize(TF.pil_to_tensor(upright), 20, antialias=True), [16, 16]
        ).int()
        assert (
            batch.images[0].int() - expected
        ).abs().max() <= tolerance + 2 and batch.aspect.item() == 1


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 20 * 20).reshape(20, 20).astype(np.uint16)
    class_of(tmp_path, ("a.png", Image.fromarray(ramp)), ("b.tif", Image.fromarray(ramp)))
    images = square(tmp_path).fetch(torch.tensor([0, 1])).images
    assert (images - torch.from_numpy((ramp / 257).round()).expand(2, 3, 20, 20)).abs().max() <= 1


@pytest.mark.parametrize("size", [(640, 400), (401, 639), (300, 36), (32, 32), (129, 33), (20, 25)])
@pytest.mark.parametrize("view", ["square", "center"])
def test_jpegs_are_decoded_small_but_never_smaller_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], view: str
) -> None:
    class_of(tmp_path, ("a.jpg", smooth(*size)), ("b.png", smooth(*size)), quality=95)
    decoded = []
    convert = dataloader.as_rgb
    monkeypatch.setattr(
        dataloader, "as_rgb", lambda image: decoded.append(image.size) or convert(image)
    )
    jpeg, full = (
        open_dataset(str(tmp_path), "pretrain", view=view, resize=32, crop=28)
        .fetch(torch.tensor([0, 1]))
        .images.float()
    )
    assert decoded[1] == size and all(
        side >= min(32, whole) for side, whole in zip(decoded[0], size)
    )
    assert (
        min(size) < 64 or max(decoded[0]) < max(size) / 2
    )  # from 2 x 32 px on, a smaller scale is there and used
    assert (jpeg - full).abs().mean() < 2.5 and (jpeg - full).abs().max() < 25


def test_square_and_center_agree_with_pillow_and_torchvision(tmp_path: Path) -> None:
    class_of(tmp_path, ("a.png", smooth(90, 60)), ("b.png", smooth(57, 91)))
    batch = square(tmp_path, resize=32).fetch(torch.tensor([0, 1]))
    assert batch.aspect.tolist() == pytest.approx([1.5, 57 / 91]) and batch.labels.tolist() == [
        0,
        0,
    ]
    assert torch.equal(
        batch.images[0],
        TF.pil_to_tensor(smooth(90, 60).resize((32, 32), Image.Resampling.BILINEAR)),
    )
    batch = open_dataset(str(tmp_path), "pretrain", view="center", resize=40, crop=32).fetch(
        torch.tensor([0, 1])
    )
    for found, image in zip(batch.images, (smooth(90, 60), smooth(57, 91))):
        assert (
            found.int()
            - TF.pil_to_tensor(TF.center_crop(TF.resize(image, 40, antialias=True), [32, 32])).int()
        ).abs().max() <= 4


# ---------------------------------------------------------------------------------------------------------------- unreadable files


def broken(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "vanished":
        path.unlink()
    else:
        path.write_bytes(
            {
                "truncated": content[: len(content) * 2 // 3],
                "empty": b"",
                "text": b"this is no image\n" * 20,
            }[how]
        )


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "vanished"])
@pytest.mark.parametrize("name", ["png", "jpg"])
def test_an_unreadable_image_is_replaced_by_the_next_with_its_label(
    tmp_path: Path, how: str, name: str
) -> None:
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        for i in range(2):
            Image.fromarray(pixels(10 * label + i, 60, 60, 3)).save(
                tmp_path / str(label) / f"{i}.{name}"
            )
    dataset = square(tmp_path)
    whole = dataset.fetch(torch.arange(4))
    last, first = tmp_path / "0" / f"1.{name}", tmp_path / "1" / f"1.{name}"
    broken(last, how)
    broken(first, how)
    batch = dataset.fetch(torch.tensor([0, 1, 3]))
    assert torch.equal(batch.images, whole.images[[0, 2, 0]]) and batch.labels.tolist() == [
        0,
        1,
        0,
    ]  # the one after the last is the first
    assert torch.equal(batch.aspect, whole.aspect[[0, 2, 0]]) and batch.failed == [
        str(last),
        str(first),
    ]


def test_a_decompression_bomb_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_of(tmp_path, ("a.png", smooth(100, 100)), ("b.png", smooth(20, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert square(tmp_path).fetch(torch.tensor([0])).failed == [str(tmp_path / "one" / "a.png")]


def test_neighbours_that_are_broken_too(tmp_path: Path) -> None:
    paths = flat(tmp_path, 300)
    for path in paths[10:13]:
        broken(path, "text")
    batch = square(tmp_path).fetch(torch.tensor([10, 12, 13]))
    assert batch.images[:, 0, 0, 0].tolist() == [13, 13, 13] and batch.failed == [
        *map(str, paths[10:13]),
        str(paths[12]),
    ]


@pytest.mark.parametrize(
    "total, allowed",
    [(1, 0), (50, 0), (99, 0), (100, 1), (199, 1), (200, 2), (300, 3), (2900, 29), (5700, 57)],
)
def test_more_than_one_percent_stops(total: int, allowed: int) -> None:
    failures = Failures(total)
    paths = [f"/data/{i}.jpg" for i in range(allowed + 1)]
    failures.add(paths[:allowed])
    failures.add(paths[:allowed])  # the same ones in the next epoch
    assert failures.paths == paths[:allowed]
    with pytest.raises(
        UserError,
        match=rf"^{allowed + 1} of {total} images \({100 * (allowed + 1) / total:.1f} %\) cannot be read, first '/data/0.jpg'",
    ):
        failures.add([paths[allowed]])


def test_each_failure_is_named_once_and_the_eleventh_only_counted(
    capsys: pytest.CaptureFixture,
) -> None:
    failures = Failures(10_000)
    for i in range(15):
        failures.add([f"/data/{i}.jpg"] * 2)
        failures.add([f"/data/{i}.jpg"])
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 10
        and all(f"'/data/{i}.jpg'" in line for i, line in enumerate(lines))
        and len(failures.paths) == 15
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterate_counts_failures_and_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture, num_workers: int
) -> None:
    paths = flat(tmp_path, 100)
    broken(paths[7], "text")
    dataset, failures = square(tmp_path), Failures(100)
    for epoch in range(2):
        batches = epoch_batches(100, 10, seed=0, epoch=epoch)
        assert (
            sum(
                len(batch.images)
                for batch in iterate(dataset, batches, num_workers=num_workers, failures=failures)
            )
            == 100
        )
    assert failures.paths == [str(paths[7])] and capsys.readouterr().err.count(str(paths[7])) == 1
    broken(paths[50], "text")
    with pytest.raises(UserError, match="2 of 100 images"):
        list(
            iterate(
                dataset,
                epoch_batches(100, 10, seed=0, epoch=2),
                num_workers=num_workers,
                failures=failures,
            )
        )


def test_nothing_readable_ends(tmp_path: Path) -> None:
    for path in flat(tmp_path, 4):
        broken(path, "empty")
    with pytest.raises(UserError, match="of 4 images"):
        list(iterate(square(tmp_path), [torch.arange(2)], num_workers=0, failures=Failures(4)))


# -------------------------------------------------------------------------------------------------------------------------- STL-10


def test_stl10_in_the_official_format(tmp_path: Path) -> None:
    images = write_stl10(tmp_path, train=20, test=10, unlabeled=30)
    for root in (tmp_path, tmp_path / "stl10_binary"):
        for split, name in {"pretrain": "unlabeled", "train": "train", "test": "test"}.items():
            dataset = open_dataset(str(root), split, view="square", resize=96, crop=64)
            assert (
                len(dataset) == len(images[name])
                and dataset.name == "stl10"
                and dataset.native == 96
                and dataset.classes[0] == "airplane"
            )
            assert dataset.labels.tolist() == (
                [-1] * 30 if split == "pretrain" else [i % 10 for i in range(len(dataset))]
            )
            indices = torch.tensor([5, 0, 9])
            batch = dataset.fetch(indices)
            assert np.array_equal(
                batch.images.numpy(), images[name][indices]
            ) and batch.aspect.tolist() == [1, 1, 1]
            assert batch.labels.tolist() == dataset.labels[indices].tolist() and batch.failed == []


def test_stl10_is_column_major(tmp_path: Path) -> None:
    """By the format's description, not by our writer: the first 96 bytes are the red channel's first column."""
    write_stl10(tmp_path, 1, 1, 1)
    data = np.zeros(3 * 96 * 96, np.uint8)
    data[:96] = 7  # red, column 0
    data[96 * 96 + 96 * 5 + 2] = 9  # green, column 5, row 2
    data[-1] = 11  # blue, the last column's last row
    data.tofile(tmp_path / "stl10_binary" / "train_X.bin")
    image = (
        open_dataset(str(tmp_path), "train", view="center", resize=96, crop=96)
        .fetch(torch.tensor([0]))
        .images[0]
    )
    assert (
        (image[0, :, 0] == 7).all()
        and image[1, 2, 5] == 9
        and image[2, 95, 95] == 11
        and (image > 0).sum() == 98
    )


def test_stl10_views(tmp_path: Path) -> None:
    images = write_stl10(tmp_path, 10, 10, 10)
    dataset = open_dataset(str(tmp_path), "pretrain", view="square", resize="auto", crop=32)
    assert dataset.resize == 64 and dataset.fetch(torch.arange(3)).images.shape == (3, 3, 64, 64)
    dataset = open_dataset(str(tmp_path), "train", view="center", resize="auto", crop=64)
    expected = TF.center_crop(
        TF.resize(torch.from_numpy(images["train"]), [73, 73], antialias=True), [64, 64]
    )
    assert dataset.resize == 73 and torch.equal(dataset.fetch(torch.arange(10)).images, expected)


@pytest.mark.parametrize(
    "name, content, split, parts",
    [
        ("unlabeled_X.bin", None, "pretrain", ["unlabeled_X.bin", "missing", "--download"]),
        ("train_X.bin", None, "train", ["train_X.bin", "missing"]),
        ("test_y.bin", None, "test", ["test_y.bin", "missing"]),
        ("train_X.bin", b"x" * 27647, "train", ["train_X.bin", "27647 bytes"]),
        ("train_X.bin", b"", "train", ["train_X.bin", "0 bytes"]),
        ("train_y.bin", b"\x01" * 9, "train", ["train_y.bin", "10 images"]),
        ("train_y.bin", b"\x0b" * 10, "train", ["train_y.bin", "1 to 10"]),
        ("train_y.bin", b"\x00" * 10, "train", ["train_y.bin", "1 to 10"]),
    ],
)
def test_stl10_files_that_are_not_sound(
    tmp_path: Path, name: str, content: bytes | None, split: str, parts: list[str]
) -> None:
    write_stl10(tmp_path, 10, 10, 10)
    path = tmp_path / "stl10_binary" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as error:
        center(tmp_path, split, crop=64)
    assert all(part in str(error.value) for part in parts)


def test_download_fetches_stl10_only_where_no_other_data_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        torchvision.datasets,
        "STL10",
        lambda root, split, download: asked.append(Path(root)) or write_stl10(Path(root), 2, 2, 2),
    )
    dataset = open_dataset(
        str(tmp_path / "new"), "pretrain", view="square", resize="auto", crop=64, download=True
    )
    assert len(dataset) == 2 and asked == [tmp_path / "new"]
    write_folders(tmp_path / "folders", 1, 1, 1)
    for root in ("shapes", str(tmp_path / "folders")):
        with pytest.raises(UserError, match="fetches STL-10, but .*leave --download out"):
            open_dataset(root, "train", view="center", resize="auto", crop=16, download=True)
    assert len(asked) == 1

    def fail(root, split, download):
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "STL10", fail)
    with pytest.raises(UserError, match="STL-10 cannot be fetched into .*no route to host"):
        open_dataset(
            str(tmp_path / "newer"), "train", view="center", resize="auto", crop=64, download=True
        )


# ------------------------------------------------------------------------------------------------------------------- Fashion-MNIST


@pytest.mark.parametrize("gz", [True, False])
def test_fashion_mnist(tmp_path: Path, gz: bool) -> None:
    images = write_fashion_mnist(tmp_path, train=40, test=20, gz=gz)
    for split, name in {"pretrain": "train", "train": "train", "test": "t10k"}.items():
        dataset = open_dataset(str(tmp_path), split, view="square", resize="auto", crop=32)
        assert (
            len(dataset) == len(images[name])
            and dataset.native == dataset.resize == 28
            and len(dataset.classes) == 10
        )
        assert (
            dataset.labels.tolist() == [i % 10 for i in range(len(dataset))]
            and dataset.labels.dtype == torch.int64
        )
        batch = dataset.fetch(torch.tensor([3, 11]))
        assert batch.images.shape == (2, 1, 28, 28) and np.array_equal(
            batch.images[:, 0].numpy(), images[name][[3, 11]]
        )
        assert batch.labels.tolist() == [3, 1]
    batch = open_dataset(str(tmp_path), "test", view="center", resize="auto", crop=32).fetch(
        torch.tensor([4])
    )
    assert torch.equal(
        batch.images,
        TF.resize(torch.from_numpy(images["t10k"][4])[None, None], [32, 32], antialias=True),
    )


def repacked(path: Path, change) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: data[:6],
        lambda data: b"\x00\x00\x0d\x03" + data[4:],
        lambda data: b"\x00\x00\x08\x01" + data[4:],
    ],
)
def test_fashion_mnist_files_that_are_not_sound(tmp_path: Path, gz: bool, change) -> None:
    write_fashion_mnist(tmp_path, gz=gz)
    repacked(next(tmp_path.glob("train-images*")), change)
    with pytest.raises(UserError, match="train-images-idx3-ubyte.*fetch it again"):
        square(tmp_path, resize=28)


def test_fashion_mnist_damage_to_the_archive_and_missing_parts(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, train=40, test=20)
    archive = tmp_path / "train-images-idx3-ubyte.gz"
    content = archive.read_bytes()
    for damage in (content[:-1000], b"no gzip", content[:500] + b"\x00" * 50 + content[550:]):
        archive.write_bytes(damage)
        with pytest.raises(UserError, match="train-images-idx3-ubyte.gz' cannot be read"):
            square(tmp_path, resize=28)
    archive.write_bytes(content)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    repacked(labels, lambda data: data[:8] + b"\x0a" + data[9:])
    with pytest.raises(UserError, match="label 10"):
        square(tmp_path, resize=28)
    labels.write_bytes((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(UserError, match="40 images but 20 labels"):
        square(tmp_path, resize=28)
    labels.unlink()
    with pytest.raises(UserError, match="no train-labels-idx1-ubyte"):
        square(tmp_path, resize=28)


# -------------------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_deterministic_and_balanced() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    images, labels = dataloader.make_shapes(200, seed=0)
    again, other = dataloader.make_shapes(200, seed=0), dataloader.make_shapes(200, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        np.array_equal(images, again[0])
        and np.array_equal(labels, again[1])
        and not np.array_equal(images, other[0])
    )
    assert (
        np.bincount(labels).tolist() == [20] * 10
        and images.dtype == np.uint8
        and images.shape == (200, 3, 40, 40)
    )
    assert len({image.tobytes() for image in images}) == 200  # no image twice
    assert not np.array_equal(labels, np.sort(labels))


def test_shapes_have_no_mark_of_an_instance() -> None:
    """Grey, of one mean and one contrast, lit evenly, not turned freely: what is left to tell images apart is the texture."""
    images, labels = dataloader.make_shapes(500, seed=0)
    images = images.astype(float)
    assert np.array_equal(images[:, 0], images[:, 1]) and np.array_equal(images[:, 0], images[:, 2])
    grey = images[:, 0]
    assert (
        np.abs(grey.mean(axis=(1, 2)) - 127).max() < 1
        and np.abs(grey.std(axis=(1, 2)) - 64).max() < 1
    )  # of 255
    corners = np.stack(
        [grey[:, i : i + 20, j : j + 20].mean(axis=(1, 2)) for i in (0, 20) for j in (0, 20)]
    )
    assert np.abs(corners - corners.mean(axis=0)).mean() < 4  # the texture's own unevenness
    down, across = np.gradient(
        grey[labels == dataloader.SHAPE_CLASSES.index("stripes")], axis=(1, 2)
    )
    tilt = np.degrees(
        0.5
        * np.arctan2(2 * (down * across).sum(axis=(1, 2)), (across**2 - down**2).sum(axis=(1, 2)))
    )  # of the structure tensor
    assert 11 < np.abs(tilt).max() < 20  # pixels blur the measure


def test_shapes_splits() -> None:
    train, test = center("shapes", "train", crop=32), center("shapes", "test", crop=32)
    assert (
        train.labels.bincount().tolist() == [500] * 10
        and test.labels.bincount().tolist() == [100] * 10
        and len(train.classes) == 10
    )
    assert train.native == 40 and train.fetch(torch.arange(4)).images.shape == (4, 3, 32, 32)
    both = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert not both  # nothing of the test split is trained on


# --------------------------------------------------------------------------------------------------------------- order and loading


def test_epoch_order_is_a_permutation_by_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    order = epoch_order(1000, seed=3, epoch=4)
    assert sorted(order.tolist()) == list(range(1000)) and order.tolist() != list(range(1000))
    torch.manual_seed(2)
    assert torch.equal(order, epoch_order(1000, seed=3, epoch=4))
    others = [
        epoch_order(1000, seed, epoch)
        for seed, epoch in [(3, 5), (4, 4), (4, 3), (0, 0), (3, 2**32)]
    ]
    assert all((order == other).float().mean() < 0.02 for other in others)


def test_epoch_batches_drop_the_last_and_start_anywhere() -> None:
    batches = epoch_batches(103, 10, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == [10] * 10
    assert torch.equal(torch.cat(batches), epoch_order(103, 0, 1)[:100])
    for start in (0, 3, 9, 10):
        rest = epoch_batches(103, 10, seed=0, epoch=1, start=start)
        assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in batches[start:]]
    assert epoch_batches(9, 10, seed=0, epoch=0) == []


def test_workers_change_nothing(tmp_path: Path) -> None:
    write_folders(tmp_path, classes=3, train=6, test=1)
    dataset, state = square(tmp_path), torch.get_rng_state()
    batches = epoch_batches(18, 4, seed=0, epoch=0)
    results = [
        list(iterate(dataset, (batch for batch in batches), num_workers=n, failures=Failures(18)))
        for n in (0, 2)
    ]
    assert len(results[0]) == len(results[1]) == 4
    for ours, theirs, indices in zip(*results, batches):
        assert (
            torch.equal(ours.images, theirs.images)
            and torch.equal(ours.labels, theirs.labels)
            and torch.equal(ours.aspect, theirs.aspect)
        )
        assert torch.equal(ours.labels, dataset.labels[indices])
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the global stream


def test_sets_in_memory_start_no_process(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    for batch in iterate(
        square(tmp_path, resize=28),
        epoch_batches(40, 8, seed=0, epoch=0),
        num_workers=4,
        failures=Failures(40),
    ):
        assert not multiprocessing.active_children() and batch.images.shape == (8, 1, 28, 28)


def test_a_killed_worker_is_one_line_at_the_next_batch(tmp_path: Path) -> None:
    flat(tmp_path, 40)
    loader = iterate(
        square(tmp_path),
        epoch_batches(40, 2, seed=0, epoch=0),
        num_workers=1,
        failures=Failures(40),
    )
    next(loader)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.3)  # the main process is in the midst of a step: no exception here
    with pytest.raises(UserError, match="killed.*--num_workers 1"):
        list(loader)


def test_an_error_of_the_code_in_a_worker_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path, 4)

    def fail(self, indices):
        raise RuntimeError("a bug")

    monkeypatch.setattr(dataloader.FolderImages, "fetch", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        list(iterate(square(tmp_path), [torch.arange(2)], num_workers=1, failures=Failures(4)))


def test_an_error_of_the_main_process_ends_the_program(tmp_path: Path) -> None:
    """The traceback keeps the loader alive, and its workers ignore SIGTERM: the program must end, not wait for them."""
    flat(tmp_path, 80)
    script = f"""
import dataloader
def main(argv):
    dataset = dataloader.open_dataset({str(tmp_path)!r}, "pretrain", view="square", resize=20, crop=16)
    for batch in dataloader.iterate(dataset, dataloader.epoch_batches(80, 4, 0, 0), num_workers=2, failures=dataloader.Failures(80)):
        raise ValueError('a bug')
main([])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(dataloader.__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr.endswith("ValueError: a bug\n"), done.stderr


# ------------------------------------------------------------------------------------------------------------------------- CIFAR-10


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10_in_its_binary_version(tmp_path: Path, below: str):
    records = write_cifar10(tmp_path / "c" / below)
    for split, part in (
        ("pretrain", records[:30]),
        ("train", records[:30]),
        ("test", records[30:]),
    ):
        dataset = dataloader.open_dataset(
            str(tmp_path / "c"), split, view="square", resize="auto", crop=32
        )
        batch = dataset.fetch(torch.arange(len(dataset)))
        assert dataset.name == "cifar10" and dataset.native == dataset.resize == 32
        assert (
            torch.equal(batch.images.flatten(1), torch.from_numpy(part[:, 1:]))
            and batch.labels.tolist() == part[:, 0].tolist()
        )


def test_damaged_cifar10_is_one_line(tmp_path: Path):
    write_cifar10(tmp_path / "c")
    path = tmp_path / "c" / "data_batch_3.bin"
    content = path.read_bytes()
    for bad, words in ((content[:-1], "cut short"), (bytes([11]) + content[1:], "label 11")):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=words):
            dataloader.open_dataset(
                str(tmp_path / "c"), "train", view="square", resize="auto", crop=32
            )
    path.unlink()
    with pytest.raises(UserError, match="data_batch_3.bin' is missing"):
        dataloader.open_dataset(str(tmp_path / "c"), "train", view="square", resize="auto", crop=32)


def test_cifar10_in_its_pickled_version_is_torchvision_s_after_its_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name, content in {
        **{f"data_batch_{i}": {"data": data, "labels": [0, 1, 2, 9]} for i in range(1, 6)},
        "test_batch": {"data": data[:2], "labels": [3, 4]},
        "batches.meta": {"label_names": list("abcdefghij")},
    }.items():
        (folder / name).write_bytes(pickle.dumps(content))
    with pytest.raises(
        UserError, match="not CIFAR-10's official python version"
    ):  # other bytes than the official ones: never unpickled
        dataloader.open_dataset(str(tmp_path), "train", view="square", resize="auto", crop=32)
    digest = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, digest[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, digest[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": digest["batches.meta"]})
    dataset = dataloader.open_dataset(str(tmp_path), "train", view="square", resize="auto", crop=32)
    batch = dataset.fetch(torch.arange(len(dataset)))
    assert (
        torch.equal(batch.images[4:8].flatten(1), torch.from_numpy(data))
        and batch.labels.tolist() == [0, 1, 2, 9] * 5
    )
