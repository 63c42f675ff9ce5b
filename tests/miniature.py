"""Miniature data sets in the official formats, and files that are broken, for the tests."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import dataloader
from data.base import Dataset


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(width: int, height: int) -> Image.Image:
    """A colourful picture without sharp edges and without any symmetry."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    red, green = 128 + 100 * np.sin(5 * x + 3 * y), 60 + 150 * x * y + 40 * y
    blue = 200 - 120 * x + 30 * np.cos(9 * y)
    return Image.fromarray(np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8))


def write_folders(
    root: Path, classes: int = 3, train: int = 8, test: int = 4, size: int = 20
) -> None:
    """train/ and val/ with class folders of PNG images: stripes as wide as the class says."""
    for split, count in (("train", train), ("val", test)):
        for c in range(classes):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            stripes = (np.arange(size) // (2 * c + 1) % 2)[:, None, None]
            for i in range(count):
                noise = pixels(100_000 * c + i + 50_000 * (split == "val"), size, size, 3) // 4
                image = Image.fromarray((noise + 190 * stripes).astype(np.uint8))
                image.save(folder / f"{i:03}.png")


def write_class(root: Path, *images: tuple[str, Image.Image], **options: object) -> Path:
    """A data set of one class with these files; returns its folder."""
    (root / "one").mkdir(parents=True, exist_ok=True)
    for name, image in images:
        image.save(root / "one" / name, **options)
    return root


def write_plain(root: Path, count: int, size: int = 20) -> list[Path]:
    """Two classes with `count` images of one grey each; their paths in order."""
    paths = [root / f"class{i // (count // 2)}" / f"{i:04}.png" for i in range(count)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size, 3), i % 251, np.uint8)).save(path)
    return paths


def enlarge_header(png: bytes) -> bytes:
    """A PNG that claims to have 50,000 x 50,000 px."""
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) * 2 // 3],
        "empty": b"",
        "text": b"this is no image\n" * 20,
    }
    if how == "vanished":
        path.unlink()
    else:
        path.write_bytes(damaged[how])


def write_stl10(
    root: Path, train: int = 20, test: int = 10, unlabeled: int = 40
) -> dict[str, np.ndarray]:
    """stl10_binary/ as in the official archive; returns each split's images (n, 3, 96, 96)."""
    folder, images = root / "stl10_binary", {}
    folder.mkdir(parents=True)
    counts = {"train": train, "test": test, "unlabeled": unlabeled}
    for seed, (name, count) in enumerate(counts.items()):
        images[name] = pixels(seed, count, 3, 96, 96)
        columns_first = images[name].transpose(0, 1, 3, 2)
        columns_first.tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    classes = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(classes) + "\n")
    return images


def write_fashion_mnist(
    root: Path, train: int = 40, test: int = 20, gz: bool = True
) -> dict[str, np.ndarray]:
    """The four idx files; returns the images (n, 28, 28) of `train` and `t10k`."""
    root.mkdir(parents=True, exist_ok=True)
    images = {}
    for seed, (name, count) in enumerate({"train": train, "t10k": test}.items()):
        images[name] = pixels(seed, count, 28, 28)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for part, array in (("images-idx3", images[name]), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
            content = head + array.tobytes()
            if gz:
                (root / f"{name}-{part}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (root / f"{name}-{part}-ubyte").write_bytes(content)
    return images


def write_cifar10(folder: Path, per_batch: int = 6) -> np.ndarray:
    """The binary version; returns all records (36, 3073): a label and three planes."""
    folder.mkdir(parents=True)
    random, records = np.random.default_rng(0), []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        record = random.integers(0, 256, (per_batch, 3073), dtype=np.uint8)
        record[:, 0] %= 10
        record.tofile(folder / f"{name}.bin")
        records.append(record)
    return np.concatenate(records)


def open_square(
    root: Path | str, split: str = "pretrain", resize: int | str = 20, crop: int = 16
) -> Dataset:
    return dataloader.open_dataset(str(root), split, fit="square", resize=resize, crop=crop)


def open_center(
    root: Path | str, split: str = "train", resize: int | str = "auto", crop: int = 16
) -> Dataset:
    return dataloader.open_dataset(str(root), split, fit="center", resize=resize, crop=crop)
