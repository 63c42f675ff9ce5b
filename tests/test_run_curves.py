"""What the log of a run says: its curves, and what sets runs apart."""

import math
from pathlib import Path

import pytest

import config
import utils
from run import curves

COLUMNS = ["step", "epoch", "loss", "contrast_top1", "lr", "images_per_second"]
COLUMNS += ["effective_rank", "knn_top1"]
NAN = math.nan


def make_run(folder: Path, rows: list[tuple], **values: object) -> Path:
    folder.mkdir()
    config.write(folder / "config.yaml", config.from_values(config.TrainSettings, values))
    utils.write_csv(folder / "log.csv", COLUMNS, rows)
    return folder


def test_the_untrained_encoder_is_epoch_0_of_knn_and_no_row_of_the_loss(tmp_path: Path) -> None:
    rows = [
        (0, 0, NAN, NAN, NAN, NAN, NAN, 30.0),
        (2, 1, 5.0, 10.0, 0.1, 64.0, 3.0, NAN),
        (4, 1, 4.0, 20.0, 0.1, 64.0, 4.0, NAN),
        (6, 2, 3.0, 30.0, 0.1, 64.0, 5.0, NAN),
        (8, 2, 2.0, 50.0, 0.01, 64.0, 6.0, 50.0),
    ]
    folder = make_run(tmp_path / "v1", rows, num_keys=7, batch_size=32)
    loss = curves.read_loss(folder)
    assert loss["step"] == [2, 4, 6, 8] and loss["loss"] == [5, 4, 3, 2]
    assert loss["chance"] == pytest.approx(math.log(8)) and loss["drops"] == [6]
    knn = curves.read_knn(folder)
    assert (knn["epoch"], knn["knn_top1"]) == ([0, 2], [30, 50])
    assert knn["rank_epoch"] == [0.5, 1, 1.5, 2] and knn["effective_rank"] == [3, 4, 5, 6]
    summary = curves.summarize(folder, epoch=2)
    assert summary == {"minutes": 0.1, "loss": 2.5, "contrast_top1": 40}  # 4 s

    begun = make_run(tmp_path / "v2", rows[:1])
    with pytest.raises(utils.UserError, match="no rows yet"):
        curves.read_loss(begun)
    assert curves.read_knn(make_run(tmp_path / "v3", rows[1:4])) is None


def test_what_sets_versions_apart(tmp_path: Path) -> None:
    """Names, seeds and machines do not; all other settings do."""
    runs = {
        "M2": make_run(tmp_path / "M2", [], exp_version="M2", seed=1, num_workers=2),
        "M3": make_run(tmp_path / "M3", [], exp_version="M3", shuffle_bn=True, crop_scale=[0.4, 1]),
    }
    assert curves.describe_differences(runs) == {
        "M2": {"crop_scale": [0.2, 1.0], "shuffle_bn": False},
        "M3": {"crop_scale": [0.4, 1.0], "shuffle_bn": True},
    }
    labels = curves.label_versions(runs)
    assert labels["M3"] == "crop_scale = 0.4 1.0, shuffled"
    runs["M2"] = make_run(tmp_path / "M1", [], momentum=0.9, shuffle_bn=True, crop_scale=[0.4, 1])
    assert curves.label_versions(runs) == {"M2": "m = 0.9", "M3": "m = 0.999"}
    assert curves.label_versions({"M3": runs["M3"]}) == {"M3": ""}
