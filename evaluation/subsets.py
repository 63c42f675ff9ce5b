"""The images of an evaluation, and parts of them: fractions, folds, and what is held out."""

from dataclasses import dataclass

import torch
from torch import Tensor

import dataloader
import utils
from config import TestSettings
from data import stl10
from data.base import Crop, Pixels


@dataclass
class Subset:
    """Some images of a data set, and the files among them that could not be read."""

    dataset: dataloader.Dataset
    indices: Tensor  # (n,)

    def __post_init__(self) -> None:
        self.failures = dataloader.Failures(len(self.dataset))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        return self.dataset.labels[self.indices]


@dataclass
class Images:
    """The images of an evaluation, to be seen whole."""

    train: Subset
    test: Subset
    folds: list[Tensor]  # rows of the training images; empty without --folds

    @property
    def classes(self) -> list[str]:
        return self.train.dataset.classes

    @property
    def smallest_fold(self) -> int:
        """How many images there are to train on."""
        return min(map(len, self.folds), default=len(self.train))


def open_images(settings: TestSettings, crop: Crop, pixels: Pixels | None) -> Images:
    """All test images, and the training images that --train_fraction leaves; UserError."""
    root, size = settings.dataset_root, {"fit": "center", "resize": settings.resize, "crop": crop}
    download = settings.download
    train = dataloader.open_dataset(root, "train", **size, pixels=pixels, download=download)
    test = dataloader.open_dataset(root, "test", **size, pixels=train.size.pixels)
    random = utils.generator(settings.seed, "train fraction")
    chosen = draw_fraction(train.labels, settings.train_fraction, random)
    folds = stl10.read_folds(root, len(train)) if settings.folds else []
    return Images(Subset(train, chosen), Subset(test, torch.arange(len(test))), folds)


def draw_fraction(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Indices of a fraction of each class, at least one image of each, in rising order."""
    classes = shuffle_classes(labels, generator)
    parts = [indices[: max(1, round(fraction * len(indices)))] for indices in classes]
    return torch.cat(parts).sort().values


def hold_out(labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices to train on, and indices to choose on: a fraction of each class.

    At least one image of a class is held out, but a class of one image stays in training.
    """
    kept, held = [], []
    for indices in shuffle_classes(labels, generator):
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        held.append(indices[:count])
        kept.append(indices[count:])
    return torch.cat(kept), torch.cat(held)


def shuffle_classes(labels: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The indices of each class, in random order."""
    members = [(labels == c).nonzero().flatten() for c in labels.unique()]
    return [indices[torch.randperm(len(indices), generator=generator)] for indices in members]
