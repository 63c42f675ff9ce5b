"""What several processes send, against the reference's, and what a second one gains on a CPU.

    python benchmarks/scaling.py            both tables of benchmarks/README.md
    python benchmarks/scaling.py --bytes    the first alone, which is computed

Bytes: those that a process hands to the network in a step, each receiver counted, averaged over
the processes; a ring forwards as many. Times: train.py on the built-in data, ResNet-18 at 32 px,
batch 128, alternating launches, median of the rows of log.csv.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torchvision
from common import build_parser, print_header, print_row, ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils

ROOT = Path(__file__).resolve().parents[1]
C, K, LOCAL = 128, 65536, 32
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCHES = {  # words after python, threads
    "1 process, 1 thread": ([], 1),
    "1 process, 2 threads": ([], 2),
    "2 processes, 1 thread each": (TORCHRUN, 1),
}
FLAGS = [
    "--preset=demo",
    "--overwrite",
    "--batch_size=128",
    "--bn_groups=2",
    "--log_every=6",
    "--max_epoch=1",
    "--device=cpu",
]


def bytes_of_reference(devices: int, side: int) -> dict[str, float]:
    """Bytes a step and process, for ResNet-50, 32 images a device, K 65536; without gradients."""
    resnet = torchvision.models.resnet50(num_classes=C)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in resnet.buffers())
    others = devices - 1
    once = others / devices  # of a broadcast, averaged over processes
    return {
        "views": others * LOCAL * image_bytes(side),  # gathered
        "keys": 2 * others * LOCAL * C * 4,  # gathered twice
        "queue": once * C * K * 4,  # broadcast
        "rest": once * (8 * LOCAL * devices + 2 * buffers),  # permutation, batch norm: broadcast
    }


def bytes_of_ours(devices: int, side: int) -> dict[str, float]:
    """The same for ours, in float32; bf16 halves the views."""
    once = (devices - 1) / devices
    views = once * LOCAL * image_bytes(side)  # all-to-all
    return {"views": views, "keys": (devices - 1) * LOCAL * C * 4}


def bytes_of_gradients(devices: int) -> float:
    parameters = torchvision.models.resnet50(num_classes=C).parameters()
    return 2 * (devices - 1) / devices * 4 * sum(parameter.numel() for parameter in parameters)


def image_bytes(side: int) -> int:
    return 3 * side * side * 4


def print_bytes() -> None:
    parts = "views, keys, queue, rest"
    print_header("GPUs", "px", "reference", "ours (bf16)", "ratio", parts, "gradients")
    for devices in (8, 64):
        for side in (64, 224):
            reference, ours = bytes_of_reference(devices, side), bytes_of_ours(devices, side)
            total, own = sum(reference.values()), sum(ours.values())
            print_row(
                str(devices),
                str(side),
                f"{total / 1e6:.1f}",
                f"{own / 1e6:.1f} ({(own - ours['views'] / 2) / 1e6:.1f})",
                f"{total / own:.1f}",
                ", ".join(f"{part / 1e6:.1f}" for part in reference.values()),
                f"{bytes_of_gradients(devices) / 1e6:.1f}",
            )


def images_per_second(launch: list[str], threads: int, out: Path) -> float:
    command = [sys.executable, *launch, "train.py", *FLAGS, f"--output_root={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    log = utils.read_csv(out / "SHAPES" / "demo" / "log.csv")
    return statistics.median(log["images_per_second"][1:])


def main(argv: list[str]) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--bytes", action="store_true", help="only the bytes")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    made_by = utils.provenance()
    print(f"commit {made_by['commit']}, torch {made_by['torch']}\n\nMegabytes:\n")
    print_bytes()
    if args.bytes:
        return
    speeds: dict[str, list[float]] = {name: [] for name in LAUNCHES}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(args.repeats):
            for name, (launch, threads) in LAUNCHES.items():
                speeds[name].append(images_per_second(launch, threads, Path(out)))
    print()
    print_header("launch", "ratio to the first", "images/s")
    first = next(iter(speeds.values()))
    for name, own in speeds.items():
        print_row(name, f"{ratio(own, first):.2f}", f"{statistics.median(own):,.0f}")


if __name__ == "__main__":
    utils.guard(main)
