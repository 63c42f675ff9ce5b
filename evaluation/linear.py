"""Linear classifiers on stored features, many of them at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from evaluation.features import Features
from evaluation.subsets import hold_out

BLOCK = 1 << 24  # logits computed at once: 64 MB of float32


@dataclass(frozen=True)
class LinearSettings:
    """How a classifier is trained: by SGD with momentum 0.9 and a cosine schedule."""

    epochs: int
    lrs: Sequence[float]  # one is chosen
    batch_size: int = 256
    seed: int = 0


@dataclass
class Classifiers:
    """T linear classifiers of C classes on features of width D, and how they did on m images."""

    weight: Tensor  # (T, C, D)
    bias: Tensor  # (T, C)
    accuracy: Tensor  # (T, epochs), top-1 in percent after each epoch
    predicted: Tensor  # (T, m, 5), at the end, the classes of the highest logits, best first
    learning_rate: float
    # of each learning rate that there was to choose from
    heldout_top1: dict[str, float] = field(default_factory=dict)
    encoder: dict[str, Tensor] | None = None  # the state of the finetuned encoder


def linear_evaluation(
    train: Features, test: Features, settings: LinearSettings, trials: Sequence[int], classes: int
) -> Classifiers:
    """Train a linear classifier for each trial; the test images decide nothing.

    The learning rate is the one with the highest accuracy on a stratified tenth of the training
    images that those classifiers did not see; then a classifier for each trial is trained on all
    of them. Raises UserError if there is a choice to make and no class has two images, or if the
    training diverges.
    """
    best, heldout = settings.lrs[0], {}
    if len(settings.lrs) > 1:
        check_choice(train.labels)
        random = utils.generator(settings.seed, "linear held out")
        kept, held = hold_out(train.labels, 0.1, random)
        *_, accuracy = train_linear(train, train.take(held), settings, [0], classes, rows=kept)
        top1 = accuracy[0, :, -1].tolist()
        heldout = {f"{lr:g}": round(x, 4) for lr, x in zip(settings.lrs, top1, strict=True)}
        best = settings.lrs[top1.index(max(top1))]
    settings = replace(settings, lrs=[best])
    weight, bias, accuracy = train_linear(train, test, settings, trials, classes)
    weight, bias, accuracy = weight[:, 0].cpu(), bias[:, 0].cpu(), accuracy[:, 0]
    check_finite(weight, bias, best)
    predicted = top_classes(test.images, weight, bias)
    # counted once more, on the CPU: the reported number is the same on every device
    accuracy[:, -1] = measure_top1(predicted, test.labels)
    return Classifiers(weight, bias, accuracy, predicted, best, heldout)


def check_finite(weight: Tensor, bias: Tensor, lr: float) -> None:
    """UserError if the training of a classifier diverged."""
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise utils.UserError(
            f"the linear classifier diverged at learning rate {lr:g}: give smaller --linear_lrs"
        )


def check_choice(labels: Tensor) -> None:
    """UserError if no class has two images: none can be held out to choose a learning rate."""
    if int(torch.bincount(labels).max()) < 2:
        raise utils.UserError(
            f"{len(labels)} training images, one for each class, leave none to choose a learning "
            "rate on: give one --linear_lrs"
        )


def train_linear(
    train: Features,
    test: Features,
    settings: LinearSettings,
    trials: Sequence[int],
    classes: int,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax regression for T trials and L learning rates at once, on standardized features.

    An epoch meets each training image (or those of `rows`) once, in one of its views drawn at
    random, and drops the last, incomplete batch. A trial's number names its first weights and its
    order, so a classifier does not depend on what is trained beside it. Returns, for features as
    they are, weights (T, L, C, D) and biases (T, L, C), and the top-1 in percent on the test
    images after each epoch (T, L, epochs).
    """
    num_views, n, width = train.views.shape
    epochs, T, L = settings.epochs, len(trials), len(settings.lrs)
    flat = train.views.flatten(0, 1)  # V n x D
    labels, images = train.labels.to(flat.device), test.images.to(flat.device)
    std, mean = torch.std_mean(flat, dim=0, correction=0)
    inverse_std = 1 / torch.where(std > 1e-6 * std.max(), std, 1.0)  # some may be constant
    rows = torch.arange(n) if rows is None else rows
    batch_size = min(settings.batch_size, len(rows))
    steps = len(rows) // batch_size
    randoms = [utils.generator(settings.seed, "linear weights", trial) for trial in trials]
    first = torch.stack([0.01 * torch.randn(width, classes, generator=r) for r in randoms])
    weight = first.to(flat).repeat(1, 1, L).requires_grad_()  # T x D x L C
    bias = torch.zeros(T, 1, L * classes).to(flat).requires_grad_()
    rates = torch.tensor(settings.lrs, dtype=torch.float64).repeat_interleave(classes).to(flat)
    optimizer = torch.optim.SGD([weight, bias], momentum=0.9)
    accuracy = torch.zeros(T, L, epochs, dtype=torch.float64)
    for epoch in utils.progress(range(epochs), f"linear classifier ({T * L} at once)"):
        orders = [draw_order(rows, n, num_views, settings.seed, t, epoch) for t in trials]
        orders = torch.stack(orders)[:, : steps * batch_size].to(flat.device)
        for step, batch in enumerate(orders.split(batch_size, dim=1)):  # T x B
            x = flat.index_select(0, batch.flatten()).sub_(mean).mul_(inverse_std)
            logits = torch.baddbmm(bias, x.view(T, batch_size, width), weight)
            targets = labels[batch % n, None].expand(-1, -1, L).flatten()
            loss = F.cross_entropy(logits.view(-1, classes), targets, reduction="sum") / batch_size
            optimizer.zero_grad()
            loss.backward()
            # SGD is linear in the gradient, so a learning rate for each column may scale that
            weight.grad.mul_(rates)
            bias.grad.mul_(rates)
            optimizer.param_groups[0]["lr"] = utils.cosine((epoch + step / steps) / epochs)
            optimizer.step()
        plain = undo_standardization(weight.detach(), bias.detach(), mean, inverse_std, L)
        accuracy[..., epoch] = measure_top1(top_classes(images, *plain, k=1), test.labels)
    return *plain, accuracy


def draw_order(rows: Tensor, n: int, num_views: int, seed: int, trial: int, epoch: int) -> Tensor:
    """The order of an epoch, as rows of the views one below the other (V n, D)."""
    random = utils.generator(seed, f"linear order {trial}", epoch)
    shuffled = rows[torch.randperm(len(rows), generator=random)]
    return shuffled + n * torch.randint(num_views, (len(rows),), generator=random)


def undo_standardization(
    weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, L: int
) -> tuple[Tensor, Tensor]:
    """Weights (T, L, C, D) and biases (T, L, C) for features as they are.

    w ((x - mean) / std) + b = (w / std) x + (b - (w / std) mean)
    """
    scaled = weight.double() * inverse_std.double()[:, None]  # T x D x L C
    shifted = bias[:, 0].double() - mean.double() @ scaled  # T x L C
    scaled = scaled.unflatten(2, (L, -1)).permute(0, 2, 3, 1).contiguous()
    return scaled.to(weight.dtype), shifted.unflatten(1, (L, -1)).to(weight.dtype)


def top_classes(features: Tensor, weight: Tensor, bias: Tensor, k: int = 5) -> Tensor:
    """The classes (..., m, k) of the highest logits, best first, of classifiers (..., C, D).

    There are fewer than k where there are fewer classes.
    """
    *lead, C, D = weight.shape
    found = []
    for part in features.split(max(1, BLOCK // bias.numel())):
        logits = F.linear(part, weight.reshape(-1, D), bias.flatten()).view(-1, *lead, C)
        found.append(logits.topk(min(k, C), dim=-1).indices.cpu())
    return torch.cat(found).movedim(0, -2)


def measure_top1(predicted: Tensor, labels: Tensor) -> Tensor:
    """Top-1 in percent (...) of predicted classes (..., m, k)."""
    return 100 * (predicted[..., 0] == labels).double().mean(dim=-1)
