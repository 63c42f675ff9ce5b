"""Random views of a uint8 batch, as batched tensor operations on the device where the batch lies.

    params = draw(batch.aspect, recipe("v2", crop=64), generator)      # CPU: all random numbers of the global batch
    im_q = augment(batch.images, params, recipe("v2", crop=64))        # device: (N, 3, 64, 64), normalised

The order of operations is that of the published MoCo code:
    v1 (arXiv:1911.05722): crop, greyscale, jitter, flip
    v2 (arXiv:2003.04297): crop, jitter, greyscale, blur, flip
Between the steps the values stay unrounded in [0, 1], as three colour planes (3, N, crop, crop), so that every colour
operation runs over contiguous memory. The flip commutes with all that follows the crop and is part of the crop here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
JITTER = ("brightness", "contrast", "saturation", "hue")
TRIES = 10  # of RandomResizedCrop, before it falls back to the centre


@dataclass(frozen=True)
class Recipe:
    """Which random views to make. ValueError for values that make no sense.

    `jitter` holds the strengths of brightness, contrast, saturation and hue as torchvision's ColorJitter takes them;
    `blur_sigma` is in output pixels, `scale` a share of the image's area, `ratio` width over height.
    """

    crop: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    grid: int = 0  # side in pixels of the original, square images, for boxes of whole pixels as torchvision's; 0: continuous boxes
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
    jitter_p: float = 1.0
    grayscale: float = 0.2
    grayscale_first: bool = True  # v1: before the jitter; v2: after it
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, need: str) -> None:
            if not ok:
                raise ValueError(
                    f"augmentation: {name} is {getattr(self, name)!r}, it must be {need}"
                )

        require(self.crop >= 1, "crop", "at least 1 pixel")
        require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "an interval within (0, 1]")
        require(0 < self.ratio[0] <= self.ratio[1], "ratio", "an interval of positive numbers")
        require(self.grid >= 0, "grid", "a side in pixels, or 0")
        require(
            0 < self.blur_sigma[0] <= self.blur_sigma[1],
            "blur_sigma",
            "an interval of positive numbers",
        )
        for name in ("flip", "jitter_p", "grayscale", "blur_p"):
            require(0 <= getattr(self, name) <= 1, name, "a probability within [0, 1]")
        require(
            len(self.jitter) == 4 and min(self.jitter) >= 0 and self.jitter[3] <= 0.5,
            "jitter",
            "four strengths >= 0, the last one (hue) at most 0.5",
        )
        require(len(self.mean) == 3, "mean", "three numbers")
        require(len(self.std) == 3 and min(self.std) > 0, "std", "three positive numbers")

    @property
    def blur_radius(self) -> int:
        """Half the blur kernel: 3 sigma of the widest blur, as far as reflection at the border reaches."""
        return min(math.ceil(3 * self.blur_sigma[1]), self.crop - 1)


def recipe(version: str, crop: int, **overrides) -> Recipe:
    """The recipe of MoCo "v1" or "v2" (the reference's aug_plus), any field replaced by `overrides`."""
    if version == "v1":
        return replace(Recipe(crop=crop), **overrides)
    if version == "v2":
        plus = Recipe(
            crop=crop, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale_first=False, blur_p=0.5
        )
        return replace(plus, **overrides)
    raise ValueError(f"augmentation {version!r} is unknown, choose v1 or v2")


def training_recipe(config: Mapping[str, Any], grid: int = 0) -> Recipe:
    """The recipe that the settings of train.py describe (config.yaml); `grid` as in `Recipe`, used if `pixel_boxes` is set."""
    version, blur = ("v2", config["blur"]) if config["aug_plus"] else ("v1", 0.0)
    return recipe(
        version,
        config["crop"],
        scale=tuple(config["crop_scale"]),
        grayscale=config["grayscale"],
        blur_p=blur,
        grid=grid if config["pixel_boxes"] else 0,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


@dataclass(frozen=True)
class Params:
    """The random numbers of one view of a batch, image by image: one row per image, `order` shared by the batch."""

    box: Tensor  # (N, 4) left, top, width, height of the crop, as shares of the image's width and height
    flip: Tensor  # (N,) bool
    jitter: Tensor  # (N,) bool: whether the next four apply
    brightness: Tensor  # (N,) factor
    contrast: Tensor  # (N,) factor
    saturation: Tensor  # (N,) factor
    hue: Tensor  # (N,) shift, in turns of the colour circle
    grayscale: Tensor  # (N,) bool
    blur: Tensor  # (N,) bool
    sigma: Tensor  # (N,) in output pixels
    order: tuple[str, ...] = JITTER  # of the jitter's four operations

    def __len__(self) -> int:
        return len(self.box)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Params:
        return replace(
            self,
            **{f.name: function(getattr(self, f.name)) for f in fields(self) if f.name != "order"},
        )

    def rows(self, index: slice | Tensor) -> Params:
        """The parameters of some images of the batch."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Params:
        """The same on another device; `dtype` converts the real-valued ones."""
        return self._map(
            lambda value: _send(value, device, dtype if value.is_floating_point() else None)
        )


def draw(aspect: Tensor, recipe: Recipe, generator: torch.Generator) -> Params:
    """Draws everything random about one view of a batch, on the CPU in float64.

    aspect: (N,) original width / height of the images. A row depends on its own aspect ratio and the generator only, so a
    process that knows the aspect of its own rows may put any positive number for the others. ValueError for
    an aspect that is not positive and finite. Distributions: torchvision's RandomResizedCrop and ColorJitter.
    """
    aspect = aspect.to("cpu", torch.float64)
    bad = ~((aspect > 0) & aspect.isfinite())
    if bad.any():
        raise ValueError(
            f"aspect ratio {aspect[bad][0].item()} of image {int(bad.nonzero()[0])} is not positive and finite"
        )
    n = len(aspect)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, dtype=torch.float64, generator=generator)

    def chance(p: float) -> Tensor:
        return torch.rand(n, dtype=torch.float64, generator=generator) < p

    area = uniform(*recipe.scale, TRIES)
    ratio = uniform(math.log(recipe.ratio[0]), math.log(recipe.ratio[1]), TRIES).exp()
    box = _boxes(aspect, area, ratio, uniform(0, 1, 2), recipe.ratio, recipe.grid)
    b, c, s, h = recipe.jitter
    order = torch.randperm(len(JITTER), generator=generator).tolist()
    return Params(
        box=box,
        flip=chance(recipe.flip),
        jitter=chance(recipe.jitter_p),
        brightness=uniform(max(0.0, 1 - b), 1 + b),
        contrast=uniform(max(0.0, 1 - c), 1 + c),
        saturation=uniform(max(0.0, 1 - s), 1 + s),
        hue=uniform(-h, h),
        grayscale=chance(recipe.grayscale),
        blur=chance(recipe.blur_p),
        sigma=uniform(*recipe.blur_sigma),
        order=tuple(JITTER[i] for i in order),
    )


@torch.no_grad()
def augment(
    images: Tensor, params: Params, recipe: Recipe, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One random view of each image: uint8 (N, 1 or 3, H, W) -> `dtype` (N, 3, crop, crop), normalised, same device.

    The images may be of any size and squeezed to a square: the boxes are shares of their sides. Hand over
    `params` as drawn, on the CPU: then nothing waits for the device. float32 or float64, never autocast.
    ValueError for other types and shapes.
    """
    _check(images, dtype)
    if len(params) != len(images):
        raise ValueError(
            f"{len(images)} images but parameters for {len(params)}: use params.rows(...)"
        )
    device = images.device
    # Which images are touched is read where the parameters lie, before they move.
    chosen = {
        name: _send(getattr(params, name).nonzero().squeeze(1), device)
        for name in ("jitter", "grayscale", "blur")
    }
    params = params.to(device, dtype)
    steps = {
        "jitter": lambda planes, index: _jitter(planes, params.rows(index), recipe),
        "grayscale": lambda planes, index: _luma(planes).repeat(3, 1, 1, 1),
        "blur": lambda planes, index: _blur(planes, params.sigma[index], recipe.blur_radius),
    }
    with torch.autocast(device.type, enabled=False):
        planes = _crop(images, params, recipe.crop, dtype)  # (3, N, crop, crop) in [0, 1]
        for name in (
            ("grayscale", "jitter", "blur")
            if recipe.grayscale_first
            else ("jitter", "grayscale", "blur")
        ):
            index = chosen[name]
            if len(index) == len(images):
                planes = steps[name](planes, index)
            elif len(index):
                planes.index_copy_(1, index, steps[name](planes.index_select(1, index), index))
        return _standardise(planes, recipe.mean, recipe.std)


def views(
    images: Tensor,
    aspect: Tensor,
    recipe: Recipe,
    generators: Sequence[torch.Generator],
    n: int,
    rows: slice,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """A random view (m, 3, crop, crop) of each image for each generator: of images (m, C, H, W) that are the `rows` of a batch of n.

    The random numbers are drawn for the whole batch, so a row's do not depend on who holds which rows.
    """
    whole = torch.ones(n)
    whole[rows] = aspect
    return [
        augment(images, draw(whole, recipe, generator).rows(rows), recipe, dtype).contiguous(
            memory_format=torch.channels_last
        )
        for generator in generators
    ]


@torch.no_grad()
def normalize(
    images: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 (N, 1 or 3, H, W) -> `dtype` (N, 3, H, W), in [0, 1] less `mean`, over `std`: for evaluation."""
    _check(images, dtype)
    return _standardise(_three(images.transpose(0, 1).to(dtype) / 255), mean, std)


def _send(value: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """To a device without waiting for it; back to the CPU one has to wait."""
    return value.to(device, dtype or value.dtype, non_blocking=torch.device(device).type != "cpu")


def _check(images: Tensor, dtype: torch.dtype) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}, they must be torch.uint8 (N, 1 or 3, H, W)"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"views in {dtype} are not supported, choose torch.float32 or torch.float64"
        )


def _standardise(planes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Planes (3, N, H, W) in [0, 1] -> contiguous (N, 3, H, W), with plain numbers: copying a tensor of them would wait."""
    out = torch.empty_like(planes.transpose(0, 1), memory_format=torch.contiguous_format)
    for c in range(3):
        torch.sub(planes[c], mean[c], out=out[:, c]).div_(std[c])
    return out


def _three(planes: Tensor) -> Tensor:
    return planes.expand(3, *planes.shape[1:])


# Crop ---------------------------------------------------------------------------------------------------------------------


def _boxes(
    aspect: Tensor,
    area: Tensor,
    ratio: Tensor,
    place: Tensor,
    bounds: tuple[float, float],
    grid: int,
) -> Tensor:
    """RandomResizedCrop's boxes (N, 4): the first of the tries (N, TRIES) that fits, else the centre, cut to a legal ratio.

    In shares of an image of width a and height 1, a box of area s (times a) and ratio r has width sqrt(s r / a)
    and height sqrt(s a / r). torchvision rounds both to pixels and places them on pixels: on a `grid` so do these boxes. The
    continuous ones (grid 0) are its limit for large images; at 28 px they overlap more, and the loss of a run is lower by about 0.1.
    """
    a = aspect[:, None]
    size = torch.stack(
        ((area * ratio / a).sqrt(), (area * a / ratio).sqrt()), dim=-1
    )  # (N, TRIES, 2) width, height
    if grid:
        size = (size * grid).round() / grid
    fits = ((size <= 1) & (size > 0)).all(-1)
    first = (fits.cumsum(1) == 0).sum(
        1
    )  # tries that failed before the first success; TRIES if none fits
    rows = torch.arange(len(aspect))
    tried = size[rows, first.clamp(max=TRIES - 1)]
    centre = torch.stack(
        ((bounds[1] / aspect).clamp(max=1), (aspect / bounds[0]).clamp(max=1)), dim=-1
    )
    found = (first < TRIES)[:, None]
    size = torch.where(found, tried, (centre * grid).round() / grid if grid else centre)
    place = torch.where(found, place, 0.5)
    corner = (place * (grid * (1 - size) + 1)).floor() / grid if grid else place * (1 - size)
    return torch.cat((corner, size), dim=1)


def _crop(images: Tensor, params: Params, crop: int, dtype: torch.dtype) -> Tensor:
    """Crop, antialiased resize and flip: (N, C, H, W) uint8 -> colour planes (3, N, crop, crop) in [0, 1].

    Two matrix products. A block of output rows needs a strip of the image only: multiplying strips saves most of the first product.
    """
    n, height, width = len(images), *images.shape[2:]
    left, top, box_width, box_height = params.box.unbind(1)
    blocks = next(b for b in (4, 2, 1) if crop % b == 0)
    # the longest strip is that of a box as high as the image; one more pixel on either side for where its ends fall
    strip = min(height, math.ceil(height / blocks + 2 * max(1, height / crop)) + 2)
    start, length = top * height, box_height * height
    block = torch.arange(blocks, device=start.device, dtype=start.dtype) / blocks
    first = (
        (start[:, None] + length[:, None] * block - (length[:, None] / crop).clamp(min=1))
        .floor()
        .long()
        .clamp(0, height - strip)
    )  # (N, blocks)
    rows = _resize_matrix(start, length, height, crop, window=(first, strip)).flatten(
        0, 1
    )  # (N blocks, crop / blocks, strip)
    columns = _resize_matrix(left * width, box_width * width, width, crop, mirrored=params.flip)[
        :, 0
    ].mT  # (N, width, crop)
    planes = _strips(images, first, strip).to(
        dtype, memory_format=torch.contiguous_format
    )  # (C, N blocks, strip, width)
    cropped = torch.stack(
        [torch.bmm(torch.bmm(rows, plane).view(n, crop, width), columns) for plane in planes]
    ).div_(255)
    return cropped if len(cropped) == 3 else cropped.repeat(3, 1, 1, 1)


def _strips(images: Tensor, first: Tensor, strip: int) -> Tensor:
    """Strips of `strip` rows from the rows `first` (N, blocks) on, of images (N, C, H, W) -> (C, N blocks, strip, W)."""
    n, c, height, width = images.shape
    index = (
        torch.arange(strip, device=first.device)
        + first[:, :, None]
        + height * torch.arange(n, device=first.device)[:, None, None]
    )
    if images.is_contiguous(memory_format=torch.channels_last):
        lines = (
            images.permute(0, 2, 3, 1)
            .reshape(n * height, width * c)
            .index_select(0, index.flatten())
        )
        return lines.view(first.numel(), strip, width, c).permute(3, 0, 1, 2)
    lines = images.transpose(0, 1).reshape(c * n * height, width)
    index = index.flatten() + n * height * torch.arange(c, device=first.device)[:, None]
    return lines.index_select(0, index.flatten()).view(c, first.numel(), strip, width)


def _resize_matrix(
    start: Tensor,
    length: Tensor,
    size: int,
    crop: int,
    mirrored: Tensor | None = None,
    window: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Matrices (N, blocks, crop / blocks, pixels) that resample `size` pixels to `crop`, from the box [start, start + length) in pixels.

    Each block of output pixels sees the `window`: its first pixel (N, blocks) and how many; without one, all are one block that sees all pixels.
    Antialiased bilinear as torchvision's: a triangle around the centre of the output pixel, as wide as an output
    pixel but at least one input pixel. A pixel counts with its overlap with the box, and none outside it.
    """
    first, pixels = (
        window
        if window
        else (torch.zeros(len(start), 1, device=start.device, dtype=torch.long), size)
    )
    pixel = torch.arange(pixels, device=start.device, dtype=start.dtype) + first[:, :, None].to(
        start.dtype
    )  # (N, blocks, pixels)
    place = (
        torch.arange(crop, device=start.device, dtype=start.dtype)
        .add_(0.5)
        .div_(crop)
        .expand(len(start), crop)
    )
    if mirrored is not None:
        place = torch.where(mirrored[:, None], 1 - place, place)
    start, length = start[:, None], length[:, None]
    centre = (start + length * place).unflatten(
        1, (first.shape[1], -1)
    )  # (N, blocks, crop / blocks)
    start, length = start[:, :, None], length[:, :, None]
    inside = (
        torch.minimum(pixel + 1, start + length).sub_(torch.maximum(pixel, start)).clamp_(min=0)
    )  # (N, blocks, pixels)
    slope = -1 / (length / crop).clamp(min=1)
    weight = (
        (pixel[:, :, None] + 0.5 - centre[..., None])
        .abs_()
        .mul_(slope[..., None])
        .add_(1)
        .clamp_(min=0)
    )
    weight.mul_(inside[:, :, None])
    return weight.div_(weight.sum(3, keepdim=True))


# Colour: planes (3, N, H, W), one parameter an image ----------------------------------------------------------------------


def _luma(planes: Tensor) -> Tensor:
    """Brightness as seen by the eye (ITU-R 601): (N, H, W)."""
    red, green, blue = planes
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend(planes: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """factor * planes + (1 - factor) * other, clipped; in place."""
    return planes.mul_(factor).add_((1 - factor) * other).clamp_(0, 1)


def _brightness(planes: Tensor, factor: Tensor) -> Tensor:
    return planes.mul_(factor).clamp_(0, 1)


def _contrast(planes: Tensor, factor: Tensor) -> Tensor:
    # Mean of means: the order of summation then depends on the image alone, not on the batch.
    return _blend(planes, _luma(planes).mean(2, keepdim=True).mean(1, keepdim=True), factor)


def _saturation(planes: Tensor, factor: Tensor) -> Tensor:
    return _blend(planes, _luma(planes), factor)


def _hue(planes: Tensor, shift: Tensor) -> Tensor:
    """Turns the colour circle by `shift` turns at constant value and chroma (HSV); in place.

    A channel stays at the maximum within a sixth of a turn around its own place on the circle (red 0, green 1/3, blue
    2/3), falls to the minimum over the next sixth and stays there: maximum - chroma * clip(6 distance - 1, 0, 1).
    """
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = value == red, value == green
    turn = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    turn.div_(torch.where(chroma > 0, chroma, 6).mul_(6))  # grey: 0 / anything
    turn.add_((~is_red).to(turn.dtype).add_(~(is_red | is_green)), alpha=1 / 3).add_(
        shift
    )  # from 0, 1/3 or 2/3
    for channel, place in enumerate((0, 1 / 3, 2 / 3)):
        distance = turn - place
        distance.sub_(distance.round()).abs_()
        torch.addcmul(
            value, chroma, distance.mul_(6).sub_(1).clamp_(0, 1), value=-1, out=planes[channel]
        )
    return planes


def _jitter(planes: Tensor, params: Params, recipe: Recipe) -> Tensor:
    """The four colour operations in the batch's order; one of strength 0 is left out."""
    operations = {
        "brightness": _brightness,
        "contrast": _contrast,
        "saturation": _saturation,
        "hue": _hue,
    }
    strength = dict(zip(JITTER, recipe.jitter))
    for name in params.order:
        if strength[name] > 0:
            planes = operations[name](planes, getattr(params, name)[:, None, None])
    return planes


# Blur ---------------------------------------------------------------------------------------------------------------------


def _blur(planes: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur with reflection at the border, one sigma (N,) an image: a banded matrix along either axis."""
    matrix = _blur_matrix(sigma, planes.shape[-1], radius)
    return torch.stack([torch.bmm(torch.bmm(matrix, plane), matrix.mT) for plane in planes])


def _blur_matrix(sigma: Tensor, size: int, radius: int) -> Tensor:
    """Matrices (N, size, size) whose row i holds the kernel around i, its ends folded back at the border."""
    tap = torch.arange(radius + 1, device=sigma.device)
    kernel = torch.exp(
        -0.5 * (tap / sigma[:, None]) ** 2
    )  # (N, radius + 1), half of a symmetric kernel
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - 1)
    i, j = torch.meshgrid(*[torch.arange(size, device=sigma.device)] * 2, indexing="ij")
    # Pixel j is seen from i directly, and where it is no border pixel also in the mirror at either end.
    distances = torch.stack(
        (
            (i - j).abs(),
            torch.where(j > 0, i + j, size + radius),
            torch.where(j < size - 1, 2 * (size - 1) - i - j, size + radius),
        )
    )
    fold = (
        (distances == tap[:, None, None, None]).sum(1).to(sigma.dtype)
    )  # (radius + 1, size, size): how often
    return (kernel @ fold.flatten(1)).view(len(sigma), size, size)
