"""Messages, random streams, progress, and files written whole."""

import io
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import utils
from utils import UserError


def test_streams_are_reproducible_and_apart():
    def draw(seed: int, stream: str, index: int) -> list[int]:
        return torch.randint(2**62, (4,), generator=utils.generator(seed, stream, index)).tolist()

    assert draw(1, "query", 5) == draw(1, "query", 5)
    others = [
        draw(1, "query", 6),
        draw(2, "query", 5),
        draw(1, "key", 5),
        draw(6, "query", 0),
        draw(5, "query", 1),
    ]
    assert len({tuple(x) for x in [draw(1, "query", 5), *others]}) == 6


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    """Its target is the file that is replaced, or made."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("there", "not_there"):
        link, target = tmp_path / name, tmp_path / "elsewhere" / name
        link.symlink_to(target)
        if name == "there":
            target.write_bytes(b"old")
        utils.atomic_write(link, lambda file: file.write(b"new"))
        assert link.is_symlink() and target.read_bytes() == b"new" and not target.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "not_there", "there"]


def test_a_pipe_a_socket_and_a_folder_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    before = {path: os.lstat(path).st_mode for path in tmp_path.iterdir()}
    for path in before:
        with pytest.raises(utils.UserError, match="cannot be written: it is a"):
            utils.atomic_write(path, lambda file: file.write(b"new"))
    assert before == {path: os.lstat(path).st_mode for path in tmp_path.iterdir()}
    listener.close()


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path: Path):
    path = tmp_path / "a" / "file"
    utils.atomic_write(path, lambda file: file.write(b"old"))

    def broken(file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        utils.atomic_write(path, broken)
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_file_written_whole_has_the_permissions_of_any_other(tmp_path: Path):
    before = os.umask(0o027)
    try:
        utils.atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_file_can_be_written_by_several_at_once(tmp_path: Path):
    path = tmp_path / "file"

    def write(file, content: bytes) -> None:
        file.write(content)
        meet.wait(timeout=30)  # all have their file open

    meet, contents = threading.Barrier(4), [bytes([65 + i]) * 1000 for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda c: utils.atomic_write(path, lambda f: write(f, c)), contents))
    assert path.read_bytes() in contents and os.listdir(tmp_path) == ["file"]


def test_durations():
    seconds = 41.6, 185, 7800, 97200
    expected = ["0:00:42", "0:03:05", "2:10:00", "1 day, 3:00:00"]
    assert [utils.duration(s) for s in seconds] == expected


def test_cosine_goes_from_one_to_zero():
    assert utils.cosine(0, 8) == 1 and utils.cosine(4, 8) == pytest.approx(0.5)
    assert utils.cosine(8, 8) == pytest.approx(0, abs=1e-15)
    assert utils.cosine(0.25) == utils.cosine(2, 8)


def test_csv_reads_back_without_a_torn_line(tmp_path: Path):
    path = tmp_path / "a.csv"
    utils.write_csv(path, ["step", "loss"], [[1, 0.5], [2, 0.25]])
    with open(path, "a") as file:
        file.write("3,0.")
    assert utils.read_csv(path) == {"step": [1, 2], "loss": [0.5, 0.25]}
    with pytest.raises(UserError, match="no column lr"):
        utils.read_csv(path, ["step", "lr"])


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory: choose another --out"):
        utils.check_writable(tmp_path / "file" / "folder", "--out")
    utils.check_writable(tmp_path / "a" / "b", "--out")
    assert not (tmp_path / "a").exists(), "it leaves nothing behind"


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_messages_that_find_no_room_end_nothing(monkeypatch: pytest.MonkeyPatch):
    done = []

    def main(argv: list[str]) -> None:
        utils.say("hello")
        utils.warn("careful")
        done.append(list(utils.progress(range(3), "counting")))

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Full())
    utils.guard(main)
    assert done == [[0, 1, 2]]


def test_errors_of_users_are_one_line(capsys: pytest.CaptureFixture):
    def main(argv: list[str]) -> None:
        raise UserError("--lr 'x' is no number: give one")

    with pytest.raises(SystemExit) as stop:
        utils.guard(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --lr 'x' is no number: give one\n"


def test_only_the_first_process_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    utils.say("hello")
    utils.warn("careful")
    utils.warn("each of us", everywhere=True)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "warning: each of us\n")


def test_provenance_names_commit_and_versions():
    made_by = utils.provenance()
    assert made_by["torch"] == torch.__version__ and made_by["commit"]
    assert isinstance(made_by["changed"], bool) and os.path.sep not in made_by["commit"]


@pytest.mark.parametrize(
    "error, parts",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
            ["out of memory", "20.00 MiB more", "a smaller --batch_size"],
        ),
        (RuntimeError("FIND was unable to find an engine to"), ["a smaller --batch_size"]),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), ["a smaller --batch_size"]),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device"),
            ["install another build"],
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_one_line(
    error: RuntimeError, parts: list[str], capsys: pytest.CaptureFixture
):
    def main(argv: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.guard(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts)


def test_a_fault_of_the_code_keeps_its_traceback():
    def main(argv: list[str]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        utils.guard(main)
