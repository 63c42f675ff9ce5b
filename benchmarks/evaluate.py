"""Protocols of the linear evaluation against each other, and the speed of kNN.

    python benchmarks/evaluate.py ROOT/fashion-mnist --pretrained CHECKPOINT

`cached` (features of the image and its mirror image once, six learning rates chosen from on held-out training images, three classifiers) against `original`
(the encoder runs on new random crops in each of 100 epochs, lr 10, x 0.2 every 20 epochs; one classifier), `original` at the learning rate that suits these features,
and `reference` (lr 30), by the functions that test.py uses, on the first 10,000 training images and all test images; seconds with all passes through the encoder.
Then kNN (k 200) of 10,000 queries against 60,000 features, 512 wide, and how much memory that adds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dataloader
import evaluate
import parallel
import utils

TRAIN = 10_000


def run(
    cfg: SimpleNamespace, subject: evaluate.Subject, root: str, launch: parallel.OneDevice
) -> tuple[float, float]:
    """Seconds and top-1 in percent of one protocol."""
    start = time.perf_counter()
    train, test = (
        dataloader.open_dataset(root, split, view="center", resize="auto", crop=subject.crop)
        for split in ("train", "test")
    )
    tests, truth = evaluate.dataset_features(cfg, subject, test, launch)
    if cfg.protocol == "cached":
        views, labels = evaluate.stored_views(
            cfg, subject, train, None, torch.arange(TRAIN), launch
        )
        found = evaluate.linear_evaluation(
            views.to(launch.device),
            labels,
            tests[0],
            truth,
            epochs=cfg.linear_epochs,
            lrs=cfg.linear_lrs,
            trials=range(cfg.trials),
            seed=cfg.seed,
        )
        predicted = found["predicted"]
    else:
        square = dataloader.open_dataset(
            root, "train", view="square", resize="auto", crop=subject.crop
        )
        recipe = evaluate.crop_recipe(
            subject.crop, subject.mean, subject.std, evaluate.PROTOCOLS[cfg.protocol][4]
        )
        predicted = evaluate.train_on_crops(
            cfg,
            subject.encoder,
            square,
            recipe,
            torch.arange(TRAIN),
            cfg.seed,
            lambda: tests[0],
            truth,
            launch,
        )["predicted"][None]
    top1 = 100 * float((predicted[..., 0] == truth).double().mean())
    return time.perf_counter() - start, top1


def knn_speed(device: torch.device) -> str:
    random = torch.Generator().manual_seed(0)
    bank, queries = (
        F.normalize(torch.randn(n, 512, generator=random), dim=1) for n in (60_000, 10_000)
    )
    labels, truth = (torch.randint(10, (n,), generator=random) for n in (60_000, 10_000))
    before, times = parallel.peak_memory_mb(device), []
    for _ in range(3):
        start = time.perf_counter()
        evaluate.knn_hits(bank.to(device), labels, queries, truth, k=200)
        times.append(time.perf_counter() - start)
    return f"kNN, 10,000 against 60,000, 512 wide: {statistics.median(times):.1f} s (median of 3), peak memory + {parallel.peak_memory_mb(device) - before:.0f} MB (the whole matrix: 2,289 MB)"


def main(argv: list[str]) -> None:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--epochs", type=int, help="of the protocols on crops (default: theirs, 100)"
    )
    parser.add_argument("--suiting_lr", type=float, default=0.3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    launch = utils.checked(parallel.launch, args.device)
    made_by = utils.provenance()
    print(
        f"commit {made_by['commit']}, torch {made_by['torch']}, {launch.name}\n\n{knn_speed(launch.device)}\n",
        flush=True,
    )
    print(
        "| seed | protocol | seconds | top-1 | seconds, cached = 1 | points, cached less it |\n| --- | --- | --- | --- | --- | --- |"
    )
    flags = [
        f"--dataset_root={args.root}",
        f"--pretrained={args.pretrained}",
        "--precision=fp32",
        f"--device={args.device}",
    ]
    for seed in args.seeds:
        settings = [["--protocol=cached"], ["--protocol=original"]]
        if seed == args.seeds[0]:
            settings += [
                ["--protocol=original", "--linear_lrs", str(args.suiting_lr)],
                ["--protocol=reference"],
            ]
        for setting in settings:
            epochs = (
                [f"--linear_epochs={args.epochs}"]
                if args.epochs and "cached" not in setting[0]
                else []
            )
            cfg = evaluate.settled(
                utils.load_config("test", [*flags, *setting, *epochs, f"--seed={seed}"])
            )
            subject = evaluate.load_subject(cfg)
            subject.encoder.to(
                device=launch.device, memory_format=torch.channels_last
            ).requires_grad_(False)
            launch.wrap(subject.encoder)
            seconds, top1 = run(cfg, subject, args.root, launch)
            if "cached" in setting[0]:
                cached = seconds, top1
            name = (
                f"{cfg.protocol}, lr {cfg.linear_lrs[0]:g}"
                if cfg.protocol != "cached"
                else "cached"
            )
            print(
                f"| {seed} | {name} | {seconds:.1f} | {top1:.2f} | {seconds / cached[0]:.1f} | {cached[1] - top1:+.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    utils.main_guard(main)
