"""Miniature data and runs for the tests of test.py and visualize.py."""

import dataclasses
import math
from pathlib import Path

import torch
from PIL import Image
from scripts import Done

import config
import model
import utils
from run import checkpoints

ROOT = Path(__file__).resolve().parents[1]


def class_folders(root: Path, seed: int, per_class: int = 8) -> None:
    """train/ and test/ with three classes of 20 x 20 px: stripes, of a width each, in noise."""
    random = torch.Generator().manual_seed(seed)
    for split, count in (("train", per_class), ("test", per_class // 2)):
        for c in range(3):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                stripes = 200 * (torch.arange(20) // (2 * c + 1) % 2)[:, None, None]
                pixels = stripes + torch.randint(56, (20, 20, 3), generator=random)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")


def fabricated_run(
    output: Path,
    version: str,
    epochs: tuple[int, ...],
    weight: float | None = None,
    num_keys: int = 16,
) -> Path:
    """A run of IMAGENET-64 as train.py leaves it, but untrained; `weight` overwrites some of it."""
    folder = output / "IMAGENET-64" / version
    values = {"arch": "resnet18", "crop": 16, "feature_dim": 8, "num_keys": num_keys, "seed": 7}
    values |= {"exp_version": version}
    settings = config.from_values(config.TrainSettings, values)
    for epoch in epochs:
        torch.manual_seed(epoch)
        moco = model.MoCo("resnet18", 8, num_keys)
        if weight is not None:
            moco.encoder_q.conv1.weight.data[0] = weight
        content = {
            "epoch": epoch,
            "step": 100 * epoch,
            "arch": "resnet18",
            "config": dataclasses.asdict(settings),
            "state_dict": {f"module.{name}": value for name, value in moco.state_dict().items()},
        }
        for name in (f"epoch_{epoch:04d}", "last"):
            checkpoints.save(folder / "checkpoints" / f"{name}.pth.tar", content)
    folder.mkdir(parents=True, exist_ok=True)
    config.write(folder / "config.yaml", settings)
    columns = ["step", "epoch", "loss", "contrast_top1", "lr", "images_per_second"]
    chance = math.log(num_keys + 1)
    rows = [(step, 1, chance - 0.01 * step, 10, 0.03, 100) for step in range(5, 100, 5)]
    utils.write_csv(folder / "log.csv", columns, rows)
    return folder


def one_line(done: Done, words: str) -> bool:
    """Whether a script stopped with one line that holds these words."""
    lines = done.stderr.strip().splitlines()
    return done.returncode == 2 and words in done.stderr and len(lines) == 1
