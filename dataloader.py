"""Data sets, the order of samples, and loaders. What a data set is, the content of its folder says (`detect`).

A data set gives batches of uint8 images of one size, so that the augmentation runs batched on the device:

    view "square"   each image squeezed to resize x resize, with its original aspect ratio: random views are cut from it
    view "center"   shorter side to `resize`, centre crop of `crop`: for evaluation

`open_dataset(...)` has `name`, `classes`, `labels` (n,) (-1: unlabelled), `native` (side of a set of fixed size, else None), `resize`,
`len()`, and `fetch(indices) -> Batch`.
"""

import contextlib
import gzip
import hashlib
import json
import math
import os
import queue
import re
import shutil
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageCms
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

import parallel
import utils
from utils import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
SHAPE_CLASSES = [
    "stripes",
    "checks",
    "dots",
    "rings",
    "bricks",
    "waves",
    "grid",
    "crosses",
    "zigzag",
    "triangles",
]
SHAPE_SIDE, SHAPE_COUNT = 40, {"pretrain": 5000, "train": 5000, "test": 1000}
TURN = Image.Transpose
EXIF_TURNS = {
    2: TURN.FLIP_LEFT_RIGHT,
    3: TURN.ROTATE_180,
    4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE,
    6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE,
    8: TURN.ROTATE_90,
}
QUARTER_TURNS = (TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90)
CIFAR_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]
STL_SIDE, STL_FILES = 96, {"pretrain": "unlabeled", "train": "train", "test": "test"}


@dataclass
class Batch:
    """Images uint8 (n, 1 or 3, S, S), original width / height (n,), labels (n,), and the paths of files that were replaced."""

    images: Tensor
    aspect: Tensor
    labels: Tensor
    failed: list[str]

    def pin_memory(self) -> "Batch":
        return replace(self, images=self.images.pin_memory())


class Failures:
    """Images of a run that could not be read: each named once, and written to `file`; more than 1 % of the data set is a UserError."""

    def __init__(self, total: int, file: Path | None = None) -> None:
        self.total, self.paths = total, []
        self._known: set[str] = set()
        self.untold: list[str] = []  # to the other processes
        self._lines = utils.Lines(file) if file else None
        self._written = set(self._lines.lines) if self._lines else set()

    def add(self, paths: list[str], told: bool = False) -> None:
        """Count paths, those that are new; `told` by another process, which has named them."""
        for path in paths:
            if path in self._known:
                continue
            self._known.add(path)
            self.paths.append(path)
            line = path.replace("\n", "\\n")
            if self._lines and line not in self._written:
                self._lines.append(line)
            if not told:
                self.untold.append(path)
                if len(self.paths) <= 10:
                    where = (
                        f" (further ones are named in {self._lines.path})"
                        if self._lines
                        else " (further ones are only counted)"
                    )
                    print(
                        f"warning: {path!r} cannot be read as an image: another one takes its place{where * (len(self.paths) == 10)}",
                        file=sys.stderr,
                        flush=True,
                    )
        if 100 * len(self.paths) > self.total:
            share = 100 * len(self.paths) / self.total
            raise UserError(
                f"{len(self.paths)} of {self.total} images ({share:.1f} %) cannot be read, first {self.paths[0]!r}: "
                "remove or repair them (up to 1 % are replaced)"
            )

    def tell(self, launch: parallel.OneDevice) -> None:
        """Let all processes count what each has found since the last time."""
        found, self.untold = launch.collect(self.untold), []
        self.add(found, told=True)


# ----------------------------------------------------------------------------------------------------------------- what is there


def detect(root: str) -> str:
    """What the folder holds: shapes (the word), stl10, cifar10, fashion_mnist, folders (train/ + val|test/), classes or packed; UserError for none of them."""
    if root == "shapes":
        return "shapes"
    path = Path(root)
    if not path.is_dir():
        raise UserError(
            f"--dataset_root {root!r} is no folder: give one with class folders, train/ and val/, STL-10 (or --download it), "
            "CIFAR-10, Fashion-MNIST idx files, or the word shapes"
        )
    if (path / "store.json").exists():
        return "packed"
    if (path / "stl10_binary").is_dir() or any(
        (path / f"{name}_X.bin").exists() for name in STL_FILES.values()
    ):
        return "stl10"
    if _cifar_folder(path):
        return "cifar10"
    if any(path.glob("*-images-idx3-ubyte*")):
        return "fashion_mnist"
    if (path / "train").is_dir() and (
        _test_folder(path) or _class_folders(path / "train")
    ):  # a class, too, may be called train
        return "folders"
    if any(_images_in(folder, first=True) for folder in _class_folders(path)):
        return "classes"
    if any(name.lower().endswith(EXTENSIONS) for name in os.listdir(path)):
        raise UserError(
            f"--dataset_root {root!r} holds images but no class folders: put them into sub-folders, one a class (one is enough for pretraining)"
        )
    raise UserError(
        f"--dataset_root {root!r} holds no images that are known here ({', '.join(EXTENSIONS)} in class folders)"
    )


def resolve_resize(resize: int | str, crop: int, native: int | None, purpose: str) -> int:
    """The side of the stored image, in px. `auto`: for pretraining 2 x crop, for evaluation 8/7 x crop, at most the native side.

    Raises UserError for a side smaller than the crop, unless the data set itself is smaller.
    """
    if resize == "auto":
        side = 2 * crop if purpose == "pretrain" else round(crop * 8 / 7)
        side = side if native is None else min(side, native)
        return side if purpose == "pretrain" else max(side, crop)
    if resize < crop and (native is None or native >= crop or resize < native):
        raise UserError(
            f"--resize {resize} is smaller than --crop {crop}: use at least {crop}, or auto"
        )
    return max(int(resize), crop) if purpose != "pretrain" else int(resize)


def open_dataset(
    root: str, split: str, *, view: str, resize: int | str, crop: int, download: bool = False
) -> "ArrayImages | FolderImages | PackedImages":
    """A split (pretrain, train or test) of the data set in `root`; see the head of this file. UserError if it is not there or not sound."""
    if download:
        _fetch_stl10(root)
    kind = detect(root)
    path = Path(root)
    if kind == "shapes":
        return ArrayImages(
            kind,
            *make_shapes(SHAPE_COUNT[split], seed=1 if split == "test" else 0),
            SHAPE_CLASSES,
            view,
            resize,
            crop,
        )
    if kind == "stl10":
        return ArrayImages(kind, *_read_stl10(path, split), view, resize, crop)
    if kind == "cifar10":
        return ArrayImages(kind, *_read_cifar10(path, split), CIFAR_CLASSES, view, resize, crop)
    if kind == "fashion_mnist":
        images, labels = (
            _read_idx(path, f"{'t10k' if split == 'test' else 'train'}-{part}")
            for part in ("images-idx3", "labels-idx1")
        )
        if len(images) != len(labels):
            raise UserError(
                f"{root!r}: {len(images)} images but {len(labels)} labels: the files do not belong together"
            )
        if labels.max(initial=0) >= len(FASHION_CLASSES):
            raise UserError(f"{root!r} has a label {labels.max()}: Fashion-MNIST's are from 0 to 9")
        return ArrayImages(
            kind, images[:, None], labels.astype(np.int64), FASHION_CLASSES, view, resize, crop
        )
    if kind == "packed":
        if split != "pretrain":
            raise UserError(
                f"--dataset_root {root!r} is a packed store, for pretraining only: an evaluation needs the images themselves"
            )
        return open_packed(path, resize, crop)
    if kind == "classes" and split != "pretrain":
        raise UserError(
            f"--dataset_root {root!r} holds class folders only: an evaluation needs train/ and val/ (or test/) with class folders"
        )
    return FolderImages(kind, *_list_folders(path, kind, split), view, resize, crop)


# ------------------------------------------------------------------------------------------------------- sets of one size, in arrays


class ArrayImages:
    """Images of one size, in an array or a memory map (n, C, S, S)."""

    paths = None
    in_memory = True

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        classes: list[str],
        view: str,
        resize: int | str,
        crop: int,
    ) -> None:
        self.name, self.images, self.classes, self.view, self.crop = (
            name,
            images,
            classes,
            view,
            crop,
        )
        self.labels, self.native = torch.from_numpy(labels), images.shape[-1]
        self.resize = resolve_resize(
            resize, crop, self.native, "pretrain" if view == "square" else "evaluate"
        )

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> Batch:
        images = torch.from_numpy(np.ascontiguousarray(self.images[indices.numpy()]))
        if self.resize != self.native:
            images = TF.resize(images, [self.resize, self.resize], antialias=True)
        if self.view == "center":
            images = TF.center_crop(images, [self.crop, self.crop])
        return Batch(images, torch.ones(len(indices)), self.labels[indices], [])


def _read_stl10(root: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """STL-10's official binary files: per image three planes of 96 x 96, each column by column; labels from 1 (0: none)."""
    folder = root / "stl10_binary" if (root / "stl10_binary").is_dir() else root
    name, image_bytes = STL_FILES[split], 3 * STL_SIDE * STL_SIDE
    size = _size(folder / f"{name}_X.bin", "STL-10")
    if size == 0 or size % image_bytes:
        raise UserError(
            f"{str(folder / f'{name}_X.bin')!r} has {size} bytes, not a multiple of {image_bytes}: it is cut short, fetch it again (--download)"
        )
    stored = np.memmap(folder / f"{name}_X.bin", dtype=np.uint8, mode="r").reshape(
        -1, 3, STL_SIDE, STL_SIDE
    )
    labels = np.full(len(stored), -1, dtype=np.int64)
    if split != "pretrain":
        _size(folder / f"{name}_y.bin", "STL-10")
        labels = np.fromfile(folder / f"{name}_y.bin", dtype=np.uint8).astype(np.int64) - 1
        if len(labels) != len(stored) or not ((0 <= labels) & (labels < 10)).all():
            raise UserError(
                f"{str(folder / f'{name}_y.bin')!r} does not hold a label from 1 to 10 for each of "
                f"{len(stored)} images: fetch it again (--download)"
            )
    names = folder / "class_names.txt"
    classes = names.read_text().split() if names.exists() else [str(i) for i in range(1, 11)]
    return stored.transpose(0, 1, 3, 2), labels, classes


def stl10_folds(root: str, images: int) -> list[Tensor]:
    """The ten official folds of STL-10's training split (Coates et al. 2011), each 1,000 of its indices; UserError where they are not, or do not fit."""
    folder = Path(root) / "stl10_binary" if (Path(root) / "stl10_binary").is_dir() else Path(root)
    if detect(root) != "stl10":
        raise UserError(
            f"--folds are STL-10's, and --dataset_root {root!r} is {detect(root)}: leave --folds out, or see --train_fraction"
        )
    try:
        folds = [
            torch.tensor([int(word) for word in line.split()])
            for line in (folder / "fold_indices.txt").read_text().splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(folder / 'fold_indices.txt')!r} cannot be read ({error}): fetch it again (--download)"
        ) from None
    if len(folds) != 10 or any(
        not len(fold) or fold.min() < 0 or fold.max() >= images or len(fold.unique()) != len(fold)
        for fold in folds
    ):
        raise UserError(
            f"{str(folder / 'fold_indices.txt')!r} does not hold ten folds of indices below {images}: fetch it again (--download)"
        )
    return folds


def _cifar_folder(root: Path) -> Path | None:
    """The folder of CIFAR-10's binary files, or of its pickled ones ("python version"), at or below `root`."""
    below = [root / "cifar-10-batches-bin", root / "cifar-10-batches-py", root]
    return next(
        (
            folder
            for folder in below
            if (folder / "data_batch_1.bin").exists()
            or (folder.name == "cifar-10-batches-py" and (folder / "data_batch_1").exists())
        ),
        None,
    )


def _read_cifar10(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's images (n, 3, 32, 32) and labels: of the binary version, a byte and three planes an image; the pickled version is read by torchvision,
    which compares its checksums first, so no foreign code is run."""
    folder = _cifar_folder(root)
    if not (folder / "data_batch_1.bin").exists():
        try:
            found = torchvision.datasets.CIFAR10(folder.parent, train=split != "test")
        except Exception as error:  # what torchvision and pickle raise
            raise UserError(
                f"{str(folder)!r} is not CIFAR-10's official python version ({' '.join(str(error).split())[:100]}): fetch it again, or take the binary version"
            ) from None
        return np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)), np.array(
            found.targets, np.int64
        )
    parts = []
    for name in ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]:
        path = folder / f"{name}.bin"
        size = _size(path, "CIFAR-10")
        if size == 0 or size % 3073:
            raise UserError(
                f"{str(path)!r} has {size} bytes, not a multiple of 3073: it is cut short, fetch it again"
            )
        parts.append(np.fromfile(path, np.uint8).reshape(-1, 3073))
    records = np.concatenate(parts)
    if records[:, 0].max() > 9:
        raise UserError(
            f"{str(folder)!r} has a label {records[:, 0].max()}: CIFAR-10's are from 0 to 9"
        )
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _size(path: Path, name: str) -> int:
    try:
        return path.stat().st_size
    except OSError:
        raise UserError(
            f"{name} is incomplete: {str(path)!r} is missing{' (fetch it with --download)' * (name == 'STL-10')}"
        ) from None


def _fetch_stl10(root: str) -> None:
    """Download STL-10 (2.6 GB) unless it is there; UserError if another data set is."""
    folder = Path(root).parent if Path(root).name == "stl10_binary" else Path(root)
    other = ""
    with contextlib.suppress(UserError):
        kind = detect(root)
        if kind != "stl10":
            other = f"--download fetches STL-10, but --dataset_root {root!r} is another data set ({kind}): leave --download out"
    if other:
        raise UserError(other)
    try:
        torchvision.datasets.STL10(
            folder, split="train", download=True
        )  # checks what is there first
    except Exception as error:  # torchvision raises what urllib, tarfile and the disk raise
        raise UserError(
            f"STL-10 cannot be fetched into {root!r}: {' '.join(str(error).split())[:160]}"
        ) from None


def _read_idx(root: Path, name: str) -> np.ndarray:
    """An idx file of unsigned bytes (Yann LeCun's format), `.gz` or not."""
    path = next(
        (
            root / f"{name}-ubyte{end}"
            for end in ("", ".gz")
            if (root / f"{name}-ubyte{end}").exists()
        ),
        None,
    )
    if path is None:
        raise UserError(
            f"{str(root)!r} has no {name}-ubyte or {name}-ubyte.gz: Fashion-MNIST has four such files"
        )
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}: fetch it again") from None
    dims = 3 if "idx3" in name else 1
    shape = (
        np.frombuffer(data[4 : 4 + 4 * dims], dtype=">i4").tolist()
        if len(data) >= 4 + 4 * dims
        else []
    )
    if data[:4] != bytes([0, 0, 8, dims]) or len(data) != 4 + 4 * dims + math.prod(shape):
        raise UserError(
            f"{str(path)!r} is no idx file of bytes with {dims} dimensions, or is cut short ({len(data)} bytes): fetch it again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)


def make_shapes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The built-in set: n images (n, 3, 40, 40) of ten texture families, with their labels (n,); the same numbers, the same images.

    Scale, phase and polarity are random, and each texture is turned by up to 15 degrees. Whatever names an image more cheaply than its
    texture does, and outlives the augmentations, a short run learns in its place: so no image has a colour, noise or light of its own, all
    have the same mean and contrast, and none is turned freely (which cost 20 points of kNN accuracy).
    """
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=random)

    y, x = torch.meshgrid(*2 * [torch.arange(SHAPE_SIDE) - (SHAPE_SIDE - 1) / 2], indexing="ij")
    angle, period, phase_u, phase_v, polarity = (
        uniform(-math.pi / 12, math.pi / 12),
        uniform(6, 13),
        uniform(0, 1),
        uniform(0, 1),
        uniform(0, 1) < 0.5,
    )
    u = (x * angle.cos() + y * angle.sin()) / period + phase_u
    v = (y * angle.cos() - x * angle.sin()) / period + phase_v
    images = torch.empty(n, SHAPE_SIDE, SHAPE_SIDE)
    for label in range(10):
        mine = labels == label
        images[mine] = torch.sigmoid(12 * _texture(SHAPE_CLASSES[label], u[mine], v[mine]))
    images = torch.where(polarity, 1 - images, images)
    images = (images - images.mean((1, 2), keepdim=True)) / images.std((1, 2), keepdim=True)
    pixels = (
        (255 * (0.5 + 0.25 * images).clamp(0, 1))
        .to(torch.uint8)[:, None]
        .expand(n, 3, SHAPE_SIDE, SHAPE_SIDE)
    )
    order = torch.randperm(n, generator=random)
    return pixels[order].numpy(), labels[order].numpy()


def _texture(name: str, u: Tensor, v: Tensor) -> Tensor:
    """A texture as a field that is positive in its figure, over coordinates in which it repeats with period 1."""
    turn = 2 * math.pi
    cell_u, cell_v = u - u.floor() - 0.5, v - v.floor() - 0.5  # within a cell, from its centre
    radius = (cell_u**2 + cell_v**2).sqrt()
    shifted = u + 0.5 * (v.floor() % 2)
    brick = shifted - shifted.floor() - 0.5
    near, far = torch.minimum(cell_u.abs(), cell_v.abs()), torch.maximum(cell_u.abs(), cell_v.abs())
    return {
        "stripes": lambda: 0.5 * torch.sin(turn * u),
        "checks": lambda: 0.7 * torch.sin(turn * u) * torch.sin(turn * v),
        "dots": lambda: 2 * (0.30 - radius),
        "rings": lambda: 3 * (0.10 - (radius - 0.32).abs()),
        "bricks": lambda: 3 * (torch.minimum(0.5 - brick.abs(), 0.5 - cell_v.abs()) - 0.09),
        "waves": lambda: 0.5 * torch.sin(turn * (u + 0.3 * torch.sin(turn * 0.75 * v))),
        "grid": lambda: 3 * (far - 0.39),
        "crosses": lambda: 3 * (0.13 - near * torch.where(far < 0.38, 1.0, 9.0)),
        "zigzag": lambda: 0.5 * torch.sin(turn * (u + 1.2 * cell_v.abs())),
        "triangles": lambda: cell_u + cell_v,
    }[name]()


# ------------------------------------------------------------------------------------------------------------- folders of images


class FolderImages:
    """Images in class folders, decoded when asked for; an unreadable one is replaced by the next of the data set that can be read."""

    native = None
    in_memory = False

    def __init__(
        self,
        name: str,
        paths: list[str],
        labels: list[int],
        classes: list[str],
        view: str,
        resize: int | str,
        crop: int,
    ) -> None:
        self.name, self.classes, self.view, self.crop = name, classes, view, crop
        self.paths, self.labels = Paths(paths), torch.tensor(labels)
        self.resize = resolve_resize(
            resize, crop, None, "pretrain" if view == "square" else "evaluate"
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: list[int]) -> Batch:
        return self.fetch(torch.tensor(indices, dtype=torch.long))

    def fetch(self, indices: Tensor) -> Batch:
        side = self.resize if self.view == "square" else self.crop
        images, aspect, labels = (
            np.zeros((len(indices), side, side, 3), np.uint8),
            torch.ones(len(indices)),
            self.labels[indices],
        )
        failed: list[str] = []
        for row, first in enumerate(indices.tolist()):
            for index in range(
                first, first + len(self) // 100 + 2
            ):  # further on, the 1 % of Failures is passed
                path = self.paths[index % len(self)]
                try:
                    images[row], aspect[row] = self.decode(path)
                    labels[row] = self.labels[index % len(self)]
                    break
                except Exception:  # whatever a decoder raises on bytes from anywhere
                    failed.append(path)
        return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), aspect, labels, failed)

    def decode(self, path: str) -> tuple[np.ndarray, float]:
        """A file as uint8 (S, S, 3), and its original width / height (1 after a centre crop)."""
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's, on odd metadata of images that it reads well
            with open(path, "rb", opener=_open_without_waiting) as file, Image.open(file) as image:
                return self._decode(image)

    def _decode(self, image: Image.Image) -> tuple[np.ndarray, float]:
        width, height = image.size
        turn = _orientation(image)
        if self.view == "square":
            image.draft(
                None, (self.resize, self.resize)
            )  # JPEG: the smallest DCT scale that is no smaller
            pixels = as_rgb(image).resize((self.resize, self.resize), Image.Resampling.BILINEAR)
            aspect = height / width if turn in QUARTER_TURNS else width / height
        else:
            scale = self.resize / min(width, height)
            image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))
            width, height = image.size
            half = min(width, height) * self.crop / self.resize / 2
            box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
            pixels, aspect = (
                as_rgb(image).resize((self.crop, self.crop), Image.Resampling.BILINEAR, box=box),
                1.0,
            )
        return np.asarray(
            pixels if turn is None else pixels.transpose(turn)
        ), aspect  # turning last, when it is small


def _open_without_waiting(path: str, flags: int) -> int:
    """As `open` does, but a pipe that is named like an image does not stop the run."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What brings a photograph upright, by its EXIF tag; None if there is nothing to do, or nothing legible."""
    try:
        return EXIF_TURNS.get(image.getexif().get(0x0112))
    except Exception:  # broken metadata do not make the picture unreadable
        return None


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB: 16-bit grey is scaled, transparency dropped."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        return Image.fromarray(
            (grey * (255 if grey.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8)
        ).convert("RGB")
    if image.mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    if image.mode in ("La", "RGBa"):  # multiplied by their transparency
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image.convert("RGB")


class Paths:
    """A list of paths as one block of bytes: millions of strings would be copied into every worker process, page by page."""

    def __init__(self, paths: list[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.block = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.block[self.ends[index] : self.ends[index + 1]].tobytes())


def _list_folders(root: Path, kind: str, split: str) -> tuple[list[str], list[int], list[str]]:
    """Paths, labels and class names of a split of class folders; UserError if its classes do not fit those of the other split."""
    folder = root
    if kind == "folders":
        test = _test_folder(root)
        if split != "pretrain" and test is None:
            raise UserError(
                f"--dataset_root {str(root)!r} has train/ but no val/ or test/: an evaluation needs both"
            )
        if split != "pretrain":
            names = [
                {path.name for path in _class_folders(part)} for part in (root / "train", test)
            ]
            if all(names) and names[0] != names[1]:
                raise UserError(
                    f"train/ and {test.name}/ in {str(root)!r} have different classes: "
                    f"only one of them has {', '.join(sorted(names[0] ^ names[1])[:5])}"
                )
        folder = test if split == "test" else root / "train"
    classes = _class_folders(folder)
    if not classes:
        raise UserError(
            f"{str(folder)!r} has no class folders: put its images into sub-folders, one a class"
        )
    paths, labels = [], []
    for label, part in enumerate(utils.progress(classes, "listing images")):
        found = _images_in(part)
        if not found:
            raise UserError(f"the class folder {str(part)!r} has no images: remove it, or fill it")
        paths += found
        labels += [label] * len(found)
    return paths, labels, [part.name for part in classes]


def _test_folder(root: Path) -> Path | None:
    return next((root / name for name in ("val", "test") if (root / name).is_dir()), None)


def _class_folders(root: Path) -> list[Path]:
    try:
        return sorted(
            Path(entry.path)
            for entry in os.scandir(root)
            if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as error:
        raise UserError(f"{str(root)!r} cannot be listed: {error.strerror}") from None


def _images_in(folder: Path, first: bool = False) -> list[str]:
    """All image files below a folder, sorted; links are followed, but no folder is entered twice. `first`: one is enough."""
    found, seen = [], set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(where, name)
            for name in sorted(files)
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
        if first and found:
            break
    return found


# ------------------------------------------------------------------------------------------------------------- the packed store

STORE_FORMAT = 1
STORE_ROWS = np.dtype([("aspect", "<f4"), ("label", "<i4"), ("readable", "?")])
PACK_BATCH = 64


class PackedImages:
    """The square images of class folders, decoded once into one memory-mapped file; batches are those of `FolderImages`, bit for bit.

    A store is a folder: `images.u8` (n, S, S, 3), `rows` (aspect ratio, label, and whether it could be read, of each), `store.json` (all else), written last.
    """

    native = None
    in_memory = True

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.name, self.classes, self.resize = meta["name"], meta["classes"], meta["resize"]
        self.images = np.memmap(
            folder / "images.u8", np.uint8, "r", shape=(meta["images"], self.resize, self.resize, 3)
        )
        self.rows = np.memmap(folder / "rows", STORE_ROWS, "r", shape=meta["images"])
        self._unreadable = {int(index): path for index, path in meta["unreadable"]}

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.rows["label"].astype(np.int64))

    def fetch(self, indices: Tensor) -> Batch:
        chosen = indices.numpy()
        rows, failed = self.rows[chosen], []
        for index in chosen.tolist() if self._unreadable else []:
            while index in self._unreadable:
                failed.append(self._unreadable[index])
                index = (index + 1) % len(self)
        images = torch.from_numpy(self.images.take(chosen, axis=0)).permute(0, 3, 1, 2)
        return Batch(
            images,
            torch.from_numpy(rows["aspect"].copy()),
            torch.from_numpy(rows["label"].astype(np.int64)),
            failed,
        )


def open_packed(
    folder: Path, resize: int | str, crop: int, source: str | None = None
) -> PackedImages:
    """A packed store; UserError unless it is whole, of this version and size, and (`source`) made from the images that are there now."""
    again = f"delete {str(folder)!r} to pack again"
    try:
        meta = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        sizes = [(folder / name).stat().st_size for name in ("images.u8", "rows")]
        kinds = {
            "format": int,
            "images": int,
            "resize": int,
            "source": str,
            "name": str,
            "classes": list,
            "unreadable": list,
        }
        if wrong := [name for name, kind in kinds.items() if type(meta[name]) is not kind]:
            raise ValueError(f"{wrong[0]} is {meta[wrong[0]]!r}")
        if meta["format"] != STORE_FORMAT:
            raise UserError(
                f"the packed store {str(folder)!r} is of version {meta['format']}, this code reads {STORE_FORMAT}: {again}"
            )
        needed = [meta["images"] * meta["resize"] ** 2 * 3, meta["images"] * STORE_ROWS.itemsize]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the packed store {str(folder)!r} is damaged ({' '.join(str(error).split())[:100]}): {again}"
        ) from None
    if sizes != needed:
        raise UserError(
            f"the packed store {str(folder)!r} is cut short: its files have {sizes[0]} and {sizes[1]} bytes, not {needed[0]} and {needed[1]}: {again}"
        )
    if source is not None and meta["source"] != source:
        raise UserError(
            f"the packed store {str(folder)!r} was made from other images than those that are there now: {again}, or name another --pack"
        )
    if meta["resize"] < crop or resize not in ("auto", meta["resize"]):
        need = f"--resize {resize}" if resize not in ("auto", meta["resize"]) else f"--crop {crop}"
        raise UserError(
            f"the packed store {str(folder)!r} holds images of {meta['resize']} px, which do not fit {need}: name another --pack"
        )
    return PackedImages(folder, meta)


def packed(
    dataset: ArrayImages | FolderImages | PackedImages, root: str, where: str, num_workers: int
) -> ArrayImages | PackedImages:
    """The store of a data set in the folder `where` (`auto`: beside the data), made unless it is there; goes on where it was interrupted.

    Data that need no decoding are given back as they are. Raises UserError if the store does not belong to the data set, if the disk has not the room, or if it cannot be written.
    """
    if not isinstance(dataset, FolderImages):
        if utils.rank() == 0:
            print(
                f"note: --pack has nothing to do, {dataset.name} needs no decoding", file=sys.stderr
            )
        return dataset
    beside = Path(root).resolve()
    folder = (
        beside.with_name(f"{beside.name}-{dataset.resize}px.pack")
        if where == "auto"
        else Path(where)
    )
    source = source_checksum(dataset, root)
    if (folder / "store.json").exists():
        return open_packed(folder, dataset.resize, dataset.crop, source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"--pack {str(folder)!r} holds something else than a packed store: name a new folder"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    if utils.rank():
        time.sleep(
            3
        )  # so that the first process packs, which shows how far it is; the others wait for the lock
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = utils.FolderLock(folder.parent, f".{folder.name}.lock")
        lock.take(wait=True)
        if not (folder / "store.json").exists():  # else it was finished while this process waited
            partial.mkdir(exist_ok=True)
            _write_store(dataset, partial, source, num_workers)
            utils.sync_folder(partial)
            os.replace(partial, folder)
            utils.sync_folder(folder.parent)
        lock.release()
    except KeyboardInterrupt:
        print("packing was interrupted: the same command goes on where it stopped", file=sys.stderr)
        raise
    except OSError as error:
        raise UserError(
            f"--pack {str(folder)!r} cannot be written: {error.strerror}: name another folder"
        ) from None
    return open_packed(folder, dataset.resize, dataset.crop, source)


def source_checksum(dataset: FolderImages, root: str) -> str:
    """SHA-256 over path below `root`, size and time (s) of each image: another one for other images, another order, or a change."""
    digest, start = hashlib.sha256(), len(str(Path(root)))
    for index in utils.progress(range(len(dataset)), "looking for changes", total=len(dataset)):
        path = dataset.paths[index]
        try:
            stat = os.stat(path)
            what = f"{stat.st_size} {int(stat.st_mtime)}"
        except OSError:
            what = "unreadable"
        digest.update(os.fsencode(f"{path[start:]}\0{what}\n"))
    return digest.hexdigest()


def _write_store(dataset: FolderImages, partial: Path, source: str, num_workers: int) -> None:
    """Append what is missing to the files of an unfinished store; `store.json`, last, says that it is whole."""
    size, started = (
        dataset.resize**2 * 3,
        {"source": source, "format": STORE_FORMAT, "resize": dataset.resize},
    )
    if utils.read_json(partial / "started.json") != started:
        for name in ("images.u8", "rows"):
            (partial / name).unlink(missing_ok=True)
        utils.write_json(partial / "started.json", started)
    with open(partial / "images.u8", "ab") as images, open(partial / "rows", "ab") as rows:
        done = (
            min(images.tell() // size, rows.tell() // STORE_ROWS.itemsize)
            // PACK_BATCH
            * PACK_BATCH
        )
        images.truncate(done * size)
        rows.truncate(done * STORE_ROWS.itemsize)
        needed, free = (
            (len(dataset) - done) * (size + STORE_ROWS.itemsize),
            shutil.disk_usage(partial).free,
        )
        if needed > free:
            raise UserError(
                f"--pack needs {needed:,} bytes in {str(partial.parent)!r}, where {free:,} are free: name another folder, or a smaller --resize"
            )
        if utils.rank() == 0:
            print(
                f"packing {len(dataset) - done:,} images at {dataset.resize} px ({needed / 1e9:.2f} GB)"
                + f"; {done:,} are there from before" * (done > 0),
                flush=True,
            )
        failures = Failures(len(dataset))
        failures.add([dataset.paths[index] for index in _unreadable(partial)], told=True)
        batches = list(torch.arange(done, len(dataset)).split(PACK_BATCH))
        for chosen, batch in zip(
            batches,
            utils.progress(
                iterate(dataset, batches, num_workers=num_workers, failures=failures),
                "packing",
                total=len(batches),
            ),
        ):
            row, failed = np.empty(len(chosen), STORE_ROWS), set(batch.failed)
            row["aspect"], row["label"] = batch.aspect.numpy(), batch.labels.numpy()
            row["readable"] = (
                [dataset.paths[index] not in failed for index in chosen.tolist()]
                if failed
                else True
            )
            images.write(batch.images.permute(0, 2, 3, 1).numpy().tobytes())
            rows.write(row.tobytes())
        for file in (images, rows):
            file.flush()
            os.fsync(file.fileno())
    unreadable = [[index, dataset.paths[index]] for index in _unreadable(partial)]
    utils.write_json(
        partial / "store.json",
        {
            **started,
            "images": len(dataset),
            "name": f"{dataset.name}, packed",
            "classes": dataset.classes,
            "unreadable": unreadable,
        },
    )


def _unreadable(folder: Path) -> list[int]:
    return np.flatnonzero(~np.fromfile(folder / "rows", STORE_ROWS)["readable"]).tolist()


# ------------------------------------------------------------------------------------------------------------- order and loading


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of n samples of an epoch: a function of (seed, epoch) alone."""
    return torch.randperm(n, generator=utils.generator(seed, "order", epoch))


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, start: int = 0) -> list[Tensor]:
    """The batches of indices of an epoch, without the last, incomplete one, from batch `start` on."""
    order = epoch_order(n, seed, epoch)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(start, n // batch_size)]


def ahead(batches: Iterator[Batch], pin: bool, depth: int = 2) -> Iterator[Batch]:
    """The same batches, fetched (and pinned) by a thread up to `depth` before they are asked for; an error comes where its batch would."""
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[Batch | None, BaseException | None]) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def fetch() -> None:
        try:
            for batch in batches:
                if not put((batch.pin_memory() if pin else batch, None)):
                    return
            put((None, None))
        except BaseException as error:  # whatever it is, it is raised where the batch is asked for
            put((None, error))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        while (item := ready.get())[0] is not None:
            yield item[0]
        if item[1] is not None:
            raise item[1]
    finally:
        stop.set()
        thread.join()


def iterate(
    dataset: ArrayImages | FolderImages | PackedImages,
    batches: Iterable[Tensor],
    *,
    num_workers: int,
    failures: Failures,
) -> Iterator[Batch]:
    """The batches in their order, whatever the number of worker processes; UserError for too many failures or a worker that died."""
    if dataset.in_memory or num_workers == 0:
        iterator: Iterator[Batch] = map(dataset.fetch, batches)
        if isinstance(dataset, PackedImages) or (dataset.in_memory and torch.cuda.is_available()):
            iterator = ahead(iterator, pin=torch.cuda.is_available())
    else:
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=map(Tensor.tolist, batches),
            num_workers=num_workers,
            worker_init_fn=parallel.start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )  # or it would draw from the global stream
        with parallel.child_signals_as_before():
            iterator = iter(loader)
        parallel.end_workers_at_exit()
    try:
        for batch in iterator:
            failures.add(batch.failed)
            yield batch
    except RuntimeError as error:
        if not re.search(r"DataLoader worker.*(exited unexpectedly|killed by signal)", str(error)):
            raise
        raise UserError(
            f"a process that decodes images was killed, most likely for want of memory (or of /dev/shm): "
            f"use fewer than --num_workers {num_workers}"
        ) from None
