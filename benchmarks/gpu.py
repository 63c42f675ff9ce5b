"""Does the GPU compute what the CPU does? Prints a table, exits with 1 if a line fails.

    python benchmarks/gpu.py                 on one NVIDIA GPU, or several
    python benchmarks/gpu.py --device cpu    tries the script itself, in seven minutes

Float64 over 20 steps, the same as CUDA graphs, float32 (TF32 off) over one step, eight batch-norm
groups on one GPU, and torchrun with one process (NCCL); on a machine with several GPUs also
nn.DataParallel and torchrun over two of them.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import build_parser, print_header, print_row

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils
from run import checkpoints

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
FLAGS = [  # 20 steps of 250 images
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
]
ONE_STEP = [  # a batch of more than half of the images
    "--precision=fp32",
    "--batch_size=2501",
    "--num_keys=2500",
    "--bn_groups=1",
]
DEMO = [
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
DEMO_CHANCE, DEMO_LOSS = 6.24, 5.9  # what the loss starts from, and must fall below


class Checks:
    """Runs of train.py in a folder, and the rows of the table."""

    def __init__(self, out: Path, device: str) -> None:
        self.out, self.device, self.failed = out, device, False

    def train(self, name: str, *flags: str, launch: tuple[str, ...] = (), gpus: str = "0") -> Path:
        """The folder of a run on these GPUs; UserError if it fails."""
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "NVIDIA_TF32_OVERRIDE": "0"}
        names = [f"--output_root={self.out}", "--dataset_name=GPU", f"--exp_version={name}"]
        done = subprocess.run(
            [sys.executable, *launch, "train.py", *FLAGS, *names, *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise utils.UserError(f"{name} failed:\n{done.stderr[-3000:]}")
        return self.out / "GPU" / name

    def check(self, name: str, value: float, limit: float) -> None:
        fits = value <= limit  # not so for a number that is not finite
        self.failed |= not fits
        print_row(name, f"{value:.2e}", f"{limit:g}", "ok" if fits else "FAILED")

    def one_device(self) -> None:
        double, device = "--precision=fp64", self.device
        cpu = self.train("cpu-fp64", double, "--device=cpu")
        gpu = self.train("gpu-fp64", double, device)
        self.check("float64, 20 steps, all of the state", difference(cpu, gpu), 1e-6)
        if self.device != "--device=cpu":
            graph = self.train("graph", double, self.device, "--cuda_graph")
            self.check("CUDA graphs, float64, 20 steps", difference(gpu, graph), 1e-6)
        single = self.train("cpu-fp32", *ONE_STEP, "--device=cpu")
        other = self.train("gpu-fp32", *ONE_STEP, device)
        self.check("float32, one step from the same state", difference(single, other), 1e-3)
        nccl = self.train("nccl", double, device, launch=(*TORCHRUN, "--nproc_per_node=1"))
        self.check("torchrun with one process, float64, 20 steps", difference(gpu, nccl), 1e-6)

    def two_devices(self) -> None:
        flags = ["--precision=fp64", self.device, "--bn_groups=2"]
        one = self.train("one", *flags)
        for name, launch in (
            ("torchrun", (*TORCHRUN, "--nproc_per_node=2")),
            ("nn.DataParallel", ()),
        ):
            two = self.train("two", *flags, launch=launch, gpus="0,1")
            self.check(f"{name} over two GPUs, float64, 20 steps", difference(one, two), 1e-6)

    def demo(self) -> None:
        log = utils.read_csv(self.train("groups", *DEMO, self.device) / "log.csv")
        loss = statistics.fmean(log["loss"][-50:])
        name = f"the demo, 8 groups, precision auto: final loss (chance: {DEMO_CHANCE})"
        self.check(name, loss, DEMO_LOSS)


def difference(a: Path, b: Path) -> float:
    """Largest difference of two runs' weights, queue, statistics and momentum buffers.

    It is relative to the largest value of each tensor.
    """
    first, second = (read_state(folder) for folder in (a, b))

    def relative(name: str) -> float:
        value, other = first[name].double(), second[name].double()
        return ((value - other).abs().max() / value.abs().max().clamp(min=1e-3)).item()

    return max(map(relative, first))


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.load(folder / "checkpoints" / "last.pth.tar")
    moments = checkpoint["optimizer"]["state"].items()
    return checkpoint["state_dict"] | {f"momentum.{i}": s["momentum_buffer"] for i, s in moments}


def main(argv: list[str]) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(argv).device
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    name = torch.cuda.get_device_name() if gpus else "no GPU"
    made_by = utils.provenance()
    print(f"commit {made_by['commit']}, torch {made_by['torch']}, {device}, {name}\n", flush=True)
    print_header("check", "measured", "limit", "")
    with tempfile.TemporaryDirectory() as out:
        checks = Checks(Path(out), f"--device={device}")
        checks.one_device()
        if gpus > 1:
            checks.two_devices()
        checks.demo()
    sys.exit(checks.failed)


if __name__ == "__main__":
    utils.guard(main)
