"""Random views of a uint8 batch, as batched tensor operations on the device where it lies.

    params = draw(batch.aspect, recipe("v2", crop=64), generator)   # CPU: all random numbers
    im_q = augment(batch.images, params, recipe("v2", crop=64))     # (N, 3, 64, 64), normalised

v1 (arXiv:1911.05722): crop, greyscale, jitter, flip; v2 (arXiv:2003.04297): crop, jitter,
greyscale, blur, flip; both as the reference. The flip commutes with the others, so the crop makes
it. Images of other than three channels C have no hue, saturation or greyscale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from config import TrainSettings
from data.base import Crop, height_width
from run import pixels
from run.pixels import JITTER

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
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
    images: Tensor,
    params: Params | Sequence[Params],
    recipe: Recipe,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One random view of each image: uint8 (N, C, H, W) -> `dtype` (N, C, height, width).

    C is the number of means; one channel may stand for three. The images may be of any size, also
    squeezed. Views are normalised, channels last, on their device, without autocast. Several
    params give as many views of each image, (len(params) N, C, height, width), in few kernels.
    Raises ValueError for params of another number of images.
    """
    params = [params] if isinstance(params, Params) else params
    if any(len(p.box) != len(images) for p in params):
        raise ValueError(f"{len(images)} images, and params of {[len(p.box) for p in params]}")
    size, channels = height_width(recipe.crop), len(recipe.mean)
    box, *flips = (_joined(params, name) for name in ("box", "hflip", "vflip"))
    cuts = pixels.cuts(images.shape, box.to(dtype), *flips, size)
    scale = [torch.tensor(x, dtype=dtype)[:, None, None, None] for x in (recipe.mean, recipe.std)]
    steps = _steps(params, recipe, dtype)
    arguments = [arguments for _, _, arguments in steps]
    cuts, (mean, std), *arguments = _send([cuts, scale, *arguments], images.device)
    with torch.autocast(images.device.type, enabled=False):
        planes = pixels.crop(images, *cuts, size).expand(channels, -1, -1, -1).contiguous()
        for (change, rows, _), (index, *more) in zip(steps, arguments, strict=True):
            some = planes[:, rows]
            if 0 < len(index) < some.shape[1]:
                chosen = some.index_select(1, index)
                change(chosen, *more)
                some.index_copy_(1, index, chosen)
            elif len(index):
                change(some, *more)
        views = planes.sub_(mean).div_(std).transpose(0, 1)
        return views.contiguous(memory_format=torch.channels_last)


def _steps(
    params: Sequence[Params], recipe: Recipe, dtype: torch.dtype
) -> list[tuple[Callable[..., None], slice, list[Tensor]]]:
    """The changes after the crop, in order, each in place.

    A change is a function, the rows of the views that it may change, and on the CPU the indices
    of those among them that it does change, with what else it takes.
    """
    n, colour = len(params[0].box), len(recipe.mean) == 3
    names = ("transpose", "grayscale", "blur")
    index = {name: _joined(params, name).nonzero().squeeze(1) for name in names}
    steps = [(pixels.transpose, slice(None), [index["transpose"]])]
    for name in recipe.steps:
        if name == "blur":
            sigma = torch.cat([p.sigma[p.blur] for p in params]).to(dtype)
            blur = partial(pixels.blur, largest=recipe.blur_sigma[1])
            steps.append((blur, slice(None), [index["blur"], sigma]))
        elif name == "grayscale" and colour:
            steps.append((pixels.remove_colour, slice(None), [index["grayscale"]]))
        elif name == "jitter":  # a view has its own order
            works = [s > 0 and (colour or i < 2) for i, s in enumerate(recipe.jitter)]
            for i, p in enumerate(params):
                change = partial(pixels.jitter, order=[JITTER[j] for j in p.order if works[j]])
                arguments = [p.jitter.nonzero().squeeze(1), p.factors[p.jitter].to(dtype)]
                steps.append((change, slice(i * n, (i + 1) * n), arguments))
    return steps


def _joined(params: Sequence[Params], name: str) -> Tensor:
    return torch.cat([getattr(p, name) for p in params])


def _send(lists: Sequence[list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """Lists of tensors on a device; on CUDA in one copy, for which the host does not wait."""
    if device.type != "cuda":
        return [[x.to(device) for x in tensors] for tensors in lists]
    # the largest elements first, so that each part is aligned
    flat = sorted(chain.from_iterable(lists), key=Tensor.element_size, reverse=True)
    packed = torch.cat([x.contiguous().flatten().view(torch.uint8) for x in flat])
    parts = packed.pin_memory().to(device, non_blocking=True).split([x.nbytes for x in flat])
    on_device = {id(x): p.view(x.dtype).view(x.shape) for x, p in zip(flat, parts, strict=True)}
    return [[on_device[id(x)] for x in tensors] for tensors in lists]


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
    params = [draw(whole, recipe, generator).rows(rows) for generator in generators]
    if images.device.type != "cuda":  # one by one they stay in a CPU's caches
        return [augment(images, drawn, recipe, dtype) for drawn in params]
    return list(augment(images, params, recipe, dtype).chunk(len(params)))


@torch.no_grad()
def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 (N, C, H, W) -> `dtype`: (x / 255 - mean) / std, for evaluation; C as in `augment`."""
    scale = [torch.tensor(x, dtype=dtype)[:, None, None] for x in (mean, std)]
    ((mean, std),) = _send([scale], images.device)
    return (images.to(dtype) / 255 - mean).div_(std)


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
