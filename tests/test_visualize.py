"""visualize.py on miniature runs: which results it uses, and what it draws."""

import json
import math
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from evaluation_data import class_folders, fabricated_run
from PIL import Image
from scripts import assert_one_line_error, run

import utils
from evaluation.compare import curves_of
from evaluation.results import Evaluation, read_evaluation
from run import checkpoints

FAST = ["--linear_epochs=2", "--linear_lrs", "0.1", "--knn_k=5", "--trials=2"]
FAST += ["--num_workers=0", "--device=cpu"]
FIGURES = ["accr_model_compare", "embedding", "filters", "loss", "neighbours", "views"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visualize")
    class_folders(folder / "data", seed=0)
    fabricated_run(folder / "output", "M0", epochs=())
    fabricated_run(folder / "output", "M1", epochs=(1,))
    fabricated_run(folder / "output", "M3", epochs=(1, 2))
    return folder


def drawn_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.png"))


def read_table(stdout: str) -> dict[str, list[str]]:
    """The words of each line of the table, by its first."""
    return {line.split()[0]: line.split()[1:] for line in stdout.splitlines() if line.strip()}


def trials_of(folder: Path) -> list[float]:
    return json.loads((folder / "result.json").read_text())["trials"]


def test_figures_of_runs(place: Path) -> None:
    home, output = place / "output" / "IMAGENET-64", f"--encoder_output_root={place}/output"
    data = f"--dataset_root={place}/data"
    early = f"--result_path={place}/early"
    versions = ["--multiple_encoder_exp_version", "M1", "M3"]
    done = run("visualize", output, early, *versions, *FAST)  # nothing is stored yet
    assert_one_line_error(done, "--dataset_root")
    assert not (place / "early").exists()

    assert run("test", output, data, "--encoder_exp_version=M1", *FAST).returncode == 0
    shutil.rmtree(home / "M1" / "eval" / "random")
    stored = (home / "M1" / "eval" / "epoch_0001" / "result.json").stat().st_mtime_ns
    epochs = ["--encoder_exp_version=M3", "--multiple_pretrained_epoch", "1", "2"]
    flags = [output, data, *versions, *epochs, *FAST]
    done = run("visualize", *flags)
    assert done.returncode == 0, done.stderr
    assert "M1, epoch 1: stored" in done.stdout
    assert "M3, epoch 2: evaluating" in done.stdout and "M3, epoch 2: stored" in done.stdout
    assert (home / "M1" / "eval" / "epoch_0001" / "result.json").stat().st_mtime_ns == stored
    files = {path.name for path in (home / "M3" / "eval" / "epoch_0001").iterdir()}
    assert files == {"accuracy.csv", "accuracy.png", "confusion.csv", "confusion.png"} | {
        "linear.pth.tar",
        "result.json",
    }
    assert drawn_in(home / "figures") == ["accr_epoch_compare", *FIGURES]
    for figure in (home / "figures").glob("*.png"):
        with Image.open(figure) as image:
            assert image.width >= 1200
            assert len(image.convert("RGB").resize((400, 200)).getcolors(80000)) > 20
    loss = json.loads((home / "figures" / "data" / "loss.json").read_text())
    assert loss.keys() == {"M0", "M1", "M3"}
    assert all(
        log.keys() == {"step", "loss", "chance", "drops", "label"} for (log,) in loss.values()
    )

    assert "untrained encoders are not shown" in done.stderr
    hint = done.stderr.split("alike by ")[1].splitlines()[0]  # works as printed
    done = run("test", *shlex.split(hint)[2:], "--device=cpu", "--num_workers=0")
    assert done.returncode == 0, done.stderr
    flags += ["--figures", "loss", "accuracy"]
    done = run("visualize", *flags)
    assert done.returncode == 0 and "evaluating" not in done.stdout
    shown = read_table(done.stdout)
    for name, folder in (
        ("M1", "M1/eval/epoch_0001"),
        ("M3", "M3/eval/epoch_0002"),
        ("untrained", "M1/eval/random"),
    ):
        result = json.loads((home / folder / "result.json").read_text())
        assert shown[name][:2] == [f"{result['knn_top1']:.2f}", f"{result['linear_top1']:.2f}"]
    before, after = (float(shown[name][0]) for name in ("untrained", "M3"))
    gain = f"kNN {before:.1f} to {after:.1f} % ({after - before:+.1f} points)"
    assert gain in done.stdout.replace("-0.0", "+0.0")
    one = [output, "--multiple_encoder_exp_version", "M1", *FAST]
    done = run("visualize", data, *one, "--trials=3")
    assert "M1, epoch 1: evaluating" in done.stdout  # more trials than are stored
    assert len(trials_of(home / "M1" / "eval" / "epoch_0001")) == 3
    done = run("visualize", *one)
    assert done.returncode == 0 and "stored" in done.stdout  # no data set is needed


def test_the_loss_needs_no_checkpoint(place: Path, tmp_path: Path) -> None:
    flags = [f"--encoder_output_root={place}/output", "--encoder_exp_version=M0"]  # has none
    done = run("visualize", *flags, f"--result_path={tmp_path}", "--figures", "loss")
    assert done.returncode == 0 and drawn_in(tmp_path) == ["loss"], done.stderr
    assert_one_line_error(
        run("visualize", *flags, "--figures", "filters"), "has no checkpoints yet"
    )


def test_a_result_of_another_measure_or_data_set_or_a_damaged_one_is_not_used(
    tmp_path: Path,
) -> None:
    for part, count in (("one", 8), ("two", 6)):
        class_folders(tmp_path / part / "data", seed=0, per_class=count)
    home = fabricated_run(tmp_path / "output", "M1", epochs=(1,))
    names = [f"--encoder_output_root={tmp_path}/output", "--encoder_exp_version=M1", *FAST]
    one, two = (f"--dataset_root={tmp_path}/{part}/data" for part in ("one", "two"))
    random = ["--encoder=random", "--linear_views=1"]
    assert run("test", *names, one, *random).returncode == 0

    def visualize(*flags: str):
        return run("visualize", *names, "--figures", "accuracy", "loss", *flags)

    def says(word: str, *flags: str) -> None:
        done = visualize(*flags)
        assert done.returncode == 0, done.stderr
        assert f"M1, epoch 1: {word}" in done.stdout
        assert "untrained" not in done.stdout and "untrained" in done.stderr  # measured otherwise

    says("evaluating", one)
    says("stored", one)
    says("evaluating", one, "--no-knn_weighted")
    says("evaluating", one, "--knn_k=3")
    says("evaluating", two, "--knn_k=3")  # of the same name
    (home / "eval" / "epoch_0001" / "result.json").write_text("[1]")
    says("evaluating", one, "--knn_k=3")
    for split in ("train", "test"):
        next((tmp_path / "one/data" / split / "class0").iterdir()).unlink()
        says("evaluating", one, "--knn_k=3")  # of the same path, but of fewer images
        says("stored", one, "--knn_k=3")
    (home / "eval" / "epoch_0001" / "accuracy.csv").write_text("")
    assert_one_line_error(visualize(one, "--knn_k=3"), "no column top1")
    (home / "log.csv").write_text("step,loss\n")
    assert_one_line_error(visualize(one, "--knn_k=3"), "no rows yet")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--multiple_encoder_exp_version", "M1", "M7"], "runs there: M1, M3"),
        (
            ["--encoder_exp_version=M3", "--multiple_pretrained_epoch", "5"],
            "it has epochs 1, 2",
        ),
        (["--encoder_exp_version=M1", "--loss_exp_version", "M8"], "runs with one: M0, M1, M3"),
        (["--encoder_exp_version=M1", "--encoder=random"], "for test.py"),
        (["--encoder_exp_version=M1", "--pretrained=some.pth"], "for test.py"),
        (["--encoder_exp_version=M1", "--dataset_root=nowhere"], "nowhere"),
        (["--encoder_exp_version=M1", "--figures", "losses"], "losses"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    place: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    places = [f"--encoder_output_root={place}/output", f"--dataset_root={place}/data"]
    done = run("visualize", *places, f"--result_path={tmp_path}/img", *FAST, *flags)
    assert_one_line_error(done, words)
    assert not (tmp_path / "img").exists()


def test_under_torchrun_is_one_line_even_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    places = [f"--encoder_output_root={place}/output", f"--dataset_root={place}/data"]
    done = run("visualize", *places, f"--result_path={tmp_path}", "--encoder_exp_version=M1", *FAST)
    assert_one_line_error(done, "one process")


def test_a_run_is_drawn_on_data_of_another_size(place: Path, tmp_path: Path) -> None:
    """A run that stored images smaller than its crop, as of Fashion-MNIST, on folders."""
    home = fabricated_run(tmp_path, "small", epochs=(1, 2))
    for path in (home / "checkpoints").iterdir():
        content = checkpoints.load(path)
        content["config"]["resize"] = 12
        checkpoints.save(path, content)
    log = utils.read_csv(home / "log.csv")
    (home / "config.yaml").unlink()  # its checkpoint says the same
    flags = [f"--encoder_output_root={tmp_path}", f"--dataset_root={place}/data", *FAST]
    flags += ["--encoder_exp_version=small", "--load_pretrained_epoch=1"]
    done = run("visualize", *flags)
    results = tmp_path / "IMAGENET-64" / "figures"
    assert done.returncode == 0 and (results / "views.png").exists(), done.stderr
    (row,) = json.loads((results / "data/versions.json").read_text())["table"]["small"]
    assert row["loss"] == pytest.approx(sum(log["loss"]) / len(log["loss"]), abs=1e-3)


def test_loss_of_the_versions_that_are_named(place: Path, tmp_path: Path) -> None:
    flags = [f"--encoder_output_root={place}/output", f"--result_path={tmp_path}", *FAST]
    flags += ["--encoder_exp_version=M1", "--figures", "loss"]
    for more, versions in (([], ["M0", "M1"]), (["--loss_exp_version", "M3"], ["M3"])):
        assert run("visualize", *flags, *more).returncode == 0
        assert list(json.loads((tmp_path / "data/loss.json").read_text())) == versions


@pytest.fixture(scope="module")
def seed_flags(place: Path) -> list[str]:
    """Two versions with two seeds each, and an untrained encoder evaluated for each seed."""
    output = place / "seeds"
    for version in ("M1", "M3"):
        for seed in (0, 1):  # with other features
            fabricated_run(output, f"{version}-seed{seed}", epochs=(1,), weight=3.0 * seed)
    flags = [f"--encoder_output_root={output}", f"--dataset_root={place}/data", *FAST]
    for seed in (0, 1):
        names = [f"--encoder_exp_version=M1-seed{seed}", "--encoder=random"]
        assert run("test", *flags, *names).returncode == 0
    return [*flags, "--seeds", "0", "1", "--multiple_encoder_exp_version", "M1", "M3"]


def test_versions_with_seeds_and_what_is_redrawn_is_what_was_drawn(
    place: Path, seed_flags: list[str], tmp_path: Path
) -> None:
    results, home = tmp_path / "img", place / "seeds/IMAGENET-64"
    epochs = ["--encoder_exp_version=M3", "--multiple_pretrained_epoch", "1"]
    done = run("visualize", *seed_flags, *epochs, f"--result_path={results}")
    assert done.returncode == 0, done.stderr
    shown = read_table(done.stdout)
    for name, folders in (
        ("M1", "M1-seed{}/eval/epoch_0001"),
        ("M3", "M3-seed{}/eval/epoch_0001"),
        ("untrained", "M1-seed{}/eval/random"),
    ):
        a, b = (
            json.loads((home / folders.format(seed) / "result.json").read_text()) for seed in (0, 1)
        )
        for i, key in ((0, "knn_top1"), (3, "linear_top1")):  # mean, ±, deviation
            assert float(shown[name][i]) == pytest.approx((a[key] + b[key]) / 2, abs=0.011)
            deviation = abs(a[key] - b[key]) / math.sqrt(2)
            assert float(shown[name][i + 2]) == pytest.approx(deviation, abs=0.011)
    data = json.loads((results / "data/versions.json").read_text())
    assert data["spread"] == "seed"
    for seed in (0, 1):  # a row is the mean over that seed's trials
        accuracy = read_evaluation(home / f"M3-seed{seed}/eval/epoch_0001").accuracy
        expected = pytest.approx(accuracy.mean(dim=0).tolist(), abs=1e-3)
        assert data["accuracy"]["M3"][seed] == expected
    assert len(json.loads((results / "data/loss.json").read_text())["M1"]) == 2

    drawn = {path.name: path.read_bytes() for path in results.glob("*.png")}
    assert len(drawn) == 7
    for name in drawn:
        (results / name).unlink()
    done = run("visualize", "--redraw", f"--result_path={results}")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in results.glob("*.png")} == drawn


def test_curves_of_one_run_are_its_trials_and_of_several_the_mean_of_each() -> None:
    def evaluation(trials: int, top: float) -> Evaluation:
        accuracy = top + torch.arange(5) + torch.arange(trials)[:, None] ** 2 / 10
        return Evaluation(Path(), {}, accuracy, torch.zeros(3, 3))

    one, two = evaluation(2, 50.0), evaluation(3, 60.0)
    for curve, expected in zip(curves_of([one]), one.accuracy.tolist(), strict=True):
        assert curve == pytest.approx(expected)
    means = [each.accuracy.mean(dim=0).tolist() for each in (one, two)]
    for curve, expected in zip(curves_of([one, two]), means, strict=True):
        assert curve == pytest.approx(expected, abs=1e-4)


def test_only_the_figures_that_are_asked_for(place: Path, tmp_path: Path) -> None:
    flags = [f"--encoder_output_root={place}/output", "--encoder_exp_version=M3", *FAST]
    results = f"--result_path={tmp_path}"
    done = run("visualize", *flags, results, "--figures", "loss", "filters")
    assert done.returncode == 0, done.stderr
    assert drawn_in(tmp_path) == ["filters", "loss"]
    done = run("visualize", *flags, results, "--figures", "views", "loss")
    assert_one_line_error(done, "--dataset_root is missing")
    done = run("visualize", "--redraw", f"--result_path={tmp_path}/none")
    assert_one_line_error(done, "--redraw finds nothing")


def test_damaged_data_are_said_when_figures_are_redrawn(place: Path, tmp_path: Path) -> None:
    flags = [f"--encoder_output_root={place}/output", "--encoder_exp_version=M3", *FAST]
    results = f"--result_path={tmp_path}"
    assert run("visualize", *flags, results, "--figures", "loss", "filters").returncode == 0
    for content in (b"PK", b"", b"some text"):
        (tmp_path / "data" / "filters.npz").write_bytes(content)
        assert_one_line_error(
            run("visualize", "--redraw", results), "filters.npz' is missing or damaged"
        )
    done = run("visualize", "--redraw", results, "--figures", "loss")
    assert done.returncode == 0, done.stderr
    (tmp_path / "data" / "filters.npz").unlink()
    for content in ("{", "{}", "[]", "\xff"):
        (tmp_path / "data" / "loss.json").write_text(content, encoding="latin-1")
        assert_one_line_error(
            run("visualize", "--redraw", results), "loss.json' is missing or damaged"
        )


def test_without_scikit_learn_the_map_is_left_out_and_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    flags = [f"--encoder_output_root={place}/output", f"--dataset_root={place}/data", *FAST]
    flags += ["--encoder_exp_version=M3", f"--result_path={tmp_path}"]
    done = run("visualize", *flags)
    assert done.returncode == 0 and drawn_in(tmp_path) == [n for n in FIGURES if n != "embedding"]
    assert "embedding.png is left out" in done.stderr and "earlier call" not in done.stderr
    (tmp_path / "embedding.png").write_bytes(b"")
    done = run("visualize", *flags)
    assert f"embedding.png in {tmp_path} is of an earlier call" in done.stderr
    done = run("visualize", *flags, "--figures", "embedding")
    assert_one_line_error(done, "pip install scikit-learn")
    assert run("visualize", *flags, "--figures", "neighbours").returncode == 0
