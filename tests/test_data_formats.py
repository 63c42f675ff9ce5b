"""STL-10, Fashion-MNIST, CIFAR-10 and the built-in textures: their formats, and damaged files."""

import gzip
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from miniature import (
    open_center,
    open_square,
    write_cifar10,
    write_fashion_mnist,
    write_folders,
    write_stl10,
)
from torchvision.transforms.v2 import functional as TF

from data import shapes, stl10
from dataloader import open_dataset
from utils import UserError

# --------------------------------------------------------------------------------- STL-10


def test_stl10_in_the_official_format(tmp_path: Path) -> None:
    images = write_stl10(tmp_path, train=20, test=10, unlabeled=30)
    for root in (tmp_path, tmp_path / "stl10_binary"):
        for split, name in {"pretrain": "unlabeled", "train": "train", "test": "test"}.items():
            dataset = open_square(root, split, resize=96, crop=64)
            assert len(dataset) == len(images[name])
            assert (dataset.name, dataset.native, dataset.classes[0]) == ("stl10", 96, "airplane")
            labels = [i % 10 for i in range(len(dataset))]
            assert dataset.labels.tolist() == (labels if split != "pretrain" else [-1] * 30)
            indices = torch.tensor([5, 0, 9])
            batch = dataset.fetch(indices)
            assert np.array_equal(batch.images.numpy(), images[name][indices])
            assert batch.aspect.tolist() == [1, 1, 1] and batch.failed == []
            assert torch.equal(batch.labels, dataset.labels[indices])


def test_stl10_is_column_major(tmp_path: Path) -> None:
    """By the description of the format: the first 96 bytes are the red channel's first column."""
    write_stl10(tmp_path, 1, 1, 1)
    content = np.zeros(3 * 96 * 96, np.uint8)
    content[:96] = 7  # red, column 0
    content[96 * 96 + 96 * 5 + 2] = 9  # green, column 5, row 2
    content[-1] = 11  # blue, the last column's last row
    content.tofile(tmp_path / "stl10_binary" / "train_X.bin")
    image = open_center(tmp_path, "train", resize=96, crop=96).fetch(torch.tensor([0])).images[0]
    assert (image[0, :, 0] == 7).all() and image[1, 2, 5] == 9 and image[2, 95, 95] == 11
    assert (image > 0).sum() == 98


def test_sizes_of_stl10(tmp_path: Path) -> None:
    images = write_stl10(tmp_path, 10, 10, 10)
    dataset = open_square(tmp_path, resize="auto", crop=32)
    assert dataset.resize == 64 and dataset.fetch(torch.arange(3)).images.shape == (3, 3, 64, 64)
    dataset = open_center(tmp_path, "train", crop=64)
    resized = TF.resize(torch.from_numpy(images["train"]), [73, 73], antialias=True)
    expected = TF.center_crop(resized, [64, 64])
    assert dataset.resize == 73
    assert torch.equal(dataset.fetch(torch.arange(10)).images, expected)


@pytest.mark.parametrize(
    "name, content, split, parts",
    [
        ("unlabeled_X.bin", None, "pretrain", ["unlabeled_X.bin", "No such file"]),
        ("train_X.bin", None, "train", ["train_X.bin", "No such file"]),
        ("test_y.bin", None, "test", ["test_y.bin", "No such file"]),
        ("train_X.bin", b"x" * 27647, "train", ["train_X.bin", "27647"]),
        ("train_X.bin", b"", "train", ["train_X.bin", "empty"]),
        ("train_y.bin", b"\x01" * 9, "train", ["10 images with 9 labels"]),
        ("train_y.bin", b"\x0b" * 10, "train", ["labels up to 10 for 10 classes"]),
        ("train_y.bin", b"\x00" * 10, "train", ["labels up to 255 for 10 classes"]),
    ],
)
def test_damaged_stl10(
    tmp_path: Path, name: str, content: bytes | None, split: str, parts: list[str]
) -> None:
    write_stl10(tmp_path, 10, 10, 10)
    path = tmp_path / "stl10_binary" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_center(tmp_path, split, crop=64)
    assert all(part in str(error.value) for part in [*parts, "fetch it again"])


def test_folds(tmp_path: Path) -> None:
    write_stl10(tmp_path, 40, 10, 10)
    file = tmp_path / "stl10_binary" / "fold_indices.txt"
    lines = [" ".join(str((7 * i + j) % 40) for j in range(5)) for i in range(10)]
    file.write_text("\n".join(lines) + "\n")
    folds = stl10.read_folds(str(tmp_path), images=40)
    assert [fold.tolist() for fold in folds] == [[*map(int, line.split())] for line in lines]
    for bad in (lines[:9], [*lines[:9], "0 1 2 3 40"], [*lines[:9], "-1 1 2 3 4"], ["x"] * 10):
        file.write_text("\n".join(bad))
        with pytest.raises(UserError, match="fold_indices.txt.*fetch it again"):
            stl10.read_folds(str(tmp_path), images=40)
    file.unlink()
    with pytest.raises(UserError, match="fold_indices.txt.*fetch it again"):
        stl10.read_folds(str(tmp_path), images=40)
    with pytest.raises(UserError, match="--folds are STL-10's"):
        stl10.read_folds("shapes", images=40)


def test_download_fetches_stl10_where_no_other_data_set_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(root: Path, split: str, download: bool) -> None:
        fetched.append(root)
        write_stl10(root, 2, 2, 2)

    def fail(root: Path, split: str, download: bool) -> None:
        raise OSError("no route\nto host")

    settings = {"fit": "center", "resize": "auto", "crop": 16, "download": True}
    monkeypatch.setattr(torchvision.datasets, "STL10", fetch)
    dataset = open_dataset(str(tmp_path / "new"), "train", **settings)
    assert len(dataset) == 2 and fetched == [tmp_path / "new"]
    write_folders(tmp_path / "folders", 1, 1, 1)
    for root in ("shapes", str(tmp_path / "folders")):
        with pytest.raises(UserError, match="fetches STL-10, but .*leave --download out"):
            open_dataset(root, "train", **settings)
    assert len(fetched) == 1
    monkeypatch.setattr(torchvision.datasets, "STL10", fail)
    with pytest.raises(UserError, match="STL-10 cannot be fetched into .*no route to host"):
        open_dataset(str(tmp_path / "newer"), "train", **settings)


# -------------------------------------------------------------------------- Fashion-MNIST


@pytest.mark.parametrize("gz", [True, False])
def test_fashion_mnist(tmp_path: Path, gz: bool) -> None:
    images = write_fashion_mnist(tmp_path, train=40, test=20, gz=gz)
    for split, name in {"pretrain": "train", "train": "train", "test": "t10k"}.items():
        dataset = open_square(tmp_path, split, resize="auto", crop=32)
        assert len(dataset) == len(images[name])
        assert dataset.native == dataset.resize == 28
        assert dataset.labels.tolist() == [i % 10 for i in range(len(dataset))]
        assert dataset.labels.dtype == torch.int64
        batch = dataset.fetch(torch.tensor([3, 11]))
        assert batch.images.shape == (2, 1, 28, 28) and batch.labels.tolist() == [3, 1]
        assert np.array_equal(batch.images[:, 0].numpy(), images[name][[3, 11]])
    found = open_center(tmp_path, "test", crop=32).fetch(torch.tensor([4])).images
    image = torch.from_numpy(images["t10k"][4])[None, None]
    assert torch.equal(found, TF.resize(image, [32, 32], antialias=True))


def test_mnist_in_files_of_the_same_names_has_digits_for_classes(tmp_path: Path) -> None:
    for folder, classes in {
        "Fashion-MNIST/raw": torchvision.datasets.FashionMNIST.classes,
        "MNIST/raw": [str(digit) for digit in range(10)],
    }.items():
        write_fashion_mnist(tmp_path / folder)
        assert open_square(tmp_path / folder, "train", resize=28).classes == classes
    (tmp_path / "data").symlink_to(tmp_path / "Fashion-MNIST/raw")
    assert "Sneaker" in open_square(tmp_path / "data", "train", resize=28).classes


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file's content, which may be packed by gzip."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"",
        lambda content: content[:6],
        lambda content: b"\x00\x00\x0d\x03" + content[4:],
        lambda content: b"\x00\x00\x08\x01" + content[4:],
    ],
)
def test_damaged_fashion_mnist(tmp_path: Path, gz: bool, change: Callable) -> None:
    write_fashion_mnist(tmp_path, gz=gz)
    rewrite(next(tmp_path.glob("train-images*")), change)
    with pytest.raises(UserError, match="train-images-idx3-ubyte.*fetch it again"):
        open_square(tmp_path, resize=28)


def test_damaged_archive_and_missing_parts_of_fashion_mnist(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, train=40, test=20)
    archive = tmp_path / "train-images-idx3-ubyte.gz"
    content = archive.read_bytes()
    for damaged in (content[:-1000], b"no gzip", content[:500] + b"\x00" * 50 + content[550:]):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="train-images-idx3-ubyte.gz' cannot be read"):
            open_square(tmp_path, resize=28)
    archive.write_bytes(content)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    rewrite(labels, lambda content: content[:8] + b"\x0a" + content[9:])
    with pytest.raises(UserError, match="labels up to 10 for 10 classes"):
        open_square(tmp_path, resize=28)
    labels.write_bytes((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(UserError, match="40 images with 20 labels"):
        open_square(tmp_path, resize=28)
    labels.unlink()
    with pytest.raises(UserError, match="No such file.*train-labels-idx1-ubyte"):
        open_square(tmp_path, resize=28)


# ------------------------------------------------------------------------------- CIFAR-10


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10_in_its_binary_version(tmp_path: Path, below: str) -> None:
    records = write_cifar10(tmp_path / "c" / below)
    parts = {"pretrain": records[:30], "train": records[:30], "test": records[30:]}
    for split, part in parts.items():
        dataset = open_square(tmp_path / "c", split, resize="auto", crop=32)
        batch = dataset.fetch(torch.arange(len(dataset)))
        assert dataset.name == "cifar10" and dataset.native == dataset.resize == 32
        assert torch.equal(batch.images.flatten(1), torch.from_numpy(part[:, 1:]))
        assert batch.labels.tolist() == part[:, 0].tolist()


def test_damaged_cifar10(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "c")
    path = tmp_path / "c" / "data_batch_3.bin"
    content = path.read_bytes()
    damaged = {"data_batch_3.bin.*fetch it again": content[:-1], "up to 11": b"\x0b" + content[1:]}
    for words, bad in damaged.items():
        path.write_bytes(bad)
        with pytest.raises(UserError, match=words):
            open_square(tmp_path / "c", "train", resize="auto", crop=32)
    path.unlink()
    with pytest.raises(UserError, match="data_batch_3.bin.*No such file"):
        open_square(tmp_path / "c", "train", resize="auto", crop=32)


def test_the_python_version_of_cifar10_is_read_after_its_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    contents = {f"data_batch_{i}": {"data": pixels, "labels": [0, 1, 2, 9]} for i in range(1, 6)}
    contents["test_batch"] = {"data": pixels[:2], "labels": [3, 4]}
    contents["batches.meta"] = {"label_names": list("abcdefghij")}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    # bytes that are not the official ones are never unpickled
    with pytest.raises(UserError, match="not CIFAR-10's official python version"):
        open_square(tmp_path, "train", resize="auto", crop=32)
    digest = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    kind = torchvision.datasets.CIFAR10
    for files in ("train_list", "test_list"):
        checked = [[name, digest[name]] for name, _ in getattr(kind, files)]
        monkeypatch.setattr(kind, files, checked)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": digest["batches.meta"]})
    for root in (tmp_path, folder):
        dataset = open_square(root, "train", resize="auto", crop=32)
        batch = dataset.fetch(torch.arange(len(dataset)))
        assert torch.equal(batch.images[4:8].flatten(1), torch.from_numpy(pixels))
        assert batch.labels.tolist() == [0, 1, 2, 9] * 5


# --------------------------------------------------------------------------------- shapes


def test_shapes_are_deterministic_and_balanced() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    images, labels = shapes.make_shapes(200, seed=0)
    again, other = shapes.make_shapes(200, seed=0), shapes.make_shapes(200, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1])
    assert not np.array_equal(images, other[0])
    assert np.bincount(labels).tolist() == [20] * 10
    assert images.dtype == np.uint8 and images.shape == (200, 3, 40, 40)
    assert len({image.tobytes() for image in images}) == 200  # no image twice
    assert not np.array_equal(labels, np.sort(labels))


def test_only_the_texture_tells_shapes_apart() -> None:
    """Grey, of one mean and one contrast, lit evenly, not turned freely."""
    images, labels = shapes.make_shapes(500, seed=0)
    images = images.astype(float)
    grey = images[:, 0]
    assert np.array_equal(grey, images[:, 1]) and np.array_equal(grey, images[:, 2])
    assert np.abs(grey.mean(axis=(1, 2)) - 127).max() < 1  # of 255
    assert np.abs(grey.std(axis=(1, 2)) - 64).max() < 1
    corners = [grey[:, i : i + 20, j : j + 20].mean(axis=(1, 2)) for i in (0, 20) for j in (0, 20)]
    corners = np.stack(corners)
    assert np.abs(corners - corners.mean(axis=0)).mean() < 4  # the texture's own unevenness
    stripes = grey[labels == shapes.CLASSES.index("stripes")]
    down, across = np.gradient(stripes, axis=(1, 2))
    mixed, plain = (down * across).sum(axis=(1, 2)), (across**2 - down**2).sum(axis=(1, 2))
    tilt = np.degrees(0.5 * np.arctan2(2 * mixed, plain))  # of the structure tensor
    assert 11 < np.abs(tilt).max() < 20  # pixels blur the measure


def test_splits_of_shapes() -> None:
    train, test = open_center("shapes", "train", crop=32), open_center("shapes", "test", crop=32)
    assert train.labels.bincount().tolist() == [500] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    assert train.native == 40 and len(train.classes) == 10
    assert train.fetch(torch.arange(4)).images.shape == (4, 3, 32, 32)
    both = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert not both  # nothing of the test split is trained on
