"""What a run survives: images that are broken, odd, or vanish while it goes on."""

import os
import signal
from pathlib import Path

from miniature import enlarge_header, write_folders
from PIL import Image
from scripts import assert_last_line_is_error, run
from survival import TRAIN, flags, home, rows, started, wait


def write_broken_files(folder: Path) -> set[str]:
    """Files that are no images, or cannot be read; returns their names."""
    sound = (folder / "000.png").read_bytes()
    broken = {
        "leer.png": b"",
        "truncated.png": sound[:-40],
        "text.jpg": b"no image",
        "\u732b.jpg": b"\xff\xd8\xff",
        "\u043a\u043e\u0442\nb.png": sound[:20],
        os.fsdecode(b"\xe9\xff.png"): b"x",
        "vast.png": enlarge_header(sound),
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "round").symlink_to(folder)
    return {*broken, "loop.png"}


def write_odd_images(folder: Path) -> None:
    """Images that can be read, although they look as if they could not."""
    Image.new("RGB", (1, 1), "red").save(folder / "1x1.png")
    Image.new("L", (1, 10_000)).save(folder / "1x10000.png")
    Image.new("CMYK", (10_000, 1)).save(folder / "10000x1.jpg")
    Image.new("1", (300, 2)).save(folder / "wide.bmp")
    Image.new("RGB", (9, 9)).save(folder / "a.jpeg", "PNG")
    Image.new("RGB", (9, 9)).save(folder / "b.png", "JPEG")


def read_list(out: Path) -> list[str]:
    content = (home(out) / "unreadable.txt").read_bytes()
    return [os.fsdecode(line).replace("\\n", "\n") for line in content.rstrip(b"\n").split(b"\n")]


def test_broken_files_are_replaced_and_listed_and_odd_ones_are_used(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_folders(data, classes=2, train=500, test=1, size=8)
    folder = data / "train" / "class0"
    paths = {str(folder / name) for name in write_broken_files(folder)}
    write_odd_images(folder)
    base = flags(data, out, "--batch_size=100", "--num_workers=2")
    done = run("train", *base, "--max_epoch=1")
    assert done.returncode == 0, done.stderr
    listed = read_list(out)
    assert len(set(listed)) == len(listed) >= 8, listed  # the last, incomplete batch is not read
    assert set(listed) <= paths
    assert done.stderr.count("another one takes its place") == len(listed)
    again = run("train", *base, "--max_epoch=2", "--resume")
    assert again.returncode == 0, again.stderr
    listed = read_list(out)
    assert set(listed) == paths and len(set(listed)) == len(listed)
    for i in range(20, 25):
        (folder / f"{i:03}.png").write_bytes(b"gone bad")  # now more than 1 %
    many = run("train", *base, "--max_epoch=4", "--resume")
    assert_last_line_is_error(many, "of 1014 images (1.")


def test_files_that_vanish_during_the_run(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_folders(data, classes=1, train=200, test=1, size=8)
    unreadable = home(out) / "unreadable.txt"
    command = flags(data, out, "--max_epoch=40", "--num_workers=1")
    with started(*TRAIN, *command) as process:
        wait(process, lambda: rows(out) >= 2)
        gone = [data / "train/class0" / name for name in ("007.png", "130.png")]
        for path in gone:
            path.unlink()
        wait(process, lambda: unreadable.exists() and unreadable.read_text().count("\n") == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert sorted(unreadable.read_text().split()) == list(map(str, gone))


def test_a_pipe_that_is_named_like_an_image_does_not_stop_the_run(tmp_path: Path) -> None:
    """Opened as a file is, it would wait for a writer for ever."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_folders(data, classes=1, train=200, test=1, size=8)
    os.mkfifo(data / "train/class0/pipe.png")
    with started(*TRAIN, *flags(data, out, "--max_epoch=2", "--num_workers=1")) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert read_list(out) == [str(data / "train/class0/pipe.png")]
