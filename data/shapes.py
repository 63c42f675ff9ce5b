"""The built-in data set: ten families of textures, made from random numbers on first use."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.arrays import ArrayImages
from data.base import Size
from utils import warn

NAME = "shapes"
SIDE = 40  # px
COUNT = {"pretrain": 5000, "train": 5000, "test": 1000}
TURN = 2 * math.pi


def _cell(x: Tensor) -> Tensor:
    """The place within a cell of width 1, from its centre."""
    return x - x.floor() - 0.5


def _crosses(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    near, far = torch.minimum(a.abs(), b.abs()), torch.maximum(a.abs(), b.abs())
    return 3 * (0.13 - near * torch.where(far < 0.38, 1.0, 9.0))


# A texture is a field, positive in its figure, over coordinates u and v in which it repeats with
# period 1; a and b are the same coordinates within a cell, from its centre.
TEXTURES = {
    "stripes": lambda u, v, a, b: 0.5 * torch.sin(TURN * u),
    "checks": lambda u, v, a, b: 0.7 * torch.sin(TURN * u) * torch.sin(TURN * v),
    "dots": lambda u, v, a, b: 2 * (0.30 - (a**2 + b**2).sqrt()),
    "rings": lambda u, v, a, b: 3 * (0.10 - ((a**2 + b**2).sqrt() - 0.32).abs()),
    "bricks": lambda u, v, a, b: (
        3 * (torch.minimum(0.5 - _cell(u + 0.5 * (v.floor() % 2)).abs(), 0.5 - b.abs()) - 0.09)
    ),
    "waves": lambda u, v, a, b: 0.5 * torch.sin(TURN * (u + 0.3 * torch.sin(TURN * 0.75 * v))),
    "grid": lambda u, v, a, b: 3 * (torch.maximum(a.abs(), b.abs()) - 0.39),
    "crosses": _crosses,
    "zigzag": lambda u, v, a, b: 0.5 * torch.sin(TURN * (u + 1.2 * b.abs())),
    "triangles": lambda u, v, a, b: a + b,
}
CLASSES = list(TEXTURES)


def matches(root: str) -> bool:
    return root == NAME


def open_split(root: str, split: str, size: Size) -> ArrayImages:
    if Path(NAME).is_dir():
        warn(f"{NAME} stands for the built-in images: the folder here is ./{NAME}")
    images, labels = make_shapes(COUNT[split], seed=1 if split == "test" else 0)
    return ArrayImages(NAME, images, labels, CLASSES, size)


def make_shapes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n images (n, 3, 40, 40) of ten textures and their labels (n,), the same for the same seed.

    Period, phase and polarity are random, and each texture is turned by up to 15 degrees. A short
    run learns whatever names an image more cheaply than its texture and outlives the augmentation.
    So no image has a colour, noise or light of its own, all have the same mean and contrast, and
    none is turned freely (which cost 20 points of kNN accuracy).
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=random)

    angle, period = uniform(-math.pi / 12, math.pi / 12), uniform(6, 13)
    phase_u, phase_v, polarity = uniform(0, 1), uniform(0, 1), uniform(0, 1) < 0.5
    line = torch.arange(SIDE) - (SIDE - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    u = (x * angle.cos() + y * angle.sin()) / period + phase_u
    v = (y * angle.cos() - x * angle.sin()) / period + phase_v
    labels = torch.arange(n) % 10
    images = torch.empty(n, SIDE, SIDE)
    for label, texture in enumerate(TEXTURES.values()):
        chosen = labels == label
        field = texture(u[chosen], v[chosen], _cell(u[chosen]), _cell(v[chosen]))
        images[chosen] = torch.sigmoid(12 * field)
    images = torch.where(polarity, 1 - images, images)
    images = (images - images.mean((1, 2), keepdim=True)) / images.std((1, 2), keepdim=True)
    pixels = (255 * (0.5 + 0.25 * images).clamp(0, 1)).to(torch.uint8)
    order = torch.randperm(n, generator=random)
    return pixels[order, None].expand(n, 3, SIDE, SIDE).numpy(), labels[order].numpy()
