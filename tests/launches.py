"""Jobs that run on one device, several processes and stand-ins for several GPUs alike."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from miniature import write_folders
from scripts import free_ports

import dataloader
import parallel
import utils
from run import checkpoints

ROOT = Path(utils.__file__).parent
IMAGES, STEPS = 52, 6  # 2 epochs of 3 steps of 14 to 16 images: a queue of 40 keys wraps twice
BASE = [
    "--arch=timm:test_resnet",  # small, so quick; the first job has a ResNet-18
    "--crop=33",
    "--resize=33",
    "--feature_dim=8",
    "--num_keys=40",
    "--max_epoch=2",
    "--save_weight_epoch=9",
    "--num_workers=0",
    "--device=cpu",
    "--precision=fp64",
    "--lr=0.003",
    "--temperature=0.2",
]
# name: flags, and the numbers of processes that give the same curve
JOBS = {
    "v1 shuffled": (
        ["--arch=resnet18", "--batch_size=16", "--bn_groups=4", "--shuffle_bn", "--log_every=1"],
        (4,),
    ),  # and over 4, then 2, in the resumed run
    "v2 plain": (
        ["--batch_size=16", "--bn_groups=4", "--mlp", "--aug_plus", "--cosine", "--log_every=1"],
        (2, 4),
    ),
    "v2 shuffled, uneven over 4": (
        ["--batch_size=14", "--bn_groups=4", "--shuffle_bn", "--mlp", "--log_every=1"],
        (4,),
    ),  # 4, 4, 4, 2
    "v1 shuffled, uneven over 2": (
        ["--batch_size=15", "--bn_groups=2", "--shuffle_bn", "--log_every=1"],
        (2,),
    ),  # 8, 7
    "v1 random queue": (
        [
            "--batch_size=16",
            "--bn_groups=2",
            "--shuffle_bn",
            "--queue_init=random",
            "--log_every=5",
        ],
        (2,),
    ),
    "symmetric, with kNN": (
        [
            "--batch_size=16",
            "--bn_groups=4",
            "--shuffle_bn",
            "--symmetric",
            "--knn_every=1",
            "--max_epoch=1",
            "--log_every=1",
        ],
        (2,),
    ),
    "broken images": (
        [
            "--batch_size=100",
            "--bn_groups=2",
            "--shuffle_bn",
            "--queue_init=random",
            "--max_epoch=1",
            "--log_every=1",
            "--crop=16",
            "--resize=16",
        ],
        (2,),
    ),
    "float32, one step": (
        [
            "--batch_size=16",
            "--bn_groups=4",
            "--shuffle_bn",
            "--precision=fp32",
            "--max_epoch=1",
            "--num_keys=16",
            "--log_every=1",
        ],
        (2, 4),
    ),
    "bfloat16, one step": (
        [
            "--batch_size=16",
            "--bn_groups=4",
            "--shuffle_bn",
            "--precision=bf16",
            "--max_epoch=1",
            "--num_keys=16",
            "--log_every=1",
        ],
        (2,),
    ),
}
TOLERANCE = {"float32, one step": 1e-4, "bfloat16, one step": 2e-2}  # the others, in float64: 1e-9


def write_data(root: Path) -> dict[str, Path]:
    """Folders of 52 images, for one step of 24, both with a test split; and of 200 images, of
    which the first that each of two processes reads is broken."""
    write_folders(root / "large", classes=4, train=IMAGES // 4, test=8, size=16)
    write_folders(root / "small", classes=4, train=6, test=2, size=16)
    write_folders(root / "broken", classes=4, train=50, test=1, size=16)
    first = dataloader.epoch_batches(200, 100, seed=0, epoch=0)[0]
    for index in first[[0, 50]].tolist():
        (root / "broken" / "train" / f"class{index // 50}" / f"{index % 50:03}.png").write_bytes(
            b"no image"
        )
    return {
        name: root / ("small" if "one step" in name else "broken" if "broken" in name else "large")
        for name in [*JOBS, "large"]
    }


def flags_of(name: str, data: dict[str, Path], out: Path, *more: str) -> list[str]:
    return [
        *BASE,
        *JOBS[name][0],
        f"--dataset_root={data[name]}",
        f"--output_root={out / name.replace(' ', '_').replace(',', '')}",
        *more,
    ]


def run_of(name: str, out: Path) -> Path:
    return out / name.replace(" ", "_").replace(",", "") / "IMAGENET-64" / "v1"


def on_processes(count: int, commands: list[list[str]]) -> list[tuple[str, list[dict[str, int]]]]:
    """Run commands ([script, flag, ...]) as `count` processes: what each printed, and its calls of
    collectives for each command."""
    jobs = json.dumps(
        [
            [port, *command]
            for port, command in zip(free_ports(len(commands)), commands, strict=True)
        ]
    )
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "tests/ranks.py", jobs],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    results = []
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert "Warning" not in err, err
        results.append(
            (
                out,
                [
                    json.loads(line.removeprefix("CALLS "))
                    for line in out.splitlines()
                    if line.startswith("CALLS ")
                ],
            )
        )
    return results


def assert_same_curve(one: Path, other: Path, tolerance: float) -> None:
    """Logs, encoders with their statistics, queue, pointer and momentum buffers are the same,
    relative to each tensor's largest value."""
    logs = [utils.read_csv(folder / "log.csv") for folder in (one, other)]
    assert logs[0]["step"] == logs[1]["step"] and len(logs[0]["step"]) > 0
    for column in (
        "loss",
        "contrast_top1",
        "lr",
        "alignment",
        "uniformity",
        "effective_rank",
        "knn_top1",
    ):
        assert logs[0][column] == pytest.approx(
            logs[1][column], rel=max(tolerance, 1e-9), nan_ok=True
        ), column
    ends = [checkpoints.load(folder / "checkpoints" / "last.pth.tar") for folder in (one, other)]
    assert ends[0]["step"] == ends[1]["step"] == logs[0]["step"][-1]
    states = [
        end["state_dict"]
        | {f"momentum.{i}": s["momentum_buffer"] for i, s in end["optimizer"]["state"].items()}
        for end in ends
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.shape == states[1][name].shape and value.dtype == states[1][name].dtype, name
        worst = (value.double() - states[1][name].double()).abs().max().item()
        largest = max(value.double().abs().max().item(), 1e-3)
        rounding = 10 if name.startswith("momentum") else 1  # of sums that nearly cancel
        assert worst <= rounding * tolerance * largest, (name, worst, largest)


class DataParallelOnCpu:
    """What nn.DataParallel does, on the CPU: chunks, replicas, threads, a gather.

    The first replica's buffers are the module's own; those of the others are thrown away.
    """

    def __init__(self, module: nn.Module, devices: int) -> None:
        self.module, self.devices = module, devices

    def __call__(self, x: torch.Tensor, *options: object) -> torch.Tensor:
        chunks = x.chunk(self.devices)
        replicas = self.replicate(len(chunks))
        outputs: list = [None] * len(chunks)
        grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

        def work(i: int) -> None:
            with (
                torch.set_grad_enabled(grad),
                torch.autocast("cpu", dtype=torch.float16, enabled=autocast),
            ):  # a thread's own type
                outputs[i] = replicas[i](chunks[i], *options)

        threads = [threading.Thread(target=work, args=(i,)) for i in reversed(range(len(chunks)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat(outputs)

    def replicate(self, count: int) -> list[nn.Module]:
        modules = list(self.module.modules())
        places = {module: i for i, module in enumerate(modules)}
        copies = [
            [module._replicate_for_data_parallel() for _ in range(count)] for module in modules
        ]
        for module, replicas in zip(modules, copies, strict=True):
            for r, replica in enumerate(replicas):
                for key, child in module._modules.items():
                    setattr(replica, key, copies[places[child]][r])
                for key, parameter in module._parameters.items():
                    setattr(replica, key, None if parameter is None else parameter.clone())
                for key, buffer in module._buffers.items():
                    setattr(replica, key, buffer if r == 0 else buffer.clone())
        return copies[0]


def replicas(devices: int = 2) -> parallel.Replicas:
    """The launch of nn.DataParallel, on stand-ins for GPUs."""
    device = torch.device("cpu")
    return parallel.Replicas(device, devices, lambda module: DataParallelOnCpu(module, devices))


def process(rank: int, count: int, monkeypatch: pytest.MonkeyPatch) -> parallel.Processes:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))
    return parallel.Processes(torch.device("cpu"))
