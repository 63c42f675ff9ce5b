"""What several processes send, against the reference's, and what a second process gains on a CPU.

    python benchmarks/scaling.py              both tables of benchmarks/README.md (bytes are computed, times measured)
    python benchmarks/scaling.py --bytes      the first alone

Bytes: those that a process hands to the network in a step, each receiver counted, averaged over processes; a ring forwards as many.
Times: train.py on the built-in data, ResNet-18 at 32 px, batch 128, alternating launches, median of the rows of log.csv.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torchvision

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import utils

C, K, LOCAL = 128, 65536, 32
LAUNCHES = {
    "1 process, 1 thread": ([sys.executable], 1),
    "1 process, 2 threads": ([sys.executable], 2),
    "2 processes, 1 thread each": (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
        1,
    ),
}


def bytes_sent(devices: int, side: int) -> dict[str, dict[str, float]]:
    """Bytes a step and process, by what is sent, for ResNet-50, 32 images a device, K 65536; gradients apart."""
    resnet = torchvision.models.resnet50(num_classes=C)
    statistics_of_two = 2 * sum(
        buffer.numel() * buffer.element_size() for buffer in resnet.buffers()
    )
    image, key, others = 3 * side * side * 4, C * 4, devices - 1
    once = others / devices  # of a broadcast, averaged over processes
    reference = {
        "key views, gathered": others * LOCAL * image,
        "permutation, broadcast": once * 8 * LOCAL * devices,
        "keys, gathered twice": 2 * others * LOCAL * key,
        "batch-norm buffers, broadcast": once * statistics_of_two,
        "queue, broadcast": once * C * K * 4,
    }
    ours = {
        "key views, all-to-all": once * LOCAL * image,
        "keys, gathered": others * LOCAL * key,
    }  # float32, as the reference's; bf16 halves the views
    gradients = 2 * once * 4 * sum(parameter.numel() for parameter in resnet.parameters())
    return {"reference": reference, "ours": ours, "both": {"gradients, all-reduced": gradients}}


def print_bytes() -> None:
    print(
        "| GPUs | px | reference MB | ours MB (with bf16) | ratio | of the reference's: views, keys, queue, rest | gradients MB (both) |\n"
        + "| --- " * 7
        + "|"
    )
    for devices in (8, 64):
        for side in (64, 224):
            sent = bytes_sent(devices, side)
            reference, ours = sum(sent["reference"].values()), sum(sent["ours"].values())
            views, permutation, keys, buffers, queue = sent["reference"].values()
            half = ours - sent["ours"]["key views, all-to-all"] / 2
            parts = ", ".join(
                f"{part / 1e6:.1f}" for part in (views, keys, queue, permutation + buffers)
            )
            print(
                f"| {devices} | {side} | {reference / 1e6:.1f} | {ours / 1e6:.1f} ({half / 1e6:.1f}) | {reference / ours:.1f} | {parts} | {sent['both']['gradients, all-reduced'] / 1e6:.1f} |"
            )


def images_per_second(launch: list[str], threads: int, out: Path) -> float:
    flags = [
        "--preset=demo",
        f"--output_root={out}",
        "--overwrite",
        "--batch_size=128",
        "--bn_groups=2",
        "--log_every=6",
        "--max_epoch=1",
        "--device=cpu",
    ]
    subprocess.run(
        [*launch, "train.py", *flags],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    return statistics.median(
        utils.read_csv(out / "SHAPES" / "demo" / "log.csv")["images_per_second"][1:]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    made_by = utils.provenance()
    print(f"commit {made_by['commit']}, torch {made_by['torch']}\n")
    print_bytes()
    if args.bytes:
        return
    measured: dict[str, list[float]] = {name: [] for name in LAUNCHES}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(args.repeats):
            for name, (launch, threads) in LAUNCHES.items():
                measured[name].append(images_per_second(launch, threads, Path(out)))
    first = next(iter(measured.values()))
    print("\n| launch | ratio to the first | images/s |\n| --- | --- | --- |")
    for name, speeds in measured.items():
        print(
            f"| {name} | {statistics.median(b / a for a, b in zip(first, speeds)):.2f} | {statistics.median(speeds):,.0f} |"
        )


if __name__ == "__main__":
    main()
