"""The packed store: the square images of class folders, decoded once into a memory-mapped file.

A store is a folder: `images.u8` (n, S, S, C), `rows` (of each image its aspect ratio, label, and
whether it could be read), and `store.json`, all else, written last.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import utils
from data.base import Batch, Dataset, Pixels, Size, height_width
from data.failures import Failures
from data.folders import FolderImages
from data.workers import fetch_all
from run.folder import FolderLock
from utils import UserError

NAME = "packed"
VERSION = 1
ROW = np.dtype([("aspect", "<f4"), ("label", "<i4"), ("readable", "?")])
BATCH = 64  # images that are written at once
HAS_ADVICE = hasattr(mmap, "MADV_WILLNEED")  # not on Windows


class PackedImages(Dataset):
    """A packed store, read in place. Its batches are those of `FolderImages`, bit for bit.

    It cannot be pickled: each process opens its own.
    Raises ValueError, KeyError or TypeError if its files are not what `about` (store.json) says.
    """

    def __init__(self, folder: Path, about: dict, size: Size) -> None:
        rows = np.fromfile(folder / "rows", ROW)
        check_rows(rows, about)
        labels = torch.from_numpy(rows["label"].astype(np.int64))
        size = replace(size, resize=about["resize"], pixels=pixels_of(about))
        super().__init__(about["name"], labels, about["classes"], size)
        with open(folder / "images.u8", "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        shape = len(rows), self.resize, self.resize, size.pixels.channels
        self.images = np.frombuffer(self._map, np.uint8).reshape(shape)
        if HAS_ADVICE:  # no reading ahead: the next image is anywhere
            self._advise(mmap.MADV_RANDOM)
        self.aspect = torch.from_numpy(rows["aspect"].copy())
        self.unreadable = dict(about["unreadable"])  # index: path
        self.source = about["source"]

    def fetch(self, indices: Tensor) -> Batch:
        failed = []
        for index in indices.tolist():
            while index in self.unreadable:  # the next that is readable stands in its place
                failed.append(self.unreadable[index])
                index = (index + 1) % len(self)
        self._ask_for(indices)
        images = torch.from_numpy(self.images.take(indices.numpy(), axis=0)).permute(0, 3, 1, 2)
        return Batch(images, self.aspect[indices], self.labels[indices], failed)

    def _ask_for(self, indices: Tensor) -> None:
        """Have the disk read these images at once, instead of one page fault after the other."""
        if not HAS_ADVICE:
            return
        size = self.images[0].nbytes
        for index in indices.tolist():
            first = index % len(self) * size
            start = first - first % mmap.PAGESIZE
            self._advise(mmap.MADV_WILLNEED, start, first + size - start)

    def _advise(self, option: int, *where: int) -> None:
        with contextlib.suppress(OSError):  # it is advice: without it reading is slower
            self._map.madvise(option, *where)


def check_rows(rows: np.ndarray, about: dict) -> None:
    """ValueError, KeyError or TypeError unless the rows of a store are what was written."""
    if len(rows) != about["images"] or not len(rows):
        raise ValueError(f"rows has {len(rows)} rows, not {about['images']}")
    if not ((rows["aspect"] > 0) & np.isfinite(rows["aspect"])).all():
        raise ValueError("rows has an aspect that is none")
    if not ((rows["label"] >= -1) & (rows["label"] < len(about["classes"]))).all():
        raise ValueError("rows has a label that is no class")
    if not all(isinstance(name, str) for name in about["classes"]):
        raise ValueError("its classes have no names")
    unreadable = dict(about["unreadable"])
    if not all(type(i) is int and 0 <= i < len(rows) for i in unreadable):
        raise ValueError("its unreadable images are none of its own")
    if len(unreadable) > len(rows) // 100:
        raise ValueError(f"{len(unreadable)} of its {len(rows)} images are unreadable")


def matches(root: str | Path) -> bool:
    return (Path(root) / "store.json").exists()


def open_split(root: str, split: str, size: Size) -> PackedImages:
    if split != "pretrain":
        raise UserError(
            f"--dataset_root {root!r} is a packed store, for pretraining only: "
            "an evaluation needs the images themselves"
        )
    return open_packed(Path(root), size)


def pixels_of(about: dict) -> Pixels:
    """How a store's images were decoded, which what is older than these settings does not say."""
    low_high = about.get("value_range")
    channels, background = about.get("channels", 3), about.get("background", 0)
    if type(channels) is not int or channels < 1:
        raise ValueError(f"its images have {channels!r} channels")
    return Pixels(channels, low_high and tuple(low_high), background)


def open_packed(folder: Path, size: Size) -> PackedImages:
    """A packed store; UserError unless it is whole, of this version, and of a size that fits."""
    name = f"the packed store {str(folder)!r}"
    again = f"delete {str(folder)!r} to pack again"
    try:
        about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        version, side = about["format"], about["resize"]
        if version != VERSION:
            raise UserError(f"{name} is of version {version}, this code reads {VERSION}: {again}")
        crop, resize, pixels = max(height_width(size.crop)), size.resize, pixels_of(about)
        if crop > side or resize not in ("auto", side):
            raise UserError(
                f"{name} holds images of {side} px, which do not fit --resize {resize} and "
                f"--crop {crop}: name another --pack"
            )
        for flag, value in vars(size.pixels).items():
            made = getattr(pixels, flag)
            if value != made and value is not None:
                raise UserError(f"{name} was made with --{flag} {made}, not {value}: {again}")
        return PackedImages(folder, about, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{name} is damaged ({reason}): {again}") from None


def pack(dataset: Dataset, root: str, where: str, num_workers: int | str) -> Dataset:
    """The store of a data set in the folder `where` ("auto": beside the data), made if need be.

    Goes on where it was interrupted. Data that need no decoding are given back as they are. Of the
    processes on a machine, the first asks whether the images have changed since.
    Raises UserError if the store does not fit the data set or cannot be written.
    """
    if not isinstance(dataset, FolderImages):
        utils.warn(f"--pack has nothing to do: {dataset.name} needs no decoding")
        return dataset
    folder = Path(where)
    if where == "auto":
        beside = Path(root).resolve()
        folder = beside.with_name(f"{beside.name}-{dataset.resize}px.pack")
    try:
        if not matches(folder):
            _make_store(dataset, folder, root, num_workers)
    except KeyboardInterrupt:
        utils.warn("packing was interrupted: the same command goes on where it stopped")
        raise
    except OSError as error:
        raise UserError(
            f"--pack {str(folder)!r} cannot be written: {error.strerror}: name another folder"
        ) from None
    store = open_packed(folder, dataset.size)
    is_first = utils.rank() == 0 or os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first and store.source != checksum(dataset, root):
        raise UserError(
            f"the packed store {str(folder)!r} was made from other images than those that are "
            "there now: delete it to pack again, or name another --pack"
        )
    return store


def checksum(dataset: FolderImages, root: str) -> str:
    """SHA-256 over each image's path below `root`, size and time: what a store is made from."""
    digest = hashlib.sha256()
    above = str(Path(root))
    start, before = (0, "/") if above == "." else (len(above), "")  # paths begin without the dot
    for index in utils.progress(range(len(dataset)), "looking for changes"):
        path = dataset.paths[index]
        try:
            stat = os.stat(path)
            state = f"{stat.st_size} {int(stat.st_mtime)}"
        except OSError:
            state = "unreadable"
        digest.update(os.fsencode(f"{before}{path[start:]}\0{state}\n"))
    return digest.hexdigest()


def _make_store(dataset: FolderImages, folder: Path, root: str, num_workers: int | str) -> None:
    """Make a store in a folder beside its own. Of several processes one does, the others wait."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"--pack {str(folder)!r} is not empty and holds no packed store: name a new folder"
        )
    utils.check_writable(folder, "--pack")
    if utils.rank():
        time.sleep(3)  # the first process, which shows its progress, is to take the lock
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder.parent, f".{folder.name}.lock")
    partial = folder.with_name(f".{folder.name}.partial")
    lock.take(wait=True)
    try:
        if not matches(folder):  # unless another process made it while we waited
            partial.mkdir(exist_ok=True)
            _write_store(dataset, partial, checksum(dataset, root), num_workers)
            os.replace(partial, folder)
            utils.sync_folder(folder.parent)
    finally:
        lock.release()


def _write_store(dataset: FolderImages, folder: Path, source: str, num_workers: int | str) -> None:
    """Append what an unfinished store in this folder lacks."""
    about = {"source": source, "format": VERSION, "resize": dataset.resize}
    pixels = dataset.size.pixels
    about |= {"channels": pixels.channels, "background": pixels.background}
    about |= {"value_range": pixels.value_range and list(pixels.value_range)}
    mode = "ab" if utils.read_json(folder / "started.json") == about else "wb"
    image_bytes = dataset.size.pixels.channels * dataset.resize**2
    with open(folder / "images.u8", mode) as images, open(folder / "rows", mode) as rows:
        utils.write_json(folder / "started.json", about)  # after files of other images are emptied
        done = min(images.tell() // image_bytes, rows.tell() // ROW.itemsize) // BATCH * BATCH
        images.truncate(done * image_bytes)
        rows.truncate(done * ROW.itemsize)
        needed = (len(dataset) - done) * (image_bytes + ROW.itemsize)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"--pack needs {needed:,} bytes in {str(folder.parent)!r}, where {free:,} are "
                "free: name another folder, or a smaller --resize"
            )
        before = f"; {done:,} are there from before" if done else ""
        utils.say(f"packing {len(dataset) - done:,} images, {needed:,} bytes{before}")
        failures = Failures(len(dataset))
        failures.add([path for _, path in _unreadable(dataset, folder)], named=True)
        batches = torch.arange(done, len(dataset)).split(BATCH)
        decoded = utils.progress(fetch_all(dataset, batches, num_workers), "packing", len(batches))
        for indices, batch in zip(batches, decoded, strict=True):
            failures.add(batch.failed)
            row = np.empty(len(indices), ROW)
            row["aspect"], row["label"] = batch.aspect.numpy(), batch.labels.numpy()
            row["readable"] = [dataset.paths[i] not in batch.failed for i in indices.tolist()]
            images.write(batch.images.permute(0, 2, 3, 1).numpy().tobytes())
            rows.write(row.tobytes())
        for file in (images, rows):
            file.flush()
            os.fsync(file.fileno())
    about |= {"images": len(dataset), "name": f"{dataset.name}, packed"}
    about |= {"classes": dataset.classes, "unreadable": _unreadable(dataset, folder)}
    utils.write_json(folder / "store.json", about)


def _unreadable(dataset: FolderImages, folder: Path) -> list[tuple[int, str]]:
    """Index and path of each image, of those written so far, that could not be read."""
    rows = np.fromfile(folder / "rows", ROW)
    return [(index, dataset.paths[index]) for index in np.flatnonzero(~rows["readable"]).tolist()]
