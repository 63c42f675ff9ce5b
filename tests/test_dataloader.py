"""The interface to data: what a folder holds, sizes, unreadable images, order, and loading."""

import os
from pathlib import Path

import pytest
import torch
from miniature import (
    damage,
    open_square,
    write_fashion_mnist,
    write_folders,
    write_plain,
    write_stl10,
)

from data.base import Size
from dataloader import Failures, detect, epoch_batches, epoch_order, iterate
from utils import UserError

# -------------------------------------------------------------------- what a folder holds


def test_detect(tmp_path: Path) -> None:
    write_folders(tmp_path / "both", classes=2, train=1, test=1)
    write_stl10(tmp_path / "stl", 1, 1, 1)
    write_fashion_mnist(tmp_path / "plain", 10, 10, gz=False)
    write_fashion_mnist(tmp_path / "gz", 10, 10)
    kinds = {
        "both": "folders",
        "both/train": "folders",
        "stl": "stl10",
        "stl/stl10_binary": "stl10",
        "plain": "fashion_mnist",
        "gz": "fashion_mnist",
    }
    assert {name: detect(str(tmp_path / name)) for name in kinds} == kinds
    assert detect("shapes") == "shapes"


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ["is not a folder", "shapes", "--download", "train/"]),
        ([], ["no data set", ".jpg"]),
        (["one/notes.txt"], ["no data set"]),
        (["file"], ["no data set"]),
    ],
)
def test_a_folder_without_data(tmp_path: Path, content: list[str] | None, parts: list[str]) -> None:
    root = tmp_path / "data"
    if content is not None:
        root.mkdir()
        for name in content:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        open_square(root)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in [str(root), *parts])


def test_a_file_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a folder"):
        open_square(tmp_path / "a.png")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        open_square(tmp_path)


@pytest.mark.parametrize(
    "resize, crop, native, fit, expected",
    [
        ("auto", 64, None, "square", 128),
        ("auto", 64, 96, "square", 96),
        ("auto", 32, 28, "square", 28),
        ("auto", 32, 40, "square", 40),
        ("auto", 16, 96, "square", 32),
        ("auto", 224, None, "center", 256),
        ("auto", 64, None, "center", 73),
        ("auto", 64, 96, "center", 73),
        ("auto", 32, 28, "center", 32),
        ("auto", 96, 96, "center", 96),
        ("auto", 88, 96, "center", 96),
        (100, 64, None, "square", 100),
        (64, 64, None, "square", 64),
        (200, 64, 96, "square", 200),
        (28, 32, 28, "square", 28),
        (28, 32, 28, "center", 32),
    ],
)
def test_sizes(resize: int | str, crop: int, native: int | None, fit: str, expected: int) -> None:
    assert Size(fit, resize, crop).resolve(native) == expected


@pytest.mark.parametrize(
    "resize, crop, native, fit",
    [
        (63, 64, None, "square"),
        (63, 64, None, "center"),
        (40, 64, 96, "square"),
        (20, 32, 28, "square"),
    ],
)
def test_sizes_that_are_too_small(resize: int, crop: int, native: int | None, fit: str) -> None:
    with pytest.raises(UserError, match=f"--resize {resize} .*--crop {crop}"):
        Size(fit, resize, crop).resolve(native)


# ---------------------------------------------------------------------- unreadable images


@pytest.mark.parametrize(
    "total, allowed",
    [(1, 0), (50, 0), (99, 0), (100, 1), (199, 1), (200, 2), (300, 3), (2900, 29), (5700, 57)],
)
def test_more_than_one_percent_stops(total: int, allowed: int) -> None:
    failures = Failures(total)
    paths = [f"/data/{i}.jpg" for i in range(allowed + 1)]
    failures.add(paths[:allowed])
    failures.add(paths[:allowed])  # the same ones in the next epoch
    assert list(failures.paths) == paths[:allowed]
    percent = 100 * (allowed + 1) / total
    message = rf"^{allowed + 1} of {total} images \({percent:.1f} %\) cannot be read: .*'/data/0"
    with pytest.raises(UserError, match=message):
        failures.add([paths[allowed]])


def test_ten_failures_are_named_once_and_others_counted(capsys: pytest.CaptureFixture) -> None:
    failures = Failures(10_000)
    for i in range(15):
        failures.add([f"/data/{i}.jpg"] * 2)
        failures.add([f"/data/{i}.jpg"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and len(failures.paths) == 15
    assert all(f"'/data/{i}.jpg'" in line for i, line in enumerate(lines))


def test_failures_are_listed_in_a_file_across_runs(tmp_path: Path) -> None:
    file = tmp_path / "unreadable.txt"
    Failures(1000, file).add(["/data/a.jpg", "/data/b\nc.jpg"])
    Failures(1000, file).add(["/data/b\nc.jpg", "/data/d.jpg"])
    assert file.read_text().splitlines() == ["/data/a.jpg", "/data/b\\nc.jpg", "/data/d.jpg"]


def test_processes_share_their_failures_once(capsys: pytest.CaptureFixture) -> None:
    class TwoProcesses:
        def collect(self, items: list[str]) -> list[str]:
            sent.append(items)
            return [*items, "/data/theirs.jpg"]

    sent, failures = [], Failures(1000)
    failures.add(["/data/ours.jpg"])
    failures.share(TwoProcesses())
    failures.share(TwoProcesses())
    assert sent == [["/data/ours.jpg"], []]
    assert list(failures.paths) == ["/data/ours.jpg", "/data/theirs.jpg"]
    assert "theirs" not in capsys.readouterr().err  # the process that met it has named it


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterate_counts_failures_and_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture, num_workers: int
) -> None:
    paths = write_plain(tmp_path, 100)
    damage(paths[7], "text")
    dataset, failures = open_square(tmp_path), Failures(100)

    def count(epoch: int) -> int:
        batches = epoch_batches(100, 10, seed=0, epoch=epoch)
        loader = iterate(dataset, batches, num_workers=num_workers, failures=failures)
        return sum(len(batch.images) for batch in loader)

    assert count(epoch=0) == count(epoch=1) == 100
    assert list(failures.paths) == [str(paths[7])]
    assert capsys.readouterr().err.count(str(paths[7])) == 1
    damage(paths[50], "text")
    with pytest.raises(UserError, match="2 of 100 images"):
        count(epoch=2)


def test_nothing_readable_ends(tmp_path: Path) -> None:
    for path in write_plain(tmp_path, 4):
        damage(path, "empty")
    dataset = open_square(tmp_path)
    with pytest.raises(UserError, match="of 4 images"):
        list(iterate(dataset, [torch.arange(2)], num_workers=0, failures=Failures(4)))


# ------------------------------------------------------------------------------ the order


def test_the_order_of_an_epoch_is_a_permutation_by_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    order = epoch_order(1000, seed=3, epoch=4)
    assert sorted(order.tolist()) == list(range(1000)) and order.tolist() != list(range(1000))
    torch.manual_seed(2)
    assert torch.equal(order, epoch_order(1000, seed=3, epoch=4))
    for seed, epoch in [(3, 5), (4, 4), (4, 3), (0, 0), (3, 2**32)]:
        assert (order == epoch_order(1000, seed, epoch)).float().mean() < 0.02


def test_batches_drop_the_last_and_start_anywhere() -> None:
    batches = epoch_batches(103, 10, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == [10] * 10
    assert torch.equal(torch.cat(batches), epoch_order(103, 0, 1)[:100])
    for start in (0, 3, 9, 10):
        rest = epoch_batches(103, 10, seed=0, epoch=1, start=start)
        assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in batches[start:]]
    assert epoch_batches(9, 10, seed=0, epoch=0) == []
