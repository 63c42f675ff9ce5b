"""Crop, colours and blur against torchvision's own transforms."""

from dataclasses import replace

import pytest
import torch
from pictures import ADJUST, PLAIN, assert_close, factor, pictures, seeded, snapped, untouched
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER,
    Params,
    Recipe,
    augment,
    draw,
    normalize,
    recipe,
)


@pytest.mark.parametrize("size, crop", [(64, 32), (48, 64), (61, 23), (28, 28), (32, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_equals_resized_crop(size: int, crop: int, channels: int) -> None:
    images = pictures(12, size, channels)
    params = snapped(
        draw(torch.ones(12), Recipe(crop, scale=(0.02, 1.0), ratio=(0.4, 2.5)), seeded(size)), size
    )
    got = augment(
        images, replace(untouched(12, hflip=params.hflip), box=params.box), Recipe(crop, **PLAIN)
    )
    assert params.hflip.any() and not params.hflip.all()
    for k, (left, top, width, height) in enumerate((params.box * size).round().int().tolist()):
        where = dict(
            top=top,
            left=left,
            height=height,
            width=width,
            size=[crop, crop],
            interpolation=InterpolationMode.BILINEAR,
            antialias=True,
        )
        mirror = F.hflip if params.hflip[k] else (lambda image: image)
        assert_close(got[k], mirror(F.resized_crop(images[k], **where)).expand(3, -1, -1), levels=1)
        assert_close(
            got[k],
            mirror(F.resized_crop(images[k].double() / 255, **where)).expand(3, -1, -1),
            levels=0.05,
        )


@pytest.mark.parametrize("box", [(1.3, 0.45, 3.9, 6.2), (2.1, 3.2, 0.5, 0.3), (0.0, 0.5, 6.0, 1.0)])
def test_crop_of_a_continuous_box_by_hand(box: tuple[float, ...]) -> None:
    height, width, crop = 7, 6, 4
    left, top, box_width, box_height = box

    def weights(start: float, length: float, size: int) -> list[list[float]]:
        table = []
        for out in range(crop):
            centre, support = start + (out + 0.5) * length / crop, max(length / crop, 1)
            row = [
                max(0, min(p + 1, start + length) - max(p, start))
                * max(0, 1 - abs(p + 0.5 - centre) / support)
                for p in range(size)
            ]
            table.append([w / sum(row) for w in row])
        return table

    rows, columns = weights(top, box_height, height), weights(left, box_width, width)
    image = torch.randint(0, 256, (1, 1, height, width), generator=seeded(3), dtype=torch.uint8)
    want = [
        [
            sum(
                rows[y][i] * columns[x][j] * image[0, 0, i, j].item() / 255
                for i in range(height)
                for j in range(width)
            )
            for x in range(crop)
        ]
        for y in range(crop)
    ]
    share = torch.tensor(
        [[left / width, top / height, box_width / width, box_height / height]], dtype=torch.float64
    )
    got = augment(image, untouched(1, box=share), Recipe(crop, **PLAIN), torch.float64)
    torch.testing.assert_close(
        got[0, 0], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "name, values",
    [
        ("brightness", (0.0, 0.6, 1.0, 1.4, 2.0)),
        ("contrast", (0.0, 0.6, 1.0, 1.4, 2.0)),
        ("saturation", (0.0, 0.6, 1.0, 1.4, 2.0)),
        ("hue", (-0.5, -0.31, -0.1, 0.0, 0.04, 0.25, 0.4, 0.5)),
    ],
)
def test_jitter_equals_torchvision(name: str, values: tuple[float, ...]) -> None:
    n = 2 * len(values)
    images, factors = (
        pictures(n, 32),
        torch.tensor(values, dtype=torch.float64).repeat_interleave(2),
    )
    params = untouched(n, jitter=torch.ones(n, dtype=torch.bool), **{name: factors})
    got = augment(images, params, Recipe(32, **PLAIN))
    assert_close(
        got,
        torch.stack(
            [ADJUST[name](image, f) for image, f in zip(images, factors.tolist(), strict=True)]
        ),
        levels=2,
    )


def test_grayscale_equals_torchvision_where_chosen() -> None:
    images, chosen = pictures(6, 32), torch.tensor([True, False, True, True, False, False])
    got = augment(images, untouched(6, grayscale=chosen), Recipe(32, **PLAIN))
    assert_close(got[chosen], F.rgb_to_grayscale(images[chosen], 3), levels=2)
    assert_close(got[~chosen], images[~chosen], levels=0.01)


@pytest.mark.parametrize("crop", [32, 7, 5, 2])  # up to 7 pixels the border limits the radius
def test_blur_equals_torchvision_where_chosen(crop: int) -> None:
    sigma = torch.tensor([0.1, 0.1, 0.5, 0.5, 1.3, 1.3, 2.0, 2.0, 2.0], dtype=torch.float64)
    chosen = torch.arange(9) < 8
    images = pictures(9, crop)
    got = augment(images, untouched(9, blur=chosen, sigma=sigma), Recipe(crop, **PLAIN))
    radius = min(6, crop - 1)  # 3 sigma of the default's widest
    blurred = torch.stack(
        [F.gaussian_blur(x, 2 * radius + 1, s) for x, s in zip(images, sigma.tolist(), strict=True)]
    )
    assert_close(got[chosen], blurred[chosen], levels=2)
    exact = torch.stack(
        [
            F.gaussian_blur(x.double() / 255, 2 * radius + 1, s)
            for x, s in zip(images, sigma.tolist(), strict=True)
        ]
    )
    assert_close(got[chosen], exact[chosen], levels=0.01)
    assert_close(got[~chosen], images[~chosen], levels=0.01)


def rendering(
    image: Tensor, params: Params, k: int, made: Recipe, steps: tuple[str, ...]
) -> Tensor:
    """Image k of the batch by torchvision, one operation after the other, in floating point."""
    left, top, width, height = (params.box[k] * image.shape[-1]).round().int().tolist()
    x = F.resized_crop(
        image.double() / 255, top, left, height, width, [made.crop, made.crop], antialias=True
    )
    radius = min(6, made.crop - 1)  # 3 sigma of the widest blur, as far as reflection reaches
    for step in steps:
        if step == "flip" and params.hflip[k]:
            x = F.hflip(x)
        elif step == "grayscale" and params.grayscale[k]:
            x = F.rgb_to_grayscale(x, 3)
        elif step == "jitter" and params.jitter[k]:
            for name in [JITTER[i] for i in params.order]:
                x = ADJUST[name](x, factor(params, name)[k].item())
        elif step == "blur" and params.blur[k]:
            x = F.gaussian_blur(x, 2 * radius + 1, params.sigma[k].item())
    return x


@pytest.mark.parametrize("seed", range(4))  # each with its own order of the jitter
@pytest.mark.parametrize(
    "version, steps, wrong",
    [
        ("v1", ("grayscale", "jitter", "flip"), ("jitter", "grayscale", "flip")),
        ("v2", ("jitter", "grayscale", "blur", "flip"), ("grayscale", "blur", "jitter", "flip")),
    ],
)
def test_pipeline_equals_torchvision(version: str, steps: tuple, wrong: tuple, seed: int) -> None:
    n, size = 24, 48
    made, images = recipe(version, 32, **PLAIN), pictures(n, size, seed=seed)
    params = snapped(draw(torch.ones(n), made, seeded(seed)), size)
    got = augment(images, params, made)
    assert_close(
        got, torch.stack([rendering(images[k], params, k, made, steps) for k in range(n)]), levels=2
    )
    with pytest.raises(AssertionError, match="levels apart"):  # the test can tell orders apart
        assert_close(
            got,
            torch.stack([rendering(images[k], params, k, made, wrong) for k in range(n)]),
            levels=2,
        )
    standard = recipe(version, 32)
    want = F.normalize(got, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(augment(images, params, standard), want, rtol=0, atol=1e-5)


def test_certain_and_impossible_operations() -> None:
    images = pictures(6, 32)
    for steps in (("grayscale", "jitter", "blur"), ("jitter", "grayscale", "blur")):
        made = Recipe(24, grayscale=1.0, steps=steps, jitter_p=1.0, blur_p=1.0, **PLAIN)
        view = augment(images, draw(torch.ones(6), made, seeded(1)), made)
        assert_close(view[:, 0], view[:, 1], levels=0.01)  # grey stays grey
    made = Recipe(
        32,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        hflip=0.0,
        jitter=(0, 0, 0, 0),
        grayscale=0.0,
        **PLAIN,
    )
    assert_close(augment(images, draw(torch.ones(6), made, seeded(1)), made), images, levels=0.01)


def test_normalize_equals_torchvision() -> None:
    images = pictures(4, 20)
    want = F.normalize(images.double() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    colours = IMAGENET_MEAN, IMAGENET_STD
    torch.testing.assert_close(normalize(images, *colours), want.float(), rtol=0, atol=1e-6)
    exact = normalize(images, *colours, torch.float64)
    torch.testing.assert_close(exact, want, rtol=0, atol=1e-12)
    grey = images[:, :1]
    three = normalize(grey.expand(-1, 3, -1, -1), *colours)
    assert torch.equal(normalize(grey, *colours), three)
