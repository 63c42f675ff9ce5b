"""The k nearest neighbours by cosine, and their vote."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import parallel
from evaluation.features import Features

BLOCK = 1 << 24  # similarities computed at once: 64 MB of float32


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The k nearest of the bank (n, D) to each query (m, D), by cosine, in blocks of b queries.

    Yields the rows of the queries (b,), similarities (b, k), the nearest first, and rows of the
    bank (b, k), computed on the device of the bank.
    """
    bank = F.normalize(bank, dim=1)
    for rows in torch.arange(len(queries)).split(max(1, BLOCK // len(bank))):
        similarities = F.normalize(queries[rows].to(bank.device), dim=1) @ bank.T
        yield rows, *similarities.topk(k, dim=1)


@torch.no_grad()
def knn_hits(
    bank: Features,
    queries: Features,
    *,
    k: int = 200,
    temperature: float = 0.07,
    weighted: bool = True,
) -> int:
    """How many queries the vote of their k nearest bank images gets right.

    A neighbour of similarity s has weight exp(s / temperature) (Wu et al. 2018,
    arXiv:1805.01978, section 3.4), or 1 if not `weighted`; a draw goes to the lower class.
    Raises ValueError unless 1 <= k <= n.
    """
    n = len(bank.labels)
    if not 1 <= k <= n:
        raise ValueError(f"k {k} must be from 1 to the number of bank images, {n}")
    hits, classes = 0, int(bank.labels.max()) + 1
    bank_labels = bank.labels.to(bank.images.device)
    for rows, similarities, neighbours in nearest(bank.images, queries.images, k):
        weights = torch.ones_like(similarities)
        if weighted:
            # relative to the nearest: changes no vote, and cannot overflow
            weights = ((similarities - similarities[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(rows), classes)
        votes.scatter_add_(1, bank_labels[neighbours], weights)
        hits += int((votes.argmax(dim=1).cpu() == queries.labels[rows]).sum())
    return hits


def knn_top1(
    bank: Features, queries: Features, launch: parallel.Launch, **options: float | bool
) -> float:
    """Top-1 in percent, the same on every process: each counts its share of the queries.

    `options` are those of `knn_hits`.
    """
    n = len(queries.labels)
    hits = knn_hits(bank, queries.take(launch.rows(n)), **options)
    return 100.0 * int(launch.total(torch.tensor(hits, device=launch.device))) / n
