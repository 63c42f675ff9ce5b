"""test.py on a miniature run."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation_data import ROOT, class_folders, fabricated_run, one_line
from scripts import assert_one_line_error, run

import config
import model
import utils
from evaluation.subject import load_subject
from run import checkpoints, compute

FAST = ["--linear_epochs=3", "--linear_lrs", "0.01", "0.1", "--trials=2", "--knn_k=5"]
FAST += ["--num_workers=0", "--device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ and other/ (the same with other images), and a run IMAGENET-64/v1 of two epochs."""
    folder = tmp_path_factory.mktemp("evaluation")
    class_folders(folder / "data", seed=0)
    class_folders(folder / "other", seed=1)
    fabricated_run(folder / "output", "v1", epochs=(1, 2))
    return folder


def flags_of(place: Path, output: str = "output", data: str = "data") -> list[str]:
    return [f"--encoder_output_root={place / output}", f"--dataset_root={place / data}", *FAST]


def test_results_of_a_run(place: Path) -> None:
    home = place / "output" / "IMAGENET-64" / "v1" / "eval"
    done = run("test", *flags_of(place), "--load_pretrained_epoch=1")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (home / "epoch_0001").iterdir()) == [
        "accuracy.csv",
        "accuracy.png",
        "confusion.csv",
        "confusion.png",
        "linear.pth.tar",
        "result.json",
    ]
    before = (home / "epoch_0001" / "result.json").read_text()
    result = json.loads(before)
    expected = {"epoch": 1, "protocol": "cached", "dataset": "data", "crop": 16, "knn_k": 5}
    expected |= {"train_images": 24, "test_images": 12}
    assert {name: result[name] for name in expected} == expected
    assert result["checkpoint"].endswith("epoch_0001.pth.tar") and result["provenance"]["torch"]
    table = utils.read_csv(home / "epoch_0001" / "accuracy.csv")
    assert list(table) == ["epoch", "trial", "top1"] and table["epoch"] == [1, 2, 3] * 2
    assert table["trial"] == [1] * 3 + [2] * 3
    assert [table["top1"][2], table["top1"][5]] == pytest.approx(result["trials"], abs=1e-3)
    linear = torch.load(home / "epoch_0001" / "linear.pth.tar", weights_only=True)
    assert linear["weight"].shape == (2, 3, 512) and linear["bias"].shape == (2, 3)
    for name in ("linear_top1", "knn_top1"):
        assert f"{result[name]:.2f}" in done.stdout

    # another data set goes elsewhere; the last checkpoint is the default
    other = flags_of(place, data="other")
    assert run("test", *other, "--load_pretrained_epoch=1").returncode == 0
    assert (home / "epoch_0001-other-cached" / "result.json").exists()
    for more in ([], ["--no-knn_weighted"]):
        assert run("test", *flags_of(place), *more).returncode == 0
    assert json.loads((home / "epoch_0002" / "result.json").read_text())["knn_weighted"] is False
    assert json.loads((home / "random" / "result.json").read_text())["checkpoint"] is None
    assert (home / "epoch_0001" / "result.json").read_text() == before


def test_a_checkpoint_file(place: Path) -> None:
    checkpoint = place / "output" / "IMAGENET-64" / "v1" / "checkpoints" / "epoch_0001.pth.tar"
    file = place / "elsewhere" / "mine.pth.tar"
    (file.parent / "b").mkdir(parents=True)
    file.write_bytes(checkpoint.read_bytes())
    flags = flags_of(place, output="elsewhere/output")
    done = run("test", *flags, f"--pretrained={file}")
    assert done.returncode == 0, done.stderr
    results = place / "elsewhere" / "output" / "eval"
    assert [path.name for path in results.iterdir()] == ["IMAGENET-64-v1-epoch_0001"]
    done = run("test", *flags, f"--pretrained={file.rename(file.parent / 'b' / file.name)}")
    assert one_line(done, "holds the result of"), done.stderr


def test_last_checkpoints_of_two_runs_have_two_results(place: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fabricated_run(tmp_path, name, epochs=(1,))
        file = tmp_path / "IMAGENET-64" / name / "checkpoints" / "last.pth.tar"
        flags = [*flags_of(place), f"--encoder_output_root={tmp_path}", f"--pretrained={file}"]
        done = run("test", *flags)
        assert done.returncode == 0, done.stderr
    content = checkpoints.load(file)
    content["config"]["exp_version"] = "../../up"  # a stranger's file names no other folder
    checkpoints.save(file, content)
    assert run("test", *flags).returncode == 0
    results = sorted(path.name for path in (tmp_path / "eval").iterdir())
    expected = ["IMAGENET-64-.._.._up", "IMAGENET-64-a", "IMAGENET-64-b"]
    assert results == [f"{name}-epoch_0001" for name in expected]


def test_untrained_encoder_without_a_run(place: Path) -> None:
    done = run("test", *flags_of(place, output="none"), "--encoder=random", "--crop=16")
    assert_one_line_error(done, "none/IMAGENET-64/v1", "--arch")
    more = ["--encoder=random", "--arch=resnet18", "--crop=16", "--knn_k=200"]
    done = run("test", *flags_of(place, output="none"), *more)
    assert done.returncode == 0, done.stderr
    assert "--knn_k 200 is more than the 24 training images" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    folder = place / "none" / "IMAGENET-64" / "v1" / "eval" / "random"
    result = json.loads((folder / "result.json").read_text())
    assert (result["knn_k"], result["arch"], result["encoder"]) == (24, "resnet18", "random")


def test_untrained_encoder_is_the_one_that_the_run_started_from(place: Path) -> None:
    settings = config.from_values(
        config.TestSettings, {"encoder_output_root": str(place / "output"), "encoder": "random"}
    )
    encoder = load_subject(settings).encoder
    # as train.py with the seed of the fabricated run
    torch.manual_seed(utils.generator(7, "weights").initial_seed())
    moco = model.MoCo("resnet18", 8, 16)
    assert torch.equal(encoder.conv1.weight, moco.encoder_q.conv1.weight)


def test_a_checkpoint_between_epochs_has_a_folder_of_its_own(place: Path) -> None:
    """And what a result replaces is said."""
    folder = place / "output" / "IMAGENET-64" / "v1" / "checkpoints"
    content = checkpoints.load(folder / "epoch_0002.pth.tar")
    between = content | {"step": 263, "images": 100 * 256}  # 100 steps an epoch
    run_folder = place / "between" / "IMAGENET-64" / "v1"
    checkpoints.save(run_folder / "checkpoints" / "last.pth.tar", between)
    done = run("test", *flags_of(place, output="between"))
    assert done.returncode == 0, done.stderr
    assert (run_folder / "eval" / "step_000263" / "result.json").exists()
    assert "replaces" not in done.stdout
    done = run("test", *flags_of(place, output="between"), "--seed=3")
    assert "replaces the result" in done.stdout and "seed 0 -> 3" in done.stdout


def test_the_untrained_column_is_of_the_encoder_from_which_the_run_started(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", seed=0, per_class=4)
    flags = flags_of(tmp_path)
    folder = fabricated_run(tmp_path / "output", "v1", epochs=(1,))  # its seed is 7
    header = "top-1 (%)         untrained   cached"
    file, last = folder / "eval/random/result.json", folder / "checkpoints" / "last.pth.tar"
    content = checkpoints.load(last)
    seen = []
    for more, seed in ([], 7), (["--precision=bf16"], 7), ([], 8):  # 8: trained anew
        checkpoints.save(last, content | {"config": content["config"] | {"seed": seed}})
        done = run("test", *flags, *more)
        untrained = json.loads(file.read_text())
        assert f"{untrained['knn_top1']:>9.2f}" in done.stdout.split(header)[1]
        seen.append((untrained["precision"], untrained["first_weights"]["seed"]))
        measured = file.read_bytes()
        assert run("test", *flags, *more).returncode == 0  # what is measured is not measured again
        assert file.read_bytes() == measured
    assert seen == [("fp32", 7), ("bf16", 7), ("fp32", 8)]
    for name in ("random_moco", "other"):  # files from elsewhere, one of which is called so
        file = {name: content[name] for name in ("state_dict", "config")}
        torch.save(file, tmp_path / f"{name}.pth")
        assert header not in run("test", *flags, f"--pretrained={tmp_path}/{name}.pth").stdout


def test_the_result_says_what_was_computed_not_what_was_given(place: Path) -> None:
    run("test", *flags_of(place), "--precision=auto")
    folder = place / "output" / "IMAGENET-64" / "v1" / "eval" / "epoch_0002"
    result = json.loads((folder / "result.json").read_text())
    assert result["precision"] == compute.pick_precision("auto", torch.device("cpu"))


def test_a_run_whose_settings_are_not_valid_is_not_taken_for_a_foreign_file(tmp_path: Path) -> None:
    last = fabricated_run(tmp_path, "v1", epochs=(1,)) / "checkpoints" / "last.pth.tar"
    content = checkpoints.load(last)
    checkpoints.save(last, content | {"config": content["config"] | {"batch_size": 0}})
    done = run("test", f"--encoder_output_root={tmp_path}", "--dataset_root=shapes", *FAST)
    assert one_line(done, "has settings that are not valid: --batch_size"), done.stderr
    del content["config"]
    checkpoints.save(last, content)
    settings = config.from_values(config.TestSettings, {"encoder_output_root": str(tmp_path)})
    assert "does not say its settings: crop 224 px" in load_subject(settings).found


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--load_pretrained_epoch=9"], "it has epochs 1, 2"),
        (["--encoder_exp_version=M9"], "runs there: v1"),
        (["--arch=resnet50"], "those of a resnet18, not of a resnet50"),
        (["--encoder=random", "--pretrained=x.pth"], "contradict each other"),
        (["--pretrained=missing.pth"], "missing.pth"),
        (["--dataset_root=nowhere"], "nowhere"),
        (["--knn_k=0"], "knn_k"),
        (["--linear_epoch=3"], "did you mean --linear_epochs"),
        (["--dataset_root=null"], "--dataset_root is missing"),
    ],
)
def test_bad_input_is_one_line(place: Path, flags: list[str], words: str) -> None:
    done = run("test", *flags_of(place), *flags)
    assert one_line(done, words), done.stderr


def test_the_command_itself(place: Path) -> None:
    output = f"--encoder_output_root={place}/output"
    command = [sys.executable, str(ROOT / "test.py"), output, "--load_pretrained_epoch=9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert one_line(done, "it has epochs 1, 2") and not done.stdout


def test_a_run_that_diverged_is_said(place: Path) -> None:
    fabricated_run(place / "diverged", "v1", epochs=(1,), weight=float("nan"))
    done = run("test", *flags_of(place, output="diverged"))
    assert one_line(done, "not finite"), done.stderr
    assert not (place / "diverged" / "IMAGENET-64" / "v1" / "eval").exists()


def test_classes_that_train_has_not_are_one_line(place: Path, tmp_path: Path) -> None:
    class_folders(tmp_path, seed=0, per_class=4)
    (tmp_path / "test" / "class2").rename(tmp_path / "test" / "other")
    done = run("test", *flags_of(place), f"--dataset_root={tmp_path}")
    assert one_line(done, "has classes of which train/ has no images: other"), done.stderr


def test_a_class_without_test_images_is_none(place: Path, tmp_path: Path) -> None:
    """From the folder to the report: the other classes are measured."""
    class_folders(tmp_path / "data", seed=0, per_class=4)
    shutil.rmtree(tmp_path / "data" / "test" / "class1")
    fabricated_run(tmp_path / "output", "v1", epochs=(1,))
    flags = flags_of(tmp_path)
    done = run("test", *flags)
    assert done.returncode == 0 and "which go untested: class1" in done.stderr, done.stderr
    (result,) = tmp_path.glob("output/*/*/eval/epoch_*/result.json")
    per_class = json.loads(result.read_text())["per_class_top1"]
    assert per_class[1] is None and None not in (per_class[0], per_class[2])
    drawn = run("visualize", *flags, "--report", f"--result_path={tmp_path / 'figures'}")
    assert drawn.returncode == 0, drawn.stderr


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """Of the data set and of a class, through to the figures and the report."""
    place = tmp_path / os.fsdecode(b"d\xff")
    class_folders(place / "data", seed=0)
    fabricated_run(place / "output", "v1", epochs=(1,))
    for split in ("train", "test"):
        folder = place / "data" / split
        (folder / "class1").rename(folder / os.fsdecode(b"cl\xe9"))
    done = run("test", *flags_of(place))
    assert done.returncode == 0, done.stderr
    (path,) = place.glob("output/*/*/eval/epoch_0001/result.json")
    assert json.loads(path.read_text())["class_names"] == ["class0", "class2", "cl\\xe9"]
    done = run("visualize", *flags_of(place), "--report", f"--result_path={place}/figures")
    assert done.returncode == 0 and (place / "figures" / "report.html").exists(), done.stderr


def test_a_protocol_that_takes_long_names_the_command_of_the_untrained_encoder(place: Path) -> None:
    """The command works as printed, and its result is then shown."""
    flags = [*flags_of(place), "--finetune", "--linear_epochs=1", "--linear_lrs", "0.01"]
    done = run("test", *flags)
    assert done.returncode == 0 and "untrained  " not in done.stdout, done.stderr
    command = done.stdout.split("of the untrained encoder: python test.py ")[1].splitlines()[0]
    assert run("test", *shlex.split(command), "--num_workers=0", "--device=cpu").returncode == 0
    assert "untrained   finetune" in run("test", *flags).stdout


def test_a_training_that_did_harm_is_said(tmp_path: Path) -> None:
    """The weights of a constant encoder: both accuracies are those of chance."""
    class_folders(tmp_path / "data", seed=0)
    last = fabricated_run(tmp_path / "output", "v1", epochs=(1,)) / "checkpoints" / "last.pth.tar"
    content = checkpoints.load(last)
    ruined = {
        name: torch.zeros_like(value) if "encoder_q" in name else value
        for name, value in content["state_dict"].items()
    }
    checkpoints.save(last, content | {"state_dict": ruined})
    done = run("test", *flags_of(tmp_path))
    assert done.returncode == 0, done.stderr
    for name in ("kNN", "linear"):
        assert f"warning: {name}: the trained encoder (" in done.stderr
