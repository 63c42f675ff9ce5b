"""Draw what the runs did, and what their encoders see.

    python visualize.py --dataset_root=ROOT/STL-10 --multiple_encoder_exp_version M1 M2 M3
    python visualize.py --dataset_root=ROOT/STL-10 --encoder_exp_version M3 --multiple_pretrained_epoch 20 40 60
    python visualize.py --dataset_root=ROOT/STL-10 --multiple_encoder_exp_version M1 M3 --seeds 0 1     runs M1-seed0, M1-seed1, M3-seed0, ...
    python visualize.py --redraw                                              from img/data alone, which earlier calls left
    python visualize.py --help                                                every flag with its default

Writes RESULT_PATH/ (default img/): loss.png, accr_model_compare.png, with --multiple_pretrained_epoch accr_epoch_compare.png, and of the last version views.png,
neighbours.png, embedding.png (with scikit-learn), filters.png; and RESULT_PATH/data/, from which they are drawn. Results of test.py with the same settings
are used as they are; what is missing is evaluated first, with --trials classifiers. Without --dataset_root only what is there is drawn.
Every figure is a function that takes data and returns a matplotlib Figure.
"""

import itertools
import json
import math
import re
import statistics
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torchvision.transforms.v2 import functional as TF

import augment
import dataloader
import evaluate
import model
import parallel
import utils

# Okabe and Ito's colours, which stay apart for colour-blind readers; a version keeps its colour in every figure
COLOURS = {"M0": "#CC79A7", "M1": "#E69F00", "M2": "#009E73", "M3": "#0072B2"}
OTHER_COLOURS = ["#D55E00", "#56B4E9", "#000000", "#999933", "#882255"]
GREY = "0.45"
CLASS_COLOURS = [
    *COLOURS.values(),
    *OTHER_COLOURS,
    "#888888",
]  # of up to ten classes; the markers tell apart what an eye cannot
CLASS_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<", "p"]
RIGHT, WRONG = COLOURS["M3"], OTHER_COLOURS[0]
VIEW_SIDE, NEIGHBOUR_SIDE = (
    96,
    64,
)  # the largest thumbnails that are kept, in px: of either figure about 1 MB at most


def main(argv: list[str]) -> None:
    cfg = evaluate.settled(utils.load_config("visualize", argv))
    results = Path(cfg.result_path)
    evaluate.check_writable(results, "--result_path")
    wanted = (
        set(FIGURES)
        if "all" in cfg.figures
        else {
            name
            for figure in cfg.figures
            for name in (("versions", "epochs") if figure == "accuracy" else (figure,))
        }
    )
    collected = (
        sorted(path.stem for path in (results / "data").glob("*.*") if path.stem in wanted)
        if cfg.redraw
        else collect(cfg, wanted, results / "data")
    )
    if not collected:
        raise utils.UserError(
            f"--redraw finds nothing in {str(results / 'data')!r}: leave it out, so that data are collected"
        )
    for name, figure in {
        name: draw(results / "data", name, cfg.redraw) for name in collected
    }.items():  # written when nothing can fail any more
        write_figure(results / FIGURES[name], figure)
    if old := [
        FIGURES[name]
        for name in FIGURES
        if name in wanted and name not in collected and (results / FIGURES[name]).exists()
    ]:
        print(
            f"note: {', '.join(old)} in {results} {'is' if len(old) == 1 else 'are'} of an earlier call",
            file=sys.stderr,
        )
    print(f"written  {results}/{', '.join(FIGURES[name] for name in collected)}")


# what is collected, and the figure that is drawn from it
FIGURES = {
    "loss": "loss.png",
    "versions": "accr_model_compare.png",
    "epochs": "accr_epoch_compare.png",
    "views": "views.png",
    "neighbours": "neighbours.png",
    "embedding": "embedding.png",
    "filters": "filters.png",
}
PICTURE_TRAIN, PICTURE_TEST = (
    10_000,
    2_000,
)  # images among which neighbours are looked for, and that are drawn as points


def collect(cfg: SimpleNamespace, wanted: set[str], where: Path) -> list[str]:
    """Everything that the figures show, left in the folder `where`; evaluates what is missing. Returns the names. UserError before any work for what is not there."""
    if cfg.pretrained is not None or cfg.encoder == "random":
        flag = "--encoder random" if cfg.encoder == "random" else f"--pretrained {cfg.pretrained!r}"
        raise utils.UserError(
            f"{flag} is for test.py: name runs with --multiple_encoder_exp_version"
        )
    launch = utils.checked(parallel.launch, cfg.device)
    if parallel.several_processes():
        raise utils.UserError(
            "visualize.py runs as one process: evaluate with torchrun and test.py first, its results are reused"
        )
    if (
        cfg.dataset_root is None
        and "all" not in cfg.figures
        and (without := wanted & {"views", "neighbours", "embedding"})
    ):
        raise utils.UserError(
            f"--dataset_root is missing, of whose images the figure {sorted(without)[0]} is drawn"
        )
    versions = (
        [cfg.encoder_exp_version]
        if cfg.multiple_encoder_exp_version == ["auto"]
        else list(dict.fromkeys(cfg.multiple_encoder_exp_version))
    )
    epochs = (
        []
        if "none" in cfg.multiple_pretrained_epoch
        else sorted(set(cfg.multiple_pretrained_epoch))
    )
    root = utils.run_folder(cfg.encoder_output_root, cfg.encoder_dataset_name, versions[0]).parent
    for version, epoch in [(v, cfg.load_pretrained_epoch) for v in versions] + [
        (cfg.encoder_exp_version, e) for e in epochs
    ]:
        for run in runs_of(version, cfg):
            utils.checkpoint_path(
                utils.run_folder(cfg.encoder_output_root, cfg.encoder_dataset_name, run), epoch
            )
    drawn = loss_versions(cfg, root, versions) if "loss" in wanted else []
    logs = {version: [read_loss(root / run) for run in runs_of(version, cfg)] for version in drawn}
    cfg = SimpleNamespace(
        **vars(cfg)
        | {"precision": utils.checked(parallel.pick_precision, cfg.precision, launch.device)}
    )
    data_now = None if cfg.dataset_root is None else what_data(cfg)

    data: dict[str, Any] = {}
    if "loss" in wanted:
        data["loss"] = {
            version: [
                {
                    "step": list(map(int, log["step"])),
                    "loss": [round(loss, 4) for loss in log["loss"]],
                }
                | ({"chance": log["chance"]} if "chance" in log else {})
                | {"drops": log["drops"]}
                for log in runs
            ]
            for version, runs in logs.items()
        }
    if "versions" in wanted:
        found = {
            version: [
                accuracy_of(cfg, launch, run, cfg.load_pretrained_epoch, data_now)
                for run in runs_of(version, cfg)
            ]
            for version in versions
        }
        found_epochs = {
            epoch: [
                accuracy_of(cfg, launch, run, epoch, data_now)
                for run in runs_of(cfg.encoder_exp_version, cfg)
            ]
            for epoch in epochs
        }
        untrained = random_results(
            cfg,
            root,
            {version: [result for result, _ in results] for version, results in found.items()},
        )
        spread = "seed" if len(runs_of(versions[0], cfg)) > 1 else "trial"
        table = {
            version: [
                row_of(result, root / run)
                for (result, _), run in zip(results, runs_of(version, cfg))
            ]
            for version, results in found.items()
        }
        table |= {"untrained": [row_of(result) for result, _ in untrained]} if untrained else {}
        data["versions"] = {
            "dataset": one_dataset(found),
            "spread": spread,
            "accuracy": {version: pooled(results) for version, results in found.items()},
            "untrained": pooled(untrained) if untrained else None,
            "table": table,
        }
        if epochs:
            data["epochs"] = {
                "name": f"{cfg.encoder_exp_version} on {one_dataset(found_epochs)}",
                "spread": spread,
                "accuracy": {
                    str(epoch): pooled(results) for epoch, results in found_epochs.items()
                },
            }
        print(summary(table))
    data |= picture_data(cfg, runs_of(versions[-1], cfg)[0], wanted, launch)
    for name, content in data.items():
        write_data(where, name, content)
    return list(data)


def draw(where: Path, name: str, old: bool = False) -> Figure:
    """A figure from what `collect` left in a folder; UserError if that is `old` and damaged."""
    try:
        if not (where / f"{name}.npz").exists():
            return draw_numbers(
                name, json.loads((where / f"{name}.json").read_text(encoding="utf-8"))
            )
        pictures = {
            "views": views_figure,
            "neighbours": neighbours_figure,
            "embedding": embedding_figure,
            "filters": filters_figure,
        }
        with np.load(where / f"{name}.npz") as data:
            return pictures[name](dict(data))
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ZeroDivisionError,
        OSError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
    ):
        if not old:
            raise
        raise utils.UserError(
            f"the data of the figure {name} in {str(where)!r} are damaged: draw without --redraw"
        ) from None


def draw_numbers(name: str, data: dict[str, Any]) -> Figure:
    """The figure of losses or accuracies from its data."""
    if name == "loss":
        return loss_figure(data)
    accuracies = {
        key: torch.tensor(values, dtype=torch.float64) for key, values in data["accuracy"].items()
    }
    if name == "epochs":
        return accuracy_by_epoch_figure(
            {int(epoch): accuracy for epoch, accuracy in accuracies.items()},
            data["name"],
            data["spread"],
        )
    random = (
        None if data["untrained"] is None else torch.tensor(data["untrained"], dtype=torch.float64)
    )
    return accuracy_by_version_figure(accuracies, random, data["dataset"], data["spread"])


def write_data(where: Path, name: str, content: Any) -> None:
    """Arrays as NAME.npz, all else as NAME.json, in which a list of numbers takes one line."""
    if all(isinstance(value, np.ndarray) for value in content.values()):
        utils.atomic_write(where / f"{name}.npz", lambda file: np.savez_compressed(file, **content))
        return
    text = re.sub(
        r"\[\s+([^\[\]{}\"]*?)\s+\]",
        lambda numbers: "[" + re.sub(r"\s+", " ", numbers[1]) + "]",
        json.dumps(content, indent=1),
    )
    utils.atomic_write(where / f"{name}.json", lambda file: file.write((text + "\n").encode()))


# ------------------------------------------------------------------------------------------------------------- where data comes from


def what_data(cfg: SimpleNamespace) -> dict[str, Any]:
    """What result.json says of the data in `cfg.dataset_root`, as they are now; UserError if they are not there."""
    train, test = (
        dataloader.open_dataset(
            cfg.dataset_root, split, view="center", resize="auto", crop=8, download=cfg.download
        )
        for split in ("train", "test")
    )
    return {
        "dataset": evaluate.data_name(cfg.dataset_root),
        "dataset_root": evaluate.data_path(cfg.dataset_root),
        "test_images": len(test),
        "class_names": train.classes,
        "train_images": len(evaluate.chosen_images(cfg, train.labels)),
    }


def runs_of(version: str, cfg: SimpleNamespace) -> list[str]:
    """The runs that a version stands for: itself, or one for each of --seeds."""
    return [version] if "none" in cfg.seeds else [f"{version}-seed{seed}" for seed in cfg.seeds]


def loss_versions(cfg: SimpleNamespace, root: Path, versions: list[str]) -> list[str]:
    """The versions whose loss is drawn: those asked for, or the compared ones and M0 where it exists."""
    there = all((root / run / "log.csv").exists() for run in runs_of("M0", cfg))
    chosen = (
        cfg.loss_exp_version
        if cfg.loss_exp_version != ["auto"]
        else (["M0"] if there else []) + versions
    )
    for folder in (root / run for version in chosen for run in runs_of(version, cfg)):
        if not (folder / "log.csv").exists():
            there = ", ".join(sorted(path.parent.name for path in root.glob("*/log.csv"))) or "none"
            raise utils.UserError(
                f"--loss_exp_version {folder.name!r}: {str(folder)!r} has no log.csv; runs with one: {there}"
            )
    return list(dict.fromkeys(chosen))


def picture_data(
    cfg: SimpleNamespace, run: str, wanted: set[str], launch: parallel.OneDevice
) -> dict[str, dict[str, np.ndarray]]:
    """What the figures of images, features and filters of a run show, beside its untrained encoder; without a data set the filters alone."""
    subject = evaluate.load_subject(SimpleNamespace(**vars(cfg) | {"encoder_exp_version": run}))
    subjects = {
        "trained": subject,
        "untrained": replace(
            subject,
            encoder=model.backbone(
                evaluate.untrained_encoder(subject.record["arch"], subject.config)
            ),
        ),
    }
    data = (
        {
            "filters": filters_data(
                {name: each.encoder.conv1.weight for name, each in subjects.items()}
            )
        }
        if "filters" in wanted
        else {}
    )
    if cfg.dataset_root is None:
        return data
    if "views" in wanted:
        config = subject.config
        resize = (
            config["resize"]
            if config["resize"] == "auto" or config["resize"] >= config["crop"]
            else "auto"
        )  # of a data set of smaller images
        square = dataloader.open_dataset(
            cfg.dataset_root, "train", view="square", resize=resize, crop=config["crop"]
        )
        data["views"] = views_data(
            square,
            augment.training_recipe(
                config, grid=square.resize if square.native == square.resize else 0
            ),
            cfg.seed,
        )
    if not wanted & {"neighbours", "embedding"}:
        return data
    parts = {
        split: dataloader.open_dataset(
            cfg.dataset_root, split, view="center", resize=cfg.resize, crop=subject.crop
        )
        for split in ("train", "test")
    }
    rows = {
        split: torch.randperm(len(part), generator=utils.generator(cfg.seed, f"pictures {split}"))[
            :count
        ]
        .sort()
        .values
        for (split, part), count in zip(parts.items(), (PICTURE_TRAIN, PICTURE_TEST))
    }
    features = {}
    for name, each in subjects.items():
        evaluate.ready(each.encoder, launch, cfg.precision)
        features[name] = tuple(
            evaluate.dataset_features(cfg, each, part, launch, rows[split])[0][0]
            for split, part in parts.items()
        )
    labels = {split: part.labels[rows[split]] for split, part in parts.items()}
    if "neighbours" in wanted:
        data["neighbours"] = neighbours_data(
            ImagesOf(parts["train"], rows["train"]),
            labels["train"],
            ImagesOf(parts["test"], rows["test"]),
            labels["test"],
            features,
            parts["train"].classes,
            cfg.seed,
            k=min(6, len(rows["train"])),
        )
    if "embedding" in wanted:
        try:
            data["embedding"] = embedding_data(
                {name: test for name, (_, test) in features.items()},
                labels["test"],
                parts["test"].classes,
                cfg.seed,
            )
        except utils.UserError as error:
            if "all" not in cfg.figures:
                raise
            print(f"note: embedding.png is left out: {error}", file=sys.stderr)
    return data


class ImagesOf:
    """Some images of a data set, read when they are asked for by their places (an array)."""

    def __init__(self, dataset: Any, rows: torch.Tensor) -> None:
        self.dataset, self.rows = dataset, rows

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self.dataset.fetch(self.rows[torch.as_tensor(places)]).images.numpy()


def read_loss(folder: Path) -> dict[str, Any]:
    """The columns of a run's log.csv; `chance`: log(K + 1), the loss when no key can be told from another; `drops`: the steps at which a constant learning rate fell."""
    log: dict[str, Any] = utils.read_csv(folder / "log.csv", ("step", "loss"))
    if not log["step"]:
        raise utils.UserError(
            f"{str(folder / 'log.csv')!r} has no rows yet: its run has just begun"
        )
    num_keys = config_of(folder).get("num_keys")
    if isinstance(num_keys, int) and num_keys > 0:
        log["chance"] = math.log(num_keys + 1)
    rates = log.get("lr", [])
    log["drops"] = [
        step
        for step, before, now, after in zip(log["step"][1:], rates, rates[1:], rates[2:])
        if before == now > 2 * after
    ]
    return log


def config_of(run: Path) -> dict[str, Any]:
    """The settings of a run; empty if they are gone."""
    config = utils.read_yaml(run / "config.yaml") if (run / "config.yaml").exists() else None
    return config if isinstance(config, dict) else {}


def accuracy_of(
    cfg: SimpleNamespace,
    launch: parallel.OneDevice,
    version: str,
    epoch: int | None,
    data_now: dict[str, Any] | None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Result and accuracy (trials, epochs) of a checkpoint on data (`what_data`): the stored one, or a new evaluation that stores its own."""
    cfg = SimpleNamespace(
        **vars(cfg) | {"encoder_exp_version": version, "load_pretrained_epoch": epoch}
    )
    subject = evaluate.load_subject(cfg)
    stored = stored_accuracy(cfg, subject, data_now)
    if stored is not None:
        print(
            f"{version}, epoch {subject.record['epoch']}: stored result on {stored[0]['dataset']}",
            flush=True,
        )
        return stored
    if data_now is None:
        raise utils.UserError(
            f"{str(subject.home / subject.stem)!r} has no result with these settings and {cfg.trials} trials: "
            "give --dataset_root, so that it can be evaluated"
        )
    print(f"{version}, epoch {subject.record['epoch']}: evaluating", flush=True)
    folder, result, linear = evaluate.evaluate_subject(cfg, subject, launch)
    draw_evaluation(folder, result, linear)
    return result, linear["accuracy"]


def stored_accuracy(
    cfg: SimpleNamespace, subject: evaluate.Subject, data_now: dict[str, Any] | None
) -> tuple[dict[str, Any], torch.Tensor] | None:
    """An earlier evaluation with the same settings and data, and at least as many trials, or None; without data, that of the plain folder."""
    kind = evaluate.kind_of(cfg.protocol, cfg.train_fraction, cfg.folds)
    folder = (
        subject.home / subject.stem
        if data_now is None
        else evaluate.result_folder(subject, data_now["dataset"], kind)
    )
    result = evaluate.read_result(folder)
    if (
        result is None
        or len(result["trials"]) < cfg.trials
        or not (folder / "accuracy.csv").exists()
    ):
        return None
    wanted = evaluate.settings(cfg, subject) | (data_now or {})
    if any(result.get(name) != value for name, value in wanted.items() if name != "checkpoint"):
        return None
    return result, read_accuracy(folder / "accuracy.csv")


def read_accuracy(path: Path) -> torch.Tensor:
    """An accuracy.csv (epoch, trial, top1) as (trials, epochs)."""
    table = utils.read_csv(path, ("trial", "top1"))
    if not table["trial"] or len(table["top1"]) % int(max(table["trial"])):
        raise utils.UserError(f"{str(path)!r} is damaged: evaluate again with test.py")
    return torch.tensor(table["top1"]).view(int(max(table["trial"])), -1)


def random_results(
    cfg: SimpleNamespace, root: Path, trained: Mapping[str, Sequence[dict[str, Any]]]
) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Results and accuracies (trials, epochs) of the encoders from which the runs of versions started, measured as they were: one for each
    seed, from the first version that has one; none if one is missing."""
    found = []
    for each in range(len(runs_of("", cfg))):
        folders = [
            (path.parent, results[each])
            for version, results in trained.items()
            for path in sorted(
                (root / runs_of(version, cfg)[each]).glob("eval/random*/result.json")
            )
        ]
        fitting = [
            folder
            for folder, result in folders
            if (random := evaluate.read_result(folder)) and evaluate.is_baseline(random, result)
        ]
        if not fitting:
            run = runs_of(next(iter(trained)), cfg)[each]
            print(
                f"note: untrained encoders are not shown: that of {run} was not measured in the same way (test.py --encoder_exp_version {run} --encoder random)",
                file=sys.stderr,
            )
            return []
        found.append((evaluate.read_result(fitting[0]), read_accuracy(fitting[0] / "accuracy.csv")))
    return found


def pooled(results: Sequence[tuple[dict[str, Any], torch.Tensor]]) -> list[list[float]]:
    """Accuracies (trials, epochs) of one run as they are; of several seeds the mean over the trials of each: (seeds, epochs)."""
    curves = (
        results[0][1]
        if len(results) == 1
        else torch.stack([accuracy.double().mean(dim=0) for _, accuracy in results])
    )
    return [[round(top1, 4) for top1 in curve] for curve in curves.tolist()]


def row_of(result: dict[str, Any], run: Path | None = None) -> dict[str, Any]:
    """A run's numbers: loss and contrast accuracy are means over the last epoch of the encoder that was measured; minutes, the time of all steps of the run."""
    row = {
        "knn_top1": round(result["knn_top1"], 2),
        "linear_top1": round(result["linear_top1"], 2),
        "commit": result["provenance"]["commit"],
    }
    log = (
        utils.read_csv(run / "log.csv", ("step", "loss"))
        if run is not None and (run / "log.csv").exists()
        else {"step": []}
    )
    if log["step"] and {"epoch", "contrast_top1", "images_per_second"} <= log.keys():
        steps = [step - before for step, before in zip(log["step"], [0, *log["step"]])]
        last = [i for i, epoch in enumerate(log["epoch"]) if epoch == result["epoch"]]
        if last:
            row |= {
                name: round(
                    sum(log[name][i] * steps[i] for i in last) / sum(steps[i] for i in last), 3
                )
                for name in ("loss", "contrast_top1")
            }
        images = config_of(run).get("batch_size", 0)
        row["minutes"] = round(
            sum(count * images / rate for count, rate in zip(steps, log["images_per_second"])) / 60,
            1,
        )
    return row


def summary(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The runs' numbers, mean ± sample deviation over seeds, as aligned lines; kNN and linear accuracy in percent."""
    columns = {
        "kNN": "knn_top1",
        "linear": "linear_top1",
        "loss": "loss",
        "contrast top-1": "contrast_top1",
        "minutes": "minutes",
    }
    lines = [f"{'':<12}" + "".join(f"{name:>16}" for name in columns)]
    for version, rows in sorted(table.items(), key=lambda item: item[0] != "untrained"):
        cells = [[row[key] for row in rows if key in row] for key in columns.values()]
        lines.append(
            f"{version:<12}"
            + "".join(
                f"{f'{statistics.fmean(cell):.2f}' + (f' ± {statistics.stdev(cell):.2f}' if len(cell) > 1 else '') if cell else '':>16}"
                for cell in cells
            )
        )
    return "\n".join(line.rstrip() for line in lines)


def one_dataset(found: Mapping[Any, Sequence[tuple[dict[str, Any], torch.Tensor]]]) -> str:
    """The data set of all results of a figure; UserError if they differ."""
    names = sorted({result["dataset"] for results in found.values() for result, _ in results})
    if len(names) > 1:
        raise utils.UserError(
            f"the stored results are of different data sets ({', '.join(names)}): give --dataset_root"
        )
    return names[0]


def draw_evaluation(folder: Path, result: Mapping[str, Any], linear: Mapping[str, Any]) -> None:
    """The figures of one evaluation, beside its result."""
    write_figure(folder / "accuracy.png", accuracy_figure(linear["accuracy"], result))
    write_figure(folder / "confusion.png", confusion_figure(linear["confusion"], result))


def write_figure(path: Path, figure: Figure) -> None:
    utils.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=200))


# --------------------------------------------------------------------------------------------------------------------------- figures


def loss_figure(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Contrastive loss over steps, a panel for each version with a line for each of its runs, one y axis; dashed: the loss at chance.

    A log holds the columns `step` and `loss` and, if known, `chance` and `drops`, the steps at which the learning rate falls. Long logs are drawn pale, with their running mean on top.
    """
    columns = min(len(logs), 4)
    rows = math.ceil(len(logs) / columns)
    figure = Figure(
        figsize=(8 if columns > 1 else 6, 0.6 + 2.6 * rows + 0.6 * (columns == 1)),
        layout="constrained",
    )
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    chances = {round(log["chance"], 6) for runs in logs.values() for log in runs if "chance" in log}
    styles = {"solid": "-", "dotted": ":", "dashed": "--", "dash-dotted": "-."}
    label = "chance, log(K + 1)" + (f" = {chances.copy().pop():.2f}" if len(chances) == 1 else "")
    for axes, (version, runs) in zip(panels, logs.items()):
        unit = 1000 if max(max(log["step"], default=0) for log in runs) >= 5000 else 1
        for log, style in zip(runs, itertools.cycle(styles.values())):
            long, colour = len(log["loss"]) > 200, colour_of(version, logs)
            steps = [step / unit for step in log["step"]]
            axes.plot(
                steps,
                log["loss"],
                color=colour,
                linewidth=1 if long else 1.6,
                alpha=0.3 / len(runs) if long else 1,
                linestyle="-" if long else style,
            )
            if long:
                axes.plot(
                    steps,
                    running_mean(log["loss"], len(log["loss"]) // 80),
                    color=colour,
                    linewidth=1.6,
                    linestyle=style,
                )
        if "chance" in runs[0]:
            axes.axhline(runs[0]["chance"], color=GREY, linestyle="--", linewidth=1.2, label=label)
        for step in runs[0].get("drops", []):
            axes.axvline(
                step / unit,
                color="0.75",
                linewidth=1,
                zorder=0,
                label="the learning rate falls" if step == runs[0]["drops"][0] else None,
            )
        axes.set_title(version)
        axes.set_xlabel("step (thousands)" if unit == 1000 else "step")
        tidy(axes, ticks=4 if columns > 2 else 6)
    for axes in panels[len(logs) :]:
        axes.remove()
    for axes in panels[: len(logs) : columns]:
        axes.set_ylabel("contrastive loss (nats)")
    with_chance = next(
        (axes for axes, runs in zip(panels, logs.values()) if "chance" in runs[0]), None
    )
    if with_chance is not None:
        figure.legend(
            *with_chance.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2,
            frameon=False,
        )
    most = max(map(len, logs.values()))
    if most > 1:
        figure.suptitle(
            f"{most} seeds each ({', '.join(list(styles)[:most])})", fontsize=10, color=GREY
        )
    return figure


def accuracy_by_version_figure(
    accuracies: Mapping[str, torch.Tensor],
    random: torch.Tensor | None = None,
    dataset: str = "",
    spread: str = "trial",
) -> Figure:
    """Test top-1 (percent) over the classifier's epochs, a line for each version: mean and standard deviation of (trials, epochs).

    `random` (trials, epochs) is the untrained encoder's, dashed; `spread` says what the rows are: trials, or seeds.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for version, accuracy in accuracies.items():
        draw_curve(axes, accuracy, colour_of(version, accuracies), version)
    if random is not None:
        draw_curve(axes, random, GREY, "untrained", linestyle="--")
    axes.set(
        xlabel="epoch of the linear classifier",
        ylabel=f"test top-1{f' on {dataset}' * bool(dataset)} (%)",
    )
    axes.set_title(
        spread_note([*accuracies.values(), *([] if random is None else [random])], spread),
        fontsize=10,
        color=GREY,
        loc="right",
    )
    tidy(axes)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside right center",
        frameon=False,
        title="last epoch",
    )
    return figure


def accuracy_by_epoch_figure(
    accuracies: Mapping[int, torch.Tensor], name: str = "", spread: str = "trial"
) -> Figure:
    """Left: top-1 (percent) at the classifier's last epoch over the pretraining epoch, mean and every trial of (trials, epochs).
    Right: over the classifier's epochs, a line for each pretraining epoch."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = sorted(accuracies)
    last = {epoch: accuracies[epoch][:, -1] for epoch in epochs}
    left.plot(
        epochs,
        [float(last[epoch].mean()) for epoch in epochs],
        color="0.25",
        linewidth=1.6,
        zorder=2,
    )
    colours = epoch_colours(len(epochs))
    for colour, epoch in zip(colours, epochs):
        left.scatter([epoch] * len(last[epoch]), last[epoch].tolist(), color=colour, s=22, zorder=3)
        draw_curve(right, accuracies[epoch], colour, str(epoch))
    left.set(xlabel="epoch of pretraining", ylabel="test top-1 (%)")
    right.set(xlabel="epoch of the linear classifier", ylabel="test top-1 (%)")
    left.set_title(f"last epoch of the classifier, every {spread}", fontsize=10)
    right.set_title(spread_note(list(accuracies.values()), spread), fontsize=10)
    tidy(left, ticks=6)
    if len(epochs) <= 8:
        left.set_xticks(epochs)
    tidy(right, ticks=6)
    figure.suptitle(name)
    figure.legend(
        *right.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(epochs)),
        frameon=False,
        title="epoch of pretraining: top-1 at the last epoch",
    )
    return figure


def accuracy_figure(accuracy: torch.Tensor, result: Mapping[str, Any]) -> Figure:
    """One evaluation: test top-1 (percent) over the classifier's epochs, a line for each trial of (trials, epochs), and the kNN's."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    trials = len(accuracy)
    for i, curve in enumerate(accuracy.tolist()):
        axes.plot(
            range(1, len(curve) + 1),
            curve,
            color=COLOURS["M3"],
            linewidth=1.3,
            alpha=0.8,
            marker="o" if len(curve) == 1 else None,
            label=f"linear, {trials} trial{'s' * (trials > 1)}: {result['linear_top1']:.1f} %"
            if i == 0
            else None,
        )
    axes.axhline(
        result["knn_top1"],
        color=OTHER_COLOURS[0],
        linestyle="--",
        label=f"kNN, k = {result['knn_k']}{', before the finetuning' * (result['protocol'] == 'finetune')}: {result['knn_top1']:.1f} %",
    )
    name = (
        "untrained"
        if result["encoder"] == "random"
        else Path(result["checkpoint"]).name
        if result["epoch"] is None
        else f"epoch {result['epoch']}"
    )
    axes.set(
        xlabel="epoch of the linear classifier",
        ylabel="test top-1 (%)",
        title=f"{result['arch']}, {name}, on {result['dataset']}",
    )
    tidy(axes)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    return figure


def confusion_figure(confusion: torch.Tensor, result: Mapping[str, Any]) -> Figure:
    """Counts (C, C), row the true class, as shares of the row in percent; numbers and names where there is room for them."""
    share = 100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    classes, names = len(share), result["class_names"]
    side = 8 if classes > 6 else 6
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    if classes <= 20:
        for i, row in enumerate(share.tolist()):
            for j, value in enumerate(row):
                if value >= 0.05:
                    axes.text(
                        j,
                        i,
                        f"{value:.0f}" if classes > 10 else f"{value:.1f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if value > 55 else "0.1",
                    )
    if classes <= 50:
        axes.set_xticks(
            range(classes),
            [name[:16] for name in names],
            rotation=90 if classes > 3 else 0,
            fontsize=9 if classes <= 20 else 6,
            parse_math=False,
        )
        axes.set_yticks(
            range(classes),
            [name[:16] for name in names],
            fontsize=9 if classes <= 20 else 6,
            parse_math=False,
        )
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(
        f"{result['arch']} on {result['dataset']}: share of the true class (%), top-1 {result['linear_top1']:.1f} %",
        fontsize=11,
    )
    figure.colorbar(image, ax=axes, shrink=0.6, label="%")
    return figure


def knn_figure(log: Mapping[str, Sequence[float]]) -> Figure:
    """kNN top-1 (percent) and effective rank while training, over steps: of the columns `step`, `knn_top1` and `effective_rank` of a log."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    seen = [
        (step, top1) for step, top1 in zip(log["step"], log["knn_top1"]) if not math.isnan(top1)
    ]
    left.plot(*zip(*seen), color=COLOURS["M3"], linewidth=1.6, marker="o", markersize=4)
    right.plot(log["step"], log["effective_rank"], color=COLOURS["M2"], linewidth=1.6)
    left.set(xlabel="step", ylabel="kNN top-1 (%)")
    right.set(xlabel="step", ylabel="effective rank of the queue")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        tidy(axes, ticks=5)
    return figure


def draw_curve(
    axes: Axes, accuracy: torch.Tensor, colour: str, label: str, linestyle: str = "-"
) -> None:
    """Mean over trials of (trials, epochs) as a line, its standard deviation as a band, the last value in the label."""
    mean = accuracy.double().mean(dim=0)
    std = accuracy.double().std(dim=0) if len(accuracy) > 1 else torch.zeros_like(mean)
    epochs = list(range(1, len(mean) + 1))
    text = f"{label}: {mean[-1]:.1f}" + (f" ± {std[-1]:.1f} %" if len(accuracy) > 1 else " %")
    axes.plot(
        epochs,
        mean.tolist(),
        color=colour,
        linewidth=1.8,
        linestyle=linestyle,
        marker="o" if len(epochs) == 1 else None,
        label=text,
    )
    axes.fill_between(
        epochs, (mean - std).tolist(), (mean + std).tolist(), color=colour, alpha=0.2, linewidth=0
    )


def spread_note(accuracies: Sequence[torch.Tensor], spread: str = "trial") -> str:
    counts = sorted({len(accuracy) for accuracy in accuracies})
    if counts[-1] == 1:
        return f"one {spread}"
    return f"mean ± standard deviation, {' to '.join(map(str, sorted({counts[0], counts[-1]})))} {spread}s"


def colour_of(version: str, versions: Mapping[str, Any]) -> str:
    """M0 to M3 have fixed colours; others take the remaining ones in their order."""
    others = [name for name in versions if name not in COLOURS]
    return COLOURS.get(version) or OTHER_COLOURS[others.index(version) % len(OTHER_COLOURS)]


def epoch_colours(count: int) -> list[str]:
    """So many colours from dark (early) to light (late)."""
    return [to_hex(colormaps["viridis"](0.85 * i / max(1, count - 1))) for i in range(count)]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over each value and up to `reach` values on either side."""
    sums = torch.cat(
        [torch.zeros(1, dtype=torch.float64), torch.tensor(values, dtype=torch.float64).cumsum(0)]
    )
    at = torch.arange(len(values))
    low, high = (at - reach).clamp_min(0), (at + reach + 1).clamp_max(len(values))
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def tidy(axes: Axes, ticks: int = 8) -> None:
    axes.xaxis.set_major_locator(
        MaxNLocator(ticks, integer=True, steps=[1, 2, 4, 5, 10] if ticks <= 4 else [1, 2, 5, 10])
    )
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------------ images, features and filters
#
# Each figure in two halves: `*_data` collects what is to be seen as small arrays, which np.savez keeps without pickle; `*_figure` draws them.


def views_data(
    dataset: Any, recipe: augment.Recipe, seed: int, count: int = 6
) -> dict[str, np.ndarray]:
    """`count` images of a data set that was opened with view "square", and two views of each by a training's recipe.

    images uint8 (n, 1 or 3, S, S), aspect float32 (n,), their original width / height; query, key uint8 (n, 3, crop, crop), not normalised;
    names (n,), of the classes, "" where there is none. The images are of different classes, as far as possible.
    """
    rows = of_different_classes(dataset.labels, count, utils.generator(seed, "views"))
    batch = dataset.fetch(rows)
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    views = {}
    for stream in (
        "query",
        "key",
    ):  # training's streams of random numbers, at a step that no run has
        view = augment.augment(
            batch.images, augment.draw(batch.aspect, recipe, utils.generator(seed, stream)), recipe
        )
        views[stream] = thumbnails((255 * (view * std + mean)).round().to(torch.uint8), VIEW_SIDE)
    return {
        "images": thumbnails(batch.images, VIEW_SIDE),
        "aspect": batch.aspect.numpy().astype(np.float32),
        **views,
        "names": class_names(dataset.classes, batch.labels),
    }


def views_figure(data: Mapping[str, np.ndarray]) -> Figure:
    """Of `views_data`: a column for each image, rows image, query view, key view."""
    images, names, aspect = data["images"], data["names"], data["aspect"].tolist()
    figure = Figure(
        figsize=(8, 0.2 + 0.25 * any(names) + 3 * 7 / max(6, len(images))), layout="constrained"
    )
    axes = figure.add_subplot()
    for y, pictures in enumerate((images, data["query"], data["key"])):
        for x, picture in enumerate(pictures):
            tile(axes, picture, 1.06 * x, 1.06 * y, aspect=aspect[x] if y == 0 else 1.0)
    axes.set(xlim=(-0.01, 1.06 * len(images) - 0.05), ylim=(3.13, -0.01))
    bare(axes)
    axes.set_yticks([0.5, 1.56, 2.62], ["image", "query\nview", "key\nview"], fontsize=10)
    axes.set_xticks(
        [1.06 * x + 0.5 for x in range(len(images))],
        [short(name, 90 // max(6, len(images))) for name in names],
        fontsize=9,
        parse_math=False,
    )
    return figure


def neighbours_data(
    train_images: Any,
    train_labels: torch.Tensor,
    test_images: Any,
    test_labels: torch.Tensor,
    features: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    classes: Sequence[str],
    seed: int,
    k: int = 6,
    count: int = 6,
) -> dict[str, np.ndarray]:
    """The k nearest training images by cosine of `count` test images of different classes, for each encoder.

    `features`: by name of the encoder, the training features (n, D) and test features (m, D); images: anything that an array of rows
    selects uint8 (.., 1 or 3, S, S) from. Returns, for E encoders and c test images: encoders (E,), their names; share float32 (E,), how
    many of the neighbours of all m test images are of the right class, percent; tests () m; bank () n; rows int32 (c,), labels int32 (c,), names (c,), images
    uint8 (c, 1 or 3, s, s) of the test images shown; neighbour_rows and neighbour_labels int32 (E, c, k), closest first, neighbour_images
    uint8 (E, c, k, 1 or 3, s, s). ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= len(train_labels):
        raise ValueError(
            f"k {k} must be from 1 to the number of training images, {len(train_labels)}"
        )
    rows = of_different_classes(test_labels, count, utils.generator(seed, "neighbours"))
    share, found = [], []
    for train_features, test_features in features.values():
        neighbours = torch.cat(
            [
                near
                for _, _, near in evaluate.nearest(train_features.float(), test_features.float(), k)
            ]
        ).cpu()
        share.append(
            100 * (train_labels[neighbours] == test_labels[:, None]).double().mean().item()
        )
        found.append(neighbours[rows])
    found = torch.stack(found)
    pictures = thumbnails(train_images[found.flatten().numpy()], NEIGHBOUR_SIDE)
    return {
        "encoders": np.array(list(features)),
        "share": np.array(share, np.float32),
        "tests": np.array(len(test_labels), np.int32),
        "bank": np.array(len(train_labels), np.int32),
        "rows": rows.numpy().astype(np.int32),
        "labels": test_labels[rows].numpy().astype(np.int32),
        "names": class_names(classes, test_labels[rows]),
        "images": thumbnails(test_images[rows.numpy()], NEIGHBOUR_SIDE),
        "neighbour_rows": found.numpy().astype(np.int32),
        "neighbour_labels": train_labels[found].numpy().astype(np.int32),
        "neighbour_images": pictures.reshape(*found.shape, *pictures.shape[1:]),
    }


def neighbours_figure(data: Mapping[str, np.ndarray]) -> Figure:
    """Of `neighbours_data`: a block for each encoder, in it each test image with its neighbours; one of another class is dashed and crossed."""
    encoders, share, images, labels, names = (
        data[name] for name in ("encoders", "share", "images", "labels", "names")
    )
    pictures, found = data["neighbour_images"], data["neighbour_labels"]
    k, lines = found.shape[2], math.ceil(len(images) / 2)
    width, height = 1.25 + 1.1 * k + 0.5, 1.48  # of a test image with its neighbours, in tiles
    inch = 7.8 / (2 * width - 0.6)
    figure = Figure(
        figsize=(8, 0.35 + len(encoders) * (0.5 + inch * height * lines)), layout="constrained"
    )
    for e, axes in enumerate(figure.subplots(len(encoders), 1, squeeze=False)[:, 0]):
        for i, name in enumerate(names):
            x, y = width * (i // lines), height * (i % lines)
            axes.text(x, y - 0.1, short(name, 40), fontsize=9, va="bottom", parse_math=False)
            tile(axes, images[i], x, y)
            for j in range(k):
                framed_tile(
                    axes,
                    pictures[e, i, j],
                    x + 1.25 + 1.1 * j,
                    y,
                    right=found[e, i, j] == labels[i],
                )
        axes.set(xlim=(-0.05, 2 * width - 0.55), ylim=(height * lines - 0.2, -0.42))
        bare(axes)
        axes.set_title(
            f"{encoders[e]}: {share[e]:.1f} % of the {k} nearest training images are of the test image's class",
            fontsize=10,
            loc="left",
            fontweight="bold",
            parse_math=False,
        )
    frames = [Rectangle((0, 0), 1, 1, fill=False, **frame(right)) for right in (True, False)]
    cross = Line2D(
        [],
        [],
        linestyle="none",
        marker="X",
        markersize=8,
        color=WRONG,
        markeredgecolor="white",
        markeredgewidth=0.8,
    )
    figure.legend(
        [frames[0], (frames[1], cross)],
        ["of the class", "of another class"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        title=f"test image, then its nearest of {int(data['bank']):,} training images; percentages over {int(data['tests']):,} test images",
    )
    return figure


def embedding_data(
    features: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    classes: Sequence[str],
    seed: int,
    count: int = 2000,
) -> dict[str, np.ndarray]:
    """A map in two dimensions of the features (m, D) of each encoder: t-SNE of the L2-normalised features, from their principal components.

    Of up to `count` labelled images drawn at random, the same for all encoders; of more than ten classes ten are drawn. Returns, for E encoders:
    encoders (E,), their names; points float16 (E, n, 2); rows int32 (n,), ascending; labels int16 (n,), as positions in classes (at most 10,).
    Raises UserError where scikit-learn is missing, or for fewer than 5 images.
    """
    try:
        from sklearn.manifold import TSNE  # an optional extra: nothing else needs it
    except ImportError:
        raise utils.UserError(
            "the map of the features needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    random = utils.generator(seed, "embedding")
    kept = labels[labels >= 0].unique()
    kept = kept[torch.randperm(len(kept), generator=random)[: len(CLASS_COLOURS)]].sort().values
    rows = torch.isin(labels, kept).nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=random)[:count]].sort().values
    kept = labels[rows].unique()  # of a rare class perhaps no image was drawn
    if len(rows) < 5:
        raise utils.UserError(
            f"{len(rows)} labelled test images are too few for a map of the features: 5 are needed"
        )
    points = []
    for values in features.values():
        tsne = TSNE(init="pca", perplexity=min(30, (len(rows) - 1) / 3), random_state=seed)
        points.append(tsne.fit_transform(F.normalize(values[rows].float(), dim=1).numpy()))
    return {
        "encoders": np.array(list(features)),
        "points": np.stack(points).astype(np.float16),
        "rows": rows.numpy().astype(np.int32),
        "labels": torch.searchsorted(kept, labels[rows]).numpy().astype(np.int16),
        "classes": class_names(classes, kept),
    }


def embedding_figure(data: Mapping[str, np.ndarray]) -> Figure:
    """Of `embedding_data`: a panel for each encoder, a point for each image, the names of the classes at their medians."""
    encoders, points, labels = data["encoders"], data["points"].astype(np.float32), data["labels"]
    names, panels = [short(name, 15) for name in data["classes"]], len(encoders)
    points -= (points.max(axis=1, keepdims=True) + points.min(axis=1, keepdims=True)) / 2
    width = 8 if panels > 1 else 6
    columns = min(
        5, int(width / (0.5 + 0.085 * max(map(len, names))))
    )  # of the legend, whose entries are about so wide, in inches
    figure = Figure(
        figsize=(width, 0.55 + 0.18 * math.ceil(len(names) / columns) + 7.8 / max(1.4, panels)),
        layout="constrained",
    )
    for e, axes in enumerate(figure.subplots(1, panels, squeeze=False)[0]):
        marks = [
            axes.scatter(
                *points[e, labels == c].T,
                s=12,
                color=CLASS_COLOURS[c],
                marker=CLASS_MARKERS[c],
                alpha=0.75,
                linewidths=0,
            )
            for c in range(len(names))
        ]
        reach = 1.04 * np.abs(points[e]).max()
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_color("0.8")
        axes.set_title(str(encoders[e]), parse_math=False)
    legend = figure.legend(
        marks,
        names,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        markerscale=2,
        handletextpad=0.2,
        title=f"t-SNE of the features of {len(labels):,} test images; distances have no unit",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    for e, axes in enumerate(figure.axes):
        label_places(
            figure,
            axes,
            np.stack([np.median(points[e, labels == c], axis=0) for c in range(len(names))]),
            names,
        )
    return figure


def filters_data(weights: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """First-layer filters (F, 3, k, k) of each encoder: encoders (E,), filters uint8 (E, F, 3, k, k), 128 for weight 0, each with its own scale."""
    filters = []
    for name, weight in weights.items():
        if weight.ndim != 4 or weight.shape[1] != 3:
            raise ValueError(
                f"the filters of {name!r} are {tuple(weight.shape)}, they must be (F, 3, k, k)"
            )
        weight = weight.detach().float().cpu()
        largest = (
            weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-20)
        )  # a filter of zeros is grey
        filters.append((128 + 127 * weight / largest).round().to(torch.uint8).numpy())
    return {"encoders": np.array(list(weights)), "filters": np.stack(filters)}


def filters_figure(data: Mapping[str, np.ndarray]) -> Figure:
    """Of `filters_data`: a panel for each encoder, the filters as tiles, row by row."""
    filters = data["filters"]
    panels, count, _, k, _ = filters.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(8 if panels > 1 else 5, 0.7 + 7.6 / max(1.6, panels) * rows / columns),
        layout="constrained",
    )
    for e, axes in enumerate(figure.subplots(1, panels, squeeze=False)[0]):
        for i, picture in enumerate(filters[e]):
            tile(axes, picture, 1.1 * (i % columns), 1.1 * (i // columns))
        axes.set(xlim=(-0.05, 1.1 * columns - 0.05), ylim=(1.1 * rows - 0.05, -0.05))
        bare(axes)
        axes.set_title(str(data["encoders"][e]), parse_math=False)
    figure.supxlabel(
        f"the {count} filters of the first layer, {k} × {k} px, each on its own scale; mid grey: weight 0",
        fontsize=10,
    )
    return figure


def of_different_classes(labels: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
    """Rows of `count` images drawn at random, no class twice before each has one, in the order of their classes."""
    first, more, seen = [], [], set()
    order = torch.randperm(len(labels), generator=random)
    for row, label in zip(order.tolist(), labels[order].tolist()):
        (more if label in seen else first).append(row)
        seen.add(label)
    return torch.tensor(
        sorted((first + more)[:count], key=lambda row: int(labels[row])), dtype=torch.long
    )


def thumbnails(images: torch.Tensor | np.ndarray, side: int) -> np.ndarray:
    """Images uint8 (n, C, S, S) of at most `side` px."""
    images = torch.as_tensor(images)
    return (
        (TF.resize(images, [side, side], antialias=True) if images.shape[-1] > side else images)
        .contiguous()
        .numpy()
    )


def class_names(classes: Sequence[str], labels: torch.Tensor) -> np.ndarray:
    """The names of the labels (n,), "" for -1, as an array of text, which needs no pickle."""
    return np.array(
        [classes[label] if label >= 0 else "" for label in labels.tolist()], dtype=np.str_
    )


def short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def tile(axes: Axes, picture: np.ndarray, x: float, y: float, aspect: float = 1.0) -> None:
    """Draw uint8 (1 or 3, S, S) in the unit square whose upper left corner is (x, y), as wide and high as its `aspect` allows."""
    width, height = min(1.0, aspect), min(1.0, 1 / aspect)
    left, top = x + (1 - width) / 2, y + (1 - height) / 2
    axes.imshow(
        np.broadcast_to(picture.transpose(1, 2, 0), (*picture.shape[1:], 3)),
        extent=(left, left + width, top + height, top),
    )


def framed_tile(axes: Axes, picture: np.ndarray, x: float, y: float, right: bool) -> None:
    """A tile with a frame that says whether it is right, in colour, line and by a cross."""
    tile(axes, picture, x, y)
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, **frame(right)))
    if not right:
        axes.plot(
            x + 0.86,
            y + 0.14,
            marker="X",
            markersize=8,
            color=WRONG,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )


def frame(right: bool) -> dict[str, Any]:
    return {
        "edgecolor": RIGHT if right else WRONG,
        "linestyle": "-" if right else (0, (2, 1)),
        "linewidth": 1.8,
    }


def bare(axes: Axes) -> None:
    """Axes that only place tiles: no frame, no ticks; names of columns stand above."""
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set(xticks=[], yticks=[])


def label_places(figure: Figure, axes: Axes, centres: np.ndarray, names: Sequence[str]) -> None:
    """Write names at points (n, 2) of the axes, or beside them where they would cover each other."""
    style = {
        "fontsize": 8,
        "fontweight": "bold",
        "ha": "center",
        "va": "center",
        "parse_math": False,
        "clip_on": True,
    }
    texts = [
        axes.text(
            *centre, name, path_effects=[withStroke(linewidth=2.5, foreground="white")], **style
        )
        for centre, name in zip(centres, names)
    ]
    figure.draw_without_rendering()  # only now the layout says how large a text is on its axes
    to_axes = axes.transData.inverted()
    boxes = [text.get_window_extent().transformed(to_axes) for text in texts]
    low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
    places = apart(
        centres, np.array([[1.08 * box.width, 1.25 * box.height] for box in boxes]), low, high
    )
    for text, place in zip(texts, places):
        text.set_position(place)


def apart(centres: np.ndarray, sizes: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Centres (n, 2) of boxes of sizes (n, 2), moved by little until no two overlap, within low (2,) and high (2,)."""
    places = np.array(centres, dtype=np.float64)
    for _ in range(1000):
        still = True
        for i, j in combinations(range(len(places)), 2):
            between = places[j] - places[i]
            overlap = (sizes[i] + sizes[j]) / 2 - np.abs(between)
            axis = int(overlap.argmin())
            if overlap[axis] > 1e-6 * sizes.max():
                push = overlap[axis] / 2 * (1 if between[axis] >= 0 else -1)
                places[i, axis] -= push
                places[j, axis] += push
                still = False
        places = places.clip(low + sizes / 2, high - sizes / 2)
        if still:
            break
    return places


if __name__ == "__main__":
    utils.main_guard(main)
