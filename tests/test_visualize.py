"""The figures show the data that they are given; visualize.py on miniature runs."""

import json
import math
import sys
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

import utils
import visualize


def log(rows: int, start: float = 9.0, num_keys: int = 4096) -> dict:
    return {
        "step": [20.0 * (i + 1) for i in range(rows)],
        "loss": [start - 0.001 * i for i in range(rows)],
        "chance": math.log(num_keys + 1),
    }


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
        ticks = [
            label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high
        ]  # those beyond are not drawn
        texts += [
            axes.title,
            axes._right_title,
            axes.xaxis.label,
            axes.yaxis.label,
            *ticks,
            *axes.get_yticklabels(),
        ]
    boxes = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts
        if text.get_text() and text.get_visible()
    ]
    shown = [(name, box) for name, box in boxes if box.width > 0]
    shown += [("legend", legend.get_window_extent(renderer)) for legend in figure.legends]
    for (a, box_a), (b, box_b) in combinations(shown, 2):
        assert not (
            box_a.x0 < box_b.x1
            and box_b.x0 < box_a.x1
            and box_a.y0 < box_b.y1
            and box_b.y0 < box_a.y1
        ), (a, b)


def test_loss_panels() -> None:
    logs = {f"M{i}": log(50, start=9 - i) for i in range(4)}
    figure = visualize.loss_figure({version: [data] for version, data in logs.items()})
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
    figure = visualize.loss_figure({"v1": [data]})
    raw, mean = figure.axes[0].get_lines()[:2]
    assert (
        list(raw.get_ydata()) == data["loss"]
        and max(raw.get_xdata()) == 20.0
        and raw.get_alpha() < 0.5
    )
    assert (
        mean.get_ydata()[500] == pytest.approx(data["loss"][500])
        and "thousands" in figure.axes[0].get_xlabel()
    )
    no_overlap(figure)


def test_loss_of_many_runs_and_without_chance() -> None:
    figure = visualize.loss_figure({f"run{i}": [{"step": [1.0], "loss": [3.0]}] for i in range(6)})
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
    assert [to_hex(line.get_color()).upper() for line in axes.get_lines()[:2]] == [
        visualize.COLOURS["M1"],
        visualize.COLOURS["M3"],
    ]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    mean, std = data["M1"].mean(0), data["M1"].std(0)
    assert band.min() == pytest.approx(float((mean - std).min())) and band.max() == pytest.approx(
        float((mean + std).max())
    )
    assert (
        "%" in axes.get_ylabel()
        and "stl10" in axes.get_ylabel()
        and "3 trials" in axes.get_title(loc="right")
    )
    no_overlap(figure)


def test_one_trial_has_no_spread() -> None:
    figure = visualize.accuracy_by_version_figure(
        {"a": curves(trials=1), "b": curves(trials=1, epochs=1)}
    )
    assert list(lines_of(figure.axes[0])) == ["a: 74.0 %", "b: 70.0 %"]
    assert figure.axes[0].get_title(loc="right") == "one trial"
    colours = {line.get_color() for line in figure.axes[0].get_lines()}
    assert len(colours) == 2 and not colours & set(visualize.COLOURS.values())


def test_accuracy_by_epoch() -> None:
    data = {60: curves(top=72.0), 20: curves(), 40: curves(top=71.0)}
    figure = visualize.accuracy_by_epoch_figure(data, "M3 on stl10")
    left, right = figure.axes
    assert list(left.get_lines()[0].get_xdata()) == [20, 40, 60]
    assert list(left.get_lines()[0].get_ydata()) == pytest.approx(
        [float(data[e][:, -1].mean()) for e in (20, 40, 60)]
    )
    assert [sorted(points.get_offsets()[:, 1].tolist()) for points in left.collections] == [
        pytest.approx(sorted(data[e][:, -1].tolist())) for e in (20, 40, 60)
    ]
    assert [label.split(":")[0] for label in lines_of(right)] == ["20", "40", "60"]
    assert list(lines_of(right).values())[1] == pytest.approx(data[40].mean(0).tolist())
    no_overlap(figure)
    no_overlap(
        visualize.accuracy_by_epoch_figure({20 * i: curves() for i in range(1, 11)}, "v1 on stl10")
    )


def test_accuracy_of_one_evaluation() -> None:
    result = {
        "linear_top1": 74.2,
        "knn_top1": 61.0,
        "knn_k": 200,
        "encoder": "trained",
        "epoch": 100,
        "arch": "resnet50",
        "dataset": "stl10",
        "protocol": "cached",
    }
    figure = visualize.accuracy_figure(curves(), result)
    lines = figure.axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines[:3]] == [
        pytest.approx(curve) for curve in curves().tolist()
    ]
    assert set(lines[3].get_ydata()) == {61.0}
    assert figure.axes[0].get_title() == "resnet50, epoch 100, on stl10"
    no_overlap(figure)


# ----------------------------------------------------------------------------------------------------------- visualize.py, in small

FAST = [
    "--linear_epochs",
    "2",
    "--linear_lrs",
    "0.1",
    "--knn_k",
    "5",
    "--num_workers",
    "0",
    "--device",
    "cpu",
    "--trials",
    "2",
]


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
    done = run(
        "visualize.py",
        output,
        f"--result_path={place}/early",
        "--multiple_encoder_exp_version",
        "M1",
        "M3",
        *FAST,
    )
    assert (
        one_line(done, "--dataset_root") and not (place / "early").exists()
    )  # nothing is stored yet

    assert run("test.py", output, data, "--encoder_exp_version=M1", *FAST).returncode == 0
    stored = (home / "M1" / "eval" / "epoch_0001" / "result.json").stat().st_mtime_ns
    flags = [
        output,
        data,
        f"--result_path={place}/img",
        "--multiple_encoder_exp_version",
        "M1",
        "M3",
        "--encoder_exp_version=M3",
        "--multiple_pretrained_epoch",
        "1",
        "2",
        *FAST,
    ]
    done = run("visualize.py", *flags)
    assert done.returncode == 0, done.stderr
    assert (
        "M1, epoch 1: stored" in done.stdout
        and "M3, epoch 2: evaluating" in done.stdout
        and "M3, epoch 2: stored" in done.stdout
    )
    assert (home / "M1" / "eval" / "epoch_0001" / "result.json").stat().st_mtime_ns == stored
    assert sorted(p.name for p in (home / "M3" / "eval" / "epoch_0001").iterdir()) == [
        "accuracy.csv",
        "accuracy.png",
        "confusion.csv",
        "confusion.png",
        "linear.pth.tar",
        "result.json",
    ]
    assert sorted(p.name for p in (place / "img").iterdir()) == [
        "accr_epoch_compare.png",
        "accr_model_compare.png",
        "data",
        "embedding.png",
        "filters.png",
        "loss.png",
        "neighbours.png",
        "views.png",
    ]
    for figure in (place / "img").glob("*.png"):
        with Image.open(figure) as image:
            assert image.width >= 1200
            assert len(image.convert("RGB").resize((400, 200)).getcolors(80000)) > 20

    assert (
        run(
            "test.py", output, data, "--encoder_exp_version=M3", "--encoder=random", *FAST
        ).returncode
        == 0
    )
    flags += ["--figures", "loss", "accuracy"]
    done = run("visualize.py", *flags)
    assert done.returncode == 0 and "evaluating" not in done.stdout
    shown = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    for name, folder in (
        ("M1", "M1/eval/epoch_0001"),
        ("M3", "M3/eval/epoch_0002"),
        ("untrained", "M3/eval/random"),
    ):
        result = json.loads((home / folder / "result.json").read_text())
        assert shown[name][:2] == [f"{result['knn_top1']:.2f}", f"{result['linear_top1']:.2f}"]
    done = run(
        "visualize.py",
        *flags,
        "--trials=3",
        "--multiple_encoder_exp_version",
        "M1",
        "--multiple_pretrained_epoch",
        "none",
    )
    assert "M1, epoch 1: evaluating" in done.stdout  # more trials than are stored
    assert (
        len(json.loads((home / "M1" / "eval" / "epoch_0001" / "result.json").read_text())["trials"])
        == 3
    )
    done = run(
        "visualize.py",
        output,
        f"--result_path={place}/img",
        "--multiple_encoder_exp_version",
        "M1",
        *FAST,
    )
    assert done.returncode == 0 and "stored" in done.stdout  # no data set is needed


def test_a_result_of_another_measure_or_data_set_or_a_damaged_one_is_not_reused(
    tmp_path: Path,
) -> None:
    for part in ("one", "two"):
        class_folders(tmp_path / part / "data", seed=0, per_class=8 if part == "one" else 6)
    home = fabricated_run(tmp_path / "output", "M1", epochs=(1,))
    flags = [
        f"--encoder_output_root={tmp_path}/output",
        f"--result_path={tmp_path}/img",
        "--figures",
        "accuracy",
        "loss",
        "--encoder_exp_version=M1",
        *FAST,
    ]
    assert (
        run(
            "test.py",
            flags[0],
            *flags[5:],
            f"--dataset_root={tmp_path}/one/data",
            "--encoder=random",
            "--linear_views=1",
        ).returncode
        == 0
    )

    def says(word: str, *more: str) -> None:
        done = run("visualize.py", *flags, *more)
        assert (
            done.returncode == 0
            and f"M1, epoch 1: {word}" in done.stdout
            and "untrained" not in done.stdout
        ), (done.stdout, done.stderr)

    one = f"--dataset_root={tmp_path}/one/data"
    says("evaluating", one)
    says("stored", one)
    says("evaluating", one, "--no-knn_weighted")
    says("evaluating", one, "--knn_k=3")
    says("evaluating", f"--dataset_root={tmp_path}/two/data", "--knn_k=3")  # of the same name
    (home / "eval" / "epoch_0001" / "result.json").write_text("[1]")
    says("evaluating", one, "--knn_k=3")
    for split in ("train", "test"):
        next((tmp_path / "one/data" / split / "class0").iterdir()).unlink()
        says("evaluating", one, "--knn_k=3")  # of the same path, but of fewer images
        says("stored", one, "--knn_k=3")
    (home / "eval" / "epoch_0001" / "accuracy.csv").write_text("")
    assert one_line(run("visualize.py", *flags, one, "--knn_k=3"), "no column trial")
    (home / "log.csv").write_text("step,loss\n")
    assert one_line(run("visualize.py", *flags, one, "--knn_k=3"), "no rows yet")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--multiple_encoder_exp_version", "M1", "M7"], "runs there: M1, M3"),
        (
            ["--multiple_encoder_exp_version", "M1"]
            + ["--multiple_pretrained_epoch", "5", "--encoder_exp_version=M3"],
            "it has epochs 1, 2",
        ),
        (["--encoder_exp_version=M1", "--loss_exp_version", "M8"], "runs with one: M0, M1, M3"),
        (["--encoder_exp_version=M1", "--encoder=random"], "for test.py"),
        (["--encoder_exp_version=M1", "--dataset_root=nowhere"], "nowhere"),
        (["--encoder_exp_version=M1", "--figures", "all", "loss"], "all stands alone"),
        (["--encoder_exp_version=M1", "--seeds", "none", "1"], "none stands alone"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    place: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    done = run(
        "visualize.py",
        f"--encoder_output_root={place}/output",
        f"--dataset_root={place}/data",
        f"--result_path={tmp_path}/img",
        *FAST,
        *flags,
    )
    assert one_line(done, words), done.stderr
    assert not (tmp_path / "img").exists()


def test_a_run_is_drawn_on_data_of_another_size_and_the_loss_is_that_of_the_epoch(
    place: Path, tmp_path: Path
) -> None:
    """A run that stored images smaller than its crop, as of Fashion-MNIST, on folders; its last rows are of epochs 1 and 2, unevenly apart."""
    home = fabricated_run(tmp_path, "small", epochs=(1, 2))
    for path in (home / "checkpoints").iterdir():
        content = utils.load_checkpoint(path)
        utils.save_checkpoint(path, content | {"config": content["config"] | {"resize": 12}})
    utils.write_csv(
        home / "log.csv",
        ["step", "epoch", "loss", "contrast_top1", "lr", "images_per_second"],
        [
            (10, 1, 4, 8, 0.03, 100),
            (50, 1, 3, 9, 0.03, 100),
            (90, 2, 2, 10, 0.03, 100),
            (100, 2, 1, 20, 0.03, 100),
        ],
    )
    (home / "config.yaml").write_text("")  # is gone, and all the same
    flags = [
        f"--encoder_output_root={tmp_path}",
        f"--dataset_root={place}/data",
        f"--result_path={tmp_path}/img",
        "--encoder_exp_version=small",
        *FAST,
    ]
    for epoch, loss, contrast in (
        (1, (10 * 4 + 40 * 3) / 50, (10 * 8 + 40 * 9) / 50),
        (2, (40 * 2 + 10 * 1) / 50, (40 * 10 + 10 * 20) / 50),
    ):
        done = run("visualize.py", *flags, f"--load_pretrained_epoch={epoch}")
        assert done.returncode == 0 and (tmp_path / "img" / "views.png").exists(), done.stderr
        row = json.loads((tmp_path / "img/data/versions.json").read_text())["table"]["small"][0]
        assert (row["loss"], row["contrast_top1"]) == (loss, contrast)


def test_under_torchrun_is_one_line_even_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    done = run(
        "visualize.py",
        f"--encoder_output_root={place}/output",
        f"--dataset_root={place}/data",
        f"--result_path={tmp_path}",
        "--encoder_exp_version=M1",
        *FAST,
    )
    assert one_line(done, "one process"), done.stderr


def test_loss_versions(place: Path) -> None:
    root = place / "output" / "IMAGENET-64"
    assert visualize.loss_versions(
        SimpleNamespace(loss_exp_version=["auto"], seeds=["none"]), root, ["M1", "M3"]
    ) == ["M0", "M1", "M3"]
    assert visualize.loss_versions(
        SimpleNamespace(loss_exp_version=["M3"], seeds=["none"]), root, ["M1"]
    ) == ["M3"]
    log = visualize.read_loss(root / "M3")
    assert log["chance"] == math.log(17) and log["step"][:2] == [5.0, 10.0] and log["drops"] == []


@pytest.mark.parametrize(
    "rates, drops",
    [
        ([3, 3, 3, 0.3, 0.3, 0.03], [3, 5]),
        ([3, 2, 1, 0.4, 0.1, 0.0], []),
        ([3, 3, 2.9, 2.9, 2.8, 2.8], []),
    ],
)  # a cosine has none
def test_where_the_learning_rate_falls(
    tmp_path: Path, rates: list[float], drops: list[int]
) -> None:
    utils.write_csv(
        tmp_path / "log.csv",
        ["step", "loss", "lr"],
        [(step, 1.0, rate) for step, rate in enumerate(rates, 1)],
    )
    log = visualize.read_loss(tmp_path)
    assert log["drops"] == drops
    marks = [
        line.get_xdata()[0] for line in visualize.loss_figure({"v": [log]}).axes[0].get_lines()[1:]
    ]
    assert marks == drops


def seed_runs(place: Path) -> list[str]:
    """Two versions with two seeds each, evaluated, and one untrained encoder for each seed; the flags that name them."""
    output = place / "seeds"
    for version in ("M1", "M3"):
        for seed in (0, 1):
            fabricated_run(
                output, f"{version}-seed{seed}", epochs=(1,), weight=3.0 * seed
            )  # other features
    flags = [f"--encoder_output_root={output}", f"--dataset_root={place}/data", *FAST]
    for seed in (0, 1):
        assert (
            run(
                "test.py", *flags, f"--encoder_exp_version=M1-seed{seed}", "--encoder=random"
            ).returncode
            == 0
        )
    return [*flags, "--seeds", "0", "1", "--multiple_encoder_exp_version", "M1", "M3"]


def test_versions_with_seeds_and_what_is_redrawn_is_what_was_drawn(
    place: Path, tmp_path: Path
) -> None:
    flags = seed_runs(place)
    done = run(
        "visualize.py",
        *flags,
        f"--result_path={tmp_path}/img",
        "--encoder_exp_version=M3",
        "--multiple_pretrained_epoch",
        "1",
    )
    assert done.returncode == 0, done.stderr
    results = {
        name: [
            json.loads(path.read_text())
            for path in sorted((place / "seeds/IMAGENET-64").glob(f"{pattern}/result.json"))
        ]
        for name, pattern in (
            ("M1", "M1-seed*/eval/epoch_0001"),
            ("M3", "M3-seed*/eval/epoch_0001"),
            ("untrained", "M1-seed*/eval/random"),
        )
    }
    shown = {
        line.split()[0]: line.split()[1:]
        for line in done.stdout.splitlines()
        if line.split() and line.split()[0] in results
    }
    for name, pair in results.items():
        assert len(pair) == 2
        for place_in_line, key in ((0, "knn_top1"), (3, "linear_top1")):
            a, b = (each[key] for each in pair)
            assert shown[name][place_in_line] == f"{(a + b) / 2:.2f}" and float(
                shown[name][place_in_line + 2]
            ) == pytest.approx(abs(a - b) / math.sqrt(2), abs=0.011)
    data = json.loads((tmp_path / "img/data/versions.json").read_text())
    assert data["spread"] == "seed"
    for seed in (0, 1):  # a row is the mean over that seed's trials
        accuracy = visualize.read_accuracy(
            place / f"seeds/IMAGENET-64/M3-seed{seed}/eval/epoch_0001/accuracy.csv"
        )
        assert data["accuracy"]["M3"][seed] == pytest.approx(
            accuracy.mean(dim=0).tolist(), abs=1e-3
        )
    assert len(json.loads((tmp_path / "img/data/loss.json").read_text())["M1"]) == 2

    drawn = {path.name: path.read_bytes() for path in (tmp_path / "img").glob("*.png")}
    for path in (tmp_path / "img").glob("*.png"):
        path.unlink()
    done = run("visualize.py", "--redraw", f"--result_path={tmp_path}/img")
    assert done.returncode == 0, done.stderr
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "img").glob("*.png")
    } == drawn and len(drawn) == 7


def test_only_the_figures_that_are_asked_for(place: Path, tmp_path: Path) -> None:
    flags = [f"--encoder_output_root={place}/output", "--encoder_exp_version=M3", *FAST]
    done = run("visualize.py", *flags, f"--result_path={tmp_path}", "--figures", "loss", "filters")
    assert done.returncode == 0 and sorted(p.name for p in tmp_path.glob("*.png")) == [
        "filters.png",
        "loss.png",
    ], done.stderr
    assert one_line(
        run("visualize.py", *flags, f"--result_path={tmp_path}/x", "--figures", "losses"),
        "--figures 'losses'",
    )
    assert one_line(
        run("visualize.py", "--redraw", f"--result_path={tmp_path}/none"), "--redraw finds nothing"
    )
    assert one_line(
        run("visualize.py", *flags, f"--result_path={tmp_path}/x", "--figures", "views", "loss"),
        "--dataset_root is missing",
    )
    (tmp_path / "data" / "filters.npz").write_bytes(b"PK")
    assert one_line(
        run("visualize.py", "--redraw", f"--result_path={tmp_path}"), "the figure filters in"
    )
    assert (
        run("visualize.py", "--redraw", "--figures", "loss", f"--result_path={tmp_path}").returncode
        == 0
    )
    (tmp_path / "data" / "filters.npz").unlink()
    (tmp_path / "data" / "loss.json").write_text("{")
    assert one_line(
        run("visualize.py", "--redraw", f"--result_path={tmp_path}"), "the figure loss in"
    )
    for content in ("{}", "[]", '{"M1": []}', '{"M1": {"step": 1}}'):
        (tmp_path / "data" / "loss.json").write_text(content)
        assert one_line(
            run("visualize.py", "--redraw", f"--result_path={tmp_path}"), "the figure loss in"
        ), content


def test_without_scikit_learn_the_map_is_left_out_and_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    flags = [
        f"--encoder_output_root={place}/output",
        f"--dataset_root={place}/data",
        "--encoder_exp_version=M3",
        f"--result_path={tmp_path}",
        *FAST,
    ]
    done = run("visualize.py", *flags)
    assert (
        done.returncode == 0
        and "embedding.png is left out" in done.stderr
        and not (tmp_path / "embedding.png").exists()
        and "earlier call" not in done.stderr
    )
    (tmp_path / "embedding.png").write_bytes(b"")
    assert (
        f"embedding.png in {tmp_path} is of an earlier call" in run("visualize.py", *flags).stderr
    )
    assert one_line(
        run("visualize.py", *flags, "--figures", "embedding"), "pip install scikit-learn"
    )


def test_tensorboard_gets_scalars_views_neighbours_and_features(
    place: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run(
        "train.py",
        f"--dataset_root={place}/data",
        f"--output_root={tmp_path}",
        "--arch=resnet18",
        "--crop=16",
        "--feature_dim=8",
        "--num_keys=8",
        "--batch_size=8",
        "--bn_groups=2",
        "--num_workers=0",
        "--log_every=2",
        "--device=cpu",
        "--max_epoch=2",
        "--momentum=0.5",
        "--tensorboard",
        "--knn_every=1",
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "IMAGENET-64" / "v1"
    events, log = (
        EventAccumulator(str(folder / "tensorboard")).Reload(),
        utils.read_csv(folder / "log.csv"),
    )
    for name in ("loss", "effective_rank"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-4)) for step, value in zip(log["step"], log[name])
        ]
    assert [event.step for event in events.Scalars("knn_top1")] == [3, 6] and [
        event.step for event in events.Images("views")
    ] == [2, 3, 6]
    assert set(events.Tags()["images"]) == {"views", "neighbours"} and list(
        (folder / "tensorboard").rglob("tensors.tsv")
    )


def test_tensorboard_that_cannot_be_written_is_said_and_the_run_goes_on(
    place: Path, tmp_path: Path
) -> None:
    flags = [
        f"--dataset_root={place}/data",
        f"--output_root={tmp_path}",
        "--arch=resnet18",
        "--crop=16",
        "--feature_dim=8",
        "--num_keys=8",
        "--batch_size=8",
        "--bn_groups=2",
        "--num_workers=0",
        "--log_every=2",
        "--device=cpu",
        "--momentum=0.5",
        "--tensorboard",
    ]
    (tmp_path / "IMAGENET-64" / "v1").mkdir(parents=True)
    (tmp_path / "IMAGENET-64" / "v1" / "tensorboard").write_text("a file")
    done = run("train.py", *flags, "--max_epoch=1")
    assert (
        done.returncode == 0 and done.stderr.count("TensorBoard's files cannot be written") == 1
    ), done.stderr


def test_without_tensorboard_is_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "tensorboard" else found(name, *more),
    )
    assert one_line(
        run(
            "train.py",
            f"--dataset_root={place}/data",
            f"--output_root={tmp_path}/x",
            "--num_keys=8",
            "--batch_size=8",
            "--bn_groups=2",
            "--tensorboard",
            "--device=cpu",
        ),
        "pip install tensorboard",
    )
    assert not (tmp_path / "x").exists()


def test_curves_of_one_run_are_its_trials_and_of_several_the_mean_of_each() -> None:
    one, two = curves(trials=2, top=50.0), curves(trials=3, top=60.0)
    assert visualize.pooled([({}, one)]) == [pytest.approx(curve) for curve in one.tolist()]
    assert visualize.pooled([({}, one), ({}, two)]) == [
        pytest.approx([sum(column) / len(column) for column in zip(*table.tolist())], abs=1e-4)
        for table in (one, two)
    ]
