"""Figures of images: their data against plain loops, and what they draw."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from figure_checks import CLASSES, pictures_of, pixels, read_figure, save_and_load
from matplotlib.colors import to_hex
from torch import Tensor

from figures import neighbours, style, views

# ----------------------------------------------------------------------------------- views


def views_input(channels: int = 1) -> dict[str, np.ndarray]:
    random = torch.Generator().manual_seed(0)
    return views.views_data(
        pixels(0, 6, channels, 28, 28),
        torch.ones(6),
        torch.rand(2, 6, 3, 16, 16, generator=random).unbind(),
        mean=[0.0] * 3,
        std=[1.0] * 3,
        names=CLASSES[:6],
    )


def test_views_are_shown_as_pixels(tmp_path: Path) -> None:
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    images, query, key = pixels(0, 2, 1, 8, 8), pixels(1, 2, 3, 4, 4), pixels(2, 2, 3, 4, 4)
    normalised = [(v / 255 - mean[:, None, None]) / std[:, None, None] for v in (query, key)]
    data = views.views_data(
        images, torch.tensor([2.0, 0.5]), normalised, mean=mean.tolist(), std=std.tolist()
    )
    data = save_and_load(data, tmp_path)
    for name, expected in (("images", images), ("query", query), ("key", key)):
        assert data[name].dtype == np.uint8 and np.array_equal(data[name], expected.numpy())
    assert data["aspect"].tolist() == [2.0, 0.5] and data["names"].tolist() == ["", ""]


@pytest.mark.parametrize("channels", [1, 3])
def test_views_figure(channels: int) -> None:
    data = views_input(channels)
    figure = views.views_figure(data)
    drawn = [picture for _, picture in pictures_of(figure.axes[0])]
    expected = [*data["images"], *data["query"], *data["key"]]
    for picture, each in zip(drawn, expected, strict=True):
        planes = [each[c % len(each)] for c in range(3)]  # a grey image is shown grey
        assert np.array_equal(picture, np.stack(planes, axis=-1))
    shown = read_figure(figure)
    assert {"image", "query\nview", "key\nview", *data["names"]} <= shown.keys()
    assert sorted(CLASSES[:6], key=lambda name: shown[name][0].x0) == CLASSES[:6]


def test_views_figure_of_wide_images_and_long_names() -> None:
    data = views_input() | {
        "images": pixels(0, 2, 3, 8, 8).numpy(),
        "aspect": np.array([2.0, 0.5], np.float32),
        "names": np.array(["a $\\name$ " + "long" * 20, ""]),
    }
    figure = views.views_figure(data)
    wide, high = (
        picture.get_extent()
        for picture in figure.axes[0].get_images()
        if picture.get_extent()[3] < 0.5  # of the first row
    )
    assert wide[1] - wide[0] == 2 * (wide[2] - wide[3]) == 1
    assert 2 * (high[1] - high[0]) == high[2] - high[3] == 1
    read_figure(figure)


# ------------------------------------------------------------------------------ neighbours


@dataclass
class Dataset:
    images: Tensor
    labels: Tensor
    classes: list[str]

    def fetch(self, indices: Tensor) -> "Dataset":
        return Dataset(self.images[indices], self.labels[indices], self.classes)


@dataclass
class Subset:
    dataset: Dataset
    indices: Tensor

    @property
    def labels(self) -> Tensor:
        return self.dataset.labels[self.indices]


def make_subset(seed: int, count: int, size: int = 6, classes: int = 10) -> Subset:
    """`count` of twice as many random images, in no order."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(2 * count) % classes
    dataset = Dataset(pixels(seed, 2 * count, 1, size, size), labels, CLASSES[:classes])
    return Subset(dataset, torch.randperm(2 * count, generator=random)[:count])


def make_neighbours(n: int = 60, m: int = 25, k: int = 6) -> dict[str, Tensor]:
    """Random rows (m, k) of n images, none twice for a query."""
    random = torch.Generator().manual_seed(1)
    return {
        name: torch.stack([torch.randperm(n, generator=random)[:k] for _ in range(m)])
        for name in ("trained", "untrained")
    }


def test_neighbours_data_against_a_plain_loop(tmp_path: Path) -> None:
    found, bank, queries = make_neighbours(k=4), make_subset(0, 60), make_subset(1, 25)
    data = neighbours.neighbours_data(found, bank, queries, seed=0)
    data = save_and_load(data, tmp_path)
    assert data["encoders"].tolist() == ["trained", "untrained"]
    assert data["tests"] == 25 and data["bank"] == 60
    rows = data["rows"].tolist()
    assert len(set(data["labels"].tolist())) == len(rows) == 6
    assert data["labels"].tolist() == queries.labels[rows].tolist()
    assert data["names"].tolist() == [CLASSES[label] for label in data["labels"]]
    images = queries.dataset.images[queries.indices[rows]]
    assert np.array_equal(data["images"], images.numpy())
    for e, near in enumerate(found.values()):
        pairs = [(bank.labels[j], queries.labels[i]) for i in range(25) for j in near[i]]
        right = sum(int(a == b) for a, b in pairs)
        assert data["share"][e] == pytest.approx(100 * right / 100)
        for i, j in product(range(6), range(4)):
            row = near[rows[i], j]
            picture = bank.dataset.images[bank.indices[row]]
            assert data["neighbour_rows"][e, i, j] == row
            assert np.array_equal(data["neighbour_images"][e, i, j], picture.numpy())
            assert data["neighbour_labels"][e, i, j] == bank.labels[row]
    other = neighbours.neighbours_data(found, bank, queries, seed=1)
    assert other["rows"].tolist() != rows


def test_neighbours_figure_marks_the_wrong_ones_in_colour_line_and_cross() -> None:
    bank, queries = make_subset(0, 60, classes=3), make_subset(1, 25, classes=3)
    data = neighbours.neighbours_data(make_neighbours(), bank, queries, seed=0)
    figure = neighbours.neighbours_figure(data)
    for e, axes in enumerate(figure.axes):
        right = data["neighbour_labels"][e] == data["labels"][:, None]
        assert 0 < right.sum() < right.size
        pictures = {(round(x, 2), round(y, 2)): image for (x, y), image in pictures_of(axes)}
        assert len(pictures) == 6 * 7 and len(axes.patches) == 36
        crosses = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines()]
        for (i, j), is_right in np.ndenumerate(right):
            frame = axes.patches[6 * i + j]
            x, y = round(frame.get_x(), 2), round(frame.get_y(), 2)
            assert np.array_equal(pictures[x, y][..., 0], data["neighbour_images"][e, i, j, 0])
            colour = neighbours.RIGHT if is_right else neighbours.WRONG
            assert to_hex(frame.get_edgecolor()).upper() == colour
            assert (frame.get_linestyle() in ("-", "solid")) == is_right
            within = [x < a < x + 1 and y < b < y + 1 for a, b in crosses]
            assert sum(within) == (0 if is_right else 1)
        assert len(crosses) == (~right).sum()
        share = f"{data['encoders'][e]}: {data['share'][e]:.1f} %"
        assert axes.get_title(loc="left").startswith(share)
    assert len(figure.axes) == 2
    gain = data["share"][0] - data["share"][1]
    assert f"({gain:+.1f} points)" in figure.axes[0].get_title(loc="left")
    title = figure.legends[0].get_title().get_text()
    assert "60 training images" in title and "25 test images" in title
    read_figure(figure)
    for axes in figure.axes:
        for text, picture in product(axes.texts, axes.get_images()):
            assert not text.get_window_extent().overlaps(picture.get_window_extent()), text


def test_neighbours_figure_of_few_images() -> None:
    bank, queries = make_subset(0, 9, classes=2), make_subset(1, 3, classes=2)
    found = make_neighbours(n=9, m=3, k=1)
    read_figure(neighbours.neighbours_figure(neighbours.neighbours_data(found, bank, queries, 0)))


def test_large_images_become_thumbnails(tmp_path: Path) -> None:
    bank, queries = make_subset(0, 20, size=224), make_subset(1, 8, size=224)
    data = neighbours.neighbours_data(make_neighbours(n=20, m=8), bank, queries, seed=0)
    save_and_load(data, tmp_path)
    assert data["images"].shape == (6, 1, 64, 64)
    assert data["neighbour_images"].shape == (2, 6, 6, 1, 64, 64)
    images = queries.dataset.images[queries.indices[data["rows"]]].float()
    assert np.abs(data["images"].mean(axis=(2, 3)) - images.mean(dim=(2, 3)).numpy()).max() < 2


def test_images_of_different_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2])

    def choose(count: int, labels: Tensor = labels) -> list[int]:
        return style.choose_images(labels, count, torch.Generator().manual_seed(0)).tolist()

    assert labels[choose(3)].tolist() == [0, 1, 2]
    for count in (5, 80):
        chosen = choose(count)
        assert len(set(chosen)) == len(chosen) == min(count, 54)
        assert set(labels[chosen].tolist()) == {0, 1, 2}
    assert len(choose(6, torch.full((9,), -1))) == 6
    assert style.class_names(["a"], torch.tensor([0, -1])).tolist() == ["a", ""]
