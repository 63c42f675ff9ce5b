"""Features of images: what a frozen encoder makes of them, on all devices of a launch."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import augment
import dataloader
import parallel
import utils
from data.base import in_px
from evaluation.subsets import Subset
from model import to_device
from run import compute
from run.memory import check_memory, image_bytes


class Features(NamedTuple):
    """Features (V, n, D) of V views of n images, the image itself first, and labels (n,)."""

    views: Tensor
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """Features (n, D) of the images themselves."""
        return self.views[0]

    def take(self, rows: Tensor | slice) -> "Features":
        return Features(self.views[:, rows], self.labels[rows])

    def to_device(self, device: torch.device) -> "Features":
        """The same on a device, unless it is a GPU that has not the memory for the work on them:
        for kNN a normalised copy of the images, some blocks of similarities, and the queries."""
        needed = self.views.nbytes + 2 * self.images.nbytes + 2**29
        if device.type == "cuda" and compute.free_memory(device) < needed:
            return self
        return Features(self.views.to(device), self.labels)


@dataclass
class Extractor:
    """A frozen encoder on all devices of a launch, and how images are brought to it."""

    encoder: nn.Module  # maps (N, 3, H, W) to (N, D)
    mean: list[float]
    std: list[float]
    launch: parallel.Launch
    precision: str = "fp32"
    batch_size: int = 256
    num_workers: int | str = 0
    not_finite: str = "the features are not finite: the training of the encoder diverged"

    def __post_init__(self) -> None:
        self.dtype = compute.precision_dtype(self.precision)
        self.encoder.to(self.launch.device, self.dtype, memory_format=torch.channels_last)
        self._on_all_devices = self.launch.wrap(self.encoder.requires_grad_(False))

    def load(self, images: Subset, batches: Sequence[Tensor]) -> Iterator[dataloader.Batch]:
        """Batches of a subset's data set, with the images on the device.

        Raises UserError if a batch takes more memory than there is.
        """
        self._check_memory(images.dataset, max(map(len, batches), default=0))
        device, workers = self.launch.device, self.num_workers
        options = {"failures": images.failures, "pin": device.type == "cuda"}
        for batch in dataloader.iterate(images.dataset, batches, num_workers=workers, **options):
            yield replace(batch, images=to_device(batch.images, device))

    def _check_memory(self, dataset: dataloader.Dataset, rows: int) -> None:
        crop, channels = dataset.crop, dataset.size.pixels.channels
        _, layer = image_bytes(self.encoder, channels, crop, self.precision)
        needed = rows * (layer + dataset.image_bytes)
        what = f"a batch of {rows} images at --crop {in_px(crop)}"
        remedy = "use a smaller --crop, or a smaller batch (of test.py --eval_batch_size)"
        check_memory(needed, self.launch.device, what, remedy)

    def encode(self, x: Tensor) -> Tensor:
        """Outputs float32 (N, D) for normalised images (N, 3, H, W)."""
        with compute.autocast(self.precision, self.launch.device):
            return self._on_all_devices(x).float()


def dataset_features(extractor: Extractor, images: Subset, mirror: bool = False) -> Features:
    """Features of images and, with `mirror`, of their mirror images; float32, on the CPU.

    Each device encodes its share, every image once; every process returns them all, in order.
    The encoder is used in eval mode and must come out unchanged, bit for bit (RuntimeError).
    Raises UserError for unreadable images and for features that are not finite.
    """
    n, launch = len(images), extractor.launch
    batches = images.indices[launch.rows(n)].split(extractor.batch_size)
    features, labels = [], []
    with freeze(extractor.encoder):
        loader = extractor.load(images, batches)
        for batch in utils.progress(loader, "features", total=len(batches)):
            mean, std = extractor.mean, extractor.std
            view = augment.normalize(batch.images, mean, std, extractor.dtype)
            views = [view, view.flip(-1)] if mirror else [view]
            outputs = [extractor.encode(view) for view in views]
            features.append(torch.stack(outputs, dim=1).cpu())  # N x V x D
            labels.append(batch.labels)
    features = launch.gather(torch.cat(features), n).transpose(0, 1).contiguous()
    if not features.isfinite().all():
        raise utils.UserError(extractor.not_finite)
    return Features(features, launch.gather(torch.cat(labels), n))


@contextlib.contextmanager
def freeze(encoder: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; afterwards the modes as before.

    Raises RuntimeError if a parameter or buffer changed by one bit.
    """
    before, modes = copy_bits(encoder), [(m, m.training) for m in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
    after = copy_bits(encoder)
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    if changed:
        raise RuntimeError(f"the frozen encoder changed while it was used: {', '.join(changed)}")


def copy_bits(module: nn.Module) -> dict[str, Tensor]:
    """The bits of a module's state: NaN is equal to itself there."""
    state = module.state_dict()
    return {name: value.flatten().view(torch.uint8).clone() for name, value in state.items()}
