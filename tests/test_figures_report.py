"""report.html: one page with what was run and what came of it."""

import base64
import html
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
from evaluation_data import class_folders, fabricated_run
from scripts import run

import config
from config import TrainSettings

FAST = ["--linear_epochs=2", "--linear_lrs", "0.1", "--knn_k=5", "--trials=2"]
FAST += ["--num_workers=0", "--device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    class_folders(folder / "data", seed=0)
    fabricated_run(folder / "output", "M1", epochs=(1,))
    fabricated_run(folder / "output", "M3", epochs=(1, 2))
    return folder


def test_a_report_is_one_page_that_needs_nothing_else(place: Path, tmp_path: Path) -> None:
    flags = [f"--encoder_output_root={place}/output", f"--dataset_root={place}/data", *FAST]
    flags += ["--multiple_encoder_exp_version", "M1", "M3", "--report"]
    here = f"--result_path={tmp_path}"
    done = run("visualize", *flags, here)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|url\(|@import|<script", page)
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert {base64.b64decode(picture) for picture in embedded} == files and len(files) == 6
    data = json.loads((tmp_path / "data" / "report.json").read_text())
    for text in (*data["commands"], *data["table"]["M3"], "not all runs were trained with"):
        assert text in html.unescape(page), text
    words = shlex.split(data["commands"][0])[2:]  # of train.py, which give the run's settings
    saved = config.read_yaml(place / "output" / "IMAGENET-64" / "M1" / "config.yaml")
    assert asdict(config.parse(TrainSettings, words)) == {
        **asdict(config.parse(TrainSettings, [])),
        **saved,
    }

    done = run("visualize", "--redraw", here, "--report")
    assert done.returncode == 0 and (tmp_path / "report.html").read_text() == page
    flags = [f"--encoder_output_root={place}/output", "--encoder_exp_version=M3", "--report"]
    assert run("visualize", *flags, "--knn_k=7", here).returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert "M3, epoch 2 has no result with these settings" in page  # in its place
    assert "not drawn, no --dataset_root was given" in page and "None: one run" in page
