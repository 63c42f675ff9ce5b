"""What the log of a run says, for its figure and for the table."""

import math
from pathlib import Path

import pytest
import yaml

import utils
from figures.curves import loss_figure
from run.curves import read_loss, summarize

HEADER = ["step", "epoch", "loss", "contrast_top1", "lr", "images_per_second"]


def write_log(folder: Path, rates: list[float]) -> None:
    rows = [(step, 1.0, rate) for step, rate in enumerate(rates, 1)]
    utils.write_csv(folder / "log.csv", ["step", "loss", "lr"], rows)


def test_loss_and_chance(tmp_path: Path) -> None:
    write_log(tmp_path, [3, 3])
    assert "chance" not in read_loss(tmp_path)  # nothing says K
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(utils.UserError, match="config.yaml' holds no keys"):
        read_loss(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"num_keys": 16}))
    log = read_loss(tmp_path)
    assert log["chance"] == math.log(17) and log["step"] == [1.0, 2.0] and log["drops"] == []


def test_a_run_without_a_log_or_rows_is_one_line(tmp_path: Path) -> None:
    for name in ("M0", "M1"):
        (tmp_path / name).mkdir()
        write_log(tmp_path / name, [])
    with pytest.raises(utils.UserError, match="no log.csv; runs with one: M0, M1"):
        read_loss(tmp_path / "M8")
    with pytest.raises(utils.UserError, match="no rows yet"):
        read_loss(tmp_path / "M1")


@pytest.mark.parametrize(
    "rates, drops",
    [
        ([3, 3, 3, 0.3, 0.3, 0.03], [3, 5]),
        ([3, 2, 1, 0.4, 0.1, 0.0], []),
        ([3, 3, 2.9, 2.9, 2.8, 2.8], []),  # a cosine has none
    ],
)
def test_where_the_learning_rate_falls(
    tmp_path: Path, rates: list[float], drops: list[int]
) -> None:
    write_log(tmp_path, rates)
    log = read_loss(tmp_path)
    assert log["drops"] == drops
    lines = loss_figure({"v": [log]}).axes[0].get_lines()
    assert [line.get_xdata()[0] for line in lines[1:]] == drops


def test_means_are_those_of_the_epoch_and_minutes_those_of_the_run(tmp_path: Path) -> None:
    """The rows are unevenly apart."""
    rows = [
        (10, 1, 4, 8, 0.03, 100),
        (50, 1, 3, 9, 0.03, 100),
        (90, 2, 2, 10, 0.03, 100),
        (100, 2, 1, 20, 0.03, 50),
    ]
    utils.write_csv(tmp_path / "log.csv", HEADER, rows)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"batch_size": 60}))
    minutes = (90 * 60 / 100 + 10 * 60 / 50) / 60
    assert summarize(tmp_path, epoch=1) == {
        "minutes": pytest.approx(minutes, abs=0.05),
        "loss": (10 * 4 + 40 * 3) / 50,
        "contrast_top1": (10 * 8 + 40 * 9) / 50,
    }
    of_second = summarize(tmp_path, epoch=2)
    assert of_second["loss"] == (40 * 2 + 10 * 1) / 50
    assert of_second["contrast_top1"] == (40 * 10 + 10 * 20) / 50
    assert summarize(tmp_path, epoch=None).keys() == {"minutes"}


def test_what_a_log_does_not_tell_is_left_out(tmp_path: Path) -> None:
    assert summarize(tmp_path, epoch=1) == {}
    write_log(tmp_path, [3, 3])
    assert summarize(tmp_path, epoch=1) == {}
    utils.write_csv(tmp_path / "log.csv", HEADER, [])
    assert summarize(tmp_path, epoch=1) == {}
