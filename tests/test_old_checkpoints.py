"""Files of the code before it was rebuilt (tests/old) still serve, with the same numbers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature import write_folders
from scripts import run

import encoders
from run import checkpoints
from utils import read_csv, read_json

OLD = Path(__file__).with_name("old")
STEPS = {"v1": 5, "v2": 7, "small_stem": 9}  # when the runs were stopped; they end at step 12
LOSSES = {  # from there to the end, as the old code went on: step -> loss
    "v1": {6: 6.664527893, 8: 4.070710182, 10: 2.814270258, 12: 2.816435099},
    "v2": {8: 1.952014685, 10: 2.830944061, 12: 2.830965281},
    "small_stem": {10: 3.430703163, 12: 2.513822556},
}


def unfold(content: Any) -> Any:
    """A copy in which no two numbers share their memory, as in a file that was not made small."""
    if isinstance(content, torch.Tensor):
        return content.clone(memory_format=torch.contiguous_format)
    if isinstance(content, dict):
        return {name: unfold(value) for name, value in content.items()}
    if isinstance(content, list):
        return [unfold(value) for value in content]
    return content


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the old runs, and the images that they were trained on."""
    root = tmp_path_factory.mktemp("old")
    write_folders(root / "data")
    for name in STEPS:
        folder = root / "output" / "IMAGENET-64" / name
        shutil.copytree(OLD / name, folder, ignore=shutil.ignore_patterns("eval"))
        path = folder / "checkpoints" / "last.pth.tar"
        torch.save(unfold(torch.load(path, weights_only=True)), path)
    return root


@pytest.mark.parametrize("name", STEPS)
def test_an_old_checkpoint_holds_what_it_says(name: str) -> None:
    loaded = encoders.load(OLD / name / "checkpoints" / "last.pth.tar")
    assert (loaded.arch, loaded.feature_dim) == ("resnet18", 8)
    assert (loaded.mlp, loaded.small_stem) == (name == "v2", name == "small_stem")
    settings = loaded.settings
    assert (settings.crop, settings.resize, settings.num_keys, settings.bn_groups) == (
        16,
        32,
        16,
        2,
    )
    assert (settings.cosine, settings.symmetric, settings.aug_plus) == (name == "v2",) * 3
    assert loaded.checkpoint["step"] == STEPS[name] and loaded.checkpoint["images"] == 24


@pytest.mark.parametrize("name", STEPS)
def test_an_old_checkpoint_is_exported(name: str, tmp_path: Path) -> None:
    path = OLD / name / "checkpoints" / "last.pth.tar"
    done = run("export", path, tmp_path / "out.pth", "--format=torchvision")
    assert done.returncode == 0, done.stderr
    weights = torch.load(path, weights_only=True)["state_dict"]
    for key, value in torch.load(tmp_path / "out.pth", weights_only=True).items():
        assert torch.equal(value, weights[f"module.encoder_q.{key}"])


@pytest.mark.parametrize("name", STEPS)
def test_an_old_checkpoint_is_evaluated(name: str, place: Path) -> None:
    done = run(
        "test",
        f"--encoder_output_root={place}/output",
        f"--encoder_exp_version={name}",
        f"--dataset_root={place}/data",
        *["--linear_epochs=2", "--trials=1", "--knn_k=5", "--num_workers=0", "--device=cpu"],
    )
    assert done.returncode == 0, done.stderr
    (result,) = (place / "output" / "IMAGENET-64" / name / "eval").glob("[!r]*/result.json")
    assert read_json(result)["step"] == STEPS[name]


@pytest.mark.parametrize("name", STEPS)
def test_an_old_run_is_continued(name: str, place: Path) -> None:
    folder = place / "output" / "IMAGENET-64" / name
    done = run(
        "train",
        f"--config={folder}/config.yaml",
        f"--output_root={place}/output",
        f"--dataset_root={place}/data",
        "--resume",
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {STEPS[name]}" in done.stdout
    checkpoint = checkpoints.load(folder / "checkpoints" / "last.pth.tar")
    assert (checkpoint["epoch"], checkpoint["step"]) == (4, 12)
    old, log = read_csv(OLD / name / "log.csv"), read_csv(folder / "log.csv")
    kept = len(old["step"])
    assert log["step"] == old["step"] + list(LOSSES[name]) and log["loss"][:kept] == old["loss"]
    assert log["loss"][kept:] == pytest.approx(list(LOSSES[name].values()), rel=1e-2)


def test_old_classifiers_are_read() -> None:
    for folder in ("step_000005", "step_000005-data-finetune"):
        content = torch.load(OLD / "v1" / "eval" / folder / "linear.pth.tar", weights_only=True)
        assert content["weight"].shape == (2, 3, 512) and content["bias"].shape == (2, 3)
        assert content["classes"] == ["class0", "class1", "class2"]
        assert (content["arch"], content["epoch"], content["dataset"]) == ("resnet18", 1, "data")
    assert len(content["encoders"]) == 2
    for state in content["encoders"]:
        encoder = encoders.remove_head(encoders.build_encoder("resnet18"))
        encoder.load_state_dict(state)
