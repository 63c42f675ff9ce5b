"""Protocols that train on new random crops in each epoch, and those that train the encoder, too."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import augment
import utils
from config import TestSettings
from evaluation.features import Extractor, Features, dataset_features, freeze
from evaluation.linear import Classifiers, check_finite, measure_top1, top_classes
from evaluation.subsets import Subset
from model import to_device


@dataclass(frozen=True)
class Protocol:
    """What `auto` means, and how the classifiers of a protocol are trained."""

    epochs: int
    lrs: list[float]
    trials: int
    schedule: Callable[[float], float]  # a learning rate's factor when a part of training is over
    smallest_crop: float = 0.2  # part of the image's area


PROTOCOLS = {
    "cached": Protocol(30, [0.001, 0.003, 0.01, 0.03, 0.1, 0.3], 3, utils.cosine),
    "original": Protocol(100, [10.0], 1, lambda done: 0.2 ** int(5 * done + 1e-9)),
    # its crops are those of torchvision's RandomResizedCrop
    "reference": Protocol(
        100, [30.0], 1, lambda done: 0.1 ** ((done >= 0.6) + (done >= 0.8)), smallest_crop=0.08
    ),
    "finetune": Protocol(30, [0.1], 1, utils.cosine),
}


def protocol_of(settings: TestSettings) -> str:
    """The protocol's name in `PROTOCOLS`."""
    return "finetune" if settings.finetune else settings.protocol


def train_online(
    settings: TestSettings,
    extractor: Extractor,
    train: Subset,
    test: Subset,
    test_features: Features,
    trial: int,
) -> Classifiers:
    """A linear classifier on the encoder's output for random crops, by SGD with momentum 0.9.

    `train` is of a data set with fit "square", `test_features` are those of the frozen encoder.
    With --finetune a copy of the encoder is trained, too, in train mode, at a learning rate of
    its own; else the encoder must come out unchanged, bit for bit (RuntimeError). Every process
    encodes its share of a batch, and all train the same classifier. UserError if it diverges.
    """
    protocol, epochs = PROTOCOLS[protocol_of(settings)], settings.linear_epochs
    if settings.finetune:
        extractor = copy_encoder(extractor)
    (lr,), encoder = settings.linear_lrs, extractor.encoder
    classifier = nn.Linear(test_features.images.shape[1], len(train.dataset.classes))
    random = utils.generator(settings.seed, "linear weights", trial)
    nn.init.normal_(classifier.weight, std=0.01, generator=random)
    nn.init.zeros_(classifier.bias)
    groups = [{"params": classifier.to(extractor.launch.device).parameters(), "lr": lr}]
    if settings.finetune:
        groups.append({"params": encoder.parameters(), "lr": settings.finetune_lr})
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: protocol.schedule(e / epochs))
    accuracy = torch.zeros(epochs, dtype=torch.float64)
    with contextlib.nullcontext() if settings.finetune else freeze(encoder), torch.enable_grad():
        for epoch in utils.progress(range(epochs), f"{protocol_of(settings)} classifier"):
            encoder.train(settings.finetune)
            for outputs, labels in encode_epoch(settings, extractor, train, trial, epoch):
                loss = F.cross_entropy(classifier(outputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            if settings.finetune:
                test_features = dataset_features(extractor, test)
            weight, bias = classifier.weight.detach().cpu(), classifier.bias.detach().cpu()
            check_finite(weight, bias, lr)
            predicted = top_classes(test_features.images, weight, bias)
            accuracy[epoch] = measure_top1(predicted, test_features.labels)
    found = [x[None] for x in (weight, bias, accuracy, predicted)]  # of one trial
    state = {name: value.cpu() for name, value in encoder.state_dict().items()}
    return Classifiers(*found, lr, encoder=state if settings.finetune else None)


def copy_encoder(extractor: Extractor) -> Extractor:
    """An extractor with a copy of the encoder, to be finetuned."""
    copied = replace(
        extractor,
        encoder=copy.deepcopy(extractor.encoder),
        not_finite="the features are not finite: the finetuning diverged; "
        "give smaller --linear_lrs and --finetune_lr",
    )
    copied.encoder.requires_grad_(True)
    return copied


def encode_epoch(
    settings: TestSettings, extractor: Extractor, train: Subset, trial: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs (B, D) of the encoder for a random crop of each image, and labels (B,), in batches.

    The last, incomplete batch is dropped. With --finetune the outputs have gradients.
    """
    launch, n, seed = extractor.launch, len(train), settings.seed
    batch_size = min(settings.linear_batch_size, n)
    own, steps = launch.rows(batch_size), n // batch_size
    order = torch.randperm(n, generator=utils.generator(seed, f"linear order {trial}", epoch))
    batches = train.indices[order[: steps * batch_size]].split(batch_size)
    recipe = augment.recipe(
        "v1",
        train.dataset.crop,
        scale=(PROTOCOLS[protocol_of(settings)].smallest_crop, 1.0),
        jitter_p=0.0,
        grayscale=0.0,
        mean=tuple(extractor.mean),
        std=tuple(extractor.std),
    )
    loader = extractor.load(train, [batch[own] for batch in batches])
    for step, batch in enumerate(loader, start=epoch * steps):
        randoms = [utils.generator(seed, f"linear views {trial}", step)]
        images, aspect, dtype = batch.images, batch.aspect, extractor.dtype
        (view,) = augment.views(images, aspect, recipe, randoms, batch_size, own, dtype)
        with torch.set_grad_enabled(settings.finetune):
            outputs = extractor.encode(view)
        labels = to_device(batch.labels, launch.device)
        yield launch.gather(outputs, batch_size), launch.gather(labels, batch_size)
