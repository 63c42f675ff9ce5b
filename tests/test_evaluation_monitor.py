"""kNN while training, and the run's other measures that need labels or keys."""

import json
import math
from pathlib import Path

import pytest
import torch
from evaluation_data import one_line
from miniature import write_folders
from scripts import assert_one_line_error, run

import config
import encoders
import parallel
import utils
from evaluation.monitor import Monitor
from run import checkpoints

TINY = ["--arch=resnet18", "--crop=16", "--resize=16", "--feature_dim=8", "--num_keys=16"]
TINY += ["--batch_size=16", "--bn_groups=2", "--num_workers=0", "--log_every=3", "--device=cpu"]
TINY += ["--precision=fp32", "--momentum=0.5", "--max_epoch=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitor")
    write_folders(folder, classes=4, train=20, test=5, size=20)
    return folder


def train(output: Path, data: Path, *flags: str) -> Path:
    done = run("train", f"--dataset_root={data}", f"--output_root={output}", *TINY, *flags)
    assert done.returncode == 0, done.stderr
    return output / "IMAGENET-64" / "v1"


def last_state(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder / "checkpoints" / "last.pth.tar")["state_dict"]


def test_knn_while_training_is_measured_and_changes_nothing(tmp_path: Path, data: Path) -> None:
    without = train(tmp_path / "without", data)
    folder = train(tmp_path / "with", data, "--knn_every=2", f"--knn_root={data}")
    state = last_state(folder)
    assert all(torch.equal(value, state[name]) for name, value in last_state(without).items())
    log = utils.read_csv(folder / "log.csv")
    assert log["step"] == [0, 3, 6, 9, 10, 12, 15]
    measured = [not math.isnan(top1) for top1 in log["knn_top1"]]
    assert measured == [True, False, False, False, True, False, True]
    assert (folder / "knn.png").exists() and not (without / "knn.png").exists()
    # test.py agrees: the same encoder, images and vote
    flags = [f"--dataset_root={data}", f"--encoder_output_root={tmp_path}/with", "--device=cpu"]
    flags += ["--num_workers=0", "--linear_epochs=1", "--trials=1", "--knn_k=80"]
    for more, name, top1 in (
        ([], "epoch_0003", log["knn_top1"][-1]),
        (["--encoder=random"], "random", log["knn_top1"][0]),
    ):
        done = run("test", *flags, *more)
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / "eval" / name / "result.json").read_text())
        assert result["knn_top1"] == pytest.approx(top1)


@pytest.mark.parametrize("below", ["", "train"])
def test_a_tenth_of_the_training_images_is_classified_by_the_others(data: Path, below: str) -> None:
    values = {"dataset_root": str(data / below), "knn_every": 1, "arch": "resnet18", "crop": 16}
    values |= {"precision": "fp32", "feature_dim": 8, "num_workers": 0}
    settings = config.from_values(config.TrainSettings, values)
    monitor = Monitor(settings, parallel.OneDevice())
    bank, queries = monitor.bank, monitor.queries
    assert bank.dataset is queries.dataset and len(bank.dataset) == 80
    assert torch.bincount(queries.labels).tolist() == [2] * 4
    assert torch.bincount(bank.labels).tolist() == [18] * 4
    assert not set(bank.indices.tolist()) & set(queries.indices.tolist())
    assert bank.features is None and monitor.images == 80

    encoder = encoders.build_encoder("resnet18", 8)
    top1 = monitor.top1(encoder.state_dict())
    assert top1 == monitor.top1(encoder.state_dict()) and 0 <= top1 <= 100
    assert bank.features.shape == (72, 512) and queries.features.shape == (8, 512)

    settings.knn_images = 20
    few = Monitor(settings, parallel.OneDevice())
    assert (len(few.bank), len(few.queries), few.images) == (20, 5, 25)


def entropy_rank(matrix: torch.Tensor) -> float:
    singular = torch.linalg.svdvals(matrix)
    p = singular / singular.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def potential(keys: torch.Tensor) -> float:
    """The logarithm of the mean of exp(-2 d^2) over pairs of keys (C, n)."""
    return float((-2 * torch.pdist(keys.T).square()).exp().mean().log())


def test_the_log_holds_what_the_keys_of_the_queue_show(tmp_path: Path, data: Path) -> None:
    """The last row against the checkpoint, whose queue holds the keys of the last batch of 16."""
    folder = train(tmp_path / "one", data)
    log, queue = utils.read_csv(folder / "log.csv"), last_state(folder)["module.queue"].double()
    assert log["effective_rank"][-1] == pytest.approx(entropy_rank(queue), rel=1e-3)
    assert log["uniformity"][-1] == pytest.approx(potential(queue), rel=1e-3)
    assert all(0 < a < 4 for a in log["alignment"])

    both = train(tmp_path / "both", data, "--symmetric", "--num_keys=32")
    log, state = utils.read_csv(both / "log.csv"), last_state(both)
    queue = state["module.queue"].double().roll(-int(state["module.queue_ptr"]), 1)
    # the keys of one view alone: pairs of views are no pairs of images
    assert log["uniformity"][-1] == pytest.approx(potential(queue[:, :16]), rel=1e-3)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--knn_every=1", "--knn_root=nowhere"], "--knn_root 'nowhere' is not a folder"),
        (["--knn_root=x"], "needs --knn_every"),
        (["--knn_every=-1"], "--knn_every"),
        (["--knn_every=1", "--knn_images=3"], "--knn_images"),
    ],
)
def test_bad_flags_are_one_line(tmp_path: Path, data: Path, flags: list[str], words: str) -> None:
    output = tmp_path / "out"
    done = run("train", f"--dataset_root={data}", f"--output_root={output}", *TINY, *flags)
    assert one_line(done, words) and not output.exists(), done.stderr


def test_one_class_gives_no_accuracy(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", classes=1, train=40, test=5)
    where = [f"--dataset_root={tmp_path}/data", f"--output_root={tmp_path}/out"]
    assert_one_line_error(run("train", *where, *TINY, "--knn_every=1"), "two classes or more")
    flags = [where[0], "--encoder=random", "--arch=resnet18", "--crop=16", "--device=cpu"]
    flags += [f"--encoder_output_root={tmp_path}", "--num_workers=0", "--linear_lrs=0.1"]
    assert_one_line_error(run("test", *flags), "one class, class0")
