"""Small runs of train.py on miniature data."""

from pathlib import Path

import torch
from scripts import Done, run

from run import checkpoints

TINY = [
    "--arch=resnet18",
    "--crop=16",
    "--resize=16",
    "--feature_dim=8",
    "--num_keys=48",
    "--batch_size=16",
    "--bn_groups=2",
    "--num_workers=0",
    "--log_every=2",
    "--device=cpu",
    "--precision=fp32",
]


def pretrain(root: Path, out: Path, *flags: object) -> Done:
    return run("train", f"--dataset_root={root}", f"--output_root={out}", *TINY, *flags)


def state(out: Path, name: str = "IMAGENET-64/v1", file: str = "last.pth.tar") -> dict:
    return checkpoints.load(out / name / "checkpoints" / file)


def assert_same_run(a: dict, b: dict) -> None:
    assert a["step"] == b["step"]
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for i, buffers in a["optimizer"]["state"].items():
        assert torch.equal(
            buffers["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"]
        )
