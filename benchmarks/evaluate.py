"""Protocols of the linear evaluation against each other, and the speed of kNN.

    python benchmarks/evaluate.py ROOT/fashion-mnist --pretrained CHECKPOINT

`cached` (features of an image and its mirror image once, six learning rates chosen from on
held-out training images, three classifiers) against `original` (the encoder runs on new random
crops in each of 100 epochs, lr 10, x 0.2 after each fifth; one classifier), `original` at the
learning rate that suits these features, and `reference` (lr 30). They see a part of each class's
training images and all test images. Seconds are those of the whole evaluation, as test.py has it.
Then kNN (k 200) of 10,000 queries against 60,000 features of width 512, and the memory it adds.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import alternate, build_parser, print_header, print_row

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config
import parallel
import utils
from config import TestSettings
from evaluation.evaluate import evaluate, resolve
from evaluation.features import Features
from evaluation.knn import knn_hits
from evaluation.subject import load_subject
from run.meters import peak_memory_mb

BANK, QUERIES, WIDTH, K = 60_000, 10_000, 512, 200


@dataclass(frozen=True)
class Measured:
    protocol: str
    seconds: float
    top1: float


def measure(launch: parallel.Launch, *flags: str) -> Measured:
    """One evaluation by test.py's functions."""
    with tempfile.TemporaryDirectory() as out:
        words = [*flags, f"--encoder_output_root={out}", "--precision=fp32"]
        settings = resolve(config.parse(TestSettings, words))
        result = evaluate(settings, load_subject(settings), launch).result
    name = settings.protocol
    if name != "cached":
        name += f", lr {settings.linear_lrs[0]:g}"
    return Measured(name, result["seconds"], result["linear_top1"])


def compare(args: argparse.Namespace, launch: parallel.Launch) -> list[list[str]]:
    """A row for each protocol: all with the first seed, cached and original with each."""
    data = [f"--dataset_root={args.root}", f"--train_fraction={args.fraction}"]
    flags = [*data, f"--pretrained={args.pretrained}", f"--device={args.device}"]
    epochs = [] if args.epochs is None else [f"--linear_epochs={args.epochs}"]
    rows = []
    for seed in args.seeds:
        others = [["--protocol=original"]]
        if seed == args.seeds[0]:
            suiting = ["--linear_lrs", str(args.suiting_lr)]
            others += [["--protocol=original", *suiting], ["--protocol=reference"]]
        cached = measure(launch, *flags, f"--seed={seed}")
        rows.append(to_row(seed, cached, cached))
        for protocol in others:
            own = measure(launch, *flags, f"--seed={seed}", *protocol, *epochs)
            rows.append(to_row(seed, own, cached))
    return rows


def to_row(seed: int, own: Measured, cached: Measured) -> list[str]:
    return [
        str(seed),
        own.protocol,
        f"{own.seconds:.1f}",
        f"{own.top1:.2f}",
        f"{own.seconds / cached.seconds:.1f}",
        f"{cached.top1 - own.top1:+.2f}",
    ]


def knn_speed(device: torch.device) -> str:
    random = torch.Generator().manual_seed(0)

    def draw(n: int) -> Features:
        vectors = F.normalize(torch.randn(n, WIDTH, generator=random), dim=1)
        return Features(vectors[None], torch.randint(10, (n,), generator=random))

    bank, queries = draw(BANK), draw(QUERIES)
    before = peak_memory_mb(device)
    run = {"kNN": lambda: knn_hits(bank.to_device(device), queries, k=K)}
    seconds = statistics.median(alternate(run, 3)["kNN"])
    return (
        f"kNN, {QUERIES:,} against {BANK:,}, {WIDTH} wide: {seconds:.1f} s (median of 3), "
        f"peak memory + {peak_memory_mb(device) - before:.0f} MB "
        f"(the whole matrix: {4 * QUERIES * BANK / 2**20:,.0f} MB)"
    )


def main(argv: list[str]) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("root", help="labelled images")
    parser.add_argument("--pretrained", required=True, help="a file of weights")
    parser.add_argument("--fraction", type=float, default=1 / 6, help="of the training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of classifiers")
    parser.add_argument("--epochs", type=int, help="of the protocols on crops (default: 100)")
    parser.add_argument("--suiting_lr", type=float, default=0.3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    launch, made_by = parallel.open_launch(args.device), utils.provenance()
    print(f"commit {made_by['commit']}, torch {made_by['torch']}, {launch.name}\n")
    print(f"{knn_speed(launch.device)}\n", flush=True)
    with launch:
        rows = compare(args, launch)
    print()
    print_header(
        "seed", "protocol", "seconds", "top-1", "seconds, cached = 1", "points, cached less it"
    )
    for row in rows:
        print_row(*row)


if __name__ == "__main__":
    utils.guard(main)
