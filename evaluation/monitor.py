"""kNN accuracy while training."""

from dataclasses import dataclass

import torch
from torch import Tensor

import dataloader
import encoders
import parallel
import utils
from config import TrainSettings, pixels_of
from evaluation.features import Extractor, dataset_features
from evaluation.knn import knn_top1
from evaluation.subsets import Subset, hold_out


@dataclass
class Part(Subset):
    """The bank or the queries, and their features of the last call."""

    features: Tensor | None = None  # (n, D)


class Monitor:
    """kNN accuracy (k 200, T 0.07) of a query encoder, on a fixed part of labelled images.

    Of --knn_root the training split is the bank, and the test split is classified. Without it a
    stratified tenth of the training images is classified by the others, so that nothing is chosen
    on a test split. Raises UserError where labels are missing.
    """

    def __init__(self, settings: TrainSettings, launch: parallel.Launch) -> None:
        self.launch = launch
        random = utils.generator(settings.seed, "monitor")
        bank, queries = open_parts(settings, random)
        limit = settings.knn_images
        self.bank = draw_part(bank, limit, random)
        self.queries = draw_part(queries, max(1, limit // 4), random)
        self.images = len(self.bank) + len(self.queries)
        if min(len(self.bank), len(self.queries)) < launch.processes**2:
            raise utils.UserError(
                f"--knn_every has too few images for {launch.processes} processes: "
                "name others with --knn_root"
            )
        self.extractor = Extractor(
            encoders.remove_head(encoders.build_from(settings)),
            settings.mean,
            settings.std,
            launch,
            settings.precision,
            num_workers=settings.num_workers,
            not_finite="the features of this run are not finite: it diverged; try a lower --lr",
        )

    def top1(self, state_dict: dict[str, Tensor]) -> float:
        """Top-1 in percent of an encoder's state, the same on every process; all call it."""
        encoder = self.extractor.encoder
        encoder.load_state_dict({name: state_dict[name] for name in encoder.state_dict()})
        bank, queries = (dataset_features(self.extractor, p) for p in (self.bank, self.queries))
        self.bank.features, self.queries.features = bank.images, queries.images
        bank = bank.to_device(self.launch.device)
        return knn_top1(bank, queries, self.launch, k=min(200, len(self.bank)))


def open_parts(settings: TrainSettings, random: torch.Generator) -> list[Subset]:
    """The images that bank and queries are drawn from."""
    size = {"fit": "center", "resize": "auto", "crop": settings.crop}
    size["pixels"] = pixels_of(settings)
    if root := settings.knn_root:
        try:
            splits = [dataloader.open_dataset(root, split, **size) for split in ("train", "test")]
        except utils.UserError as error:
            raise utils.UserError(str(error).replace("--dataset_root", "--knn_root")) from None
        return [Subset(split, torch.arange(len(split))) for split in splits]

    root = settings.dataset_root
    kind = dataloader.detect(root)
    if kind == "packed":
        raise utils.UserError(
            f"--knn_every needs labels, and {root!r} is a packed store: name images with --knn_root"
        )
    # what is trained on, but for STL-10, whose pretraining split has no labels
    split = "pretrain" if kind == "folders" else "train"
    dataset = dataloader.open_dataset(root, split, **size)
    if len(dataset.labels.unique()) < 2:
        raise utils.UserError(
            f"--knn_every needs two classes or more, and {root!r} does not have them: "
            "name others with --knn_root"
        )
    bank, queries = hold_out(dataset.labels, 0.1, random)
    if not len(queries):
        raise utils.UserError(
            f"--knn_every needs classes of two images or more, and {root!r} has none: "
            "name others with --knn_root"
        )
    return [Subset(dataset, bank), Subset(dataset, queries)]


def draw_part(images: Subset, limit: int, random: torch.Generator) -> Part:
    """At most `limit` of the images, in the order of the data set."""
    rows = torch.randperm(len(images), generator=random)[:limit]
    return Part(images.dataset, images.indices[rows].sort().values)
