"""Random views of a uint8 batch, as batched tensor operations on the device where it lies.

    params = draw(batch.aspect, recipe("v2", crop=64), generator)   # CPU: all random numbers
    im_q = augment(batch.images, params, recipe("v2", crop=64))     # (N, 3, 64, 64), normalised

v1 (arXiv:1911.05722): crop, greyscale, jitter, flip; v2 (arXiv:2003.04297): crop, jitter,
greyscale, blur, flip; both as the reference. The flip commutes with the others, so the crop makes
it. Views stay unrounded in [0, 1], as planes (C, N, height, width), until they are normalised.
Images of other than three channels C have no hue, saturation or greyscale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from config import TrainSettings
from data.base import Crop, height_width

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
JITTER = ("brightness", "contrast", "saturation", "hue")
TRIES = 10  # of RandomResizedCrop, before it takes the centre


@dataclass(frozen=True)
class Recipe:
    """Which random views to make; v1's by default."""

    crop: Crop  # side of the view, px, or its height and width
    scale: tuple[float, float] = (0.2, 1.0)  # area of a crop, as a share of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # its width over its height, over the view's
    grid: int | None = None  # side in pixels of square images, to crop whole pixels as torchvision
    hflip: float = 0.5  # probability, as those down to blur_p
    vflip: float = 0.0
    rotate90: float = 0.0  # by one, two or three right angles
    jitter: tuple[float, ...] = (0.4, 0.4, 0.4, 0.4)  # strengths of JITTER, as torchvision's
    jitter_p: float = 1.0
    grayscale: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # in pixels of the view
    steps: tuple[str, ...] = ("grayscale", "jitter", "blur")
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def recipe(version: str, crop: Crop, **changes) -> Recipe:
    """The recipe of MoCo "v1" or "v2" (the reference's aug_plus), with some fields changed."""
    if version == "v2":
        weak_hue, steps = (0.4, 0.4, 0.4, 0.1), ("jitter", "grayscale", "blur")
        changes = {"jitter": weak_hue, "jitter_p": 0.8, "blur_p": 0.5, "steps": steps} | changes
    return Recipe(crop, **changes)


def training_recipe(settings: TrainSettings, grid: int | None = None) -> Recipe:
    """The recipe of a training; `grid` as in `Recipe`, used with --pixel_boxes."""
    changes = {
        name: getattr(settings, name) for name in ("hflip", "vflip", "rotate90", "grayscale")
    }
    if settings.jitter is not None:
        changes["jitter"] = tuple(settings.jitter)
    return recipe(
        "v2" if settings.aug_plus else "v1",
        settings.crop,
        scale=tuple(settings.crop_scale),
        grid=grid if settings.pixel_boxes else None,
        blur_p=settings.blur if settings.aug_plus else 0.0,
        mean=tuple(settings.mean),
        std=tuple(settings.std),
        **changes,
    )


@dataclass(frozen=True)
class Params:
    """The random numbers of one view of a batch, a row an image; the batch shares `order`."""

    box: Tensor  # (N, 4) left, top, width, height of the crop, as shares of width and height
    hflip: Tensor  # (N,) bool
    vflip: Tensor  # (N,) bool
    transpose: Tensor  # (N,) bool: after the flips; a turn by a right angle is both
    jitter: Tensor  # (N,) bool: whether the next apply
    factors: Tensor  # (N, 4) of JITTER; hue: a shift, in turns of the colour circle
    grayscale: Tensor  # (N,) bool
    blur: Tensor  # (N,) bool
    sigma: Tensor  # (N,) of the blur, in pixels of the view
    order: tuple[int, ...] = (0, 1, 2, 3)  # of JITTER

    def rows(self, index: slice | Tensor) -> "Params":
        """The parameters of some images of the batch."""
        names = [field.name for field in fields(self) if field.name != "order"]
        return replace(self, **{name: getattr(self, name)[index] for name in names})


def draw(aspect: Tensor, recipe: Recipe, generator: torch.Generator) -> Params:
    """Draw everything random about one view of a batch, on the CPU in float64.

    aspect: (N,) original width / height of the images, positive and finite.
    A row depends on its own aspect and the generator only, so those of other rows may be made up.
    Distributions: torchvision's RandomResizedCrop and ColorJitter.
    """
    aspect = aspect.to("cpu", torch.float64)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        numbers = torch.rand(len(aspect), *shape, dtype=torch.float64, generator=generator)
        return low + (high - low) * numbers

    area = uniform(*recipe.scale, TRIES)
    height, width = height_width(recipe.crop)
    ratio = uniform(*map(math.log, recipe.ratio), TRIES).exp() * (width / height)
    *strengths, hue = recipe.jitter
    ranges = [*((max(0.0, 1 - s), 1 + s) for s in strengths), (-hue, hue)]
    drawn = Params(  # the numbers are drawn in this order
        box=_boxes(aspect, area, ratio, uniform(0, 1, 2), recipe),
        order=tuple(torch.randperm(len(JITTER), generator=generator).tolist()),
        hflip=uniform(0, 1) < recipe.hflip,
        vflip=torch.zeros(len(aspect), dtype=torch.bool),  # these two below
        transpose=torch.zeros(len(aspect), dtype=torch.bool),
        jitter=uniform(0, 1) < recipe.jitter_p,
        factors=torch.stack([uniform(low, high) for low, high in ranges], dim=1),
        grayscale=uniform(0, 1) < recipe.grayscale,
        blur=uniform(0, 1) < recipe.blur_p,
        sigma=uniform(*recipe.blur_sigma),
    )
    vflip, turned = uniform(0, 1) < recipe.vflip, uniform(0, 1) < recipe.rotate90
    angle = uniform(1, 4).floor()  # in right angles
    one, two, three = (turned & (angle == count) for count in (1, 2, 3))
    flips = {"hflip": drawn.hflip ^ one ^ two, "vflip": vflip ^ two ^ three}
    return replace(drawn, transpose=one | three, **flips)


@torch.no_grad()
def augment(
    images: Tensor, params: Params, recipe: Recipe, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One random view of each image: uint8 (N, C, H, W) -> `dtype` (N, C, height, width).

    C is the number of means; one channel may stand for three. The images may be of any size, also
    squeezed. Views are normalised, on their device, without autocast.
    """
    colours = [name for name in recipe.steps if name != "grayscale" or len(recipe.mean) == 3]
    steps = ["vflip", "transpose", *colours]
    sent = [getattr(params, name).nonzero().squeeze(1) for name in steps]  # read on the CPU
    numbers = params.box, params.factors[params.jitter], params.sigma[params.blur]
    sent = _send([*sent, *(x.to(dtype) for x in numbers), params.hflip], images.device)
    chosen, (box, factors, sigma, hflip) = sent[: len(steps)], sent[len(steps) :]
    functions = {
        "vflip": lambda planes: planes.flip(2),
        "transpose": lambda planes: planes.mT,
        "grayscale": lambda planes: _luma(planes).repeat(3, 1, 1, 1),
        "jitter": lambda planes: _jitter(planes, factors, params.order, recipe),
        "blur": lambda planes: _blur(planes, sigma, recipe),
    }
    with torch.autocast(images.device.type, enabled=False):
        planes = _crop(images, box, hflip, recipe)
        for step, index in zip(map(functions.get, steps), chosen, strict=True):
            if len(index) == len(images):
                planes = step(planes)
            elif len(index):
                planes.index_copy_(1, index, step(planes.index_select(1, index)))
        return _standardize(planes, recipe.mean, recipe.std)


def _send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors, of larger types first, on a device: in one copy that no GPU has to wait for."""
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    packed = torch.cat([x.contiguous().flatten().view(torch.uint8) for x in tensors])
    parts = packed.pin_memory().to(device, non_blocking=True).split([x.nbytes for x in tensors])
    return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def views(
    images: Tensor,
    aspect: Tensor,
    recipe: Recipe,
    generators: Sequence[torch.Generator],
    n: int,
    rows: slice,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """A random view (m, C, height, width) of each image for each generator, channels last.

    The images (m, C, H, W) and their aspects (m,) are the `rows` of a batch of n: all n are drawn,
    so that the random numbers of a row do not depend on who holds which rows.
    """
    whole = torch.ones(n)
    whole[rows] = aspect
    params = (draw(whole, recipe, generator).rows(rows) for generator in generators)
    made = [augment(images, drawn, recipe, dtype) for drawn in params]
    return [view.contiguous(memory_format=torch.channels_last) for view in made]


@torch.no_grad()
def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 (N, C, H, W) -> `dtype`: (x / 255 - mean) / std, for evaluation; C as in `augment`."""
    planes = images.transpose(0, 1).to(dtype) / 255
    return _standardize(planes.expand(len(mean), -1, -1, -1), mean, std)


def _standardize(planes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Planes (C, N, H, W) -> (N, C, H, W). To copy a tensor of means to the device would wait."""
    out = planes.new_empty(planes.shape[1], len(planes), *planes.shape[2:])
    for c in range(len(planes)):
        torch.sub(planes[c], mean[c], out=out[:, c]).div_(std[c])
    return out


def _boxes(aspect: Tensor, area: Tensor, ratio: Tensor, place: Tensor, recipe: Recipe) -> Tensor:
    """RandomResizedCrop's boxes (N, 4): the first of the tries (N, TRIES) that fits.

    Where none fits, the centre, cut to a legal ratio. In shares of the image's sides, a box of area
    s and ratio r is sqrt(s r / aspect) wide and sqrt(s aspect / r) high. torchvision rounds both to
    pixels, as on a `grid`; at 28 px continuous boxes overlap more: a run's loss is lower by 0.1.
    """
    height, width = height_width(recipe.crop)
    a, grid = aspect[:, None], recipe.grid
    least, most = (bound * width / height for bound in recipe.ratio)
    tries = torch.stack([(area * ratio / a).sqrt(), (area * a / ratio).sqrt()], dim=-1)
    centre = torch.stack([most / aspect, aspect / least], dim=-1).clamp(max=1)
    if grid is not None:
        tries, centre = (tries * grid).round() / grid, (centre * grid).round() / grid
    fits = ((tries <= 1) & (tries > 0)).all(-1)
    failed = (fits.cumsum(1) == 0).sum(1)  # tries before the first that fits
    tried = tries[torch.arange(len(aspect)), failed.clamp(max=TRIES - 1)]
    found = (failed < TRIES)[:, None]
    size, place = torch.where(found, tried, centre), torch.where(found, place, 0.5)
    free = 1 - size
    corner = place * free if grid is None else (place * (grid * free + 1)).floor() / grid
    return torch.cat([corner, size], dim=1)


def _crop(images: Tensor, box: Tensor, hflip: Tensor, recipe: Recipe) -> Tensor:
    """Crop, antialiased resize, flip: uint8 (N, C, H, W) -> planes (C, N, h, w) in [0, 1]."""
    n, c, height, width = images.shape
    out_height, out_width = height_width(recipe.crop)
    left, top, box_width, box_height = box.unbind(1)
    start, length, device, dtype = top * height, box_height * height, top.device, top.dtype
    blocks = next(b for b in (4, 2, 1) if out_height % b == 0)
    # to make a block of output rows takes a strip of the image only; the longest strip is that of
    # a box as high as the image, with a pixel more at either end for where these fall
    strip = min(height, math.ceil(height / blocks + 2 * max(1, height / out_height)) + 2)
    share = torch.arange(blocks, device=device, dtype=dtype) / blocks
    edge = start[:, None] + length[:, None] * share - (length[:, None] / out_height).clamp(min=1)
    first = edge.floor().long().clamp(0, height - strip)  # (N, blocks): the strips' first rows
    across, down = (
        torch.arange(count, device=device, dtype=dtype).add_(0.5).div_(count).expand(n, count)
        for count in (out_width, out_height)
    )
    rows = _resampling(start, length, down, first, strip).flatten(0, 1)
    across = torch.where(hflip[:, None], 1 - across, across)
    zero = torch.zeros_like(first[:, :1])  # all columns are one block, and see the whole line
    columns = _resampling(left * width, box_width * width, across, zero, width).squeeze(1).mT
    first = first + height * torch.arange(n, device=device)[:, None]  # in the lines of all images
    index = (first[:, :, None] + torch.arange(strip, device=device)).flatten()
    if images.is_contiguous(memory_format=torch.channels_last):
        lines = images.permute(0, 2, 3, 1).reshape(n * height, width * c).index_select(0, index)
        strips = lines.view(-1, strip, width, c).permute(3, 0, 1, 2)
    else:
        lines = images.transpose(0, 1).reshape(c, n * height, width).index_select(1, index)
        strips = lines.view(c, -1, strip, width)
    planes = strips.to(dtype, memory_format=torch.contiguous_format)  # (C, N blocks, strip, W)
    cropped = [torch.bmm(torch.bmm(rows, p).view(n, out_height, width), columns) for p in planes]
    return torch.stack(cropped).div_(255).expand(len(recipe.mean), -1, -1, -1).contiguous()


def _resampling(start: Tensor, length: Tensor, place: Tensor, first: Tensor, pixels: int) -> Tensor:
    """Matrices (N, blocks, P / blocks, pixels) that resample a line of pixels to P.

    `place` (N, P) says where the P lie in the box [start, start + length). A block of them sees
    `pixels` pixels, from `first` (N, blocks) on. A weight is antialiased bilinear as torchvision's,
    a triangle as wide as an output pixel but at least 1 px, times the pixel's overlap with the box.
    """
    centre = (start[:, None] + length[:, None] * place).unflatten(1, (first.shape[1], -1))
    start, length = start[:, None, None], length[:, None, None]
    slope = -1 / (length / place.shape[1]).clamp(min=1)
    pixel = (first[:, :, None] + torch.arange(pixels, device=first.device)).to(start.dtype)
    inside = torch.minimum(pixel + 1, start + length) - torch.maximum(pixel, start)
    weight = (pixel[:, :, None] + 0.5 - centre[..., None]).abs_()  # (N, blocks, P / blocks, pixels)
    weight.mul_(slope[..., None]).add_(1).clamp_(min=0).mul_(inside.clamp_(min=0)[:, :, None])
    return weight.div_(weight.sum(3, keepdim=True))


def _luma(planes: Tensor) -> Tensor:
    """Brightness as seen by the eye (ITU-R 601), or the mean of other channels: (N, H, W)."""
    if len(planes) != 3:
        return planes.mean(0)
    red, green, blue = planes
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _jitter(planes: Tensor, factors: Tensor, order: Sequence[int], recipe: Recipe) -> Tensor:
    """The colour operations in the batch's order, but those of strength 0; in place."""
    colours = 4 if len(planes) == 3 else 2  # without three channels, brightness and contrast
    for i in [i for i in order if i < colours and recipe.jitter[i] > 0]:
        name, factor = JITTER[i], factors[:, i, None, None]
        if name == "hue":
            _turn_hue(planes, factor)
        elif name == "brightness":
            planes.mul_(factor).clamp_(0, 1)
        else:
            other = _luma(planes)
            if name == "contrast":  # a mean of means: an image's does not depend on the batch
                other = other.mean(2, keepdim=True).mean(1, keepdim=True)
            planes.mul_(factor).add_((1 - factor) * other).clamp_(0, 1)
    return planes


def _turn_hue(planes: Tensor, shift: Tensor) -> None:
    """Turn the colour circle by `shift` turns, at constant value and chroma (HSV).

    A channel at a distance from its place on the circle (red 0, green 1/3, blue 2/3) has the value
    maximum - chroma * clip(6 distance - 1, 0, 1).
    """
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = value == red, value == green
    turn = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    turn.div_(torch.where(chroma > 0, chroma, 6).mul_(6))  # grey: 0 / anything
    third = (~is_red).to(turn.dtype).add_(~(is_red | is_green))  # 0 red, 1 green, 2 blue
    turn.add_(third, alpha=1 / 3).add_(shift)
    for channel, place in enumerate((0, 1 / 3, 2 / 3)):
        distance = turn - place
        distance.sub_(distance.round()).abs_()
        fall = distance.mul_(6).sub_(1).clamp_(0, 1)
        torch.addcmul(value, chroma, fall, value=-1, out=planes[channel])


def _blur(planes: Tensor, sigma: Tensor, recipe: Recipe) -> Tensor:
    """Gaussian blur, reflected at the border: by a matrix (N, side, side) along either axis."""
    rows, columns = (_blurring(side, sigma, recipe) for side in planes.shape[2:])
    return torch.stack([torch.bmm(torch.bmm(rows, plane), columns.mT) for plane in planes])


def _blurring(side: int, sigma: Tensor, recipe: Recipe) -> Tensor:
    """Matrices (N, side, side) that blur a line of pixels by sigma (N,)."""
    radius = min(math.ceil(3 * recipe.blur_sigma[1]), side - 1)  # as far as reflection reaches
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)  # (N, taps)
    kernel /= kernel.sum(1, keepdim=True)
    # the matrix blurs a line as the identity is blurred: the sum over taps of its shifted copies
    identity = torch.eye(side, dtype=sigma.dtype, device=sigma.device)
    shifted = F.pad(identity, (radius, radius), mode="reflect").unfold(1, side, 1)
    return torch.einsum("nt,jti->nij", kernel, shifted)
