"""The packed store: the batches of the files themselves, made once, whatever interrupts it; and never those of other images."""

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from data import pixels, write_folders
from PIL import Image
from scripts import assert_one_line_error, run

import dataloader
import utils
from dataloader import PackedImages, open_dataset, packed
from utils import UserError

ROOT = Path(dataloader.__file__).parent


def square(root: Path, **options: object) -> dataloader.FolderImages | PackedImages:
    return open_dataset(
        str(root), "pretrain", **{"view": "square", "resize": 24, "crop": 16, **options}
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """3 classes, 250 images of many shapes, two of which cannot be read, one after the other."""
    root = tmp_path / "data"
    for i in range(250):
        path = root / f"class{i // 90}" / (os.fsdecode(b"\xe9") + f"{i:03}.{('png', 'jpg')[i % 2]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, 20 + i % 7, 20 + i % 11, 3)).save(path)
        if i in (63, 64):
            path.write_bytes(b"no image")
    return root


def assert_same(a: dataloader.Batch, b: dataloader.Batch) -> None:
    assert (
        torch.equal(a.images, b.images)
        and torch.equal(a.aspect, b.aspect)
        and torch.equal(a.labels, b.labels)
        and a.failed == b.failed
    )
    assert (
        a.images.dtype == b.images.dtype
        and a.aspect.dtype == b.aspect.dtype
        and a.labels.dtype == b.labels.dtype
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_gives_what_the_files_give(data: Path, num_workers: int) -> None:
    plain = square(data)
    store = packed(plain, str(data), "auto", num_workers)
    folder = data.with_name("data-24px.pack")
    assert sorted(path.name for path in folder.iterdir()) == [
        "images.u8",
        "rows",
        "started.json",
        "store.json",
    ]
    assert (
        len(store) == len(plain) == 250
        and store.classes == plain.classes
        and store.resize == 24
        and torch.equal(store.labels[:60], plain.labels[:60])
    )
    for indices in (torch.arange(250), torch.randperm(250), torch.tensor([63, 64, 65, 249])):
        assert_same(store.fetch(indices), plain.fetch(indices))
    assert len(store.fetch(torch.tensor([63])).failed) == 2
    before = (folder / "images.u8").stat().st_mtime_ns
    assert_same(
        packed(plain, str(data), "auto", 0).fetch(torch.arange(9)), plain.fetch(torch.arange(9))
    )
    assert (folder / "images.u8").stat().st_mtime_ns == before, "it is made once"
    alone = square(folder, resize="auto")  # without the images
    shutil.rmtree(data)
    assert_same(alone.fetch(torch.arange(250)), store.fetch(torch.arange(250)))


def test_a_run_is_the_same_with_a_store_and_goes_on_with_it(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", classes=4, train=20, test=5, size=20)
    tiny = [
        f"--dataset_root={tmp_path / 'data'}",
        "--arch=resnet18",
        "--crop=16",
        "--feature_dim=8",
        "--num_keys=48",
        "--batch_size=16",
        "--bn_groups=2",
        "--log_every=2",
        "--device=cpu",
        "--precision=fp32",
        "--num_workers=0",
    ]
    for name, stages in {
        "plain": [["--max_epoch=2"]],
        "packed": [["--max_epoch=2", "--pack=auto"]],
        "both": [["--max_epoch=1"], ["--max_epoch=2", "--resume", "--pack=auto"]],
        "store": [["--max_epoch=2", f"--dataset_root={tmp_path / 'data-32px.pack'}"]],
    }.items():
        for flags in stages:
            done = run("train", *tiny, f"--output_root={tmp_path / name}", *flags)
            assert done.returncode == 0, done.stderr
    ends = [
        utils.load_checkpoint(tmp_path / name / "IMAGENET-64/v1/checkpoints/last.pth.tar")[
            "state_dict"
        ]
        for name in ("plain", "packed", "both", "store")
    ]
    for end in ends[1:]:
        assert all(torch.equal(value, end[name]) for name, value in ends[0].items())
    assert_one_line_error(
        run(
            "test",
            f"--dataset_root={tmp_path / 'data-32px.pack'}",
            f"--encoder_output_root={tmp_path / 'plain'}",
        ),
        "packed store",
        "pretraining only",
    )


@pytest.mark.parametrize("torn", [0, 1, 1000])
def test_an_interrupted_store_goes_on(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    torn: int,
) -> None:
    plain, folder = square(data), tmp_path / "store"
    whole = packed(plain, str(data), str(tmp_path / "whole"), 0)
    fetch, calls = dataloader.FolderImages.fetch, []

    def stop_at_the_third(self, indices):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fetch(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(dataloader.FolderImages, "fetch", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            packed(plain, str(data), str(folder), 0)
    assert not folder.exists() and "the same command goes on" in capsys.readouterr().err
    with open(tmp_path / ".store.partial" / "images.u8", "ab") as file:
        file.write(bytes(torn))  # a batch that was cut short
    again = packed(plain, str(data), str(folder), 0)
    assert (
        "128 are there from before" in capsys.readouterr().out
        and not (tmp_path / ".store.partial").exists()
    )
    assert np.array_equal(again.images, whole.images) and np.array_equal(again.rows, whole.rows)
    assert_same(again.fetch(torch.arange(250)), plain.fetch(torch.arange(250)))


def test_an_unfinished_store_of_other_images_is_begun_anew(data: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".store.partial"
    partial.mkdir()
    utils.write_json(partial / "started.json", {"source": "other", "format": 1, "resize": 24})
    (partial / "images.u8").write_bytes(bytes(64 * 24 * 24 * 3))
    (partial / "rows").write_bytes(bytes(64 * dataloader.STORE_ROWS.itemsize))
    plain = square(data)
    assert_same(
        packed(plain, str(data), str(tmp_path / "store"), 0).fetch(torch.arange(250)),
        plain.fetch(torch.arange(250)),
    )


def rewrite(folder: Path, **changes: object) -> None:
    utils.write_json(
        folder / "store.json", json.loads((folder / "store.json").read_text()) | changes
    )


DAMAGE = {
    "cut short": lambda folder, data: os.truncate(folder / "images.u8", 1000),
    "bytes, not": lambda folder, data: os.truncate(folder / "rows", 9),
    "of version 9": lambda folder, data: rewrite(folder, format=9),
    "damaged": lambda folder, data: (folder / "store.json").write_text("{"),
    "No such file": lambda folder, data: (folder / "images.u8").unlink(),
    "damaged (": lambda folder, data: rewrite(folder, images="x"),
    "made from other images": lambda folder, data: next(data.glob("*/*")).unlink(),
    "than those that are there now": lambda folder, data: Image.new("RGB", (9, 9)).save(
        data / "class0" / "new.png"
    ),
    "other images": lambda folder, data: os.utime(next(data.glob("*/*")), (1, 1)),
    "holds images of 32 px, which do not fit --resize 24": lambda folder, data: (
        rewrite(folder, resize=32, images=0)
        or [os.truncate(folder / name, 0) for name in ("images.u8", "rows")]
    ),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_a_store_that_does_not_fit_is_one_line(data: Path, tmp_path: Path, part: str) -> None:
    packed(square(data), str(data), str(tmp_path / "store"), 0)
    DAMAGE[part](tmp_path / "store", data)
    with pytest.raises(UserError) as error:
        packed(square(data), str(data), str(tmp_path / "store"), 0)
    assert (
        part in str(error.value)
        and "\n" not in str(error.value)
        and str(tmp_path / "store") in str(error.value)
    )


def test_where_a_store_cannot_be(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        packed(square(data), str(data), str(tmp_path / "other"), 0)
    with pytest.raises(UserError, match="cannot be written"):
        packed(square(data), str(data), "/proc/store", 0)
    needed = 250 * (24 * 24 * 3 + dataloader.STORE_ROWS.itemsize)
    monkeypatch.setattr(
        dataloader.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(needed - 1)
    )
    with pytest.raises(UserError, match=f"needs {needed:,} bytes .* where {needed - 1:,} are free"):
        packed(square(data), str(data), str(tmp_path / "store"), 0)
    monkeypatch.undo()
    shapes = open_dataset("shapes", "pretrain", view="square", resize="auto", crop=16)
    assert (
        packed(shapes, "shapes", "auto", 0) is shapes and "nothing to do" in capsys.readouterr().err
    )


def test_more_than_one_percent_unreadable_is_no_store(data: Path, tmp_path: Path) -> None:
    (data / "class2" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="3 of 251 images"):
        packed(square(data), str(data), str(tmp_path / "store"), 0)
    assert not (tmp_path / "store").exists()


def test_two_processes_make_one_store(data: Path, tmp_path: Path) -> None:
    """As torchrun starts them: one packs, the other waits and reads."""
    script = f"""
import dataloader, sys
plain = dataloader.open_dataset({str(data)!r}, "pretrain", view="square", resize=24, crop=16)
print(len(dataloader.packed(plain, {str(data)!r}, {str(tmp_path / "store")!r}, 0)))
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0] and all(
        out.splitlines()[-1] == "250" for out in said
    )
    assert sum("packing" in out for out in said) == 1 and not (tmp_path / ".store.partial").exists()


def test_a_store_is_not_read_into_memory(tmp_path: Path) -> None:
    n, side = 60_000, 40  # 288 MB
    (tmp_path / "images.u8").touch()
    os.truncate(tmp_path / "images.u8", n * side * side * 3)
    np.zeros(n, dataloader.STORE_ROWS).tofile(tmp_path / "rows")
    store = PackedImages(
        tmp_path, {"name": "x", "classes": ["a"], "resize": side, "images": n, "unreadable": []}
    )

    def anonymous() -> int:
        gc.collect()
        return (
            int(
                next(
                    line.split()[1]
                    for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith("RssAnon")
                )
            )
            // 1024
        )

    before = anonymous()
    for batch in torch.randperm(n).split(256):
        store.fetch(batch)
    assert anonymous() - before < 30  # MB


def test_ahead_keeps_the_order_raises_in_its_place_and_ends_its_thread() -> None:
    threads = threading.active_count()
    assert list(dataloader.ahead(iter(range(100)), pin=False)) == list(range(100))

    def failing():
        yield from range(3)
        raise UserError("in its place")

    got = []
    with pytest.raises(UserError, match="in its place"):
        for item in dataloader.ahead(failing(), pin=False):
            got.append(item)
    assert got == [0, 1, 2]
    endless = dataloader.ahead(itertools.count(), pin=False)
    assert [next(endless) for _ in range(3)] == [0, 1, 2]
    endless.close()
    time.sleep(0.05)
    assert threading.active_count() == threads
