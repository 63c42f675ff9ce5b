"""Class folders: which files count, in which order, and what takes an unreadable file's place."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from miniature import (
    damage,
    enlarge_header,
    open_center,
    open_square,
    pixels,
    smooth,
    write_class,
    write_folders,
    write_plain,
)
from PIL import Image

from data.failures import Failures
from utils import UserError


def names(dataset, below: Path) -> list[str]:
    return [os.path.relpath(dataset.paths[i], below) for i in range(len(dataset))]


def test_train_and_val(tmp_path: Path) -> None:
    write_folders(tmp_path, classes=3, train=4, test=2)
    train, test = open_center(tmp_path, "train"), open_center(tmp_path, "test")
    assert train.name == "folders" and train.native is None
    assert train.classes == test.classes == ["class0", "class1", "class2"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    pretrain = open_square(tmp_path)
    assert names(pretrain, tmp_path) == names(train, tmp_path)
    assert names(pretrain, tmp_path)[5] == "train/class1/001.png"
    assert all(name.startswith("val/") for name in names(test, tmp_path))
    (tmp_path / "val").rename(tmp_path / "test")
    test = open_center(tmp_path, "test")
    assert all(name.startswith("test/") for name in names(test, tmp_path))


def test_the_checksum_is_of_the_names_below_the_folder(tmp_path: Path) -> None:
    write_folders(tmp_path / "a", classes=3, train=4, test=1)
    shutil.copytree(tmp_path / "a", tmp_path / "longer" / "b")
    one, other = open_square(tmp_path / "a"), open_square(tmp_path / "longer" / "b")
    names = b"".join(f"{c}/{i:03}.png".encode() for c in range(3) for i in range(4))
    assert one.paths.below_common().tobytes() == names
    assert one.checksum == other.checksum
    folder = tmp_path / "longer" / "b" / "train" / "class1"
    (folder / "003.png").rename(folder / "004.png")
    assert open_square(tmp_path / "longer" / "b").checksum != one.checksum


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        (tmp_path / name).mkdir()
        smooth(20, 20).save(tmp_path / name / "a.png")
    assert open_square(tmp_path).classes == ["bus", "train"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_evaluation_needs_two_folders(tmp_path: Path, split: str) -> None:
    write_folders(tmp_path, classes=2, train=2, test=2)
    with pytest.raises(UserError, match="needs train/ and val/"):
        open_center(tmp_path / "train", split)
    (tmp_path / "val").rename(tmp_path / "check")
    assert len(open_square(tmp_path)) == 4  # pretraining needs train/ alone
    with pytest.raises(UserError, match=r"needs train/ and val/ \(or test/\)"):
        open_center(tmp_path, split)


@pytest.mark.parametrize("how", ["absent", "empty"])
def test_a_class_without_test_images_goes_untested(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture
) -> None:
    write_folders(tmp_path, classes=3, train=2, test=1)
    (tmp_path / "val" / "class1" / "000.png").unlink()
    if how == "absent":
        (tmp_path / "val" / "class1").rmdir()
    train, test = open_center(tmp_path, "train"), open_center(tmp_path, "test")
    assert train.classes == test.classes == ["class0", "class1", "class2"]
    assert test.labels.tolist() == [0, 2] and names(test, tmp_path)[1] == "val/class2/000.png"
    assert (
        "val' has no images of some classes, which go untested: class1" in capsys.readouterr().err
    )


def test_a_class_without_training_images_is_none(tmp_path: Path) -> None:
    write_folders(tmp_path, classes=2, train=1, test=1)
    (tmp_path / "val" / "class1").rename(tmp_path / "val" / "klass1")
    with pytest.raises(UserError, match="classes of which train/ has no images: klass1"):
        open_center(tmp_path, "test")
    (tmp_path / "val" / "klass1").rename(tmp_path / "val" / "class1")
    (tmp_path / "train" / "class1" / "000.png").unlink()
    assert open_center(tmp_path, "train").classes == ["class0"]
    with pytest.raises(UserError, match="classes of which train/ has no images: class1"):
        open_center(tmp_path, "test")
    (tmp_path / "train" / "class0" / "000.png").unlink()
    with pytest.raises(UserError, match="the class folders in .*train' have no images"):
        open_center(tmp_path, "train")


@pytest.mark.parametrize("split", ["pretrain", "train", "test"])
def test_a_folder_without_images_is_no_class(
    tmp_path: Path, split: str, capsys: pytest.CaptureFixture
) -> None:
    write_folders(tmp_path, classes=2, train=1, test=1)
    for part in ("train", "val"):
        (tmp_path / part / "__MACOSX").mkdir()
    images = open_square(tmp_path) if split == "pretrain" else open_center(tmp_path, split)
    assert images.classes == ["class0", "class1"] and images.labels.tolist() == [0, 1]
    left_out = "without images are left out: __MACOSX" in capsys.readouterr().err
    assert left_out == (split != "test")  # where it is said of train/


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_which_of_several_test_folders_is_used_is_said(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    write_folders(tmp_path, classes=2, train=1, test=1)
    (tmp_path / "val").rename(tmp_path / name)
    open_center(tmp_path, "test")
    assert "is used" not in capsys.readouterr().out
    (tmp_path / "test").mkdir(exist_ok=True)
    test = open_center(tmp_path, "test")
    assert names(test, tmp_path)[0] == f"{name}/class0/000.png"
    said = f"has {name}/ and test/: {name}/ is used" in capsys.readouterr().out
    assert said == (name != "test")


def test_other_endings_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_folders(tmp_path, classes=2, train=1, test=1)
    for path in ("class0/a.gif", "class0/b.GIF", "class1/c.heic", "class1/README", "class1/.d"):
        (tmp_path / "train" / path).write_bytes(b"x")
    assert len(open_square(tmp_path)) == 2
    said = capsys.readouterr().out
    assert "not read, by their ending: 2 .gif, 1 no ending, 1 .heic\n" in said
    open_center(tmp_path, "test")
    assert "ending" not in capsys.readouterr().out


def test_why_a_file_cannot_be_read(tmp_path: Path) -> None:
    write_class(tmp_path, ("whole.png", smooth(20, 20)))
    vast = enlarge_header((tmp_path / "one" / "whole.png").read_bytes())
    for name, content, reason in (
        ("vast.png", vast, "has more than 1,000 megapixels"),
        ("text.png", b"no image", "cannot be read as an image"),
        ("gone.png", None, "is no longer there"),
    ):
        path = tmp_path / name
        if content:
            path.write_bytes(content)
        failures = Failures(total=1)
        with pytest.raises(UserError, match=f"the first, .*{name}', {reason}"):
            failures.add([str(path)])


def test_a_folder_without_classes_is_for_pretraining(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_folders(tmp_path / "data", classes=2, train=3, test=1)
    for i, path in enumerate((tmp_path / "data" / "train").rglob("*.png")):
        path.rename(tmp_path / f"{i}.png")
    shutil.rmtree(tmp_path / "data")
    images = open_square(tmp_path)
    assert len(images) == 6 and images.labels.tolist() == [-1] * 6 and images.classes == []
    assert "its 6 images have no labels" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs train/ and val/"):
        open_center(tmp_path, "train")


def test_val_without_class_folders(tmp_path: Path) -> None:
    write_folders(tmp_path, classes=2, train=1, test=1)
    for folder in list((tmp_path / "val").iterdir()):
        (folder / "000.png").rename(tmp_path / "val" / f"{folder.name}.png")
        folder.rmdir()
    assert len(open_square(tmp_path)) == 2
    with pytest.raises(UserError, match="val' has no class folders"):
        open_center(tmp_path, "test")


def test_only_image_files_count_in_sorted_order_and_below(tmp_path: Path) -> None:
    listed = ["C.JPG", "a.webp", "b.png", "d.tiff", "e.bmp", "f.ppm"]
    folder, image = tmp_path / "one", smooth(20, 20)
    write_class(tmp_path, *((name, image) for name in [*listed[::-1], ".hidden.png", "gif.gif"]))
    (folder / "notes.txt").write_text("no image")
    (folder / "png").write_bytes(b"x")
    for name in ("deep/er", ".cache"):
        (folder / name).mkdir(parents=True)
        image.save(folder / name / "z.jpeg")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.png").write_bytes(b"x")
    dataset = open_square(tmp_path)
    assert names(dataset, folder) == [*listed, "deep/er/z.jpeg"] and dataset.classes == ["one"]
    assert dataset.fetch(torch.arange(7)).failed == []


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    stored = write_class(tmp_path / "stored", ("a.png", smooth(20, 20))) / "one"
    (tmp_path / "data" / "two").mkdir(parents=True)
    (tmp_path / "data" / "one").symlink_to(stored)
    (tmp_path / "data" / "two" / "linked").symlink_to(stored)
    (stored / "circle").symlink_to(stored)
    dataset = open_square(tmp_path / "data")
    assert dataset.labels.tolist() == [0, 1]
    assert dataset.fetch(torch.tensor([0, 1])).failed == []


def test_odd_file_names_survive(tmp_path: Path) -> None:
    odd = ["ä ö.png", "a\nb.png", os.fsdecode(b"\xff.png")]
    write_class(tmp_path, *((name, smooth(20, 20)) for name in odd))
    dataset = open_square(tmp_path)
    assert sorted(names(dataset, tmp_path / "one")) == sorted(odd)
    assert dataset.fetch(torch.arange(3)).failed == []


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "vanished"])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_the_next_image_replaces_an_unreadable_one_with_its_label(
    tmp_path: Path, how: str, ending: str
) -> None:
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        for i in range(2):
            image = Image.fromarray(pixels(10 * label + i, 60, 60, 3))
            image.save(tmp_path / str(label) / f"{i}.{ending}")
    dataset = open_square(tmp_path)
    whole = dataset.fetch(torch.arange(4))
    bad = [tmp_path / "0" / f"1.{ending}", tmp_path / "1" / f"1.{ending}"]
    for path in bad:
        damage(path, how)
    batch = dataset.fetch(torch.tensor([0, 1, 3]))
    shown = [0, 2, 0]  # the one after the last is the first
    assert torch.equal(batch.images, whole.images[shown])
    assert torch.equal(batch.labels, whole.labels[shown])
    assert torch.equal(batch.aspect, whole.aspect[shown])
    assert batch.failed == [*map(str, bad)]


def test_neighbours_that_are_unreadable_too(tmp_path: Path) -> None:
    paths = write_plain(tmp_path, 300)
    for path in paths[10:13]:
        damage(path, "text")
    batch = open_square(tmp_path).fetch(torch.tensor([10, 12, 13]))
    assert batch.images[:, 0, 0, 0].tolist() == [13, 13, 13]
    assert batch.failed == [*map(str, paths[10:13]), str(paths[12])]


def test_a_decompression_bomb_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class(tmp_path, ("a.png", smooth(100, 100)), ("b.png", smooth(20, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    failed = open_square(tmp_path).fetch(torch.tensor([0])).failed
    assert failed == [str(tmp_path / "one" / "a.png")]
