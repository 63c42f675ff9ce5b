"""The figures show the data that they are given; visualize.py on miniature runs."""

import json
import math
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluation_data import class_folders, fabricated_run, one_line
from scripts import run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import visualize


def log(rows: int, start: float = 9.0, num_keys: int = 4096) -> dict:
    return {"step": [20.0 * (i + 1) for i in range(rows)], "loss": [start - 0.001 * i for i in range(rows)], "chance": math.log(num_keys + 1)}


def curves(trials: int = 3, epochs: int = 5, top: float = 70.0) -> torch.Tensor:
    return top + torch.arange(epochs) + torch.arange(trials)[:, None] ** 2 / 10


def lines_of(axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def no_overlap(figure: Figure) -> None:
    """Titles, axis labels, tick labels and legends keep clear of each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [figure._suptitle] if figure._suptitle else []
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]  # those beyond are not drawn
        texts += [axes.title, axes._right_title, axes.xaxis.label, axes.yaxis.label, *ticks, *axes.get_yticklabels()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text() and text.get_visible()]
    shown = [(name, box) for name, box in boxes if box.width > 0]
    shown += [("legend", legend.get_window_extent(renderer)) for legend in figure.legends]
    for (a, box_a), (b, box_b) in combinations(shown, 2):
        assert not (box_a.x0 < box_b.x1 and box_b.x0 < box_a.x1 and box_a.y0 < box_b.y1 and box_b.y0 < box_a.y1), (a, b)


def test_loss_panels() -> None:
    logs = {f"M{i}": log(50, start=9 - i) for i in range(4)}
    figure = visualize.loss_figure(logs)
    assert [axes.get_title() for axes in figure.axes] == ["M0", "M1", "M2", "M3"]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    for axes, (version, data) in zip(figure.axes, logs.items()):
        loss, chance = axes.get_lines()
        assert list(loss.get_ydata()) == data["loss"] and list(loss.get_xdata()) == data["step"]
        assert to_hex(loss.get_color()).upper() == visualize.COLOURS[version]
        assert set(chance.get_ydata()) == {math.log(4097)} and "8.32" in chance.get_label()
        assert "step" in axes.get_xlabel()
    assert "loss" in figure.axes[0].get_ylabel()
    no_overlap(figure)


def test_long_loss_is_shown_with_its_running_mean_in_thousands() -> None:
    data = log(1000)
    figure = visualize.loss_figure({"v1": data})
    raw, mean = figure.axes[0].get_lines()[:2]
    assert list(raw.get_ydata()) == data["loss"] and max(raw.get_xdata()) == 20.0 and raw.get_alpha() < 0.5
    assert mean.get_ydata()[500] == pytest.approx(data["loss"][500]) and "thousands" in figure.axes[0].get_xlabel()
    no_overlap(figure)


def test_loss_of_many_runs_and_without_chance() -> None:
    figure = visualize.loss_figure({f"run{i}": {"step": [1.0], "loss": [3.0]} for i in range(6)})
    assert len(figure.axes) == 6 and not figure.legends
    no_overlap(figure)


def test_running_mean_by_hand() -> None:
    assert visualize.running_mean([0.0, 3.0, 6.0, 0.0], 1) == [1.5, 3.0, 3.0, 3.0]
    assert visualize.running_mean([5.0], 3) == [5.0]


def test_accuracy_by_version() -> None:
    data = {"M1": curves(), "M3": curves(top=75.0)}
    figure = visualize.accuracy_by_version_figure(data, random=curves(top=40.0), dataset="stl10")
    axes = figure.axes[0]
    shown = lines_of(axes)
    for label, values in zip(shown, [*data.values(), curves(top=40.0)]):
        assert shown[label] == pytest.approx(values.mean(0).tolist())
        assert f"{values[:, -1].mean():.1f} ± {values[:, -1].std():.1f} %" in label
    assert [label.split(":")[0] for label in shown] == ["M1", "M3", "untrained"]
    assert [to_hex(line.get_color()).upper() for line in axes.get_lines()[:2]] == [visualize.COLOURS["M1"], visualize.COLOURS["M3"]]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    mean, std = data["M1"].mean(0), data["M1"].std(0)
    assert band.min() == pytest.approx(float((mean - std).min())) and band.max() == pytest.approx(float((mean + std).max()))
    assert "%" in axes.get_ylabel() and "stl10" in axes.get_ylabel() and "3 trials" in axes.get_title(loc="right")
    no_overlap(figure)


def test_one_trial_has_no_spread() -> None:
    figure = visualize.accuracy_by_version_figure({"a": curves(trials=1), "b": curves(trials=1, epochs=1)})
    assert list(lines_of(figure.axes[0])) == ["a: 74.0 %", "b: 70.0 %"]
    assert figure.axes[0].get_title(loc="right") == "one trial"
    colours = {line.get_color() for line in figure.axes[0].get_lines()}
    assert len(colours) == 2 and not colours & set(visualize.COLOURS.values())


def test_accuracy_by_epoch() -> None:
    data = {60: curves(top=72.0), 20: curves(), 40: curves(top=71.0)}
    figure = visualize.accuracy_by_epoch_figure(data, "M3 on stl10")
    left, right = figure.axes
    assert list(left.get_lines()[0].get_xdata()) == [20, 40, 60]
    assert list(left.get_lines()[0].get_ydata()) == pytest.approx([float(data[e][:, -1].mean()) for e in (20, 40, 60)])
    assert [sorted(points.get_offsets()[:, 1].tolist()) for points in left.collections] == \
        [pytest.approx(sorted(data[e][:, -1].tolist())) for e in (20, 40, 60)]
    assert [label.split(":")[0] for label in lines_of(right)] == ["20", "40", "60"]
    assert list(lines_of(right).values())[1] == pytest.approx(data[40].mean(0).tolist())
    no_overlap(figure)
    no_overlap(visualize.accuracy_by_epoch_figure({20 * i: curves() for i in range(1, 11)}, "v1 on stl10"))


def test_accuracy_of_one_evaluation() -> None:
    result = {"linear_top1": 74.2, "knn_top1": 61.0, "knn_k": 200, "encoder": "trained", "epoch": 100, "arch": "resnet50", "dataset": "stl10"}
    figure = visualize.accuracy_figure(curves(), result)
    lines = figure.axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines[:3]] == [pytest.approx(curve) for curve in curves().tolist()]
    assert set(lines[3].get_ydata()) == {61.0}
    assert figure.axes[0].get_title() == "resnet50, epoch 100, on stl10"
    no_overlap(figure)


# ----------------------------------------------------------------------------------------------------------- visualize.py, in small

FAST = ["--linear_epochs", "2", "--linear_lrs", "0.1", "--knn_k", "5", "--num_workers", "0", "--device", "cpu", "--trials", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visualize")
    class_folders(folder / "data", seed=0)
    fabricated_run(folder / "output", "M0", epochs=())
    fabricated_run(folder / "output", "M1", epochs=(1,))
    fabricated_run(folder / "output", "M3", epochs=(1, 2))
    return folder


def test_figures_of_runs(place: Path) -> None:
    home, output = place / "output" / "IMAGENET-64", f"--encoder_output_root={place}/output"
    data = f"--dataset_root={place}/data"
    done = run("visualize.py", output, f"--result_path={place}/early", "--multiple_encoder_exp_version", "M1", "M3", *FAST)
    assert one_line(done, "--dataset_root") and not (place / "early").exists()  # nothing is stored yet

    assert run("test.py", output, data, "--encoder_exp_version=M1", *FAST).returncode == 0
    stored = (home / "M1" / "eval" / "epoch_0001" / "result.json").stat().st_mtime_ns
    flags = [output, data, f"--result_path={place}/img", "--multiple_encoder_exp_version", "M1", "M3",
             "--encoder_exp_version=M3", "--multiple_pretrained_epoch", "1", "2", *FAST]
    done = run("visualize.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "M1, epoch 1: stored" in done.stdout and "M3, epoch 2: evaluating" in done.stdout and "M3, epoch 2: stored" in done.stdout
    assert (home / "M1" / "eval" / "epoch_0001" / "result.json").stat().st_mtime_ns == stored
    assert sorted(p.name for p in (home / "M3" / "eval" / "epoch_0001").iterdir()) == ["accuracy.csv", "accuracy.png", "linear.pth.tar", "result.json"]
    assert sorted(p.name for p in (place / "img").iterdir()) == ["accr_epoch_compare.png", "accr_model_compare.png", "loss.png"]
    for figure in (place / "img").iterdir():
        with Image.open(figure) as image:
            assert image.width >= 1200
            assert len(image.convert("RGB").resize((400, 200)).getcolors(80000)) > 20

    assert run("test.py", output, data, "--encoder_exp_version=M3", "--encoder=random", *FAST).returncode == 0
    done = run("visualize.py", *flags)
    assert done.returncode == 0 and "evaluating" not in done.stdout
    shown = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    for name, folder in (("M1", "M1/eval/epoch_0001"), ("M3", "M3/eval/epoch_0002"), ("untrained", "M3/eval/random")):
        result = json.loads((home / folder / "result.json").read_text())
        assert shown[name][-2:] == [f"{result['knn_top1']:.2f}", f"{result['linear_top1']:.2f}"]
    done = run("visualize.py", *flags, "--trials=3", "--multiple_encoder_exp_version", "M1", "--multiple_pretrained_epoch", "none")
    assert "M1, epoch 1: evaluating" in done.stdout  # more trials than are stored
    assert len(json.loads((home / "M1" / "eval" / "epoch_0001" / "result.json").read_text())["trials"]) == 3
    done = run("visualize.py", output, f"--result_path={place}/img", "--multiple_encoder_exp_version", "M1", *FAST)
    assert done.returncode == 0 and "stored" in done.stdout  # no data set is needed


def test_a_result_of_another_measure_or_data_set_or_a_damaged_one_is_not_reused(tmp_path: Path) -> None:
    for part in ("one", "two"):
        class_folders(tmp_path / part / "data", seed=0, per_class=8 if part == "one" else 6)
    home = fabricated_run(tmp_path / "output", "M1", epochs=(1,))
    flags = [f"--encoder_output_root={tmp_path}/output", f"--result_path={tmp_path}/img", "--encoder_exp_version=M1", *FAST]
    assert run("test.py", *flags[:1], *flags[2:], f"--dataset_root={tmp_path}/one/data", "--encoder=random", "--no-linear_mirror").returncode == 0

    def says(word: str, *more: str) -> None:
        done = run("visualize.py", *flags, *more)
        assert done.returncode == 0 and f"M1, epoch 1: {word}" in done.stdout and "untrained" not in done.stdout, (done.stdout, done.stderr)
    one = f"--dataset_root={tmp_path}/one/data"
    says("evaluating", one)
    says("stored", one)
    says("evaluating", one, "--no-knn_weighted")
    says("evaluating", one, "--knn_k=3")
    says("evaluating", f"--dataset_root={tmp_path}/two/data", "--knn_k=3")  # of the same name
    (home / "eval" / "epoch_0001" / "result.json").write_text("[1]")
    says("evaluating", one, "--knn_k=3")
    (home / "eval" / "epoch_0001" / "accuracy.csv").write_text("")
    assert one_line(run("visualize.py", *flags, one, "--knn_k=3"), "no column trial")
    (home / "log.csv").write_text("step,loss\n")
    assert one_line(run("visualize.py", *flags, one, "--knn_k=3"), "no rows yet")


@pytest.mark.parametrize("flags, words", [
    (["--multiple_encoder_exp_version", "M1", "M7"], "runs there: M1, M3"),
    (["--multiple_encoder_exp_version", "M1"] + ["--multiple_pretrained_epoch", "5", "--encoder_exp_version=M3"], "it has epochs 1, 2"),
    (["--encoder_exp_version=M1", "--loss_exp_version", "M8"], "runs with one: M0, M1, M3"),
    (["--encoder_exp_version=M1", "--encoder=random"], "for test.py"),
    (["--encoder_exp_version=M1", "--dataset_root=nowhere"], "nowhere"),
])
def test_bad_input_is_one_line_before_any_work(place: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    done = run("visualize.py", f"--encoder_output_root={place}/output", f"--dataset_root={place}/data", f"--result_path={tmp_path}/img", *FAST, *flags)
    assert one_line(done, words), done.stderr
    assert not (tmp_path / "img").exists()


def test_loss_versions(place: Path) -> None:
    root = place / "output" / "IMAGENET-64"
    chosen = visualize.loss_runs(SimpleNamespace(loss_exp_version=["auto"]), {"M1": root / "M1", "M3": root / "M3"})
    assert list(chosen) == ["M0", "M1", "M3"]
    assert list(visualize.loss_runs(SimpleNamespace(loss_exp_version=["M3"]), {"M1": root / "M1"})) == ["M3"]
    log = visualize.read_loss(root / "M3")
    assert log["chance"] == math.log(17) and log["step"][:2] == [5.0, 10.0]
