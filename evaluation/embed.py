"""Features of any images, written as they come: the memory does not grow with their number."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import augment
import utils
from data.failures import Failures
from data.folders import FolderImages
from evaluation.features import Extractor, freeze
from evaluation.subsets import Subset
from run import checkpoints

ROWS = 1 << 16  # of the features, compared with a query at once


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of C classes on features of width D: the first trial of an evaluation."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    classes: list[str]

    def predict(self, features: Tensor) -> list[tuple[str, str]]:
        """The likeliest class of each of (N, D), and its probability."""
        probability, index = F.linear(features, self.weight, self.bias).softmax(dim=1).max(dim=1)
        pairs = zip(index.tolist(), probability.tolist(), strict=True)
        return [(self.classes[i], f"{p:.4f}") for i, p in pairs]


def read_classifier(path: str, width: int) -> Classifier:
    """The classifier in a linear.pth.tar of test.py; UserError if it is none, or does not fit."""
    content = checkpoints.read(path)
    if not isinstance(content, dict) or not {"weight", "bias", "classes"} <= content.keys():
        raise utils.UserError(f"--predict {path!r} is no linear.pth.tar of test.py")
    weight, bias, classes = (content[name] for name in ("weight", "bias", "classes"))
    try:
        sound = weight.shape == (*bias.shape, weight.shape[2]) and len(classes) == bias.shape[1] > 0
        sound &= bool(weight.isfinite().all() and bias.isfinite().all())
        sound &= all(isinstance(name, str) for name in classes)
    except (AttributeError, IndexError, TypeError, RuntimeError):
        sound = False
    if not sound or not len(weight):
        raise utils.UserError(f"--predict {path!r} is damaged: evaluate again with test.py")
    if weight.shape[2] != width:
        reason = f"takes features of width {weight.shape[2]}, not {width}"
        raise utils.UserError(f"--predict {path!r} {reason}: name the checkpoint that it is of")
    return Classifier(weight[0].float(), bias[0].float(), classes)


def extract(extractor: Extractor, images: FolderImages) -> Iterator[tuple[list[str], Tensor]]:
    """Paths and features float32 (n, D) of the images by batches, less the unreadable ones.

    Raises UserError if more than 1 % cannot be read, or for features that are not finite.
    """
    subset = Subset(images, torch.arange(len(images)))
    subset.failures = Failures(len(images), fate="it is left out")
    batches = subset.indices.split(extractor.batch_size)
    with freeze(extractor.encoder):
        loader = extractor.load(subset, batches)
        loader = utils.progress(loader, "features", total=len(batches))
        for rows, batch in zip(batches, loader, strict=True):
            mean, std = extractor.mean, extractor.std
            view = augment.normalize(batch.images, mean, std, extractor.dtype)
            features = extractor.encode(view).cpu()
            if not features.isfinite().all():
                raise utils.UserError(extractor.not_finite)
            paths = [images.paths[row] for row in rows.tolist()]
            kept = [i for i, path in enumerate(paths) if path not in batch.failed]
            yield [paths[i] for i in kept], features[kept]


def write_features(
    extractor: Extractor, images: FolderImages, out: Path, classifier: Classifier | None
) -> int:
    """Write OUT.npy, float32 (n, D), and OUT.csv, a line for each row: how many there are."""
    lines: list[Sequence[Any]] = []

    def write(file: Any) -> None:
        shape = (0, 0)
        for paths, features in extract(extractor, images):
            if not lines:
                shape = (len(images), features.shape[1])
                write_header(file, shape)
            predicted = classifier.predict(features) if classifier else [()] * len(paths)
            for path, more in zip(paths, predicted, strict=True):
                lines.append((path, len(lines), *more))
            file.write(features.numpy().astype("<f4").tobytes())
        file.seek(0)
        write_header(file, (len(lines), shape[1]))  # of the same length, whatever the number

    utils.atomic_write(out.with_name(f"{out.name}.npy"), write)
    columns = ["path", "row", *(["class", "probability"] if classifier else [])]
    utils.write_csv(out.with_name(f"{out.name}.csv"), columns, lines)
    return len(lines)


def read_rows(out: Path) -> list[list[str]]:
    """The lines of OUT.csv: path, row, and perhaps class and probability."""
    text = os.fsdecode(out.with_name(f"{out.name}.csv").read_bytes())
    return list(csv.reader(io.StringIO(text)))[1:]


def write_header(file: Any, shape: tuple[int, int]) -> None:
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)


def nearest(features: np.ndarray, query: Tensor, k: int) -> list[tuple[float, int]]:
    """Cosines and rows of the k of (n, D) that are nearest to a query (D,), closest first."""
    found: list[tuple[float, int]] = []
    for start in range(0, len(features), ROWS):
        part = torch.from_numpy(np.array(features[start : start + ROWS]))
        cosines = F.normalize(part, dim=1) @ F.normalize(query, dim=0)
        best = cosines.topk(min(k, len(part)))
        found += zip(best.values.tolist(), (start + best.indices).tolist(), strict=True)
        found = sorted(found, reverse=True)[:k]
    return found
