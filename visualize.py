"""Draw what the runs did, and what their encoders see.

    python visualize.py --dataset_root=ROOT/STL-10 --multiple_encoder_exp_version M1 M2 M3
    ... --encoder_exp_version M3 --multiple_pretrained_epoch 20 40 60     epochs of M3 as well
    ... --multiple_encoder_exp_version M1 M3 --seeds 0 1     runs M1-seed0, M1-seed1, M3-seed0, ...
    python visualize.py --redraw --result_path img           from img/data alone

Writes RESULT_PATH/ (default: output/DATASET_NAME/figures): loss.png, knn.png of runs with
--knn_every, accr_model_compare.png, with --multiple_pretrained_epoch accr_epoch_compare.png, and of
the last version views.png, neighbours.png, embedding.png (needs scikit-learn), filters.png; with
--report also report.html, one page with all of it; and RESULT_PATH/data/, from which they are
drawn. Results of test.py with the same settings are used; what is missing is evaluated first.
Without --dataset_root only what needs no images is drawn.
"""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import augment
import config
import dataloader
import parallel
from config import TestSettings, TrainSettings, VisualizeSettings
from data.base import height_width
from evaluation import compare
from evaluation.evaluate import evaluate, resolve
from evaluation.features import Extractor, dataset_features
from evaluation.knn import nearest
from evaluation.results import Evaluation, describe_data
from evaluation.subject import Subject, first_encoder, load_subject
from evaluation.subsets import Subset
from figures import confusion, curves, embedding, filters, neighbours, report, style, views
from run.curves import describe_differences, label_versions, read_knn, read_loss, read_settings
from run.flags import show
from run.folder import path_of
from utils import UserError, atomic_write, check_writable, generator, guard, provenance, say, warn

DRAW = {  # how each figure is drawn from its data
    "loss": curves.loss_figure,
    "knn": curves.knn_figure,
    "versions": curves.accuracy_by_version_figure,
    "epochs": curves.accuracy_by_epoch_figure,
    "views": views.views_figure,
    "neighbours": neighbours.neighbours_figure,
    "embedding": embedding.embedding_figure,
    "filters": filters.filters_figure,
}
FILES = {name: f"{name}.png" for name in DRAW}
FILES |= {"versions": "accr_model_compare.png", "epochs": "accr_epoch_compare.png"}
FLAGS = {"versions": "accuracy", "epochs": "accuracy", "knn": "loss"}  # of --figures
OF_IMAGES = ("views", "neighbours", "embedding")
BANK, QUERIES = 10_000, 2_000  # at most so many images are searched for neighbours, and drawn


def main(argv: list[str]) -> None:
    settings = resolve(config.parse(VisualizeSettings, argv, __doc__))
    default = Path(settings.encoder_output_root, settings.encoder_dataset_name, "figures")
    results = Path(settings.result_path or default)
    check_writable(results, "--result_path")
    flags = settings.figures or ["loss", "accuracy", *OF_IMAGES, "filters"]
    names = [name for name in DRAW if FLAGS.get(name, name) in flags]
    if settings.redraw:
        drawn = [name for name in names if data_path(results, name).exists()]
    else:
        data = collect(settings, names, shlex.join(["python", "visualize.py", *argv]))
        for name, content in data.items():
            style.write_data(data_path(results, name), content)
        drawn = [name for name in names if name in data]
    if settings.redraw and not drawn:
        raise UserError(f"--redraw finds nothing in {str(results / 'data')!r}: leave it out")
    files = {name: results / FILES[name] for name in drawn}
    pictures = {}
    for name in drawn:
        with style.reading(data_path(results, name), not settings.redraw) as content:
            pictures[files[name]] = style.render(DRAW[name](content))
    for path, png in pictures.items():  # now that all of them could be drawn
        atomic_write(path, lambda file, png=png: file.write(png))
    for name in names:
        if name not in drawn and (results / FILES[name]).exists():
            warn(f"{FILES[name]} in {results} is of an earlier call")
    written = [FILES[name] for name in drawn]
    if settings.report:
        with style.reading(data_path(results, "report"), not settings.redraw) as content:
            page = report.report_html(content, files).encode(errors="replace")
        atomic_write(results / "report.html", lambda file: file.write(page))
        written.append("report.html")
    say(f"written  {results}/{', '.join(written)}")


def data_path(results: Path, name: str) -> Path:
    return results / "data" / f"{name}.{'npz' if name in (*OF_IMAGES, 'filters') else 'json'}"


# ----------------------------------------------------------------- what the figures show


def read_comparison(settings: VisualizeSettings) -> compare.Comparison:
    """What the flags say."""
    version = settings.encoder_exp_version
    run = path_of(settings.encoder_output_root, settings.encoder_dataset_name, version)
    return compare.Comparison(
        folder=run.parent,
        versions=settings.multiple_encoder_exp_version or [version],
        epoch=settings.load_pretrained_epoch,
        version=version,
        epochs=sorted(settings.multiple_pretrained_epoch or []),
        seeds=settings.seeds or None,
    )


def check_flags(settings: VisualizeSettings, names: list[str]) -> None:
    if settings.pretrained is not None or settings.encoder == "random":
        remedy = "name runs with --multiple_encoder_exp_version"
        raise UserError(f"--pretrained and --encoder random are for test.py: {remedy}")
    if parallel.several_processes():
        remedy = "evaluate with torchrun and test.py first, its results are used"
        raise UserError(f"visualize.py runs as one process: {remedy}")
    of_images = [name for name in names if name in OF_IMAGES]
    if settings.dataset_root is None and settings.figures and of_images:
        raise UserError(f"--dataset_root is missing: {of_images[0]} is drawn from its images")


def collect(
    settings: VisualizeSettings, names: list[str], command: str
) -> dict[str, dict[str, Any]]:
    """The data of the figures; evaluates what has no result. Errors come before any work."""
    check_flags(settings, names)
    comparison = read_comparison(settings)
    if {*names} - {"loss", "knn"}:  # those need the log alone
        comparison.check()
    data: dict[str, dict[str, Any]] = {}
    missing = {}  # from the report, by figure: why
    if "loss" in names or "knn" in names:
        curves_of = collect_curves(comparison, settings.loss_exp_version)
        data |= {name: curves for name, curves in curves_of.items() if curves and name in names}
        missing["knn"] = "not all runs were trained with --knn_every"
    with parallel.open_launch(settings.device) as launch:
        if "versions" in names:
            try:
                data |= collect_accuracies(settings, comparison, launch)
            except UserError as error:
                if not settings.report or settings.dataset_root is not None:
                    raise
                missing["versions"] = str(error)
        if {*names} & {*OF_IMAGES, "filters"}:
            data |= collect_pictures(settings, names, comparison, launch)
    if settings.dataset_root is None:
        missing |= dict.fromkeys(OF_IMAGES, "no --dataset_root was given")
    missing["embedding"] = missing.get("embedding", "it needs scikit-learn and labelled images")
    if settings.report:
        missing = {name: why for name, why in missing.items() if name in names}
        data["report"] = collect_report(comparison, data.get("versions"), missing, command)
    return data


def collect_curves(
    comparison: compare.Comparison, versions: list[str] | None
) -> dict[str, dict[str, Any]]:
    """`loss` and `knn` of versions: of those given, or of the compared ones and M0 where it is."""
    if not versions:
        m0 = all((run / "log.csv").exists() for run in comparison.runs("M0"))
        versions = list(dict.fromkeys(["M0"] * m0 + comparison.versions))
    runs = {version: comparison.runs(version) for version in versions}
    labels = label_versions({name: folders[0] for name, folders in runs.items()})
    data: dict[str, dict[str, Any]] = {"loss": {}, "knn": {}}
    for version, folders in runs.items():
        mark = {"label": labels[version]}
        data["loss"][version] = [read_loss(folder) | mark for folder in folders]
        knn = [read_knn(folder) for folder in folders]
        if all(knn):
            data["knn"][version] = [curve | mark for curve in knn]
    return data


def collect_accuracies(
    settings: VisualizeSettings, comparison: compare.Comparison, launch: parallel.Launch
) -> dict[str, dict[str, Any]]:
    """The accuracies of versions, and those of epochs if they are compared; prints the table."""
    data = describe_data(settings) if settings.dataset_root is not None else None

    def measure(settings: TestSettings, subject: Subject) -> Evaluation:
        new = evaluate(settings, subject, launch)
        style.save(new.folder / "accuracy.png", curves.accuracy_figure(new.accuracy, new.result))
        picture = confusion.confusion_figure(new.confusion, new.result)
        style.save(new.folder / "confusion.png", picture)
        return new

    def evaluations(version: str, epoch: int | None) -> list[Evaluation]:
        runs = comparison.runs(version)
        return compare.evaluate_runs(runs, epoch, settings, data, measure)

    of_versions = {name: evaluations(name, comparison.epoch) for name in comparison.versions}
    of_epochs = {str(e): evaluations(comparison.version, e) for e in comparison.epochs}
    untrained = compare.find_untrained(of_versions.values())
    table = compare.tabulate(of_versions | ({"untrained": untrained} if untrained else {}))
    say(compare.format_table(table))
    if untrained:
        say(compare.describe_gain(table))
    spread = "seed" if len(settings.seeds or []) > 1 else "trial"
    collected = {}
    collected["versions"] = {
        "dataset": compare.name_data(of_versions.values()),
        "spread": spread,
        "accuracy": {name: compare.curves_of(found) for name, found in of_versions.items()},
        "untrained": compare.curves_of(untrained) if untrained else None,
        "labels": label_versions({name: comparison.runs(name)[0] for name in of_versions}),
        "table": table,
    }
    if of_epochs:
        dataset = style.title_of(compare.name_data(of_epochs.values()))
        collected["epochs"] = {
            "name": f"{comparison.version} on {dataset}",
            "spread": spread,
            "accuracy": {epoch: compare.curves_of(found) for epoch, found in of_epochs.items()},
        }
    return collected


def collect_pictures(
    settings: VisualizeSettings,
    names: list[str],
    comparison: compare.Comparison,
    launch: parallel.Launch,
) -> dict[str, dict[str, np.ndarray]]:
    """What the last version's encoder sees, beside the untrained one."""
    run, data = comparison.runs(comparison.versions[-1])[0], {}
    subject = load_subject(replace(settings, encoder_exp_version=run.name))
    encoders = {"trained": subject.encoder, "untrained": first_encoder(subject.settings, run)}
    if "filters" in names:
        weights = {name: first_filters(encoder) for name, encoder in encoders.items()}
        data["filters"] = filters.filters_data(weights)
    if settings.dataset_root is not None and "views" in names:
        data["views"] = collect_views(settings, subject.settings)
    if settings.dataset_root is not None and {"neighbours", "embedding"} & {*names}:
        data |= collect_features(settings, names, subject, encoders, launch)
    return data


def first_filters(encoder: nn.Module) -> torch.Tensor:
    return next(m.weight for m in encoder.modules() if isinstance(m, nn.Conv2d))


def collect_report(
    comparison: compare.Comparison,
    results: Mapping[str, Any] | None,
    missing: dict[str, str],
    command: str,
) -> dict[str, Any]:
    """What report.html says beside the figures."""
    runs = {version: comparison.runs(version) for version in comparison.versions}
    settings = {folder: read_settings(folder) for folders in runs.values() for folder in folders}
    settings = {folder: values for folder, values in settings.items() if values}
    training = [config.words_of(TrainSettings, values) for values in settings.values()]
    made_by = provenance()
    versions = f"torch {made_by['torch']}, Python {made_by['python']}, {made_by['machine']}"
    return {
        "dataset": results and results["dataset"],
        "columns": list(compare.COLUMNS),
        "table": compare.cells_of(results["table"]) if results else {},
        "differences": describe_differences({v: folders[0] for v, folders in runs.items()}),
        "settings": {
            folder.name: "  ".join(f"{name}={show(value)}" for name, value in values.items())
            for folder, values in settings.items()
        },
        "commands": [*(shlex.join(["python", "train.py", *words]) for words in training), command],
        "made_by": f"Commit {made_by['commit']}{' (changed)' * made_by['changed']}, {versions}.",
        "missing": missing,
    }


def collect_views(settings: VisualizeSettings, training: TrainSettings) -> dict[str, np.ndarray]:
    """Images of different classes, and two views of each, as a run makes them."""
    resize = training.resize
    if resize != "auto" and resize < max(height_width(training.crop)):
        resize = "auto"  # the run's own images were smaller than its crop, these may be larger
    size = {"fit": "square", "resize": resize, "crop": training.crop}
    pixels = config.pixels_of(training)
    images = dataloader.open_dataset(settings.dataset_root, "train", **size, pixels=pixels)
    chosen = style.choose_images(images.labels, 6, generator(settings.seed, "views"))
    batch = images.fetch(chosen)
    grid = images.resize if images.native == images.resize else None
    recipe = augment.training_recipe(training, grid)
    randoms = [generator(settings.seed, stream) for stream in ("query", "key")]
    rows = slice(0, len(chosen))
    return views.views_data(
        batch.images,
        batch.aspect,
        augment.views(batch.images, batch.aspect, recipe, randoms, len(chosen), rows),
        mean=training.mean,
        std=training.std,
        names=style.class_names(images.classes, batch.labels),
    )


def collect_features(
    settings: VisualizeSettings,
    names: list[str],
    subject: Subject,
    encoders: Mapping[str, nn.Module],
    launch: parallel.Launch,
) -> dict[str, dict[str, np.ndarray]]:
    """The neighbours of test images, and a map of their features."""
    bank = draw_images(settings, "train", subject, BANK)
    queries = draw_images(settings, "test", subject, QUERIES)
    near, points, data = {}, {}, {}
    for name, encoder in encoders.items():
        extractor = Extractor(
            encoder,
            subject.settings.mean,
            subject.settings.std,
            launch,
            settings.precision,
            batch_size=settings.eval_batch_size,
            num_workers=settings.num_workers,
        )
        points[name] = dataset_features(extractor, queries).images
        blocks = nearest(dataset_features(extractor, bank).images, points[name], min(6, len(bank)))
        near[name] = torch.cat([rows for _, _, rows in blocks])
    if "neighbours" in names:
        data["neighbours"] = neighbours.neighbours_data(near, bank, queries, settings.seed)
    if "embedding" in names:
        given = points, queries.labels, queries.dataset.classes, settings.seed
        try:
            data["embedding"] = embedding.embedding_data(*given)
        except UserError as error:
            if settings.figures is not None:
                raise
            warn(f"embedding.png is left out: {error}")
    return data


def draw_images(settings: VisualizeSettings, split: str, subject: Subject, count: int) -> Subset:
    """At most `count` random images of a split."""
    size = {"fit": "center", "resize": settings.resize, "crop": subject.crop}
    pixels = config.pixels_of(subject.settings)
    dataset = dataloader.open_dataset(settings.dataset_root, split, **size, pixels=pixels)
    random = generator(settings.seed, f"pictures {split}")
    indices = torch.randperm(len(dataset), generator=random)[:count]
    return Subset(dataset, indices.sort().values)


if __name__ == "__main__":
    guard(main)
