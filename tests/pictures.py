"""Pictures to augment, parameters that change one thing, and how close is close enough."""

from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms import functional as F

from augment import JITTER, Params

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # views stay in [0, 1]
ADJUST = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Half white noise, half smooth colours, with some saturated corners."""
    noise = torch.randint(
        0, 256, (n, channels, size, size), generator=seeded(seed), dtype=torch.uint8
    )
    smooth = (
        F.resize(noise[:, :, :4, :4].float(), [size, size])
        .mul(1.4)
        .sub(40)
        .clamp(0, 255)
        .round()
        .to(torch.uint8)
    )
    return torch.where(torch.arange(n)[:, None, None, None] % 2 == 0, noise, smooth)


def untouched(n: int, **changes) -> Params:
    """Parameters that take the whole image and change nothing, but for `changes`.

    Beside the fields of Params these may be brightness, contrast, saturation and hue (N,).
    """
    off, one = torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.float64)
    factors = [changes.pop(name, one if name != "hue" else 0 * one) for name in JITTER]
    same = Params(
        box=torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64).expand(n, 4),
        hflip=off,
        vflip=off,
        transpose=off,
        jitter=off,
        factors=torch.stack(factors, dim=1),
        grayscale=off,
        blur=off,
        sigma=one,
    )
    return replace(same, **changes)


def factor(params: Params, name: str) -> Tensor:
    """The jitter's factors (N,) of one operation."""
    return params.factors[:, JITTER.index(name)]


def snapped(params: Params, size: int) -> Params:
    """The same with boxes on whole pixels, at least 2 wide."""
    corner = (params.box[:, :2] * size).round().clamp(max=size - 2)
    length = (params.box[:, 2:] * size).round().clamp(min=2).minimum(size - corner)
    return replace(params, box=torch.cat((corner, length), dim=1) / size)


def assert_close(got: Tensor, want: Tensor, levels: float) -> None:
    """At most `levels` / 255 apart anywhere; `want` is uint8 or in [0, 1]."""
    want = want.double() / 255 if want.dtype == torch.uint8 else want.double()
    assert got.shape == want.shape
    worst = (got.double() - want).abs().max().item() * 255
    assert worst <= levels, f"{worst:.3f} levels apart"
