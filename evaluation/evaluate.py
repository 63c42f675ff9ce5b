"""One encoder, start to end: features, kNN, linear classifiers, and what they got right."""

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

import dataloader
import parallel
import utils
from config import TestSettings, pixels_of
from data.base import in_px
from evaluation import results
from evaluation.features import Extractor, Features, dataset_features
from evaluation.knn import knn_top1
from evaluation.linear import Classifiers, LinearSettings, check_choice, linear_evaluation
from evaluation.online import PROTOCOLS, protocol_of, train_online
from evaluation.results import Evaluation
from evaluation.subject import Subject
from evaluation.subsets import Images, Subset, open_images
from run import compute
from utils import UserError


def resolve(settings: TestSettings) -> TestSettings:
    """The settings with the protocol's own values, and a precision, in place of auto.

    Raises UserError if some contradict each other.
    """
    protocol, lrs, folds = protocol_of(settings), settings.linear_lrs, settings.folds
    if settings.finetune and settings.protocol != "cached":
        refuse_both("--finetune", f"--protocol {settings.protocol}")
    if folds and settings.train_fraction < 1:
        refuse_both("--folds", f"--train_fraction {settings.train_fraction:g}")
    if folds and settings.trials != "auto":
        refuse_both("--folds, one trial a fold,", f"--trials {settings.trials}")
    if protocol != "cached" and lrs and len(lrs) > 1:
        given = " ".join(map(str, lrs))
        raise UserError(f"--linear_lrs {given}: {protocol} takes one learning rate, cached chooses")
    auto, device = PROTOCOLS[protocol], compute.pick_device(settings.device)
    epochs, trials = settings.linear_epochs, settings.trials
    return replace(
        settings,
        linear_epochs=auto.epochs if epochs == "auto" else epochs,
        linear_lrs=lrs or auto.lrs,
        trials=auto.trials if trials == "auto" else trials,
        precision=pick_precision(settings, device),
    )


def pick_precision(settings: TestSettings, device: torch.device) -> str:
    """The encoder's precision; UserError for finetuning in fp16, whose gradients would vanish."""
    precision = compute.pick_precision(settings.precision, device)
    if settings.finetune and precision == "fp16":
        if settings.precision == "fp16":
            raise UserError("--finetune does not work with --precision fp16: use fp32")
        return "fp32"
    return precision


def refuse_both(one: str, other: str) -> NoReturn:
    raise UserError(f"{one} and {other} contradict each other: give one")


def evaluate(settings: TestSettings, subject: Subject, launch: parallel.Launch) -> Evaluation:
    """kNN and linear accuracy of an encoder, by settings without auto (`resolve`).

    Each device encodes its share of the images, and classifies its share of the test images by
    kNN; the linear classifiers are trained by every process alike. The first process writes the
    files. Raises UserError for unfit data or settings.
    """
    start = time.monotonic()
    check_launch(settings, launch)
    images = open_images(settings, subject.crop, pixels_of(subject.settings))
    check_sizes(settings, images, launch.processes)
    about = results.describe_data(settings, images)
    about |= results.describe_measure(settings, subject)
    about |= {"classes": len(images.classes), "resize": images.train.dataset.resize}
    about |= {"knn_k": min(settings.knn_k, images.smallest_fold)}
    folder = results.result_folder(settings, subject, about["dataset"])
    if launch.rank == 0:
        utils.check_writable(folder, "--encoder_output_root")
        announce(settings, images, launch, folder, about)

    extractor = build_extractor(settings, subject, launch)
    mirror = protocol_of(settings) == "cached" and settings.linear_views == 2
    device = torch.device("cpu") if launch.device.type == "mps" else launch.device  # float64
    train = dataset_features(extractor, images.train, mirror).to_device(device)
    test = dataset_features(extractor, images.test)
    banks = [train.take(fold) for fold in images.folds] or [train]

    vote = {"temperature": settings.knn_temperature, "weighted": settings.knn_weighted}
    knn = [knn_top1(bank, test, launch, k=about["knn_k"], **vote) for bank in banks]
    if protocol_of(settings) == "cached":
        parts = train_cached(settings, banks, test, len(images.classes))
    else:
        parts = train_on_crops(settings, extractor, images, test)

    predicted = torch.cat([part.predicted for part in parts])
    scores, confusion = score(predicted, test.labels, len(images.classes))
    heldout = [part.heldout_top1 for part in parts]
    result = {
        "linear_top1": scores.pop("linear_top1"),
        "knn_top1": statistics.fmean(knn),
        **({"knn_top1_std": statistics.stdev(knn)} if settings.folds else {}),
        **scores,
        "learning_rate": statistics.mode(part.learning_rate for part in parts),
        "heldout_top1": heldout if settings.folds else heldout[0],
        **about,
        "seconds": round(time.monotonic() - start, 1),
        "provenance": utils.provenance(),
    }
    accuracy = torch.cat([part.accuracy for part in parts])
    evaluation = Evaluation(folder, result, accuracy, confusion)
    if launch.rank == 0:
        results.save(evaluation, parts)
    return evaluation


def check_launch(settings: TestSettings, launch: parallel.Launch) -> None:
    """UserError for what cannot be done on several devices, or without data."""
    if settings.dataset_root is None:
        raise UserError("--dataset_root is missing: give labelled images, or the word shapes")
    if settings.download and launch.processes > 1:
        raise UserError("--download is for one process: fetch the data with plain python first")
    if settings.finetune and (launch.devices > 1 or parallel.several_processes()):
        raise UserError(
            "--finetune is for one device: use plain python, and CUDA_VISIBLE_DEVICES=0"
        )


def check_sizes(settings: TestSettings, images: Images, processes: int) -> None:
    """UserError, before any work, if there are too few images for it."""
    if len(images.classes) < 2:
        reason = f"has one class, {images.classes[0]}: an accuracy needs two or more"
        raise UserError(f"--dataset_root {settings.dataset_root!r} {reason}")
    counts = {"training images": len(images.train), "test images": len(images.test)}
    if protocol_of(settings) == "cached":
        labels = images.train.labels
        if len(settings.linear_lrs) > 1:
            for part in [labels[fold] for fold in images.folds] or [labels]:
                check_choice(part)
    else:
        batch = counts["images a batch"] = min(images.smallest_fold, settings.linear_batch_size)
        if settings.finetune and batch < 2:
            raise UserError(
                "--finetune needs batches of two images or more, for the batch norm: "
                "use a larger --linear_batch_size or --train_fraction"
            )
    for what, count in counts.items():
        if count < processes**2:
            raise UserError(
                f"{count} {what} are too few for {processes} processes: evaluate with plain python"
            )


def announce(
    settings: TestSettings,
    images: Images,
    launch: parallel.Launch,
    folder: Path,
    about: dict[str, Any],
) -> None:
    """Tell the user what is evaluated on what, and which result it replaces."""
    old, k, train = results.read_any(folder), about["knn_k"], images.train.dataset
    changed = [f"{x} {old[x]} -> {new}" for x, new in about.items() if old.get(x, new) != new]
    if changed:
        utils.say(f"note     replaces the result in {folder}: {', '.join(changed)}")
    if k < settings.knn_k:
        utils.warn(f"--knn_k {settings.knn_k} is more than the {k} training images: k = {k}")
    if launch.note:
        utils.say(f"note     {launch.note}")
    part = f"{len(images.train):,} of " if len(images.train) < len(train) else ""
    utils.say(
        f"data     {train.name}: {part}{len(train):,} training and {len(images.test):,} test "
        f"images, {about['classes']} classes, shorter side {train.resize} px, crop "
        f"{in_px(train.crop)} ({launch.name}, {settings.precision})"
    )


def build_extractor(settings: TestSettings, subject: Subject, launch: parallel.Launch) -> Extractor:
    return Extractor(
        subject.encoder,
        subject.settings.mean,
        subject.settings.std,
        launch,
        settings.precision,
        settings.eval_batch_size,
        settings.num_workers,
        not_finite=f"the features of {subject.record['checkpoint']} are not finite: "
        "its training diverged; choose an earlier epoch",
    )


def train_cached(
    settings: TestSettings, banks: list[Features], test: Features, classes: int
) -> list[Classifiers]:
    """Classifiers on stored features: one a fold, or all trials at once."""
    linear = LinearSettings(
        settings.linear_epochs, settings.linear_lrs, settings.linear_batch_size, settings.seed
    )
    if not settings.folds:
        return [linear_evaluation(banks[0], test, linear, range(settings.trials), classes)]
    return [linear_evaluation(bank, test, linear, [i], classes) for i, bank in enumerate(banks)]


def train_on_crops(
    settings: TestSettings, extractor: Extractor, images: Images, test: Features
) -> list[Classifiers]:
    """Classifiers on new random crops in each epoch: one a fold, or one a trial."""
    size = images.train.dataset.size
    square = dataloader.open_dataset(
        settings.dataset_root,
        "train",
        fit="square",
        resize="auto",
        crop=size.crop,
        pixels=size.pixels,
    )
    indices = images.train.indices
    parts = [indices[fold] for fold in images.folds] or [indices] * settings.trials
    return [
        train_online(settings, extractor, Subset(square, part), images.test, test, trial)
        for trial, part in enumerate(parts)
    ]


def score(predicted: Tensor, labels: Tensor, classes: int) -> tuple[dict[str, Any], Tensor]:
    """What T trials got right: of predicted classes (T, m, k), best first, and labels (m,).

    Returns linear_top1 (mean over trials, percent) and its std (sample deviation), linear_top1_ci95
    (Wilson's interval: what another draw of m test images may give), trials (top-1 of each),
    linear_top5 (where there are more than 5 classes) and per_class_top1 (None without test images);
    and the confusion (C, C): counts over all trials, row the true class, column the predicted.
    """
    hits = predicted == labels[:, None]  # T x m x k
    trials = (100 * hits[..., 0].double().mean(dim=1)).tolist()
    top1 = statistics.fmean(trials)
    pairs = labels.repeat(len(predicted)) * classes + predicted[..., 0].flatten()
    confusion = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    per_class = [(row[c], sum(row)) for c, row in enumerate(confusion.tolist())]
    scores = {
        "linear_top1": top1,
        "linear_top1_std": statistics.stdev(trials) if len(trials) > 1 else 0.0,
        "linear_top1_ci95": wilson_interval(top1 / 100, len(labels)),
        "trials": trials,
        "per_class_top1": [100 * right / n if n else None for right, n in per_class],
    }
    if classes > 5:
        scores["linear_top5"] = 100 * float(hits.any(dim=2).double().mean())
    return scores, confusion


def wilson_interval(p: float, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % interval of a share p seen in n independent draws, in percent (Wilson 1927)."""
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * bound / (1 + z * z / n) for bound in (centre - half, centre + half))
    return [max(0.0, low), min(100.0, high)]
