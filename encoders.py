"""Image encoders: torchvision's ResNets, untrained or with the weights of a file.

An encoder maps normalised images (N, 3, H, W) to (N, feature_dim); without its head, as evaluation
and export use it, to pooled features (N, D).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from config import TrainSettings, from_values
from run import checkpoints
from utils import UserError, generator

FAMILIES = ["resnet*", "resnext*", "wide_resnet*"]
ARCHS = torchvision.models.list_models(module=torchvision.models, include=FAMILIES)


class OverlapConv2d(nn.Conv2d):
    """A convolution that, for an output of one pixel, skips the kernel taps that meet only padding.

    In a ResNet's last stage at 32 px these are eight of nine, and some CPUs compute the weight
    gradient ten times slower than that of a matrix product. The result is that of nn.Conv2d.
    """

    @classmethod
    def replacing(cls, conv: nn.Conv2d) -> "OverlapConv2d":
        """This kind of convolution with the very parameters of `conv`; draws no random number."""
        shape = conv.in_channels, conv.out_channels, conv.kernel_size
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        new = cls(*shape, *geometry, bias=conv.bias is not None, device="meta")
        new.weight, new.bias = conv.weight, conv.bias
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W)
        h, w = x.shape[2:]
        (kh, kw), (ph, pw), (sh, sw) = self.kernel_size, self.padding, self.stride
        one_pixel = (h + 2 * ph - kh) // sh == 0 and (w + 2 * pw - kw) // sw == 0
        if not one_pixel or h + ph > kh or w + pw > kw or self.groups != 1:
            return super().forward(x)
        taps = self.weight[:, :, ph : ph + h, pw : pw + w]  # those that touch the input
        return F.linear(x.flatten(1), taps.flatten(1), self.bias)[:, :, None, None]


def check_arch(arch: str) -> None:
    """UserError for an architecture that is not one of `ARCHS`."""
    if arch not in ARCHS:
        raise UserError(f"--arch {arch!r} is not known: choose one of {', '.join(ARCHS)}")


def build_encoder(
    arch: str,
    feature_dim: int = 128,
    *,
    mlp: bool = False,
    small_stem: bool = False,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Module:
    """An untrained ResNet; its output (N, feature_dim) is not yet normalised.

    `mlp` makes the head that of MoCo v2: Linear-ReLU-Linear (arXiv:2003.04297, section 2).
    `small_stem`, for images up to 64 px, is a first convolution of 3 x 3 with stride 1 and no
    max pool, as is usual on CIFAR. `norm_layer` makes a layer for a number of channels.
    Raises UserError as `check_arch`.
    """
    check_arch(arch)
    encoder = torchvision.models.get_model(arch, num_classes=feature_dim, norm_layer=norm_layer)
    if small_stem:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    if mlp:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d):
                setattr(parent, name, OverlapConv2d.replacing(child))
    return encoder


def build_untrained(
    arch: str, seed: int, feature_dim: int, mlp: bool, small_stem: bool
) -> nn.Module:
    """The encoder from which a run with these settings starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        return build_encoder(arch, feature_dim, mlp=mlp, small_stem=small_stem)


def remove_head(encoder: nn.Module) -> nn.Module:
    """The encoder without its head, changed in place: (N, 3, H, W) to pooled features (N, D)."""
    encoder.fc = nn.Identity()
    return encoder


@functools.cache
def shapes_of(arch: str) -> set[tuple[str, torch.Size]]:
    """The names and shapes of a ResNet's weights; takes no memory for them."""
    with torch.device("meta"):
        weights = torchvision.models.get_model(arch).state_dict()
    return {(name, value.shape) for name, value in weights.items()}


@dataclass(frozen=True)
class LoadedEncoder:
    """The encoder of a file, and what the file was found to be."""

    encoder: nn.Module  # without head: (N, 3, H, W) to pooled features (N, D)
    arch: str
    feature_dim: int | None  # width of the head's output; None: the file has no head
    mlp: bool
    small_stem: bool
    description: str  # for the user
    settings: TrainSettings | None  # those of the run, if our train.py wrote the file
    checkpoint: dict[str, Any]  # all that the file holds


def load(path: str | Path, arch: str = "auto") -> LoadedEncoder:
    """Read the (query) encoder of any file of weights: ours, the reference's, or torchvision's.

    The shapes tell architecture, stem and head: MoCo v1's or v2's, a classifier, or none.
    Raises UserError unless the file holds all weights of one encoder and no others, and agrees
    with its own settings and with `arch`, where that is not "auto".
    """
    checkpoint = checkpoints.load(path, bare=True)
    try:
        loaded = recognize(checkpoint)
        said = {} if loaded.settings is None else vars(loaded.settings)
        for name in ("arch", "feature_dim", "mlp", "small_stem"):
            found = getattr(loaded, name)
            if said.get(name, found) != found:
                raise UserError(
                    f"its {name} is {said[name]} by its settings, {found} by its weights"
                )
        if arch not in ("auto", loaded.arch):
            raise UserError(f"its weights are those of a {loaded.arch}, not of a {arch}")
    except UserError as error:
        raise UserError(f"checkpoint {str(path)!r} cannot be used: {error}") from None
    return loaded


def recognize(checkpoint: dict[str, Any]) -> LoadedEncoder:
    """The encoder of a checkpoint, strictly; UserError if it is incomplete or not known."""
    weights, is_moco = select_weights(checkpoint["state_dict"])
    shapes = {(name, value.shape) for name, value in weights.items()}
    arch = min(ARCHS, key=lambda arch: len(shapes ^ shapes_of(arch)))
    small_stem = weights["conv1.weight"].shape[2:] == (3, 3)
    mlp = "fc.2.bias" in weights
    bias = weights.get("fc.2.bias" if mlp else "fc.bias")
    feature_dim = None if bias is None else bias.numel()
    encoder = build_encoder(arch, feature_dim or 128, mlp=mlp, small_stem=small_stem)
    if not is_moco and not any(name.startswith("fc.") for name in weights):
        remove_head(encoder)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())[:160]
        raise UserError(f"its weights are not those of a {arch}: {reason}") from None

    kind = f"MoCo v{2 if mlp else 1} checkpoint" if is_moco else "ResNet weights"
    head = f"{'MLP' if mlp else 'linear'} head of width {feature_dim}" if feature_dim else "no head"
    return LoadedEncoder(
        encoder=remove_head(encoder),
        arch=arch,
        feature_dim=feature_dim,
        mlp=mlp,
        small_stem=small_stem,
        description=f"{kind}: {arch}, {'small stem, ' if small_stem else ''}{head}",
        settings=read_settings(checkpoint),
        checkpoint=checkpoint,
    )


def select_weights(state_dict: dict[str, Any]) -> tuple[dict[str, torch.Tensor], bool]:
    """The weights of the (query) encoder by their plain names, and whether the file is of MoCo."""
    tensors = {str(name): t for name, t in state_dict.items() if isinstance(t, torch.Tensor)}
    for prefix in ("module.encoder_q.", "encoder_q.", "module.", ""):
        if prefix + "conv1.weight" in tensors:
            names = [name for name in tensors if name.startswith(prefix)]
            return {name.removeprefix(prefix): tensors[name] for name in names}, "_q." in prefix
    first = next(iter(state_dict), "none")
    raise UserError(f"it has neither MoCo's weights nor a ResNet's; its first is {first!r}")


def read_settings(checkpoint: dict[str, Any]) -> TrainSettings | None:
    """The settings in a file of our train.py, or None; UserError if they are not valid."""
    if "format" not in checkpoint or "crop" not in checkpoint.get("config", {}):
        return None  # other programs write no format, and call other things config
    try:
        return from_values(TrainSettings, checkpoint["config"])
    except UserError as error:
        raise UserError(f"it has settings that are not valid: {error}") from None
