"""What is drawn at random: distributions, streams, and what the training relies on."""

import colorsys
from dataclasses import replace

import pytest
import torch
from pictures import PLAIN, factor, pictures, seeded, untouched
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop

import config
from augment import JITTER, Recipe, augment, draw, recipe, training_recipe
from config import TrainSettings


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Mean difference of the sorted samples (the 1-Wasserstein distance)."""
    return (ours.double().sort().values - theirs.double().sort().values).abs().mean().item()


@pytest.mark.parametrize(
    "aspect", [0.2, 0.5, 3 / 4, 1.0, 4 / 3, 16 / 9, 5.0]
)  # at 0.2 and 5 half of the boxes fall back
@pytest.mark.parametrize("scale, ratio", [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.08, 0.6), (0.5, 3.0))])
def test_boxes_follow_torchvision(aspect: float, scale: tuple, ratio: tuple) -> None:
    n, width, height = 2500, round(1000 * aspect**0.5), round(1000 / aspect**0.5)
    image = torch.zeros(1).expand(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = torch.tensor(
            [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
        )
    top, left, h, w = drawn.double().T
    theirs = {"left": left / width, "top": top / height, "width": w / width, "height": h / height}
    box = draw(
        torch.full((n,), width / height), Recipe(32, scale=scale, ratio=ratio), seeded(2)
    ).box
    ours = dict(zip(("left", "top", "width", "height"), box.T, strict=True))
    for sample in (ours, theirs):
        sample["area"] = sample["width"] * sample["height"]
        sample["ratio"] = sample["width"] / sample["height"]
        sample["right"] = 1 - sample["left"] - sample["width"]
    for name in ours:
        spread = (
            theirs[name].std().item() + 0.002
        )  # two samples of one distribution: about 0.02 spreads apart
        assert distance(ours[name], theirs[name]) < 0.08 * spread + 0.002, name
    assert (box >= 0).all() and (box[:, :2] + box[:, 2:] <= 1 + 1e-12).all()


@pytest.mark.parametrize("grid", [7, 28])
def test_boxes_on_a_grid_are_torchvisions(grid: int) -> None:
    n, image = 6000, torch.zeros(1).expand(3, grid, grid)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = torch.tensor(
            [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
        )
    box = grid * draw(torch.ones(n), Recipe(32, grid=grid), seeded(2)).box
    assert (box - box.round()).abs().max() < 1e-9 and (box[:, :2] + box[:, 2:]).max() <= grid + 1e-9
    for ours, theirs in zip(box.round().long().T, drawn[:, [1, 0, 3, 2]].T, strict=True):
        counts = [
            torch.bincount(values, minlength=grid + 1).double() / n for values in (ours, theirs)
        ]
        assert (
            counts[0] - counts[1]
        ).abs().max() < 0.03  # 3.3 standard errors of the most frequent value
    free = draw(torch.ones(n), Recipe(32), seeded(2)).box
    assert (box[:, 0] / grid).std() > 1.02 * free[
        :, 0
    ].std()  # why the grid matters: whole pixels spread wider


@pytest.mark.parametrize("size", [(800, 100), (100, 800), (1000, 90), (60, 1000)])
def test_fallback_is_torchvisions_centre(size: tuple[int, int]) -> None:
    width, height = size
    top, left, h, w = RandomResizedCrop.get_params(
        torch.zeros(1).expand(3, height, width), [0.2, 1.0], [3 / 4, 4 / 3]
    )
    box = draw(torch.full((50,), width / height), Recipe(32), seeded(0)).box
    got = box * torch.tensor([width, height, width, height])
    assert (got - torch.tensor([left, top, w, h])).abs().max() <= 1  # torchvision's whole pixels


def test_whole_image_where_no_box_of_a_legal_aspect_fits() -> None:
    made = Recipe(
        32, scale=(1.0, 1.0), ratio=(0.5, 2.0)
    )  # only a box of the image's own aspect would fit
    box = draw(torch.tensor([1.0, 1.3, 0.7], dtype=torch.float64), made, seeded(0)).box
    torch.testing.assert_close(
        box, torch.tensor([[0.0, 0, 1, 1]], dtype=torch.float64).repeat(3, 1)
    )


@pytest.mark.parametrize(
    "strength", [(0.4, 0.4, 0.4, 0.1), (0.2, 1.5, 0.8, 0.5)]
)  # 1.5: the factor stops at 0
def test_jitter_follows_torchvision(strength: tuple[float, ...]) -> None:
    n, transform = 3000, ColorJitter(*strength)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = [
            transform.get_params(
                transform.brightness, transform.contrast, transform.saturation, transform.hue
            )[1:]
            for _ in range(n)
        ]
    params = draw(torch.ones(n), Recipe(32, jitter=strength), seeded(2))
    for name, theirs, s in zip(JITTER, torch.tensor(drawn).T, strength, strict=True):
        assert distance(factor(params, name), theirs) < 0.04 * s, name
        assert factor(params, name).min() >= (-s if name == "hue" else max(0, 1 - s))


def test_jitter_order_is_a_fair_permutation() -> None:
    orders = [draw(torch.ones(1), Recipe(32), seeded(k)).order for k in range(1200)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    counts = [orders.count(order) for order in set(orders)]
    assert (
        len(counts) == 24 and sum((c - 50) ** 2 / 50 for c in counts) < 50
    )  # chi-squared, 23 degrees: p < 0.001


@pytest.mark.parametrize(
    "version, want", [("v1", (0.5, 1.0, 0.2, 0.0)), ("v2", (0.5, 0.8, 0.2, 0.5))]
)
def test_frequencies(version: str, want: tuple[float, ...]) -> None:
    params = draw(torch.ones(20000), recipe(version, 32), seeded(5))
    chosen = torch.stack((params.hflip, params.jitter, params.grayscale, params.blur)).double()
    assert (chosen.mean(1) - torch.tensor(want)).abs().max() < 0.012  # 3.4 standard errors
    assert (torch.corrcoef(chosen[[0, 2]])[0, 1]).abs() < 0.025
    assert distance(params.sigma, torch.linspace(0.1, 2.0, 20000)) < 0.02


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_the_batch_are_the_batch_of_rows(version: str, dtype: torch.dtype) -> None:
    made, images = recipe(version, 32), pictures(16, 48)
    params = draw(torch.linspace(0.5, 2, 16), made, seeded(7))
    whole = augment(images, params, made, dtype)
    for index in (slice(0, 5), slice(5, 16), slice(3, 4), torch.tensor([15, 2, 8])):
        assert torch.equal(augment(images[index], params.rows(index), made, dtype), whole[index])


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_several_views_at_once_are_the_views_one_by_one(version: str, channels: int) -> None:
    made, images = recipe(version, 32, vflip=0.5, rotate90=0.5), pictures(7, 48, channels)
    several = [draw(torch.linspace(0.5, 2, 7), made, seeded(seed)) for seed in (1, 2, 3)]
    assert len({params.order for params in several}) == 3
    views = augment(images, several, made).chunk(3)
    for params, view in zip(several, views, strict=True):
        assert torch.equal(view, augment(images, params, made))
    with pytest.raises(ValueError, match=r"6 images, and params of \[7, 7, 7\]"):
        augment(images[:6], several, made)


def test_a_row_ignores_the_aspect_of_the_others() -> None:
    aspect = torch.linspace(0.1, 9, 12)
    alone = torch.where(torch.arange(12) < 4, aspect, torch.ones(12))
    one, two = (draw(a, recipe("v2", 32), seeded(7)).rows(slice(0, 4)) for a in (aspect, alone))
    assert all(
        torch.equal(getattr(one, f), getattr(two, f))
        for f in ("box", "hflip", "factors", "grayscale", "sigma")
    )


def test_same_seed_same_views_other_seed_other_views() -> None:
    made, images = recipe("v2", 32), pictures(8, 48)
    first, again, other = (
        augment(images, draw(torch.ones(8), made, seeded(s)), made) for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.random.get_rng_state()
    draw(torch.ones(8), made, seeded(1))
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_grey_input_equals_three_equal_channels(version: str) -> None:
    made, images = recipe(version, 32), pictures(8, 28, channels=1)
    params = draw(torch.ones(8), made, seeded(4))
    assert torch.equal(
        augment(images, params, made), augment(images.expand(-1, 3, -1, -1), params, made)
    )


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_float64_agrees_with_float32(version: str) -> None:
    made, images = recipe(version, 32), pictures(32, 48)
    params = draw(torch.linspace(0.5, 2, 32), made, seeded(6))
    single, double = augment(images, params, made), augment(images, params, made, torch.float64)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-4)


def test_hue_equals_the_standard_library_in_float64() -> None:
    images, shift = pictures(4, 8), torch.tensor([-0.37, 0.05, 0.2, 0.5], dtype=torch.float64)
    params = untouched(4, jitter=torch.ones(4, dtype=torch.bool), hue=shift)
    got = augment(images, params, Recipe(8, **PLAIN), torch.float64)
    for k in range(4):
        for pixel, view in zip(
            (images[k].double() / 255).flatten(1).T.tolist(), got[k].flatten(1).T, strict=True
        ):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            want = torch.tensor(
                colorsys.hsv_to_rgb((hue + shift[k].item()) % 1, saturation, value),
                dtype=torch.float64,
            )
            torch.testing.assert_close(view, want, rtol=0, atol=1e-12)


def test_autocast_does_not_reach_the_views() -> None:
    made, images = recipe("v2", 32), pictures(8, 48)
    params = draw(torch.ones(8), made, seeded(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = augment(images, params, made)
    assert torch.equal(inside, augment(images, params, made))


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_flat_images_stay_flat_and_finite(version: str, level: int) -> None:
    made = recipe(version, 32, **PLAIN)
    params = draw(torch.tensor([0.05, 0.7, 1.0, 1.5, 20.0] * 8), made, seeded(level))
    view = augment(torch.full((40, 3, 21, 21), level, dtype=torch.uint8), params, made)
    assert view.isfinite().all() and view.min() >= 0 and view.max() <= 1 + 1e-5
    flat = view.flatten(1)
    assert (flat.max(1).values - flat.min(1).values).max() < 1e-5
    if level == 0:
        assert view.max() == 0


def test_no_images() -> None:
    made = recipe("v2", 32)
    assert augment(pictures(0, 48), draw(torch.ones(0), made, seeded(0)), made).shape == (
        0,
        3,
        32,
        32,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gpu_agrees_with_cpu_and_waits_for_nothing(version: str) -> None:
    made, images = recipe(version, 32), pictures(32, 48)
    params = draw(torch.linspace(0.5, 2, 32), made, seeded(6))
    on_device = images.cuda()
    augment(on_device, params, made)  # the first call sets libraries up
    try:
        torch.cuda.set_sync_debug_mode("error")
        view = augment(on_device, params, made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(view.cpu(), augment(images, params, made), rtol=0, atol=2e-4)


def test_the_recipe_of_a_training_is_what_its_settings_say() -> None:
    colours = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    values = {"crop": 32, "aug_plus": True, "blur": 0.3, "crop_scale": [0.4, 0.9], **colours}
    settings = config.from_values(TrainSettings, values | {"grayscale": 0.1})
    same = {"scale": (0.4, 0.9), "grayscale": 0.1, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert training_recipe(settings, grid=32) == recipe("v2", 32, blur_p=0.3, **same)
    settings = replace(settings, aug_plus=False, pixel_boxes=True)
    plain = training_recipe(settings, grid=28)
    assert plain == recipe("v1", 32, grid=28, **same) and plain.blur_p == 0
