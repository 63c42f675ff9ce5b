"""The pixels of a batch of views: crop, colours and blur, by tensor operations on any device.

Views are planes (C, N, height, width) in [0, 1], unrounded. What changes them does so in place.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

JITTER = ("brightness", "contrast", "saturation", "hue")


def cuts(
    shape: torch.Size, box: Tensor, hflip: Tensor, vflip: Tensor, size: tuple[int, int]
) -> list[Tensor]:
    """Where `crop` cuts views of a size out of images of a shape (N, C, H, W), on the CPU.

    `box` (n, 4) are left, top, width and height as shares of the image's; n is a multiple of N.
    Returns (n, blocks) the first row of each strip, counted over all images; the same, counted
    within its image; and (2, n, 5) the spans, down and across, that `_resampling` takes.
    """
    images, _, height, width = shape
    out_height, out_width = size
    left, top, box_width, box_height = box.unbind(1)
    top, length = top * height, box_height * height
    down = _span(top, length, out_height, vflip)
    across = _span(left * width, box_width * width, out_width, hflip)
    block = torch.arange(_blocks(out_height))
    block = torch.where(vflip[:, None], block.flip(0), block) / len(block)
    radius = down[:, 4:]
    edge = top[:, None] + length[:, None] * block - radius
    first = edge.floor().long().clamp(0, height - _strip(height, out_height))
    image = torch.arange(len(box)).remainder_(max(1, images))
    return [first + height * image[:, None], first.to(box.dtype), torch.stack([down, across])]


def _span(start: Tensor, length: Tensor, count: int, flipped: Tensor) -> Tensor:
    """Boxes (n,) along an axis, in pixels of the image.

    Returns (n, 5): start; end; centre of the first of `count` output pixels, less half a pixel;
    step to the next; radius of the filter.
    """
    step, end = length / count, start + length
    radius = step.clamp(min=1)
    centre = torch.where(flipped, end - step / 2, start + step / 2) - 0.5
    return torch.stack([start, end, centre, torch.where(flipped, -step, step), radius], dim=1)


def _blocks(out_height: int) -> int:
    """The blocks of output rows; to make one takes a strip of the image only."""
    return next(blocks for blocks in (4, 2, 1) if out_height % blocks == 0)


def _strip(height: int, out_height: int) -> int:
    """The rows of a strip: for a box as high as the image, and a pixel at either end."""
    rows = math.ceil(height / _blocks(out_height) + 2 * max(1, height / out_height)) + 2
    return min(height, rows)


def crop(
    images: Tensor, starts: Tensor, first: Tensor, spans: Tensor, size: tuple[int, int]
) -> Tensor:
    """Crop, antialiased resize, flip: uint8 (N, C, H, W) -> (C, n, height, width), by `cuts`."""
    count, c, height, width = images.shape
    strip, n = _strip(height, size[0]), len(starts)
    rows = _resampling(spans[0], size[0], first, strip).flatten(0, 1)
    zero = first.new_zeros(1, 1)  # all columns are one block, and see the whole line
    columns = _resampling(spans[1], size[1], zero, width).squeeze(1).mT
    index = (starts[:, :, None] + torch.arange(strip, device=starts.device)).flatten()
    if images.is_contiguous(memory_format=torch.channels_last):
        lines = images.permute(0, 2, 3, 1).reshape(count * height, width * c)
        strips = lines.index_select(0, index).view(-1, strip, width, c).permute(3, 0, 1, 2)
    else:
        lines = images.transpose(0, 1).reshape(c, count * height, width)
        strips = lines.index_select(1, index).view(c, -1, strip, width)
    planes = strips.to(spans.dtype, memory_format=torch.contiguous_format)  # (C, n blocks, ...)
    cropped = [torch.bmm(torch.bmm(rows, p).view(n, size[0], width), columns) for p in planes]
    return torch.stack(cropped).div_(255)


def _resampling(spans: Tensor, count: int, first: Tensor, pixels: int) -> Tensor:
    """Matrices (n, blocks, count / blocks, pixels) that resample a line of pixels to `count`.

    A block of these sees `pixels` pixels, from `first` (n or 1, blocks) on. A weight is antialiased
    bilinear as torchvision's, a triangle as wide as an output pixel but at least 1 px, times the
    pixel's overlap with the box.
    """
    start, end, centre, step, radius = spans[:, :, None].unbind(1)
    number = torch.arange(count, device=spans.device, dtype=spans.dtype)
    centre = torch.addcmul(centre, step, number).unflatten(1, (first.shape[1], -1))
    edges = first[:, :, None] + torch.arange(pixels + 1, device=spans.device, dtype=spans.dtype)
    distance = (edges[:, :, None, :-1] - centre[..., None]).abs_()  # both less half a pixel
    inside = edges.clamp(start[..., None], end[..., None]).diff()
    weight = torch.sub(radius[..., None, None], distance, out=distance).clamp_(min=0)
    weight.mul_(inside[:, :, None])
    return weight.div_(weight.sum(3, keepdim=True))


def _luma(planes: Tensor) -> Tensor:
    """Brightness as seen by the eye (ITU-R 601), or the mean of other channels: (N, H, W)."""
    if len(planes) != 3:
        return planes.mean(0)
    red, green, blue = planes
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def transpose(planes: Tensor) -> None:
    """Swap height and width, which must be equal."""
    planes.copy_(planes.mT.clone())


def remove_colour(planes: Tensor) -> None:
    """The same grey in all channels."""
    planes.copy_(_luma(planes))


def jitter(planes: Tensor, factors: Tensor, order: Sequence[str]) -> None:
    """Change brightness, contrast, saturation and hue by `factors` (N, 4), in an order."""
    for name in order:
        factor = factors[:, JITTER.index(name), None, None]
        if name == "hue":
            _turn_hue(planes, factor)
        elif name == "brightness":
            planes.mul_(factor).clamp_(0, 1)
        else:
            other = _luma(planes)
            if name == "contrast":  # a mean of means: an image's does not depend on the batch
                other = other.mean(2, keepdim=True).mean(1, keepdim=True)
            torch.lerp(other, planes, factor, out=planes).clamp_(0, 1)


def _turn_hue(planes: Tensor, shift: Tensor) -> None:
    """Turn the colour circle by `shift` turns, at constant value and chroma (HSV).

    A channel at a distance from its place on the circle, whose length is 6 (red 0, green 2, blue
    4), has the value maximum - chroma * clip(distance - 1, 0, 1).
    """
    red, green, blue = planes
    value = planes.amax(0)
    chroma = value - planes.amin(0)
    by_green, by_blue = (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    hue = torch.where(value == green, by_green, by_blue)
    hue = torch.where(value == red, green - blue, hue)
    hue.div_(chroma.clamp(min=torch.finfo(hue.dtype).tiny)).add_(shift, alpha=6)  # grey: 0 / any
    place = torch.arange(0, 6, 2, device=hue.device, dtype=hue.dtype)[:, None, None, None]
    distance = hue - place
    distance.sub_((distance / 6).round_(), alpha=6).abs_()
    fall = distance.sub_(1).clamp_(0, 1)
    torch.addcmul(value, chroma, fall, value=-1, out=planes)


def blur(planes: Tensor, sigma: Tensor, largest: float) -> None:
    """Gaussian blur, reflected at the border: by a matrix (N, side, side) along either axis.

    `sigma` (N,) in pixels, at most the `largest`, of which the kernel's radius is three times.
    """
    height, width = planes.shape[2:]
    rows = _blurring(height, sigma, largest)
    columns = rows if width == height else _blurring(width, sigma, largest)
    for plane in planes:
        torch.bmm(torch.bmm(rows, plane), columns.mT, out=plane)


def _blurring(side: int, sigma: Tensor, largest: float) -> Tensor:
    """Matrices (N, side, side) that blur a line of pixels by sigma (N,)."""
    radius = min(math.ceil(3 * largest), side - 1)  # as far as reflection reaches
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)  # (N, taps)
    kernel /= kernel.sum(1, keepdim=True)
    # the matrix blurs a line as the identity is blurred: the sum over taps of its shifted copies
    identity = torch.eye(side, dtype=sigma.dtype, device=sigma.device)
    shifted = F.pad(identity, (radius, radius), mode="reflect").unfold(1, side, 1)
    return torch.einsum("nt,jti->nij", kernel, shifted)
