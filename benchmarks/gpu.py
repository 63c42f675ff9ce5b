"""Does the GPU compute what the CPU does? For a machine with an NVIDIA GPU; prints a table, exits with 1 if a line fails.

    python benchmarks/gpu.py                  on one GPU, or several
    python benchmarks/gpu.py --device cpu     tries the script itself where there is no GPU, in seven minutes: everything must agree

Float64 over 20 steps, float32 (TF32 off) over one step, eight batch-norm groups on one GPU, and torchrun with one process (NCCL); on a
machine with several GPUs also nn.DataParallel and torchrun over two of them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import utils

BASE = [
    "--dataset_root=shapes",
    "--arch=resnet18",
    "--crop=40",
    "--resize=40",
    "--feature_dim=16",
    "--num_keys=96",
    "--batch_size=250",
    "--bn_groups=5",
    "--shuffle_bn",
    "--max_epoch=1",
    "--lr=0.003",
    "--temperature=0.2",
    "--log_every=1",
    "--overwrite",
]  # 20 steps of 250 images
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def train(
    out: Path, name: str, flags: list[str], launch: tuple[str, ...] = (), gpus: str = "0"
) -> dict[str, list[float]]:
    """The log of a run on these GPUs; SystemExit with its error if it fails."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "NVIDIA_TF32_OVERRIDE": "0"}
    done = subprocess.run(
        [
            sys.executable,
            *launch,
            "train.py",
            *BASE,
            f"--output_root={out}",
            f"--exp_version={name}",
            *flags,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return utils.read_csv(out / "IMAGENET-64" / name / "log.csv")


def difference(out: Path, a: str, b: str) -> float:
    """The largest difference of two runs' weights, queue, statistics and momentum buffers, relative to each tensor's largest value."""
    ends = [
        utils.load_checkpoint(out / "IMAGENET-64" / name / "checkpoints" / "last.pth.tar")
        for name in (a, b)
    ]
    states = [
        end["state_dict"]
        | {f"momentum.{i}": s["momentum_buffer"] for i, s in end["optimizer"]["state"].items()}
        for end in ends
    ]
    return max(
        (
            (v.double() - states[1][n].double()).abs().max()
            / v.double().abs().max().clamp(min=1e-3)
        ).item()
        for n, v in states[0].items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    device = f"--device={parser.parse_args().device}"
    gpus = torch.cuda.device_count() if device == "--device=cuda" else 0
    print(
        f"commit {utils.provenance()['commit']}, torch {torch.__version__}, {device}, {torch.cuda.get_device_name() if gpus else 'no GPU'}\n\n| check | measured | limit | |\n| --- | --- | --- | --- |",
        flush=True,
    )
    failed = False

    def check(name: str, value: float, limit: float) -> None:
        nonlocal failed
        failed |= not value <= limit
        print(
            f"| {name} | {value:.2e} | {limit:g} | {'ok' if value <= limit else 'FAILED'} |",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        one_step = [
            "--precision=fp32",
            "--batch_size=2501",
            "--num_keys=2500",
            "--bn_groups=1",
        ]  # more than half of the images
        for name, flags in (("fp64", ["--precision=fp64"]), ("fp32", one_step)):
            train(out, f"cpu-{name}", [*flags, "--device=cpu"])
            train(out, f"gpu-{name}", [*flags, device])
        check(
            "float64, 20 steps, weights, queue and statistics",
            difference(out, "cpu-fp64", "gpu-fp64"),
            1e-6,
        )
        check(
            "float32, one step from the same state", difference(out, "cpu-fp32", "gpu-fp32"), 1e-3
        )
        train(out, "nccl", ["--precision=fp64", device], (*TORCHRUN, "--nproc_per_node=1"))
        check(
            "torchrun with one process, float64, 20 steps",
            difference(out, "gpu-fp64", "nccl"),
            1e-6,
        )
        if gpus > 1:
            for name, launch in (
                ("torchrun over two GPUs", (*TORCHRUN, "--nproc_per_node=2")),
                ("nn.DataParallel over two GPUs", ()),
            ):
                train(out, "one", ["--precision=fp64", device, "--bn_groups=2"])
                train(out, "two", ["--precision=fp64", device, "--bn_groups=2"], launch, gpus="0,1")
                check(f"{name}, float64, 20 steps", difference(out, "one", "two"), 1e-6)
        demo = [
            "--crop=32",
            "--feature_dim=128",
            "--batch_size=64",
            "--bn_groups=8",
            "--num_keys=512",
            "--lr=0.03",
            "--cosine",
            "--momentum=0.99",
            "--max_epoch=9",
        ]
        loss = train(out, "groups", [device, *demo])["loss"]
        check(
            "the demo with 8 groups, precision auto: loss of the last 50 steps (chance: 6.24)",
            statistics.fmean(loss[-50:]),
            5.9,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
