"""log.csv, and other files that grow by lines."""

import math
import os
from pathlib import Path

import pytest

import utils
from run.log import COLUMNS, Lines, Log
from utils import UserError


def test_log_drops_rows_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path, columns = tmp_path / "log.csv", ["step", "loss"]
    log = Log(path, columns, 0)
    for step in (2, 4, 6):
        log.add({"step": step, "loss": step / 10, "of no column": 1})
    with open(path, "a") as file:
        file.write("8")  # the power went
    Log(path, columns, 4).add({"step": 6, "loss": math.nan})
    assert path.read_text() == "step,loss\n2,0.2\n4,0.4\n6,nan\n"
    Log(path, columns, 0)
    assert utils.read_csv(path)["step"] == []


def test_numbers_have_ten_digits(tmp_path: Path) -> None:
    Log(tmp_path / "log.csv", ["step", "loss"], 0).add({"step": 123456789, "loss": 1 / 3})
    assert (tmp_path / "log.csv").read_text().splitlines()[1] == "123456789,0.3333333333"


def test_a_log_of_an_older_version_gets_the_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss,gone\n5,1.5,3\n10,1.25,3\n")
    Log(path, COLUMNS, 10).add(dict.fromkeys(COLUMNS, 11.0))
    log = utils.read_csv(path, COLUMNS)
    assert list(log) == COLUMNS and log["step"] == [5, 10, 11] and log["loss"] == [1.5, 1.25, 11]
    assert math.isnan(log["alignment"][0]) and math.isnan(log["alignment"][1])


@pytest.mark.parametrize("content", [None, "", "step,loss\n"])
def test_a_log_that_is_gone_is_said(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if content is not None:
        (tmp_path / "log.csv").write_text(content)
    Log(tmp_path / "log.csv", ["step", "loss"], 10)
    assert "its rows up to step 10 are lost" in capsys.readouterr().err
    (tmp_path / "log.csv").write_text("hello\n")
    with pytest.raises(UserError, match="log.csv' is damaged"):
        Log(tmp_path / "log.csv", ["step", "loss"], 10)


def test_lines_go_on_after_the_last_whole_one(tmp_path: Path) -> None:
    path, odd = tmp_path / "lines", os.fsdecode(b"\xe9\xff\x0c\r\x1c")  # the name of a file
    lines = Lines(path)
    assert lines.lines == [] and not path.exists()
    lines.append(odd)
    lines.append("")
    with open(path, "a") as file:
        file.write("torn")
    again = Lines(path)
    assert again.lines == [odd, ""]
    again.append("new")
    assert path.read_bytes() == os.fsencode(odd) + b"\n\nnew\n"
    path.unlink()
    again.append("in a new file")
    assert path.read_text() == "in a new file\n"


def test_lines_wait_until_they_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "lines"
    lines = Lines(path)
    path.mkdir()
    lines.append("one")
    lines.append("two")
    assert capsys.readouterr().err.count("will retry with the next line") == 1
    with pytest.raises(UserError, match="lines' cannot be written: Is a directory"):
        lines.flush()
    with pytest.raises(UserError, match="lines' cannot be read: Is a directory: move it away"):
        Lines(path)
    path.rmdir()
    lines.append("three")
    assert path.read_text() == "one\ntwo\nthree\n"
