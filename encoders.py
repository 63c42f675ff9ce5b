"""Image encoders: torchvision's ResNets and timm's models, untrained or with a file's weights.

An encoder maps normalised images (N, channels, H, W) to (N, feature_dim); without its head, as
evaluation and export use it, to pooled features (N, D).
"""

import difflib
import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torchvision

from config import TrainSettings, from_values
from data.base import Crop, height_width, in_px
from run import checkpoints
from run.convolution import replace_convolutions
from utils import UserError, generator

FAMILIES = ["resnet*", "resnext*", "wide_resnet*"]
TIMM = "timm:"
ARCHS = torchvision.models.list_models(module=torchvision.models, include=FAMILIES)


def check_arch(arch: str) -> None:
    """UserError for an architecture that is neither one of `ARCHS` nor timm:NAME."""
    if not arch.startswith(TIMM):
        if arch not in ARCHS:
            known = f"{', '.join(ARCHS)}, or {TIMM}NAME for a model of timm"
            raise UserError(f"--arch {arch!r} is not known: choose one of {known}")
        return
    try:
        import timm  # an optional extra
    except ImportError:
        raise UserError(f"--arch {arch} needs a package: pip install timm") from None
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {TIMM}{near[0]}?" if near else "timm.list_models() names them"
        raise UserError(f"--arch {arch!r} is not known to timm: {hint}")


def build_encoder(
    arch: str,
    feature_dim: int = 128,
    *,
    mlp: bool = False,
    small_stem: bool = False,
    crop: Crop | None = None,
    channels: int = 3,
) -> nn.Module:
    """An untrained encoder; its output (N, feature_dim) is not yet normalised.

    `arch` is a ResNet of torchvision, or timm:NAME. `mlp` makes the head that of MoCo v2:
    Linear-ReLU-Linear (arXiv:2003.04297, section 2). `small_stem`, of a ResNet for images up to
    64 px, is a first convolution of 3 x 3 with stride 1 and no max pool, as is usual on CIFAR.
    `crop` is the side of the images, or height and width, which a ViT must know. Raises
    UserError as `check_arch`, and for what a model of timm cannot do.
    """
    check_arch(arch)
    if arch.startswith(TIMM):
        encoder = _build_timm(arch, feature_dim, crop, channels)
        if small_stem:
            raise UserError(f"--small_stem is for torchvision's ResNets, not for {arch}")
    else:
        encoder = _build_resnet(arch, feature_dim, small_stem, channels)
    replace_convolutions(encoder)
    if mlp:
        path = head_of(arch)
        last = encoder.get_submodule(path)
        width = last.in_features
        mlp_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)
        parent, _, name = path.rpartition(".")
        setattr(encoder.get_submodule(parent), name, mlp_head)
    return encoder


def _build_resnet(arch: str, feature_dim: int, small_stem: bool, channels: int) -> nn.Module:
    encoder = torchvision.models.get_model(arch, num_classes=feature_dim)
    if small_stem or channels != 3:
        kernel, stride, padding = (3, 1, 1) if small_stem else (7, 2, 3)
        encoder.conv1 = nn.Conv2d(channels, 64, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small_stem:
        encoder.maxpool = nn.Identity()
    return encoder


def _build_timm(arch: str, feature_dim: int, crop: Crop | None, channels: int) -> nn.Module:
    import timm

    name = arch.removeprefix(TIMM)
    about = timm.get_pretrained_cfg(name)
    size = {"img_size": crop} if crop and about.fixed_input_size else {}
    size |= {"in_chans": channels} if channels != 3 else {}  # a few models do not know it
    try:
        encoder = timm.create_model(name, num_classes=feature_dim, **size)
        if crop:
            with torch.no_grad():
                encoder.eval()(torch.zeros(1, channels, *height_width(crop)))
            encoder.train()
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        what = in_px(crop) + (f" and {channels} channels" if channels != 3 else "")
        raise UserError(f"timm's {name} does not take images of {what}: {reason}") from None
    if not isinstance(encoder.get_classifier(), nn.Linear):
        raise UserError(f"--arch {arch} has no linear classifier to make MoCo's head of")
    return encoder


def head_of(arch: str) -> str:
    """The name of an encoder's head, which in its weights stands before those of the head."""
    if not arch.startswith(TIMM):
        return "fc"
    import timm

    return timm.get_pretrained_cfg(arch.removeprefix(TIMM)).classifier


def has_fixed_size(arch: str) -> bool:
    """Whether an encoder takes images of one size only, as a ViT does."""
    if not arch.startswith(TIMM):
        return False
    import timm

    return bool(timm.get_pretrained_cfg(arch.removeprefix(TIMM)).fixed_input_size)


def images_of(arch: str) -> dict[str, Any]:
    """Side, mean and deviation of the images that published weights are for."""
    if not arch.startswith(TIMM):
        return {"crop": 224}
    import timm

    about = timm.get_pretrained_cfg(arch.removeprefix(TIMM))
    return {"crop": about.input_size[-1], "mean": list(about.mean), "std": list(about.std)}


def build_from(settings: TrainSettings) -> nn.Module:
    """The encoder of a run, with random weights."""
    kind = {name: getattr(settings, name) for name in ("mlp", "small_stem", "crop", "channels")}
    return build_encoder(settings.arch, settings.feature_dim, **kind)


def build_untrained(settings: TrainSettings) -> nn.Module:
    """The encoder from which a run with these settings starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(settings.seed, "weights").initial_seed())
        return build_from(settings)


def remove_head(encoder: nn.Module) -> nn.Module:
    """The encoder without its head, changed in place: it gives pooled features (N, D)."""
    if hasattr(encoder, "reset_classifier"):  # of timm
        encoder.reset_classifier(0)
    else:
        encoder.fc = nn.Identity()
    return encoder


def fit_channels(weights: dict[str, torch.Tensor], channels: int) -> dict[str, torch.Tensor]:
    """An encoder's weights for images of another number of channels.

    The filters of the first layer are repeated, or for fewer channels summed, and scaled, so that
    an image of equal channels gives what it gave.
    """
    name = next(name for name, value in weights.items() if value.ndim == 4)
    first = weights[name]
    old = first.shape[1]
    if channels < old:
        first = first.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels
    elif channels > old:
        which = torch.arange(channels) % old
        copies = torch.bincount(which)[which]
        first = first[:, which] / copies[:, None, None]
    return weights | {name: first}


@functools.cache
def shapes_of(arch: str) -> set[tuple[str, torch.Size]]:
    """The names and shapes of a ResNet's weights; takes no memory for them."""
    with torch.device("meta"):
        weights = torchvision.models.get_model(arch).state_dict()
    return {(name, value.shape) for name, value in weights.items()}


@dataclass(frozen=True)
class LoadedEncoder:
    """The encoder of a file, and what the file was found to be."""

    encoder: nn.Module  # without head: (N, channels, H, W) to pooled features (N, D)
    head: dict[str, torch.Tensor]  # the head's weights, by their names in the whole encoder
    arch: str
    feature_dim: int | None  # width of the head's output; None: the file has no head of ours
    mlp: bool
    small_stem: bool
    channels: int  # that the first layer takes
    description: str  # for the user
    settings: TrainSettings | None  # those of the run, if our train.py wrote the file
    checkpoint: dict[str, Any]  # all that the file holds


def load(path: str | Path, arch: str = "auto") -> LoadedEncoder:
    """Read the (query) encoder of any file of weights: ours, the reference's, or another tool's.

    The shapes tell a ResNet's architecture, stem and head: MoCo v1's or v2's, a classifier, or
    none. A model of timm is known by the file's settings, if they are ours, or by `arch`.
    Raises UserError unless the file holds all weights of one encoder and no others, and agrees
    with its own settings and with `arch`, where that is not "auto".
    """
    checkpoint = checkpoints.load(path, bare=True)
    try:
        settings = read_settings(checkpoint)
        named, crop = (settings.arch, settings.crop) if settings else (arch, None)
        named = named if named.startswith(TIMM) else "auto"
        loaded = recognize(checkpoint, named, crop, settings.channels if settings else None)
        said = {} if settings is None else vars(settings)
        for name in ("arch", "feature_dim", "mlp", "small_stem", "channels"):
            found = getattr(loaded, name)
            if said.get(name, found) != found:
                raise UserError(
                    f"its {name} is {said[name]} by its settings, {found} by its weights"
                )
        if arch not in ("auto", loaded.arch):
            raise UserError(f"its weights are those of a {loaded.arch}, not of a {arch}")
    except UserError as error:
        raise UserError(f"checkpoint {str(path)!r} cannot be used: {error}") from None
    return replace(loaded, settings=settings)


def recognize(
    checkpoint: dict[str, Any], arch: str, crop: Crop | None, channels: int | None
) -> LoadedEncoder:
    """The encoder of a checkpoint, strictly; UserError if it is incomplete or not known."""
    tensors = {str(n): t for n, t in checkpoint["state_dict"].items() if torch.is_tensor(t)}
    if arch == "auto":
        prefix = find_prefix(checkpoint["state_dict"], "conv1.weight", "layer1.0.conv1.weight")
    else:
        with torch.device("meta"):
            first = next(iter(remove_head(build_encoder(arch, crop=crop)).state_dict()))
        prefix = find_prefix(checkpoint["state_dict"], first)
    names = [name for name in tensors if name.startswith(prefix)]
    weights = {name.removeprefix(prefix): tensors[name] for name in names}
    for name, value in weights.items():
        if name.rpartition(".")[2] != "num_batches_tracked" and not value.is_floating_point():
            raise UserError(f"its {name} holds no real numbers, but {value.dtype}")
        if not value.isfinite().all():
            raise UserError(f"its {name} is not finite: the training that made it diverged")
    if arch == "auto":
        shapes = {(name, value.shape) for name, value in weights.items()}
        arch = min(ARCHS, key=lambda arch: len(shapes ^ shapes_of(arch)))
    is_moco, head = "encoder_q." in prefix, head_of(arch)
    small_stem = arch in ARCHS and weights["conv1.weight"].shape[2:] == (3, 3)
    mlp = f"{head}.2.bias" in weights
    bias = weights.get(f"{head}.2.bias" if mlp else f"{head}.bias")
    feature_dim = None if bias is None else bias.numel()
    if channels is None:  # a first layer is a convolution
        channels = next((v.shape[1] for v in weights.values() if v.ndim == 4), 3)
    kind = {"mlp": mlp, "small_stem": small_stem, "crop": crop, "channels": channels}
    encoder = build_encoder(arch, feature_dim or 128, **kind)
    if not is_moco and not any(name.startswith(f"{head}.") for name in weights):
        remove_head(encoder)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())[:160]
        raise UserError(f"its weights are not those of a {arch}: {reason}") from None

    network = "weights" if arch.startswith(TIMM) else "ResNet weights"
    what = f"MoCo v{2 if mlp else 1} checkpoint" if is_moco else network
    about = f"{'MLP' if mlp else 'linear'} head of width {feature_dim}"
    return LoadedEncoder(
        encoder=remove_head(encoder),
        head={name: value for name, value in weights.items() if name.startswith(f"{head}.")},
        arch=arch,
        feature_dim=feature_dim,
        mlp=mlp,
        small_stem=small_stem,
        channels=channels,
        description=f"{what}: {arch}, {'small stem, ' if small_stem else ''}"
        f"{f'{channels} channels, ' if channels != 3 else ''}"
        f"{about if feature_dim else 'no head'}",
        settings=None,
        checkpoint=checkpoint,
    )


def find_prefix(state_dict: dict[str, Any], *names: str) -> str:
    """What stands before an encoder's names: "", or as other tools have it "backbone.".

    `names` are some of the encoder's. MoCo's query encoder comes first; key encoders and teachers
    are left out where there is another. Raises UserError if there is none, or if there are several.
    """
    tensors = [str(name) for name, value in state_dict.items() if torch.is_tensor(value)]
    ends = [name for name in tensors if name.endswith(names[-1])]
    prefixes = [name.removesuffix(names[-1]) for name in ends]
    prefixes = [p for p in prefixes if not p or p.endswith(".")]
    prefixes = [p for p in prefixes if all(p + name in tensors for name in names)]
    for prefix in prefixes:
        if prefix.endswith("encoder_q."):
            return prefix
    students = [p for p in prefixes if not re.search(r"_k\b|momentum|teacher|ema|target", p)]
    students = students or prefixes
    if len(students) == 1:
        return students[0]
    if students:
        raise UserError(
            f"it holds several encoders ({', '.join(students)}): save one of them alone"
        )
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
