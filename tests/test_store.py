"""The packed store: the batches of the files, made once, whatever interrupts it."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import open_center, open_square, pixels, write_folders
from PIL import Image
from scripts import assert_one_line_error, run

import utils
from data import store
from data.base import Batch, Dataset, Size
from data.folders import FolderImages
from run import checkpoints
from utils import UserError

ROOT = Path(utils.__file__).parent


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes, 250 images of many sizes, two of which, neighbours, cannot be read."""
    root = tmp_path_factory.mktemp("images")
    for i in range(250):
        path = root / f"class{i // 90}" / (os.fsdecode(b"\xe9") + f"{i:03}.{('png', 'jpg')[i % 2]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, 20 + i % 7, 20 + i % 11, 3)).save(path)
        if i in (63, 64):
            path.write_bytes(b"no image")
    return root


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    """A copy of the images, times included, that a test may change."""
    return Path(shutil.copytree(images, tmp_path / "data"))


def open_files(root: Path, resize: int | str = 24) -> Dataset:
    return open_square(root, resize=resize)


def assert_same(a: Batch, b: Batch) -> None:
    for name in ("images", "aspect", "labels"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert a.failed == b.failed


@pytest.mark.parametrize("num_workers, advice", [(0, True), (2, False)])
def test_a_store_gives_what_the_files_give(
    data: Path, num_workers: int, advice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "HAS_ADVICE", advice and store.HAS_ADVICE)
    files = open_files(data)
    packed = store.pack(files, str(data), "auto", num_workers)
    folder = data.with_name("data-24px.pack")
    written = sorted(path.name for path in folder.iterdir())
    assert written == ["images.u8", "rows", "started.json", "store.json"]
    assert len(packed) == len(files) == 250
    assert packed.classes == files.classes and packed.resize == 24
    assert torch.equal(packed.labels[:60], files.labels[:60])
    for indices in (torch.arange(250), torch.randperm(250), torch.tensor([63, 64, 65, 249])):
        assert_same(packed.fetch(indices), files.fetch(indices))
    assert len(packed.fetch(torch.tensor([63])).failed) == 2
    before = (folder / "images.u8").stat().st_mtime_ns
    again = store.pack(files, str(data), "auto", 0)
    assert_same(again.fetch(torch.arange(9)), files.fetch(torch.arange(9)))
    assert (folder / "images.u8").stat().st_mtime_ns == before, "it is made once"
    alone = open_files(folder, resize="auto")
    shutil.rmtree(data)
    assert_same(alone.fetch(torch.arange(250)), packed.fetch(torch.arange(250)))
    for split in ("train", "test"):
        with pytest.raises(UserError, match="packed store, for pretraining only"):
            open_center(folder, split)


def test_the_format_is_version_1(data: Path, tmp_path: Path) -> None:
    """Stores that are there stay readable: the bytes, and what they are made from."""
    files, folder = open_files(data), tmp_path / "store"
    store.pack(files, str(data), str(folder), 0)
    shown = files.fetch(torch.arange(250))
    about = json.loads((folder / "store.json").read_text())
    assert (about["format"], about["images"], about["resize"]) == (1, 250, 24)
    assert about["unreadable"] == [[63, files.paths[63]], [64, files.paths[64]]]
    assert " ".join(about) == (
        "source format resize channels background value_range images name classes unreadable"
    )
    for name in ("channels", "background", "value_range"):  # which stores of old do not have
        del about[name]
    (folder / "store.json").write_text(json.dumps(about))
    assert torch.equal(open_files(folder).fetch(torch.arange(250)).images, shown.images)
    kind = [("aspect", "<f4"), ("label", "<i4"), ("readable", "?")]
    rows = np.fromfile(folder / "rows", kind)
    assert np.array_equal(rows["aspect"], shown.aspect) and rows["readable"].sum() == 248
    assert np.array_equal(rows["label"], shown.labels)
    stored = np.fromfile(folder / "images.u8", np.uint8).reshape(250, 24, 24, 3)
    assert np.array_equal(stored, shown.images.permute(0, 2, 3, 1))


def test_a_run_is_the_same_with_a_store_and_goes_on_with_it(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", classes=4, train=20, test=5, size=20)
    tiny = "--arch=resnet18 --crop=16 --feature_dim=8 --num_keys=48 --batch_size=16 --bn_groups=2"
    tiny += " --log_every=2 --device=cpu --precision=fp32 --num_workers=0"
    packed = tmp_path / "data-20px.pack"
    runs = {
        "plain": [["--max_epoch=2"]],
        "packed": [["--max_epoch=2", "--pack=auto"]],
        "both": [["--max_epoch=1"], ["--max_epoch=2", "--resume", "--pack=auto"]],
        "store": [["--max_epoch=2", f"--dataset_root={packed}"]],
    }
    ends = []
    for name, stages in runs.items():
        for flags in stages:
            where = [f"--dataset_root={tmp_path / 'data'}", f"--output_root={tmp_path / name}"]
            done = run("train", *tiny.split(), *where, *flags)
            assert done.returncode == 0, done.stderr
        last = tmp_path / name / "IMAGENET-64/v1/checkpoints/last.pth.tar"
        ends.append(checkpoints.load(last)["state_dict"])
    for end in ends[1:]:
        assert all(torch.equal(value, end[name]) for name, value in ends[0].items())
    encoder = f"--encoder_output_root={tmp_path / 'plain'}"
    done = run("test", f"--dataset_root={packed}", encoder)
    assert_one_line_error(done, "packed store", "pretraining only")


@pytest.mark.parametrize("torn", [0, 1, 1000])
def test_an_interrupted_store_goes_on(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    torn: int,
) -> None:
    files, calls = open_files(images), []
    store.pack(files, str(images), str(tmp_path / "whole"), 0)
    fetch = FolderImages.fetch

    def stop_at_the_third(self: FolderImages, indices: torch.Tensor) -> Batch:
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fetch(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(FolderImages, "fetch", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            store.pack(files, str(images), str(tmp_path / "store"), 0)
    partial = tmp_path / ".store.partial"
    assert not (tmp_path / "store").exists()
    assert "the same command goes on" in capsys.readouterr().err
    with open(partial / "images.u8", "ab") as file:
        file.write(bytes(torn))  # a batch that was cut short
    store.pack(files, str(images), str(tmp_path / "store"), 0)
    assert "128 are there from before" in capsys.readouterr().out and not partial.exists()
    for name in ("images.u8", "rows", "store.json"):
        stored = (tmp_path / "store" / name).read_bytes()
        assert stored == (tmp_path / "whole" / name).read_bytes()


def test_an_unfinished_store_of_other_images_is_begun_anew(images: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".store.partial"
    partial.mkdir()
    utils.write_json(partial / "started.json", {"source": "other", "format": 1, "resize": 24})
    (partial / "images.u8").write_bytes(bytes(64 * 24 * 24 * 3))
    (partial / "rows").write_bytes(bytes(64 * store.ROW.itemsize))
    files = open_files(images)
    packed = store.pack(files, str(images), str(tmp_path / "store"), 0)
    assert_same(packed.fetch(torch.arange(250)), files.fetch(torch.arange(250)))


def rewrite(folder: Path, **changes: object) -> None:
    about = json.loads((folder / "store.json").read_text())
    utils.write_json(folder / "store.json", about | changes)


def first_image(data: Path) -> Path:
    return min(data.glob("*/*"))


DAMAGE: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "images cut short": (
        "damaged (cannot reshape",
        lambda folder, data: os.truncate(folder / "images.u8", 1000),
    ),
    "rows cut short": ("damaged (rows has", lambda folder, data: os.truncate(folder / "rows", 9)),
    "other version": ("of version 9", lambda folder, data: rewrite(folder, format=9)),
    "no JSON": ("damaged", lambda folder, data: (folder / "store.json").write_text("{")),
    "no list": ("damaged", lambda folder, data: (folder / "store.json").write_text("[]")),
    "no images": ("No such file", lambda folder, data: (folder / "images.u8").unlink()),
    "wrong type": ("damaged (", lambda folder, data: rewrite(folder, images="x")),
    "image gone": ("made from other images", lambda folder, data: first_image(data).unlink()),
    "image new": (
        "than those that are there now",
        lambda folder, data: Image.new("RGB", (9, 9)).save(data / "class0" / "new.png"),
    ),
    "image changed": ("other images", lambda folder, data: os.utime(first_image(data), (1, 1))),
    "other size": (
        "holds images of 32 px, which do not fit --resize 24",
        lambda folder, data: rewrite(folder, resize=32),
    ),
    "empty": ("damaged (rows has 0", lambda folder, data: empty(folder)),
    "zeros": ("an aspect that is none", lambda folder, data: fill_rows(folder, b"\0")),
    "garbage": ("damaged (rows has a", lambda folder, data: fill_rows(folder, b"\xff")),
    "no classes": ("a label that is no class", lambda folder, data: rewrite(folder, classes=[])),
    "odd classes": ("have no names", lambda folder, data: rewrite(folder, classes=[1] * 9)),
    "odd list": ("damaged (", lambda folder, data: rewrite(folder, unreadable=[3, "a"])),
    "no such image": ("none of its own", lambda f, data: rewrite(f, unreadable=[[999, "a"]])),
    "none readable": (
        "250 of its 250 images are unreadable",
        lambda folder, data: rewrite(folder, unreadable=[[i, "a"] for i in range(250)]),
    ),
    "no channels": ("have 0 channels", lambda folder, data: rewrite(folder, channels=0)),
    "deep": (
        "damaged (",
        lambda folder, data: (folder / "store.json").write_text("[" * 10**5),
    ),
}


def empty(folder: Path) -> None:
    os.truncate(folder / "rows", 0)
    rewrite(folder, images=0)


def fill_rows(folder: Path, byte: bytes) -> None:
    (folder / "rows").write_bytes(byte * (folder / "rows").stat().st_size)


@pytest.fixture(scope="module")
def packed_folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "store"
    store.pack(open_files(images), str(images), str(folder), 0)
    return folder


@pytest.mark.parametrize("what", DAMAGE)
def test_a_store_that_does_not_fit_is_one_line(
    data: Path, packed_folder: Path, tmp_path: Path, what: str
) -> None:
    folder = Path(shutil.copytree(packed_folder, tmp_path / "store"))
    words, damage = DAMAGE[what]
    damage(folder, data)
    with pytest.raises(UserError) as error:
        store.pack(open_files(data), str(data), str(folder), 0)
    message = str(error.value)
    assert words in message and str(folder) in message and "\n" not in message


def test_where_a_store_cannot_be(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    files = open_files(images)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no packed store"):
        store.pack(files, str(images), str(tmp_path / "other"), 0)
    with pytest.raises(UserError, match="cannot be written"):
        store.pack(files, str(images), "/proc/store", 0)
    needed = 250 * (24 * 24 * 3 + store.ROW.itemsize)
    usage = namedtuple("usage", "free")(needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=f"needs {needed:,} bytes .* where {needed - 1:,} are free"):
        store.pack(files, str(images), str(tmp_path / "store"), 0)
    monkeypatch.undo()
    shapes = open_square("shapes", resize="auto")
    assert store.pack(shapes, "shapes", "auto", 0) is shapes
    assert "nothing to do" in capsys.readouterr().err


def test_more_than_one_percent_unreadable_is_no_store(data: Path, tmp_path: Path) -> None:
    (data / "class2" / "x.png").write_bytes(b"no image")
    for _ in range(2):  # the second time, two of them are known from before
        with pytest.raises(UserError, match="3 of 251 images"):
            store.pack(open_files(data), str(data), str(tmp_path / "store"), 0)
    assert not (tmp_path / "store").exists()


def test_two_processes_make_one_store(images: Path, tmp_path: Path) -> None:
    """As torchrun starts them: one packs, the other waits and reads."""
    script = f"""
import dataloader
from data import store
files = dataloader.open_dataset({str(images)!r}, "pretrain", fit="square", resize=24, crop=16)
print(len(store.pack(files, {str(images)!r}, {str(tmp_path / "store")!r}, 0)))
"""
    command = [sys.executable, "-c", script]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert all(text.splitlines()[-1] == "250" for text in said)
    assert sum("packing" in text for text in said) == 1
    assert not (tmp_path / ".store.partial").exists()


def make_store(folder: Path, n: int, side: int) -> store.PackedImages:
    """A store of n equal images of any pixels, whose file is there already."""
    np.array([(1, 0, True)] * n, store.ROW).tofile(folder / "rows")
    about = {"name": "x", "source": "", "classes": ["a"], "resize": side, "images": n}
    return store.PackedImages(folder, about | {"unreadable": []}, Size("square", "auto", 32))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what it reads")
def test_a_disk_reads_the_images_that_are_asked_for_and_little_else(tmp_path: Path) -> None:
    n, side = 10_000, 40
    with open(tmp_path / "images.u8", "wb") as file:
        file.write(bytes(n * side * side * 3))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # out of the cache

    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])

    packed, before = make_store(tmp_path, n, side), bytes_read()
    packed.fetch(torch.randperm(n)[:256])
    assert bytes_read() - before < 4 * 256 * side * side * 3  # in whole pages it is 2.5 times


def test_a_store_is_not_read_into_memory(tmp_path: Path) -> None:
    n, side = 60_000, 40  # 288 MB
    (tmp_path / "images.u8").touch()
    os.truncate(tmp_path / "images.u8", n * side * side * 3)
    packed = make_store(tmp_path, n, side)

    def anonymous() -> int:
        gc.collect()
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("RssAnon"))
        return int(line.split()[1]) // 1024

    before = anonymous()
    for indices in torch.randperm(n).split(256):
        packed.fetch(indices)
    assert anonymous() - before < 30  # MB
