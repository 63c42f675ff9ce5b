"""Views that are turned, that are no squares, and of images of other than three channels."""

from dataclasses import replace

import pytest
import torch
from pictures import PLAIN, assert_close, pictures, seeded, snapped, untouched
from torchvision.transforms import functional as F

from augment import Recipe, augment, draw, normalize, recipe

STILL = {"jitter": (0, 0, 0, 0), "grayscale": 0.0, "hflip": 0.0, **PLAIN}


def whole(crop: int, **changes) -> Recipe:
    """A recipe that takes the whole image."""
    return Recipe(crop, scale=(1.0, 1.0), ratio=(1.0, 1.0), **{**STILL, **changes})


def test_turns_by_right_angles_are_equally_likely() -> None:
    images, made = pictures(1, 16).expand(3000, -1, -1, -1), whole(16, rotate90=1.0)
    views = augment(images, draw(torch.ones(3000), made, seeded(3)), made)
    turns = torch.stack([torch.rot90(images[0], k, dims=(1, 2)) for k in range(4)]) / 255
    which = (views[:, None] - turns).abs().amax(dim=(2, 3, 4)) < 1e-5  # N x 4
    assert which.sum(1).eq(1).all() and not which[:, 0].any()
    assert (which[:, 1:].double().mean(0) - 1 / 3).abs().max() < 0.03  # 3.5 standard errors


@pytest.mark.parametrize("hflip, vflip", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_flips_equal_torchvision(hflip: float, vflip: float) -> None:
    images, made = pictures(5, 40), whole(20, hflip=hflip, vflip=vflip)
    expected = F.resize(images.double() / 255, [20, 20], antialias=True)
    expected = F.hflip(expected) if hflip else expected
    expected = F.vflip(expected) if vflip else expected
    assert_close(augment(images, draw(torch.ones(5), made, seeded(1)), made), expected, levels=0.05)


def test_half_of_the_views_are_flipped_and_turned() -> None:
    made = recipe("v2", 32, vflip=0.5, rotate90=0.5)
    params = draw(torch.ones(20000), made, seeded(5))
    chosen = torch.stack([params.hflip, params.vflip, params.transpose]).double()
    expected = torch.tensor([0.5, 0.5, 1 / 3])  # of the turns, two in three transpose
    assert (chosen.mean(1) - expected).abs().max() < 0.012


def test_new_draws_leave_the_others_as_they_were() -> None:
    plain, turned = (
        draw(torch.ones(50), recipe("v2", 32, vflip=p, rotate90=p), seeded(5)) for p in (0.0, 1.0)
    )
    for name in ("box", "jitter", "factors", "grayscale", "blur", "sigma"):
        assert torch.equal(getattr(plain, name), getattr(turned, name))


@pytest.mark.parametrize("crop", [[16, 40], [30, 12]])
def test_a_rectangular_crop_equals_torchvision(crop: list[int]) -> None:
    images, made = pictures(12, 48), Recipe(crop, **PLAIN)
    drawn = snapped(draw(torch.ones(12), made, seeded(2)), 48)
    views = augment(images, replace(untouched(12, vflip=drawn.hflip), box=drawn.box), made)
    assert views.shape == (12, 3, *crop)
    for k, (left, top, width, height) in enumerate((drawn.box * 48).round().int().tolist()):
        exact = images[k].double() / 255
        exact = F.resized_crop(exact, top, left, height, width, crop, antialias=True)
        assert_close(views[k], F.vflip(exact) if drawn.hflip[k] else exact, levels=0.05)


def test_a_rectangular_view_is_blurred_alike_along_both_axes() -> None:
    images, made = pictures(4, 32), Recipe([16, 32], blur_p=1.0, **PLAIN)
    sigma = torch.tensor([0.1, 0.5, 1.1, 2.0], dtype=torch.float64)
    views = augment(images, untouched(4, blur=torch.ones(4, dtype=torch.bool), sigma=sigma), made)
    sharp = F.resize(images.double() / 255, [16, 32], antialias=True)
    for view, image, s in zip(views, sharp, sigma.tolist(), strict=True):
        assert_close(view, F.gaussian_blur(image, 13, s), levels=0.05)


def test_boxes_have_the_shape_of_the_view() -> None:
    """Of images as wide as the view, boxes are seen in the paper's range of ratios."""
    params = draw(torch.full((5000,), 2.0), Recipe([20, 40]), seeded(1))
    width, height = params.box[:, 2] * 2, params.box[:, 3]
    ratio = width / height / 2
    assert ratio.min() > 0.7499 and ratio.max() < 1.3334 and (ratio.log().mean()).abs() < 0.02


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_channels_are_treated_alike(channels: int) -> None:
    """Hue, saturation and greyscale need three; crop, brightness and blur know no other channel."""
    mean, std = (0.0,) * channels, (1.0,) * channels
    jitter = (0.4, 0.0, 0.4, 0.4)
    made = recipe("v2", 24, mean=mean, std=std, jitter=jitter, grayscale=1.0, blur_p=0.5)
    images = torch.cat([pictures(6, 32, 1, seed=i) for i in range(channels)], dim=1)
    params = draw(torch.ones(6), made, seeded(4))
    views = augment(images, params, made)
    one = replace(made, mean=(0.0,), std=(1.0,))
    for c in range(channels):
        assert_close(views[:, c : c + 1], augment(images[:, c : c + 1], params, one), levels=0.01)
    normalized = normalize(images, (0.5,) * channels, (0.25,) * channels)
    torch.testing.assert_close(normalized, (images / 255 - 0.5) / 0.25)


def test_contrast_of_many_channels_is_about_their_mean() -> None:
    images, made = pictures(3, 16, 1).expand(-1, 5, -1, -1), whole(16, mean=(0,) * 5, std=(1,) * 5)
    contrast = torch.tensor([0.6, 1.0, 1.4], dtype=torch.float64)
    params = untouched(3, jitter=torch.ones(3, dtype=torch.bool), contrast=contrast)
    views = augment(images, params, replace(made, jitter=(0, 0.4, 0, 0)))
    for view, image, factor in zip(views, images.double() / 255, contrast.tolist(), strict=True):
        expected = (factor * image + (1 - factor) * image.mean()).clamp(0, 1)
        assert_close(view, expected, levels=0.05)
