"""Miniature data sets in the official formats, for the tests."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folders(
    root: Path, classes: int = 3, train: int = 8, test: int = 4, size: int = 20
) -> None:
    """train/ and val/ with `classes` folders of `train` and `test` PNG images, stripes of a width for each class in noise."""
    for split, count in (("train", train), ("val", test)):
        for c in range(classes):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            stripes = (np.arange(size) // (2 * c + 1) % 2)[:, None, None]
            for i in range(count):
                noise = pixels(100_000 * c + i + 50_000 * (split == "val"), size, size, 3) // 4
                Image.fromarray((noise + 190 * stripes).astype(np.uint8)).save(
                    folder / f"{i:03}.png"
                )


def write_stl10(
    root: Path, train: int = 20, test: int = 10, unlabeled: int = 40
) -> dict[str, np.ndarray]:
    """stl10_binary/ as the official archive has it; returns the images (n, 3, 96, 96) of each split, row by row."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    images = {}
    for seed, (name, count) in enumerate(
        {"train": train, "test": test, "unlabeled": unlabeled}.items()
    ):
        images[name] = pixels(seed, count, 3, 96, 96)
        images[name].transpose(0, 1, 3, 2).tofile(
            folder / f"{name}_X.bin"
        )  # the format is column by column
        if name != "unlabeled":
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text(
        "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n"
    )
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
            data = head + array.tobytes()
            (root / f"{name}-{part}-ubyte{'.gz' if gz else ''}").write_bytes(
                gzip.compress(data) if gz else data
            )
    return images


def write_cifar10(folder: Path, per_batch: int = 6) -> np.ndarray:
    """The binary version: six files of records, a label and the three planes; returns the records (36, 3073)."""
    folder.mkdir(parents=True)
    random, records = np.random.default_rng(0), []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        record = random.integers(0, 256, (per_batch, 3073), dtype=np.uint8)
        record[:, 0] %= 10
        record.tofile(folder / f"{name}.bin")
        records.append(record)
    return np.concatenate(records)
