"""Image files: in class folders, alone or in train/ and val/ (or test/), or all in one folder."""

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.base import Batch, Dataset, Size, height_width
from data.decoding import EXTENSIONS, decode, look
from utils import UserError, progress, say, warn

NAME = "folders"
TEST_FOLDERS = ("val", "valid", "validation", "test")  # beside train/; the first that is there


class FolderImages(Dataset):
    """Image files, decoded when fetched. The next readable file replaces one that is not."""

    in_memory = False

    def __init__(self, paths: list[str], labels: list[int], classes: list[str], size: Size) -> None:
        largest, size = look(paths, size) if size.pixels else (None, size)
        classes = [os.fsencode(name).decode(errors="backslashreplace") for name in classes]
        super().__init__(NAME, torch.tensor(labels), classes, size, largest=largest)
        self.paths = Paths(paths)

    @property
    def checksum(self) -> int:
        return zlib.crc32(self.paths.below_common(), super().checksum)

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

    def below_common(self) -> np.ndarray:
        """All paths, one after the other, without what the first and the last begin with alike.

        So they are the same wherever the data set is mounted.
        """
        ends = [os.fsencode(self[i]) for i in (0, len(self.ends) - 2)]
        kept = np.ones(len(self.block), bool)
        for i in range(len(os.path.commonprefix(ends))):
            kept[self.ends[:-1] + i] = False
        return self.block[kept]


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
    skipped: Counter[str] = Counter()
    parts = progress(class_folders(folder), "listing")
    found = {part.name: list(image_files(part, skipped)) for part in parts}
    if split == "pretrain" and not any(found.values()):
        return _open_loose(folder, size)
    if not found:
        raise UserError(f"{str(folder)!r} has no class folders: put its images into some")
    tell_skipped(folder, skipped)
    names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    loose = sum(n.lower().endswith(EXTENSIONS) and not n.startswith(".") for n in names)
    if loose:
        warn(f"{str(folder)!r} has images beside its class folders, which are left out: {loose:,}")
    filled = [name for name, paths in found.items() if paths]
    classes = filled
    if split == "test":
        classes = _filled(folder.parent / "train")
        _compare(folder, filled, classes)
    elif empty := [name for name in found if name not in filled]:
        warn(f"folders in {str(folder)!r} without images are left out: {_some(empty)}")
    if not filled:
        raise UserError(f"the class folders in {str(folder)!r} have no images")
    paths = [path for name in filled for path in found[name]]
    labels = [label for label, name in enumerate(classes) for _ in found.get(name, [])]
    return FolderImages(paths, labels, classes, size)


def _open_loose(folder: Path, size: Size) -> FolderImages:
    """Images without classes, all below one folder."""
    skipped: Counter[str] = Counter()
    paths = list(image_files(folder, skipped))
    tell_skipped(folder, skipped)
    if not paths:
        raise UserError(f"{str(folder)!r} has no images")
    say(f"data: {folder} has no class folders: its {len(paths):,} images have no labels")
    return FolderImages(paths, [-1] * len(paths), [], size)


def _filled(folder: Path) -> list[str]:
    """The names of the class folders that have images."""
    return [part.name for part in class_folders(folder) if next(image_files(part), None)]


def _compare(folder: Path, found: list[str], classes: list[str]) -> None:
    """Hold the classes of the test images against those of train/; UserError for new ones."""
    if new := sorted(set(found) - set(classes)):
        raise UserError(f"{str(folder)!r} has classes of which train/ has no images: {_some(new)}")
    if missing := sorted(set(classes) - set(found)):
        warn(f"{str(folder)!r} has no images of some classes, which go untested: {_some(missing)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def class_folders(root: str | Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones; UserError if it cannot be listed."""
    try:
        folders = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir()]
    except OSError as error:
        raise UserError(f"{str(root)!r} cannot be listed: {error.strerror}") from None
    return sorted(folder for folder in folders if not folder.name.startswith("."))


def image_files(folder: Path, skipped: Counter[str] | None = None) -> Iterator[str]:
    """All images below a folder, sorted; links are followed, but no folder is entered twice.

    `skipped` counts other files by their ending.
    """
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            if name.startswith("."):
                continue
            if name.lower().endswith(EXTENSIONS):
                yield os.path.join(where, name)
            elif skipped is not None:
                skipped[os.path.splitext(name)[1].lower() or "no ending"] += 1


def tell_skipped(folder: Path, skipped: Counter[str]) -> None:
    if skipped:
        kinds = ", ".join(f"{count:,} {ending}" for ending, count in skipped.most_common(5))
        say(f"data: {folder}: files that are not read, by their ending: {kinds}")


def _has_splits(root: Path) -> bool:
    """Whether train/ is a split; it may be a class of this name."""
    train = root / "train"
    return train.is_dir() and (bool(_test_folders(root)) or bool(class_folders(train)))


def _test_folders(root: Path) -> list[Path]:
    return [root / name for name in TEST_FOLDERS if (root / name).is_dir()]


def _evaluation_folder(root: Path, split: str) -> Path:
    """train/, or the folder of the test images; UserError unless both are there."""
    train, tests = root / "train", _test_folders(root)
    if not tests or not train.is_dir():
        raise UserError(
            f"--dataset_root {str(root)!r}: an evaluation needs train/ and val/ (or test/) "
            "with class folders, and not both are there"
        )
    if split == "train":
        return train
    if len(tests) > 1:
        names = " and ".join(f"{path.name}/" for path in tests)
        say(f"data: {root} has {names}: {tests[0].name}/ is used")
    return tests[0]
