"""Figures of features and filters: their data, and what they draw."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from figure_checks import CLASSES, pictures_of, pixels, read_figure, save_and_load
from matplotlib.colors import to_hex
from torch import Tensor

import utils
from figures import embedding, filters

# ------------------------------------------------------------------------------- embedding


def make_clusters(per_class: int, classes: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Features (n, D) in directions of their class, of any length, and labels (n,), mixed."""
    random = torch.Generator().manual_seed(2)
    labels = torch.arange(classes).repeat(per_class)
    centres = torch.nn.functional.normalize(torch.randn(classes, width, generator=random), dim=1)
    features = centres[labels] + 0.05 * torch.randn(len(labels), width, generator=random)
    return features * (0.1 + 10 * torch.rand(len(labels), 1, generator=random)), labels


def test_separated_clusters_stay_separated(tmp_path: Path) -> None:
    features, labels = make_clusters(60, 2)
    mixed = torch.randn(120, 16, generator=torch.Generator().manual_seed(3))
    given = {"trained": features, "untrained": mixed}, labels, ["a", "b"]
    data = save_and_load(embedding.embedding_data(*given, seed=0, count=100), tmp_path)
    assert data["points"].shape == (2, 100, 2) and data["points"].dtype == np.float16
    assert data["classes"].tolist() == ["a", "b"]
    assert data["labels"].tolist() == labels[data["rows"]].tolist()
    assert len(set(data["rows"].tolist())) == 100
    same_class = []
    for points in data["points"].astype(np.float64):
        distance = ((points[:, None] - points[None]) ** 2).sum(-1)
        np.fill_diagonal(distance, np.inf)
        same_class.append((data["labels"][distance.argmin(axis=1)] == data["labels"]).mean())
    assert same_class[0] == 1.0 and same_class[1] < 0.8
    again = embedding.embedding_data(*given, seed=0, count=100)
    assert np.array_equal(again["points"], data["points"])


def test_embedding_of_many_classes_and_unlabelled_images_keeps_ten() -> None:
    features, labels = make_clusters(3, 14)
    labels[0] = -1
    classes = [f"class {i}" for i in range(14)]
    data = embedding.embedding_data({"one": features}, labels, classes, seed=0)
    assert len(data["classes"]) == 10 and 0 not in data["rows"]
    assert set(data["labels"].tolist()) == set(range(10))
    names = [data["classes"][label] for label in data["labels"]]
    assert names == [f"class {labels[row]}" for row in data["rows"]]
    with pytest.raises(utils.UserError, match="too few"):
        embedding.embedding_data({"one": features[:4]}, labels[:4], list("abcd"), seed=0)


def test_a_rare_class_that_is_not_drawn_has_no_name() -> None:
    labels = torch.tensor([7] * 999 + [0])
    features = {"one": torch.randn(1000, 3)}
    data = embedding.embedding_data(features, labels, list("abcdefgh"), seed=0, count=8)
    assert data["classes"].tolist() == ["h"] and set(data["labels"].tolist()) == {0}


def test_embedding_without_scikit_learn_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    labels = torch.zeros(9, dtype=torch.long)
    with pytest.raises(utils.UserError, match="pip install scikit-learn") as error:
        embedding.embedding_data({"one": torch.randn(9, 3)}, labels, ["a"], seed=0)
    assert "\n" not in str(error.value)


def make_map(encoders: list[str], classes: list[str] = CLASSES) -> dict[str, np.ndarray]:
    """300 points around their classes' places, which lie on a line."""
    random = np.random.default_rng(0)
    labels = (np.arange(300) % len(classes)).astype(np.int16)
    shape = (len(encoders), 300, 2)
    points = 5.0 * labels[:, None] * [1.0, 0.3] + random.normal(size=shape) + 40
    return {
        "encoders": np.array(encoders),
        "points": points.astype(np.float16),
        "labels": labels,
        "classes": np.array(classes),
    }


def test_embedding_figure_shows_every_point_in_its_class() -> None:
    data = make_map(["trained", "untrained"])
    figure = embedding.embedding_figure(data)
    assert [axes.get_title() for axes in figure.axes] == ["trained", "untrained"]
    looks = []
    for e, axes in enumerate(figure.axes):
        points = data["points"][e].astype(np.float64)
        middle = (points.max(0) + points.min(0)) / 2
        assert len(axes.collections) == 10 and axes.get_xlim() == axes.get_ylim()
        low, high = axes.get_xlim()
        for c, marks in enumerate(axes.collections):
            offsets = marks.get_offsets()
            assert np.allclose(offsets + middle, points[data["labels"] == c], atol=1e-3)
            assert (offsets > low).all() and (offsets < high).all()
            marker = marks.get_paths()[0].vertices.tobytes()
            looks.append((to_hex(marks.get_facecolor()[0]), marker))
    assert looks[:10] == looks[10:]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 10
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == CLASSES
    assert "300 test images" in legend.get_title().get_text()
    read_figure(figure)


@pytest.mark.parametrize("encoders", [["trained"], ["trained", "untrained"]])
def test_class_names_have_room_in_the_legend(encoders: list[str]) -> None:
    read_figure(embedding.embedding_figure(make_map(encoders, ["a", "b"])))
    names = [f"_a $\\name$ that is long {i}" for i in range(10)]
    read_figure(embedding.embedding_figure(make_map(encoders, names)))


# --------------------------------------------------------------------------------- filters


def test_filters_are_scaled_each_to_its_own_range_around_grey(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    scales = torch.logspace(-6, 3, 64)[:, None, None, None]
    weight = torch.randn(64, 3, 7, 7, generator=random) * scales
    weight[5] = 0
    weight[6] = weight[6].abs()
    weights = {"trained": torch.nn.Parameter(weight), "untrained": weight.flip(0)}
    data = save_and_load(filters.filters_data(weights), tmp_path)
    assert data["filters"].shape == (2, 64, 3, 7, 7) and data["filters"].dtype == np.uint8
    assert np.array_equal(data["filters"][1], data["filters"][0][::-1])
    for i, picture in enumerate(data["filters"][0].astype(int)):
        if i == 5:
            assert (picture == 128).all()
            continue
        largest = float(weight[i].abs().max())
        assert np.abs(picture - 128).max() == 127
        error = np.abs((picture - 128) / 127 * largest - weight[i].numpy()).max()
        assert error <= 0.5 / 127 * largest * 1.001
    assert data["filters"][0, 6].min() >= 128
    bands = torch.stack([torch.full((2, 3, 3), 0.5), torch.full((2, 3, 3), -1.5)], dim=1)
    bands[0, :, 0] = 0  # of two channels the mean is shown, -0.5 or 0
    grey = filters.filters_data({"one": bands})["filters"][0]
    assert (grey[0, :, 0] == 128).all() and (grey[0, :, 1:] == 1).all() and (grey[1] == 1).all()


@pytest.mark.parametrize("count, k", [(64, 7), (10, 3)])
def test_filters_figure(count: int, k: int) -> None:
    pictures = pixels(0, 2, count, 3, k, k).numpy()
    data = {"encoders": np.array(["trained", "untrained"]), "filters": pictures}
    figure = filters.filters_figure(data)
    for e, axes in enumerate(figure.axes):
        tiles = pictures_of(axes)
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for ((x, y), picture), expected in zip(tiles, pictures[e], strict=True):
            assert np.array_equal(picture, expected.transpose(1, 2, 0))
            assert left <= x and x + 1 <= right and top <= y and y + 1 <= bottom
        assert len({corner for corner, _ in tiles}) == count
    note = f"the {count} filters of the first layer, {k} × {k} px, each on its own scale"
    assert {"trained", "untrained", f"{note}; mid grey: weight 0"} <= read_figure(figure).keys()
