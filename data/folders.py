"""Image files: in class folders, alone or in train/ and val/ (or test/), or all in one folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.base import Batch, Dataset, Size, height_width
from data.decoding import EXTENSIONS, decode, look
from utils import UserError, progress, say, warn

NAME = "folders"


class FolderImages(Dataset):
    """Image files, decoded when fetched. The next readable file replaces one that is not."""

    in_memory = False

    def __init__(self, paths: list[str], labels: list[int], classes: list[str], size: Size) -> None:
        largest, size = look(paths, size) if size.pixels else (None, size)
        super().__init__(NAME, torch.tensor(labels), classes, size, largest=largest)
        self.paths = Paths(paths)

    def __getitem__(self, indices: list[int]) -> Batch:
        """As PyTorch's DataLoader calls it."""
        return self.fetch(torch.tensor(indices, dtype=torch.long))

    def fetch(self, indices: Tensor) -> Batch:
        n, side = len(indices), self.resize if self.size.fit == "square" else self.crop
        images = np.zeros((n, *height_width(side), self.size.pixels.channels), np.uint8)
        aspect = torch.ones(n)
        labels, failed = self.labels[indices], []
        tries = len(self) // 100 + 2  # if so many are unreadable, Failures stops the run
        for row, first in enumerate(indices.tolist()):
            for index in range(first, first + tries):
                path = self.paths[index % len(self)]
                try:
                    images[row], aspect[row] = decode(path, self.size)
                    labels[row] = self.labels[index % len(self)]
                    break
                except Exception:  # whatever a decoder raises on bytes from anywhere
                    failed.append(path)
        return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), aspect, labels, failed)


class Paths:
    """Paths in one block of bytes: worker processes would copy millions of strings."""

    def __init__(self, paths: list[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.block = np.frombuffer(b"".join(encoded), np.uint8)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.block[self.ends[index] : self.ends[index + 1]].tobytes())


def matches(root: str) -> bool:
    if not Path(root).is_dir():
        return False
    class_folders(root)  # UserError if it cannot be listed
    return _has_splits(Path(root)) or next(image_files(Path(root)), None) is not None


def open_split(root: str, split: str, size: Size) -> FolderImages:
    folder = Path(root)
    if split != "pretrain":
        folder = _evaluation_folder(folder, split)
    elif _has_splits(folder):
        folder = folder / "train"
    found = {part: list(image_files(part)) for part in progress(class_folders(folder), "listing")}
    empty = [part.name for part, paths in found.items() if not paths]
    if split == "pretrain" and not any(found.values()):  # no classes
        loose = list(image_files(folder))
        if not loose:
            raise UserError(f"{str(folder)!r} has no images")
        say(f"data: {folder} has no class folders: its {len(loose):,} images have no labels")
        return FolderImages(loose, [-1] * len(loose), [], size)
    if not found:
        raise UserError(f"{str(folder)!r} has no class folders: put its images into some")
    if empty and split != "pretrain":
        empty = str(folder / empty[0])
        raise UserError(f"the class folder {empty!r} has no images: remove it, or fill it")
    if empty:
        warn(f"folders in {str(folder)!r} without images are left out: {', '.join(empty[:5])}")
    found = {part: paths for part, paths in found.items() if paths}
    paths = [path for part in found.values() for path in part]
    labels = [label for label, part in enumerate(found.values()) for _ in part]
    return FolderImages(paths, labels, [part.name for part in found], size)


def class_folders(root: str | Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones; UserError if it cannot be listed."""
    try:
        folders = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir()]
    except OSError as error:
        raise UserError(f"{str(root)!r} cannot be listed: {error.strerror}") from None
    return sorted(folder for folder in folders if not folder.name.startswith("."))


def image_files(folder: Path) -> Iterator[str]:
    """All images below a folder, sorted; links are followed, but no folder is entered twice."""
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.join(where, name)


def _has_splits(root: Path) -> bool:
    """Whether train/ is a split; it may be a class of this name."""
    train = root / "train"
    return train.is_dir() and (_test_folder(root) is not None or bool(class_folders(train)))


def _test_folder(root: Path) -> Path | None:
    return next((root / name for name in ("val", "test") if (root / name).is_dir()), None)


def _evaluation_folder(root: Path, split: str) -> Path:
    """train/, or val/ or test/; UserError unless both are there, with the same classes."""
    train, test = root / "train", _test_folder(root)
    if test is None or not train.is_dir():
        raise UserError(
            f"--dataset_root {str(root)!r}: an evaluation needs train/ and val/ (or test/) "
            "with class folders, and not both are there"
        )
    names, test_names = ({path.name for path in class_folders(part)} for part in (train, test))
    if names and test_names and names != test_names:
        raise UserError(
            f"train/ and {test.name}/ in {str(root)!r} have different classes: "
            f"only one of them has {', '.join(sorted(names ^ test_names)[:5])}"
        )
    return test if split == "test" else train
