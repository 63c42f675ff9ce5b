"""Evaluation of a frozen encoder: pooled features once per image and view, a kNN vote, a linear classifier.

`evaluate_subject` runs all of it on one encoder and leaves the result in the run's folder; the parts stand alone above it.
"""

import contextlib
import copy
import functools
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import augment
import dataloader
import model
import parallel
import utils

SAME_MEASURE = (
    "dataset",
    "dataset_root",
    "train_images",
    "test_images",
    "arch",
    "crop",
    "asked_resize",
    "precision",
    "protocol",
    "train_fraction",
    "folds",
    "finetune_lr",
    "linear_epochs",
    "linear_lrs",
    "linear_batch_size",
    "linear_views",
    "asked_knn_k",
    "knn_temperature",
    "knn_weighted",
    "seed",
)
CROP_BATCH = 256  # images whose stored random crops are drawn together
BLOCK = 1 << 24  # numbers in the largest temporary matrix: 64 MB of float32


# ----------------------------------------------------------------------------------------------------------------------- features


@contextlib.contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; the modes as they were after. RuntimeError if a parameter or buffer changed by one bit."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
    changed = [
        name
        for name, value in encoder.state_dict().items()
        if not torch.equal(_bits(value), _bits(before[name]))
    ]
    if changed:
        raise RuntimeError(
            f"the frozen encoder changed while its features were read: {', '.join(changed[:3])} ({len(changed)} tensors)"
        )


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1).view(torch.uint8)  # NaN equals itself here


Views = tuple[
    list[torch.Tensor], torch.Tensor
]  # of a batch: one or more (N, 3, H, W), and labels (N,)


def extract_features(
    encoder: nn.Module,
    batches: Iterable[Views],
    launch: parallel.OneDevice,
    precision: str = "fp32",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features float32 (V, n, D) of V views of n images, and labels (n,), on the CPU.

    `encoder`, on the devices of `launch`, maps (N, 3, H, W) to (N, D). It is used in eval mode and must come out unchanged, bit for bit (RuntimeError).
    """
    features, labels = [], []
    with frozen(encoder):
        for views, batch_labels in batches:
            with parallel.autocast(precision, launch.device):
                out = torch.stack([launch.encode(encoder, view) for view in views])  # V x N x D
            features.append(out.float().cpu())
            labels.append(batch_labels.cpu())
    return torch.cat(features, dim=1), torch.cat(labels)


def whole_images(
    batches: Iterable[dataloader.Batch],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    mirror: bool = False,
) -> Iterator[Views]:
    """The images of batches, normalised, and (`mirror`) their mirror images."""
    for batch in batches:
        images = augment.normalize(
            batch.images.to(device, non_blocking=True), mean, std, dtype=dtype
        )
        yield ([images, images.flip(-1)] if mirror else [images]), batch.labels


def crop_recipe(
    crop: int, mean: Sequence[float], std: Sequence[float], smallest: float = 0.2
) -> augment.Recipe:
    """Random crops and flips, no colours: what classifiers are trained on."""
    return augment.recipe(
        "v1",
        crop,
        scale=(smallest, 1.0),
        jitter_p=0.0,
        grayscale=0.0,
        mean=tuple(mean),
        std=tuple(std),
    )


# ---------------------------------------------------------------------------------------------------------------------------- kNN


@torch.no_grad()
def nearest(
    bank: torch.Tensor, queries: torch.Tensor, k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The k nearest by cosine of the bank (n, D) to each query (m, D), in blocks of b queries, on the device of the bank: yields the places of the
    queries (b,), similarities (b, k), the nearest first, and rows of the bank (b, k)."""
    bank = F.normalize(bank, dim=1)
    for rows in torch.arange(len(queries)).split(max(1, BLOCK // len(bank))):
        yield rows, *(F.normalize(queries[rows].to(bank.device), dim=1) @ bank.T).topk(k, dim=1)


@torch.no_grad()
def knn_hits(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    k: int = 200,
    temperature: float = 0.07,
    weighted: bool = True,
) -> int:
    """How many test images a vote of the k nearest training features by cosine gets right, on the device of `train_features` (n, D).

    A neighbour of similarity s has weight exp(s / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4), or 1 if not `weighted`;
    a draw goes to the lower class. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(
            f"k {k} must be from 1 to the number of training images, {len(train_features)}"
        )
    hits, classes, bank_labels = (
        0,
        int(train_labels.max()) + 1,
        train_labels.to(train_features.device),
    )
    for rows, similarity, neighbours in nearest(train_features, test_features, k):
        # dividing all weights of a row by the largest changes no vote and cannot overflow
        weights = (
            torch.exp((similarity - similarity[:, :1]) / temperature)
            if weighted
            else torch.ones_like(similarity)
        )
        votes = weights.new_zeros(len(rows), classes).scatter_add_(
            1, bank_labels[neighbours], weights
        )
        hits += int((votes.argmax(dim=1).cpu() == test_labels[rows]).sum())
    return hits


# -------------------------------------------------------------------------------------------------------------- linear classifier


def standardisation(views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (D,) of features (V, n, D); a feature that is constant has deviation 1."""
    flat = views.flatten(0, 1)
    blocks = flat.split(
        4096
    )  # a row of ones times a block is its sum, much faster than a reduction over the first dimension
    mean = sum((block.new_ones(len(block)) @ block).double() for block in blocks) / len(flat)
    std = (
        sum(
            (block.new_ones(len(block)) @ (block - mean.to(block)).square()).double()
            for block in blocks
        )
        / len(flat)
    ).sqrt()
    return mean.to(flat), torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)).to(flat)


def train_linear(
    views: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    lrs: Sequence[float],
    trials: Sequence[int],
    epochs: int,
    seed: int = 0,
    batch_size: int = 256,
    rows: torch.Tensor | None = None,
    classes: int | None = None,
    momentum: float = 0.9,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax regression on standardised features, for all T trials and L learning rates at once, by SGD with a cosine schedule.

    `views` (V, n, D) are the training features; `rows` restricts the training to some of the n images. An epoch meets each image once, in
    one of its views drawn at random: the cost of one view with the variety of all. A trial is a number that names its first weights
    and its order, so a classifier does not depend on what is trained beside it. The last, incomplete batch of an epoch is dropped.
    Returns weights (T, L, C, D) and biases (T, L, C) for features as they are, not standardised, and top-1 in percent on the test
    features (m, D) after each epoch (T, L, epochs).
    """
    num_views, n, width = views.shape
    T, L, C, device = len(trials), len(lrs), classes or int(labels.max()) + 1, views.device
    rows = torch.arange(n) if rows is None else rows.cpu()
    batch = min(batch_size, len(rows))
    steps = len(rows) // batch
    flat, labels, test_features, test_labels = (
        views.reshape(-1, width),
        labels.to(device),
        test_features.to(device),
        test_labels.to(device),
    )
    mean, std = standardisation(views)
    inverse = 1 / std
    first = torch.stack(
        [
            torch.randn(width, C, generator=utils.generator(seed, "linear weights", t))
            for t in trials
        ]
    )
    weight = 0.01 * first.repeat(1, 1, L).to(flat)  # T x D x LC
    bias = torch.zeros(T, 1, L * C).to(flat)  # T x 1 x LC
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = torch.tensor(lrs, dtype=torch.float64).repeat_interleave(C).to(flat)  # LC
    accuracy = torch.zeros(T, L, epochs, dtype=torch.float64)
    for epoch in utils.progress(range(epochs), f"linear classifier ({T * L} at once)"):
        order = torch.stack([_epoch_order(rows, n, num_views, seed, t, epoch) for t in trials]).to(
            device
        )
        for step in range(steps):
            now = order[:, step * batch : (step + 1) * batch].reshape(-1)
            x = flat.index_select(0, now).sub_(mean).mul_(inverse).view(T, batch, width)
            error = torch.baddbmm(bias, x, weight).view(T, batch, L, C).softmax(dim=-1)
            target = labels[now % n].view(T, batch, 1, 1).expand(T, batch, L, 1)
            error.scatter_add_(
                3, target, torch.full_like(error[..., :1], -1.0)
            )  # gradient of the cross-entropy: softmax - one-hot
            error = error.view(T, batch, L * C) / batch
            weight_velocity = torch.baddbmm(weight_velocity, x.mT, error, beta=momentum)
            bias_velocity = momentum * bias_velocity + error.sum(dim=1, keepdim=True)
            rate = rates * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            weight.sub_(rate * weight_velocity)
            bias.sub_(rate * bias_velocity)
        plain = _plain(weight, bias, mean, std, L)
        accuracy[..., epoch] = _top1(*plain, test_features, test_labels)
    return *plain, accuracy


def _epoch_order(
    rows: torch.Tensor, n: int, num_views: int, seed: int, trial: int, epoch: int
) -> torch.Tensor:
    """The order of an epoch, as rows of the flattened views (V n, D): one view of each image."""
    random = utils.generator(seed, f"linear order {trial}", epoch)
    shuffled = rows[torch.randperm(len(rows), generator=random)]
    return shuffled + n * torch.randint(num_views, (len(rows),), generator=random)


def _plain(
    weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, L: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (T, L, C, D) and biases (T, L, C) for raw features: the standardisation moved into the classifier."""
    T, D, _ = weight.shape
    scaled = weight.double() / std.double()[:, None]
    shifted = bias[:, 0].double() - mean.double() @ scaled
    return scaled.view(T, D, L, -1).permute(0, 2, 3, 1).to(weight.dtype).contiguous(), shifted.view(
        T, L, -1
    ).to(weight.dtype)


def _top1(
    weight: torch.Tensor, bias: torch.Tensor, features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Top-1 in percent (T, L) of classifiers (T, L, C, D) on features (m, D), in blocks."""
    T, L, C, D = weight.shape
    stacked, hits = (
        weight.view(-1, D).T,
        torch.zeros(T, L, dtype=torch.long, device=features.device),
    )
    for part in torch.arange(len(features), device=features.device).split(
        max(1, BLOCK // (T * L * C))
    ):
        logits = torch.addmm(bias.view(-1), features[part], stacked).view(-1, T, L, C)
        hits += (logits.argmax(dim=-1) == labels[part, None, None]).sum(dim=0)
    return 100.0 * hits.cpu().double() / len(features)


def held_out(
    labels: torch.Tensor, fraction: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices to train on and to choose on, stratified: `fraction` of each class, at least one image; a class of one image stays in training."""
    labels = labels.cpu()
    kept, held = [], []
    for c in labels.unique():
        members = (labels == c).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept), torch.cat(held)


def stratified(labels: torch.Tensor, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """Indices of `fraction` of each class (n,), at least one image of each, in rising order; all of them for 1."""
    parts = [
        members[torch.randperm(len(members), generator=generator)][
            : max(1, round(fraction * len(members)))
        ]
        for c in labels.unique()
        for members in [(labels == c).nonzero().flatten()]
    ]
    return torch.cat(parts).sort().values


def check_choice(labels: torch.Tensor) -> None:
    """UserError if no class has two images, so that none can be held out to choose a learning rate on."""
    if int(torch.bincount(labels.cpu()).max()) < 2:
        raise utils.UserError(
            f"{len(labels)} training images, one for each class, leave none to choose a learning rate on: give one --linear_lrs"
        )


def linear_evaluation(
    views: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    epochs: int,
    lrs: Sequence[float],
    trials: Sequence[int],
    seed: int = 0,
    batch_size: int = 256,
    classes: int | None = None,
) -> dict[str, Any]:
    """A linear classifier on frozen features; the test split decides nothing.

    `views` (V, n, D) or (n, D) are training features, `test_features` (m, D). The learning rate is the one with the highest accuracy on a stratified
    tenth of the training images that the classifiers did not see; then a classifier for each trial is fitted on all of them.
    Returns learning_rate, heldout_top1 (of each learning rate), accuracy (T, epochs: top-1 in percent), predicted (T, m, 5: the classes with the highest
    logits after the last epoch), weight (T, C, D) and bias (T, C) for the features as they are.
    Raises UserError if there is a choice to make and no class has two images, or if it diverges.
    """
    views = views if views.dim() == 3 else views[None]
    options = {"epochs": epochs, "seed": seed, "batch_size": batch_size, "classes": classes}
    heldout: dict[str, float] = {}
    best = float(lrs[0])
    if len(lrs) > 1:
        check_choice(labels)
        kept, held = held_out(labels, 0.1, utils.generator(seed, "linear held out"))
        _, _, chosen = train_linear(
            views,
            labels,
            views[0, held.to(views.device)],
            labels[held],
            lrs=lrs,
            trials=[0],
            rows=kept,
            **options,
        )
        heldout = {f"{lr:g}": round(float(top1), 4) for lr, top1 in zip(lrs, chosen[0, :, -1])}
        best = float(lrs[int(chosen[0, :, -1].argmax())])
    weight, bias, accuracy = train_linear(
        views, labels, test_features, test_labels, lrs=[best], trials=trials, **options
    )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise utils.UserError(
            f"the linear classifier diverged at learning rate {best:g}: give smaller --linear_lrs"
        )
    predicted = torch.stack(
        [top_classes(test_features, w.cpu(), b.cpu()) for w, b in zip(weight[:, 0], bias[:, 0])]
    )
    accuracy[:, 0, -1] = 100 * (predicted[..., 0] == test_labels).double().mean(
        dim=1
    )  # the same numbers everywhere, whatever the device's rounding
    return {
        "learning_rate": best,
        "heldout_top1": heldout,
        "accuracy": accuracy[:, 0],
        "predicted": predicted,
        "weight": weight[:, 0].cpu(),
        "bias": bias[:, 0].cpu(),
    }


@torch.no_grad()
def top_classes(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int = 5
) -> torch.Tensor:
    """The k classes (m, k) (fewer if there are no more) with the highest logits of a classifier (C, D), (C,) on features (m, D), best first, in blocks."""
    return torch.cat(
        [
            F.linear(part, weight, bias).topk(min(k, len(bias)), dim=1).indices
            for part in features.split(max(1, BLOCK // len(bias)))
        ]
    )


# The online protocols train on the encoder's output for new random crops in each epoch; the share of the learning rate by the part of training that is done.
ORIGINAL, REFERENCE = (
    (lambda done: 0.2 ** int(5 * done + 1e-9)),
    (lambda done: 0.1 ** ((done >= 0.6) + (done >= 0.8))),
)
PROTOCOLS = {  # epochs, learning rates, trials, schedule, smallest area of a crop
    "cached": (30, [0.001, 0.003, 0.01, 0.03, 0.1, 0.3], 3, None, 0.2),
    "original": (100, [10.0], 1, ORIGINAL, 0.2),
    "reference": (100, [30.0], 1, REFERENCE, 0.08),  # torchvision's RandomResizedCrop
    "finetune": (30, [0.1], 1, lambda done: 0.5 * (1 + math.cos(math.pi * done)), 0.2),
}


def train_on_crops(
    cfg: SimpleNamespace,
    encoder: nn.Module,
    dataset: Any,
    recipe: augment.Recipe,
    rows: torch.Tensor,
    trial: int,
    test_features: Callable[[], torch.Tensor],
    test_labels: torch.Tensor,
    launch: parallel.OneDevice,
) -> dict[str, Any]:
    """A linear classifier on the encoder's output for random views of `rows` of a data set (view "square"), by SGD with momentum 0.9.

    With `cfg.finetune` the encoder is trained, too, in train mode, at `cfg.finetune_lr`; else it is frozen, in eval mode, and must come out
    unchanged, bit for bit (RuntimeError). Every process encodes its share of a batch, and all train the same classifier.
    Returns accuracy (epochs,), predicted (m, 5), weight (C, D) and bias (C,) as `linear_evaluation`. UserError if it diverges.
    """
    (lr,), rate, device, precision = (
        cfg.linear_lrs,
        PROTOCOLS[cfg.protocol][3],
        launch.device,
        cfg.precision,
    )
    batch = min(cfg.linear_batch_size, len(rows))
    tests = test_features()
    classifier = nn.Linear(tests.shape[1], len(dataset.classes)).to(device)
    classifier.weight.data = 0.01 * torch.randn(
        classifier.weight.shape, generator=utils.generator(cfg.seed, "linear weights", trial)
    ).to(device)
    classifier.bias.data.zero_()
    groups = [{"params": classifier.parameters(), "lr": lr}] + (
        [{"params": encoder.parameters(), "lr": cfg.finetune_lr}] if cfg.finetune else []
    )
    optimizer, accuracy, predicted = (
        torch.optim.SGD(groups, momentum=0.9),
        torch.zeros(cfg.linear_epochs, dtype=torch.float64),
        torch.empty(0),
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    own = launch.rows(batch)
    with contextlib.nullcontext() if cfg.finetune else frozen(encoder), torch.enable_grad():
        for epoch in utils.progress(
            range(cfg.linear_epochs), "linear classifier" if not cfg.finetune else "finetuning"
        ):
            encoder.train(cfg.finetune)
            for group, start in zip(optimizer.param_groups, rates):
                group["lr"] = start * rate(epoch / cfg.linear_epochs)
            order = rows[
                torch.randperm(
                    len(rows), generator=utils.generator(cfg.seed, f"linear order {trial}", epoch)
                )
            ]
            batches = [
                order[i : i + batch][own] for i in range(0, len(order) - batch + 1, batch)
            ]  # the last, incomplete batch is dropped
            for step, part in enumerate(
                dataloader.iterate(
                    dataset, batches, num_workers=cfg.num_workers, failures=failures_of(dataset)
                )
            ):
                random = utils.generator(
                    cfg.seed, f"linear views {trial}", epoch * len(batches) + step
                )
                (x,) = augment.views(
                    part.images.to(device, non_blocking=True),
                    part.aspect,
                    recipe,
                    [random],
                    batch,
                    own,
                    parallel.precision_dtype(precision),
                )
                with torch.set_grad_enabled(cfg.finetune), parallel.autocast(precision, device):
                    out = launch.encode(encoder, x)
                labels = launch.gather(part.labels.to(device, non_blocking=True), batch)
                loss = F.cross_entropy(classifier(launch.gather(out.float(), batch)), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            trained = [classifier, encoder] if cfg.finetune else [classifier]
            if not all(
                value.isfinite().all()
                for module in trained
                for value in module.state_dict().values()
            ):
                raise utils.UserError(
                    f"the linear classifier diverged at learning rate {lr:g}: give smaller --linear_lrs"
                    + " and --finetune_lr" * cfg.finetune
                )
            if cfg.finetune:
                tests = test_features()
            predicted = top_classes(
                tests, classifier.weight.detach().cpu(), classifier.bias.detach().cpu()
            )
            accuracy[epoch] = 100 * (predicted[:, 0] == test_labels).double().mean()
    return {
        "accuracy": accuracy,
        "predicted": predicted,
        "weight": classifier.weight.detach().cpu(),
        "bias": classifier.bias.detach().cpu(),
    }


def scores(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, Any]:
    """What T classifiers got right: predicted classes (T, m, k), best first, and labels (m,).

    linear_top1 (mean over trials, percent), linear_top1_std (sample deviation over them), trials (top-1 of each), linear_top1_ci95 (Wilson's interval of the
    mean: what another draw of m test images may give), linear_top5 (where there are more than 5 classes), per_class_top1 (C; null for a class
    without test images), and confusion (C x C, counts over all trials: row the true class, column the predicted).
    """
    hits = predicted == labels[:, None]  # T x m x k
    trials = (100 * hits[..., 0].double().mean(dim=1)).tolist()
    top1 = statistics.fmean(trials)
    pairs = labels.repeat(len(predicted)) * classes + predicted[..., 0].flatten()
    confusion = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    per_class = [
        100 * int(row[c]) / int(row.sum()) if row.sum() else None for c, row in enumerate(confusion)
    ]
    top5 = {"linear_top5": 100 * float(hits.any(dim=2).double().mean())} if classes > 5 else {}
    return {
        "linear_top1": top1,
        "linear_top1_std": statistics.stdev(trials) if len(trials) > 1 else 0.0,
        "linear_top1_ci95": wilson(top1 / 100, len(labels)),
        "trials": trials,
        **top5,
        "per_class_top1": per_class,
        "confusion": confusion,
    }


def wilson(p: float, n: int, z: float = 1.959964) -> list[float]:
    """Wilson's 95 % interval of a share p seen in n independent draws, in percent (Wilson 1927)."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [
        max(0.0, 100 * (centre - half) / (1 + z * z / n)),
        min(100.0, 100 * (centre + half) / (1 + z * z / n)),
    ]


# -------------------------------------------------------------------------------------------------------- one encoder, start to end


def settled(cfg: SimpleNamespace) -> SimpleNamespace:
    """The configuration of an evaluation without its `auto`s; UserError for settings that contradict each other."""
    cfg = SimpleNamespace(**vars(cfg))
    if cfg.finetune and cfg.protocol != "cached":
        raise utils.UserError(
            f"--finetune and --protocol {cfg.protocol} contradict each other: give one"
        )
    if cfg.folds and cfg.train_fraction < 1:
        raise utils.UserError(
            f"--folds and --train_fraction {cfg.train_fraction:g} contradict each other: give one"
        )
    if cfg.folds and cfg.trials != "auto":
        raise utils.UserError(
            f"--folds trains a classifier on each of the ten folds: leave --trials {cfg.trials} out"
        )
    cfg.protocol = "finetune" if cfg.finetune else cfg.protocol
    epochs, lrs, trials, *_ = PROTOCOLS[cfg.protocol]
    cfg.linear_epochs = epochs if cfg.linear_epochs == "auto" else cfg.linear_epochs
    cfg.linear_lrs = lrs if "auto" in cfg.linear_lrs else cfg.linear_lrs
    cfg.trials = trials if cfg.trials == "auto" else cfg.trials
    if cfg.protocol != "cached" and len(cfg.linear_lrs) > 1:
        raise utils.UserError(
            f"--linear_lrs {' '.join(map(str, cfg.linear_lrs))}: {'--finetune' if cfg.finetune else f'--protocol {cfg.protocol}'} takes one learning rate, "
            "only cached chooses"
        )
    return cfg


@dataclass
class Subject:
    """An encoder to evaluate, and where its results go: `home`/`stem`; `foreign`: a file outside of the run; `found`: what the file holds, where that is news."""

    encoder: nn.Module
    home: Path
    stem: str
    foreign: bool
    found: str
    crop: int
    mean: list[float]
    std: list[float]
    record: dict[
        str, Any
    ]  # what result.json says of it: encoder, arch, checkpoint, epoch, step, first_weights
    config: dict[str, Any] = field(default_factory=dict)  # of its training

    @property
    def width(self) -> int:
        """D of its features."""
        return model.body_width(self.record["arch"])


def load_subject(cfg: SimpleNamespace) -> Subject:
    """The encoder that the configuration names: a run's checkpoint, a file (`pretrained`), or an untrained one (`encoder` random).

    Raises UserError if the checkpoint does not exist or does not fit, or if `arch` contradicts it.
    """
    run = utils.run_folder(
        cfg.encoder_output_root, cfg.encoder_dataset_name, cfg.encoder_exp_version
    )
    home, untrained, path = run / "eval", cfg.encoder == "random", None
    if cfg.pretrained is not None:
        if untrained or cfg.load_pretrained_epoch is not None:
            other = (
                "--encoder random"
                if untrained
                else f"--load_pretrained_epoch {cfg.load_pretrained_epoch}"
            )
            raise utils.UserError(
                f"--pretrained {cfg.pretrained!r} and {other} contradict each other: give one"
            )
        path, home = Path(cfg.pretrained), Path(cfg.encoder_output_root) / "eval"
    elif untrained and cfg.load_pretrained_epoch is not None:
        raise utils.UserError(
            f"--encoder random and --load_pretrained_epoch {cfg.load_pretrained_epoch} contradict each other: give one"
        )
    elif not untrained or any(run.glob("checkpoints/*.pth.tar")):
        path = utils.checkpoint_path(run, cfg.load_pretrained_epoch)
    checkpoint = utils.load_checkpoint(path, bare=cfg.pretrained is not None) if path else {}
    # training's defaults serve an untrained encoder that has no run; files from elsewhere are of ImageNet at 224 px
    keys = utils.config_keys("train")
    own = own_config(checkpoint, keys, strict=path if cfg.pretrained is None else None)
    config = {name: key.default for name, key in keys.items()} | (
        own or ({"seed": cfg.seed} if path is None else {"crop": 224})
    )
    if untrained:
        arch = checkpoint.get("arch") or (config["arch"] if cfg.arch == "auto" else cfg.arch)
        if cfg.arch not in ("auto", arch):
            raise utils.UserError(
                f"--arch {cfg.arch} contradicts checkpoint {str(path)!r}, which is a {arch}: leave --arch out"
            )
        encoder, stem, found, epoch = untrained_encoder(arch, config), "random", "", None
    else:
        encoder, found = read_checkpoint(path, checkpoint, cfg.arch)
        arch, epoch, step = found.arch, checkpoint.get("epoch"), checkpoint.get("step")
        between = (
            step
            and "images" in checkpoint
            and step % max(1, checkpoint["images"] // config["batch_size"])
        )  # the epochs
        stem = f"step_{step:06d}" if between else f"epoch_{epoch or 0:04d}"
        stem = (
            re.sub(r"(\.(pth|pt|tar))+$", "", path.name)
            if epoch is None or cfg.pretrained is not None
            else stem
        )
    crop = config["crop"] if cfg.crop == "auto" else cfg.crop
    silent = f"; it does not say its settings: crop {crop} px, ImageNet's mean and deviation" * (
        not own
    )
    found = f"{found}{silent}" if found and (silent or cfg.pretrained is not None) else ""
    first = (
        {name: config[name] for name in ("seed", "feature_dim", "mlp", "small_stem")}
        if own or untrained
        else None
    )
    record = {
        "encoder": cfg.encoder,
        "arch": arch,
        "checkpoint": None if untrained else str(path),
        "epoch": epoch,
        "step": None if untrained else checkpoint.get("step"),
        "first_weights": first,
    }
    return Subject(
        encoder=model.backbone(encoder),
        home=home,
        stem=stem,
        foreign=cfg.pretrained is not None,
        found=found,
        crop=crop,
        mean=config["mean"],
        std=config["std"],
        record=record,
        config=config,
    )


def own_config(
    checkpoint: dict[str, Any], keys: dict[str, utils.Key], strict: Path | None = None
) -> dict[str, Any]:
    """The settings in a checkpoint, if they are those of train.py, else none: other programs call other things config.

    `strict` names the checkpoint of a run, whose settings must be valid where there are any: UserError.
    """
    config = checkpoint.get("config") or {}
    try:
        own = {name: keys[name].accepts(value) for name, value in config.items() if name in keys}
        return (
            own
            if "crop" in own and all(len(own.get(name, "rgb")) == 3 for name in ("mean", "std"))
            else {}
        )
    except utils.UserError as error:
        if strict is not None:
            raise utils.UserError(
                f"checkpoint {str(strict)!r} has settings that are not valid: {error}"
            ) from None
        return {}


def read_checkpoint(
    path: Path, checkpoint: dict[str, Any], arch: str = "auto"
) -> tuple[nn.Module, model.Found]:
    """The backbone of a checkpoint and what it is; UserError if it does not fit `arch`, its own settings, or any known format."""
    config = own_config(checkpoint, utils.config_keys("train"))
    try:
        encoder, found = model.read_encoder(
            checkpoint["state_dict"], None if arch == "auto" else arch
        )
        for name, value in (
            ("arch", checkpoint.get("arch")),
            *((name, config.get(name)) for name in ("feature_dim", "mlp", "small_stem")),
        ):
            if value is not None and name in ("arch", *config) and getattr(found, name) != value:
                raise ValueError(
                    f"its {name} is {value} by its settings, but {getattr(found, name)} by its weights"
                )
    except ValueError as error:
        raise utils.UserError(f"checkpoint {str(path)!r} cannot be used: {error}") from None
    return encoder, found


def untrained_encoder(arch: str, config: dict[str, Any]) -> nn.Module:
    """The encoder that a run of this configuration starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(utils.generator(config["seed"], "weights").initial_seed())
        return utils.checked(
            model.build_encoder,
            arch,
            config["feature_dim"],
            config["mlp"],
            small_stem=config["small_stem"],
        )


def data_name(root: str) -> str:
    """The name of a data set in results: its kind, or the folder's name if it is one of class folders. UserError if there is no data."""
    kind = dataloader.detect(root)
    return (
        re.sub(r"[^\w.]+", "_", Path(root).resolve().name) or kind
        if kind in ("folders", "classes")
        else kind
    )


def data_path(root: str) -> str:
    """The place of a data set, the same from wherever it is named."""
    return root if root == "shapes" else str(Path(root).resolve())


def kind_of(protocol: str, train_fraction: float, folds: bool) -> str:
    """What sort of result it is, as part of a folder's name: results of several sorts stand side by side."""
    return protocol + f"-{100 * train_fraction:g}percent" * (train_fraction < 1) + "-folds" * folds


def result_folder(subject: Subject, dataset: str, kind: str) -> Path:
    """`home`/`stem`, or `home`/`stem`-DATASET-KIND if that is for the result of another data set, or the kind is not the default.

    Raises UserError if that holds the result of another file of the same name (`pretrained`).
    """
    folder = subject.home / subject.stem
    taken = _any_result(folder)
    if kind != "cached" or taken.get("dataset", dataset) != dataset:
        folder = subject.home / f"{subject.stem}-{dataset}-{kind}"
        taken = _any_result(folder)
    old, new = taken.get("checkpoint"), subject.record["checkpoint"]
    if subject.foreign and old and Path(old).resolve() != Path(new).resolve():
        raise utils.UserError(
            f"{str(folder)!r} holds the result of {old!r}, not of {new!r}: remove it, or choose another --encoder_output_root"
        )
    return folder


def _any_result(folder: Path) -> dict[str, Any]:
    """The result.json of a folder, of whatever version; empty if there is none."""
    result = utils.read_json(folder / "result.json")
    return result if isinstance(result, dict) else {}


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result.json of a folder, or None where there is none that is whole."""
    result = _any_result(folder)
    return (
        result
        if {
            *SAME_MEASURE,
            "linear_top1",
            "knn_top1",
            "trials",
            "encoder",
            "epoch",
            "first_weights",
            "class_names",
        }
        <= result.keys()
        else None
    )


def settings(cfg: SimpleNamespace, subject: Subject) -> dict[str, Any]:
    """What makes a result: how it is measured, apart from the data set, and the encoder."""
    names = (
        "protocol",
        "train_fraction",
        "folds",
        "linear_epochs",
        "linear_lrs",
        "linear_batch_size",
        "linear_views",
        "knn_temperature",
        "knn_weighted",
        "precision",
        "seed",
    )
    return (
        {name: getattr(cfg, name) for name in names}
        | {
            "finetune_lr": cfg.finetune_lr if cfg.finetune else None,
            "asked_knn_k": cfg.knn_k,
            "asked_resize": cfg.resize,
            "crop": subject.crop,
        }
        | subject.record
    )


def same_measure(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results, of whatever encoders, were measured in the same way on the same data."""
    return all(a[name] == b[name] for name in SAME_MEASURE)


def is_baseline(untrained: dict[str, Any], trained: dict[str, Any]) -> bool:
    """Whether a result is that of the untrained encoder from which another's training started, measured in the same way."""
    first = trained["first_weights"]
    return (
        untrained["encoder"] == "random"
        and first is not None
        and untrained["first_weights"] == first
        and same_measure(untrained, trained)
    )


def evaluate_subject(
    cfg: SimpleNamespace, subject: Subject, launch: parallel.OneDevice
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """kNN and linear accuracy of an encoder on `cfg.dataset_root` (`settled`), left in its result folder by the first process.

    On several devices each encodes its share of the images, every image once, and votes for its share of the test images; the linear
    classifiers are trained by every process alike. Returns the folder, what result.json holds, and the classifiers: accuracy (trials, epochs),
    confusion (C, C), weight, bias. Raises UserError for unfit data or settings.
    """
    start = time.monotonic()
    if cfg.dataset_root is None:
        raise utils.UserError(
            "--dataset_root is missing: give labelled images, or the word shapes for the built-in data set"
        )
    if cfg.download and launch.processes > 1:
        raise utils.UserError(
            "--download is for one process: fetch the data with plain python first"
        )
    if cfg.finetune and (launch.devices > 1 or parallel.several_processes()):
        raise utils.UserError(
            "--finetune is for one process on one device: use plain python, and CUDA_VISIBLE_DEVICES=0"
        )
    device, first = launch.device, launch.rank == 0
    cfg = SimpleNamespace(**vars(cfg))
    cfg.precision = utils.checked(parallel.pick_precision, cfg.precision, device)
    open_split = functools.partial(
        dataloader.open_dataset, cfg.dataset_root, crop=subject.crop, download=cfg.download
    )
    train, test = (
        open_split(split, view="center", resize=cfg.resize) for split in ("train", "test")
    )
    square = (
        open_split("train", view="square", resize="auto")
        if cfg.protocol != "cached" or cfg.linear_views > 2
        else None
    )
    chosen = chosen_images(cfg, train.labels)
    folds = dataloader.stl10_folds(cfg.dataset_root, len(train)) if cfg.folds else None
    check_sizes(cfg, subject, train.labels, chosen, folds, len(test), launch.processes)
    folder = result_folder(
        subject, data_name(cfg.dataset_root), kind_of(cfg.protocol, cfg.train_fraction, cfg.folds)
    )
    voters = min(map(len, folds)) if folds else len(chosen)
    k = min(cfg.knn_k, voters)
    if first:
        check_writable(folder, "--encoder_output_root")
        earlier, now = (
            _any_result(folder),
            settings(cfg, subject) | {"dataset_root": data_path(cfg.dataset_root)},
        )
        changed = [
            f"{name} {earlier[name]} -> {value}"
            for name, value in now.items()
            if name in earlier and earlier[name] != value
        ]
        print(
            f"note     replaces the result in {folder}: {', '.join(changed)}\n" * bool(changed),
            end="",
        )
    if first and k < cfg.knn_k:
        print(
            f"warning: --knn_k {cfg.knn_k} is more than the {voters} training images: k = {k}",
            file=sys.stderr,
        )
    if first:
        part = f"{len(chosen):,} of " if len(chosen) < len(train) else ""
        print(
            f"note     {launch.note}\n"
            * bool(launch.note)
            + f"data     {train.name}: {part}{len(train):,} training and {len(test):,} test images, {len(train.classes)} classes, "
            f"shorter side {train.resize} px, crop {subject.crop} px ({launch.name}, {cfg.precision})",
            flush=True,
        )
    ready(subject.encoder, launch, cfg.precision)
    views, labels = stored_views(cfg, subject, train, square, chosen, launch)
    test_features, test_labels = dataset_features(cfg, subject, test, launch)
    views = views.to(launch.float64_device if fits_on(launch.float64_device, views) else "cpu")
    own = launch.rows(len(test))
    vote = functools.partial(
        knn_hits, k=k, temperature=cfg.knn_temperature, weighted=cfg.knn_weighted
    )
    votes = [
        vote(views[0, rows], labels[rows], test_features[0, own], test_labels[own])
        for rows in folds or [slice(None)]
    ]
    knn = [
        100.0 * int(launch.total(torch.tensor(hits, device=device))) / len(test) for hits in votes
    ]

    trials = (
        [(number, rows) for number, rows in enumerate(folds)]
        if folds
        else [(number, torch.arange(len(chosen))) for number in range(cfg.trials)]
    )
    if cfg.protocol == "cached":
        options = {
            "epochs": cfg.linear_epochs,
            "lrs": cfg.linear_lrs,
            "seed": cfg.seed,
            "batch_size": cfg.linear_batch_size,
            "classes": len(train.classes),
        }
        together = (
            [([number], rows) for number, rows in trials]
            if folds
            else [([number for number, _ in trials], slice(None))]
        )  # trials on the same images, at once
        parts = [
            linear_evaluation(
                views[:, rows],
                labels[rows],
                test_features[0],
                test_labels,
                trials=numbers,
                **options,
            )
            for numbers, rows in together
        ]
        linear = {
            name: torch.cat([part[name] for part in parts])
            for name in ("accuracy", "predicted", "weight", "bias")
        }
        chosen_rates = [part["learning_rate"] for part in parts]
        heldout = (
            parts[0]["heldout_top1"]
            if len(parts) == 1
            else [part["heldout_top1"] for part in parts]
        )
    else:
        parts = [
            online_trial(
                cfg, subject, square, chosen[rows], number, test, test_features, test_labels, launch
            )
            for number, rows in trials
        ]
        linear = {
            name: torch.stack([part[name] for part in parts])
            for name in ("accuracy", "predicted", "weight", "bias")
        }
        linear |= {"encoders": [part["encoder"] for part in parts]} if cfg.finetune else {}
        chosen_rates, heldout = cfg.linear_lrs, {}
    found = scores(linear["predicted"], test_labels, len(train.classes))
    linear["confusion"] = found.pop("confusion")
    result = {
        "linear_top1": found.pop("linear_top1"),
        "knn_top1": statistics.fmean(knn),
        **({"knn_top1_std": statistics.stdev(knn)} if folds else {}),
        **found,
        "learning_rate": statistics.mode(chosen_rates),
        "heldout_top1": heldout,
        "knn_k": k,
        "dataset": data_name(cfg.dataset_root),
        "dataset_root": data_path(cfg.dataset_root),
        "train_images": len(chosen),
        "test_images": len(test),
        "classes": len(train.classes),
        "class_names": train.classes,
        "resize": train.resize,
        **settings(cfg, subject),
        "seconds": round(time.monotonic() - start, 1),
        "provenance": utils.provenance(),
    }
    if first:
        save_results(folder, result, linear)
    return folder, result, linear


def online_trial(
    cfg: SimpleNamespace,
    subject: Subject,
    square: Any,
    rows: torch.Tensor,
    number: int,
    test: Any,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    launch: parallel.OneDevice,
) -> dict[str, Any]:
    """A trial of `train_on_crops`; a finetuned one begins with a copy of the encoder, and gives it back."""
    encoder = (
        copy.deepcopy(subject.encoder).requires_grad_(True) if cfg.finetune else subject.encoder
    )
    tuned = replace(subject, encoder=encoder)
    remedy = "the finetuning diverged; give smaller --linear_lrs and --finetune_lr"
    tests = (
        (lambda: dataset_features(cfg, tuned, test, launch, remedy=remedy)[0][0])
        if cfg.finetune
        else (lambda: test_features[0])
    )
    recipe = crop_recipe(subject.crop, subject.mean, subject.std, PROTOCOLS[cfg.protocol][4])
    done = train_on_crops(cfg, encoder, square, recipe, rows, number, tests, test_labels, launch)
    return done | {
        "encoder": {name: value.cpu() for name, value in encoder.state_dict().items()}
        if cfg.finetune
        else None
    }


def chosen_images(cfg: SimpleNamespace, labels: torch.Tensor) -> torch.Tensor:
    """The indices of the training images that `train_fraction` leaves."""
    return (
        stratified(labels, cfg.train_fraction, utils.generator(cfg.seed, "train fraction"))
        if cfg.train_fraction < 1
        else torch.arange(len(labels))
    )


def check_sizes(
    cfg: SimpleNamespace,
    subject: Subject,
    labels: torch.Tensor,
    chosen: torch.Tensor,
    folds: list[torch.Tensor] | None,
    tests: int,
    processes: int,
) -> None:
    """UserError before any work, if there are too few images for what is to be done with them, or too many for the memory."""
    parts = folds or [torch.arange(len(chosen))]
    fewest = min(map(len, parts))
    batch = fewest if cfg.protocol == "cached" else min(fewest, cfg.linear_batch_size)
    for what, count in (
        (f"{len(chosen)} training images", len(chosen)),
        (f"{tests} test images", tests),
        (f"batches of {batch} images", batch),
    ):
        if count < processes**2:
            raise utils.UserError(
                f"{what} are too few for {processes} processes: evaluate with plain python"
            )
    if cfg.finetune and batch < 2:
        raise utils.UserError(
            "--finetune needs batches of two images or more, for the batch norm: use a larger --linear_batch_size or --train_fraction"
        )
    if cfg.protocol == "cached" and len(cfg.linear_lrs) > 1:
        for part in parts:
            check_choice(labels[chosen[part]])
    views = cfg.linear_views if cfg.protocol == "cached" else 1
    check_memory(
        (views * len(chosen) + tests) * subject.width,
        "use --linear_views 1, or a smaller --train_fraction",
    )


def ready(encoder: nn.Module, launch: parallel.OneDevice, precision: str) -> None:
    """An encoder that is to be used as it is, on the devices of a launch."""
    encoder.to(
        device=launch.device,
        dtype=parallel.precision_dtype(precision),
        memory_format=torch.channels_last,
    )
    launch.wrap(encoder.requires_grad_(False))


def check_writable(folder: Path, flag: str) -> None:
    """UserError now, before the work, if the folder that a flag names could not be made or written; leaves nothing behind."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise utils.UserError(
            f"{str(folder)!r} cannot be written: {error.strerror}: choose another {flag}"
        ) from None


def fits_on(device: torch.device | str, features: torch.Tensor) -> bool:
    """Whether a GPU has room for features and for the work with them; else they stay where they are."""
    return (
        torch.device(device).type != "cuda"
        or 1.5 * features.nbytes < torch.cuda.mem_get_info(device)[0]
    )


def stored_views(
    cfg: SimpleNamespace,
    subject: Subject,
    train: Any,
    square: Any,
    chosen: torch.Tensor,
    launch: parallel.OneDevice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (V, n, D) of the chosen training images, and labels (n,): the image, for the cached protocol its mirror image, and random crops."""
    count = cfg.linear_views if cfg.protocol == "cached" else 1
    views, labels = dataset_features(cfg, subject, train, launch, chosen, mirror=count > 1)
    recipe = crop_recipe(subject.crop, subject.mean, subject.std)
    crops = [
        dataset_features(cfg, subject, square, launch, chosen, recipe=recipe, number=number)[0]
        for number in range(2, count)
    ]
    return torch.cat([views, *crops]) if crops else views, labels


def dataset_features(
    cfg: SimpleNamespace,
    subject: Subject,
    dataset: Any,
    launch: parallel.OneDevice,
    chosen: torch.Tensor | None = None,
    *,
    mirror: bool = False,
    recipe: augment.Recipe | None = None,
    number: int = 0,
    remedy: str = "its training diverged; choose an earlier epoch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (V, n, D) and labels (n,) of a data set (or its `chosen` images) in its order, on all devices and processes.

    The views are the images, and with `mirror` their mirror images; or, of a data set of view "square", a random crop by a `recipe`, the `number`-th
    of its kind. UserError if the features are not finite, with a `remedy`.
    """
    chosen = torch.arange(len(dataset)) if chosen is None else chosen
    n, batch, own = (
        len(chosen),
        cfg.eval_batch_size if recipe is None else CROP_BATCH,
        launch.rows(len(chosen)),
    )
    edges = [
        own.start,
        *range((own.start // batch + 1) * batch, own.stop, batch),
        own.stop,
    ]  # of whole batches, whoever holds which rows
    pieces = [slice(a, b) for a, b in zip(edges, edges[1:])]
    loader = dataloader.iterate(
        dataset,
        [chosen[piece] for piece in pieces],
        num_workers=cfg.num_workers,
        failures=failures_of(dataset),
    )
    batches = utils.progress(loader, "features", total=len(pieces))
    dtype = parallel.precision_dtype(cfg.precision)
    if recipe is None:
        views = whole_images(batches, subject.mean, subject.std, launch.device, dtype, mirror)
    else:
        views = (
            (
                augment.views(
                    part.images.to(launch.device),
                    part.aspect,
                    recipe,
                    [utils.generator(cfg.seed, f"stored view {number}", piece.start // batch)],
                    batch,
                    slice(piece.start % batch, piece.start % batch + len(part.images)),
                    dtype,
                ),
                part.labels,
            )
            for piece, part in zip(pieces, batches)
        )
    features, labels = extract_features(subject.encoder, views, launch, cfg.precision)
    features = launch.gather(features.movedim(-2, 0), n).movedim(0, -2).contiguous()
    if not features.isfinite().all():
        raise utils.UserError(
            f"the features of {subject.record['checkpoint']} are not finite: {remedy}"
        )
    return features, launch.gather(labels, n)


def failures_of(dataset: Any) -> dataloader.Failures:
    """Of all passes over a data set, so that an unreadable file is named once."""
    return vars(dataset).setdefault("failures", dataloader.Failures(len(dataset)))


def check_memory(numbers: int, remedy: str) -> None:
    """UserError if the machine has not the memory for so many numbers of features, as far as the system says."""
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return
    needed = (
        4
        * numbers
        * (3 * int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else 2)
    )  # parts, the whole; gathered ones in order
    if needed > free:
        raise utils.UserError(
            f"the features take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free: {remedy}"
        )


def save_results(folder: Path, result: dict[str, Any], linear: dict[str, Any]) -> None:
    """accuracy.csv, confusion.csv, the classifiers, and result.json last: where it stands, the others are complete."""
    (folder / "result.json").unlink(missing_ok=True)
    rows = [
        (epoch, trial, f"{top1:.4f}")
        for trial, curve in enumerate(linear["accuracy"].tolist(), 1)
        for epoch, top1 in enumerate(curve, 1)
    ]
    utils.write_csv(folder / "accuracy.csv", ["epoch", "trial", "top1"], rows)
    utils.write_csv(
        folder / "confusion.csv",
        [f"predicted_{c}" for c in range(result["classes"])],
        linear["confusion"].tolist(),
    )
    classifier = {
        "weight": linear["weight"],
        "bias": linear["bias"],
        "classes": result["class_names"],
    }  # (trials, C, D), (trials, C)
    classifier |= (
        {"encoders": linear["encoders"]} if "encoders" in linear else {}
    )  # finetuned, one for each trial
    classifier |= {
        name: result[name] for name in ("arch", "checkpoint", "epoch", "dataset", "learning_rate")
    }
    utils.atomic_write(folder / "linear.pth.tar", lambda file: torch.save(classifier, file))
    utils.write_json(folder / "result.json", result)


# ------------------------------------------------------------------------------------------------------------------ while training


class Monitor:
    """kNN accuracy of the query encoder while it is trained (k = 200, T = 0.07), on a fixed part of labelled images; training does not notice.

    `cfg` is train.py's: of `knn_root` the training split votes and the test split asks; without it, of the training images of `dataset_root` a stratified
    tenth asks and the others vote, so that nothing is chosen on a test split. Raises UserError where labels are missing.
    """

    def __init__(self, cfg: SimpleNamespace, launch: parallel.OneDevice) -> None:
        self.launch, seed, root = (
            launch,
            utils.generator(cfg.seed, "monitor"),
            cfg.knn_root or cfg.dataset_root,
        )
        try:
            kind = dataloader.detect(root)
            if kind == "packed":
                raise utils.UserError(
                    f"--knn_every needs labelled images, and {root!r} is a packed store: name them with --knn_root"
                )
            split = (
                "train"
                if kind in ("stl10", "fashion_mnist", "cifar10", "shapes") or cfg.knn_root
                else "pretrain"
            )  # of folders, the images that are trained on
            pairs = [
                (dataset, torch.arange(len(dataset)))
                for dataset in (
                    dataloader.open_dataset(root, part, view="center", resize="auto", crop=cfg.crop)
                    for part in ((split, "test") if cfg.knn_root else (split,))
                )
            ]
        except utils.UserError as error:
            raise utils.UserError(
                str(error).replace("--dataset_root", "--knn_root") if cfg.knn_root else str(error)
            ) from None
        if not cfg.knn_root:
            dataset = pairs[0][0]
            kept, held = held_out(dataset.labels, 0.1, seed)
            if not len(held):
                raise utils.UserError(
                    f"--knn_every needs classes of two images or more, and {root!r} has none: name others with --knn_root"
                )
            pairs = [(dataset, kept), (dataset, held)]
        limits = cfg.knn_images, max(1, cfg.knn_images // 4)
        self.parts = [
            (dataset, rows[torch.randperm(len(rows), generator=seed)[:limit]].sort().values)
            for (dataset, rows), limit in zip(pairs, limits)
        ]
        if min(len(rows) for _, rows in self.parts) < launch.processes**2:
            raise utils.UserError(
                f"--knn_every has too few images in {root!r} for {launch.processes} processes: name others with --knn_root"
            )
        self.cfg = SimpleNamespace(
            eval_batch_size=256, num_workers=cfg.num_workers, precision=cfg.precision, seed=cfg.seed
        )
        encoder = model.backbone(
            model.build_encoder(cfg.arch, cfg.feature_dim, cfg.mlp, small_stem=cfg.small_stem)
        )
        check_memory(
            sum(len(rows) for _, rows in self.parts) * model.body_width(cfg.arch),
            "use fewer --knn_images",
        )
        self.subject = Subject(
            encoder,
            home=Path(),
            stem="",
            foreign=False,
            found="",
            crop=cfg.crop,
            mean=cfg.mean,
            std=cfg.std,
            record={"arch": cfg.arch, "checkpoint": "this run"},
        )
        self.features: list[
            torch.Tensor
        ] = []  # of those that vote and those that ask (n, D), of the last call
        self.ready = False

    def top1(self, state_dict: dict[str, torch.Tensor]) -> float:
        """Top-1 in percent of an encoder's state, the same on every process, which all call it."""
        encoder = self.subject.encoder
        if not self.ready:
            ready(encoder, self.launch, self.cfg.precision)
            self.ready = True
        encoder.load_state_dict(
            {name: value for name, value in state_dict.items() if not name.startswith("fc.")}
        )
        (bank, labels), (queries, truth) = [
            dataset_features(
                self.cfg,
                self.subject,
                dataset,
                self.launch,
                rows,
                remedy="it diverged; try a lower --lr",
            )
            for dataset, rows in self.parts
        ]
        self.features = [bank[0], queries[0]]
        own = self.launch.rows(len(truth))
        hits = knn_hits(
            bank[0].to(self.launch.device),
            labels,
            queries[0, own],
            truth[own],
            k=min(200, len(labels)),
        )
        return (
            100.0
            * int(self.launch.total(torch.tensor(hits, device=self.launch.device)))
            / len(truth)
        )
