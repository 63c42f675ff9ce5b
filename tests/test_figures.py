"""The figures of images and features: their data against plain loops, and what they draw."""

import sys
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data import pixels, write_fashion_mnist, write_folders
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import augment
import dataloader
import evaluate
import parallel
import train
import utils
import visualize

CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def kept(data: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The data from a file, without pickle; it must be what it was, and small."""
    np.savez(folder / "data.npz", **data)
    with np.load(folder / "data.npz", allow_pickle=False) as file:
        read = dict(file)
    assert read.keys() == data.keys()
    for name, array in data.items():
        assert (
            isinstance(array, np.ndarray)
            and array.dtype == read[name].dtype
            and np.array_equal(array, read[name])
        ), name
    assert (folder / "data.npz").stat().st_size < 2e6
    return read


def texts_of(figure: Figure) -> dict[str, list]:
    """The window extents of all texts that a figure shows, drawn at its size; none is outside of it or smaller than 8 points."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [
        text
        for axes in figure.axes
        for text in (
            axes.title,
            axes._left_title,
            *axes.texts,
            *axes.get_xticklabels(),
            *axes.get_yticklabels(),
            axes.xaxis.label,
            axes.yaxis.label,
        )
    ]
    texts += [
        text for legend in figure.legends for text in (*legend.get_texts(), legend.get_title())
    ]
    texts += [text for text in (figure._suptitle, figure._supxlabel) if text]
    shown: dict[str, list] = {}
    for text in texts:
        if text.get_text() and text.get_visible():
            box = text.get_window_extent(renderer)
            assert text.get_fontsize() >= 8, text
            assert (
                figure.bbox.x0 <= box.x0
                and box.x1 <= figure.bbox.x1
                and figure.bbox.y0 <= box.y0
                and box.y1 <= figure.bbox.y1
            ), text
            shown.setdefault(text.get_text(), []).append(box)
    return shown


def no_overlap(figure: Figure) -> dict[str, list]:
    """No text covers another, whatever it belongs to."""
    shown = texts_of(figure)
    for (a, box_a), (b, box_b) in combinations(
        [(name, box) for name, boxes in shown.items() for box in boxes], 2
    ):
        assert not (
            box_a.x0 < box_b.x1
            and box_b.x0 < box_a.x1
            and box_a.y0 < box_b.y1
            and box_b.y0 < box_a.y1
        ), (a, b)
    return shown


def pictures_of(axes) -> list[tuple[tuple[float, float], np.ndarray]]:
    """Upper left corner and pixels (H, W, 3) of each picture in the axes."""
    return [
        ((picture.get_extent()[0], picture.get_extent()[3]), np.asarray(picture.get_array()))
        for picture in axes.get_images()
    ]


# ----------------------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("kind", ["grey", "colour"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_views_are_those_of_training(tmp_path: Path, kind: str, version: str) -> None:
    if kind == "grey":
        write_fashion_mnist(tmp_path / "data")
    else:
        write_folders(tmp_path / "data")
    dataset = dataloader.open_dataset(
        str(tmp_path / "data"), "train", view="square", resize="auto", crop=16
    )
    recipe = augment.recipe(version, 16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    data = kept(visualize.views_data(dataset, recipe, seed=3), tmp_path)
    assert data["images"].dtype == data["query"].dtype == data["key"].dtype == np.uint8
    assert data["images"].shape[:2] == (6, 1 if kind == "grey" else 3) and data["query"].shape == (
        6,
        3,
        16,
        16,
    )
    stored = [
        tuple(image.flatten()) for image in dataset.fetch(torch.arange(len(dataset))).images.numpy()
    ]
    rows = [stored.index(tuple(image.flatten())) for image in data["images"]]
    assert data["names"].tolist() == [dataset.classes[dataset.labels[row]] for row in rows]
    assert len(set(rows)) == 6 and len(set(data["names"])) == (6 if kind == "grey" else 3)

    cfg = SimpleNamespace(batch_size=6, seed=3, precision="fp32")
    views = train.two_views(dataset.fetch(torch.tensor(rows)), recipe, cfg, 0, parallel.OneDevice())
    for name, view in zip(("query", "key"), views):
        for i, c in product(range(6), range(3)):
            expected = 255 * (view[i, c].double().numpy() * recipe.std[c] + recipe.mean[c])
            assert np.abs(data[name][i, c] - expected).max() <= 0.5 + 1e-3
    assert not np.array_equal(data["query"], data["key"])
    other = visualize.views_data(dataset, recipe, seed=4)
    assert not np.array_equal(other["query"], data["query"]) and not np.array_equal(
        other["images"], data["images"]
    )


def test_views_figure(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data")
    dataset = dataloader.open_dataset(
        str(tmp_path / "data"), "train", view="square", resize="auto", crop=16
    )
    data = visualize.views_data(dataset, augment.recipe("v1", 16), seed=0)
    figure = visualize.views_figure(data)
    drawn = [
        picture
        for _, picture in sorted(
            pictures_of(figure.axes[0]), key=lambda item: (round(item[0][1], 3), item[0][0])
        )
    ]
    assert len(drawn) == 18
    for shown, name in zip((drawn[:6], drawn[6:12], drawn[12:]), ("images", "query", "key")):
        for picture, expected in zip(shown, data[name]):
            assert picture.shape[2] == 3 and np.array_equal(
                picture, np.stack([expected[c % len(expected)] for c in range(3)], axis=-1)
            )
    assert (drawn[0][..., 0] == drawn[0][..., 2]).all()  # a grey image is shown grey
    shown = no_overlap(figure)
    assert {"image", "query\nview", "key\nview", *data["names"]} <= shown.keys()
    names = sorted((boxes[0].x0, name) for name, boxes in shown.items() if name in data["names"])
    assert [name for _, name in names] == data["names"].tolist()


def test_views_figure_of_wide_images_and_long_names() -> None:
    data = {
        "images": pixels(0, 2, 3, 8, 8),
        "aspect": np.array([2.0, 0.5], np.float32),
        "query": pixels(1, 2, 3, 4, 4),
        "key": pixels(2, 2, 3, 4, 4),
        "names": np.array(["a $\\name$ " + "long" * 20, ""]),
    }
    figure = visualize.views_figure(data)
    left, right, top, bottom = (lambda e: (e[0], e[1], e[3], e[2]))(
        figure.axes[0].get_images()[0].get_extent()
    )
    assert (right - left) == 2 * (bottom - top) == 1
    left, right, top, bottom = (lambda e: (e[0], e[1], e[3], e[2]))(
        figure.axes[0].get_images()[1].get_extent()
    )
    assert 2 * (right - left) == (bottom - top) == 1
    no_overlap(figure)


# ------------------------------------------------------------------------------------------------------------------------ neighbours


def neighbours_input(n: int = 60, m: int = 25, width: int = 5, classes: int = 10) -> dict:
    random = torch.Generator().manual_seed(1)
    draw = lambda count: (
        torch.randn(count, width, generator=random)
        * torch.rand(count, 1, generator=random).mul(5).add(0.1)
    )  # of any length
    return {
        "train_images": torch.from_numpy(pixels(0, n, 1, 6, 6)),
        "train_labels": torch.randint(classes, (n,), generator=random),
        "test_images": torch.from_numpy(pixels(1, m, 1, 6, 6)),
        "test_labels": torch.arange(m) % classes,
        "features": {"trained": (draw(n), draw(m)), "untrained": (draw(n), draw(m))},
        "classes": CLASSES[:classes],
    }


def nearest_by_loop(train: torch.Tensor, test: torch.Tensor, k: int) -> list[list[int]]:
    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return (
            sum(x * y for x, y in zip(a.tolist(), b.tolist()))
            / (sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist())) ** 0.5
        )

    return [
        sorted(range(len(train)), key=lambda row: -cosine(train[row], query))[:k] for query in test
    ]


def test_neighbours_are_those_of_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = neighbours_input()
    sizes = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor,
        "topk",
        lambda self, *args, **kwargs: sizes.append(self.numel()) or topk(self, *args, **kwargs),
    )
    monkeypatch.setattr(evaluate, "BLOCK", 250)
    data = kept(visualize.neighbours_data(**given, seed=0, k=4), tmp_path)
    assert max(sizes) <= 250 and sum(sizes) == 2 * 60 * 25  # in blocks, every pair once
    assert (
        data["encoders"].tolist() == ["trained", "untrained"]
        and data["tests"] == 25
        and data["bank"] == 60
    )
    rows = data["rows"].tolist()
    assert len(set(data["labels"].tolist())) == len(rows) == 6
    assert data["labels"].tolist() == given["test_labels"][rows].tolist() and data[
        "names"
    ].tolist() == [CLASSES[label] for label in data["labels"]]
    assert np.array_equal(data["images"], given["test_images"][rows].numpy())
    for e, (train_features, test_features) in enumerate(given["features"].values()):
        expected = nearest_by_loop(train_features, test_features, 4)
        assert data["neighbour_rows"][e].tolist() == [expected[row] for row in rows]
        right = [
            given["train_labels"][j] == given["test_labels"][i]
            for i in range(25)
            for j in expected[i]
        ]
        assert data["share"][e] == pytest.approx(100 * sum(map(int, right)) / 100)
        for i, j in product(range(6), range(4)):
            row = expected[rows[i]][j]
            assert np.array_equal(
                data["neighbour_images"][e, i, j], given["train_images"][row].numpy()
            )
            assert data["neighbour_labels"][e, i, j] == given["train_labels"][row]
    assert visualize.neighbours_data(**given, seed=1)["rows"].tolist() != rows
    with pytest.raises(ValueError, match="k 61"):
        visualize.neighbours_data(**given, seed=0, k=61)


def test_share_of_right_neighbours_by_hand() -> None:
    """Two classes at right angles, each with one stray: along the first axis lie classes 0 0 1, along the second 1 1 0."""
    train_features = torch.tensor(
        [[9.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]]
    )
    test_features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    train_images, test_images = (torch.zeros(n, 1, 2, 2, dtype=torch.uint8) for n in (6, 3))
    data = visualize.neighbours_data(
        train_images,
        torch.tensor([0, 0, 1, 1, 1, 0]),
        test_images,
        torch.tensor([0, 1, 0]),
        {"one": (train_features, test_features)},
        ["a", "b"],
        seed=0,
        k=3,
    )
    assert data["share"][0] == pytest.approx(100 * (2 + 2 + 1) / 9)
    assert sorted(zip(data["rows"].tolist(), data["neighbour_rows"][0].tolist())) == [
        (0, [0, 1, 2]),
        (1, [3, 4, 5]),
        (2, [3, 4, 5]),
    ]


def test_neighbours_figure_marks_the_wrong_ones_in_colour_line_and_cross() -> None:
    given = neighbours_input()
    data = visualize.neighbours_data(**given, seed=0)
    data["names"][0] = "Ankle boot"
    figure = visualize.neighbours_figure(data)
    for e, axes in enumerate(figure.axes):
        right = data["neighbour_labels"][e] == data["labels"][:, None]
        assert 0 < right.sum() < right.size
        pictures = {(round(x, 2), round(y, 2)): picture for (x, y), picture in pictures_of(axes)}
        frames = [
            (round(frame.get_x(), 2), round(frame.get_y(), 2), frame) for frame in axes.patches
        ]
        assert len(pictures) == 6 * 7 and len(frames) == 36
        crosses = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines()]
        for (i, j), is_right in np.ndenumerate(right):
            x, y, frame = frames[6 * i + j]
            assert np.array_equal(pictures[x, y][..., 0], data["neighbour_images"][e, i, j, 0])
            assert to_hex(frame.get_edgecolor()).upper() == (
                visualize.RIGHT if is_right else visualize.WRONG
            )
            assert (frame.get_linestyle() in ("-", "solid")) == is_right
            assert sum(x < a < x + 1 and y < b < y + 1 for a, b in crosses) == (
                0 if is_right else 1
            )
        assert len(crosses) == (~right).sum()
        title = axes.get_title(loc="left")
        assert title.startswith(f"{data['encoders'][e]}: {data['share'][e]:.1f} % of the 6 nearest")
    assert len(figure.axes) == 2 and "25 test images" in figure.legends[0].get_title().get_text()
    no_overlap(figure)
    for axes in figure.axes:
        for text, picture in product(axes.texts, axes.get_images()):
            assert not text.get_window_extent().overlaps(picture.get_window_extent()), text
    no_overlap(
        visualize.neighbours_figure(
            visualize.neighbours_data(**neighbours_input(m=3, classes=2), seed=0, k=1)
        )
    )


def test_large_images_become_thumbnails(tmp_path: Path) -> None:
    given = neighbours_input(n=20, m=8) | {
        "train_images": pixels(0, 20, 3, 224, 224),
        "test_images": pixels(1, 8, 3, 224, 224),
    }
    data = kept(visualize.neighbours_data(**given, seed=0), tmp_path)
    assert data["images"].shape == (6, 3, 64, 64) and data["neighbour_images"].shape == (
        2,
        6,
        6,
        3,
        64,
        64,
    )
    mean = given["test_images"][data["rows"]].mean(axis=(2, 3))
    assert np.abs(data["images"].mean(axis=(2, 3)) - mean).max() < 2


def test_images_of_different_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2])
    chosen = visualize.of_different_classes(labels, 3, torch.Generator().manual_seed(0))
    assert labels[chosen].tolist() == [0, 1, 2]
    for count in (5, 80):
        chosen = visualize.of_different_classes(
            labels, count, torch.Generator().manual_seed(0)
        ).tolist()
        assert len(set(chosen)) == len(chosen) == min(count, 54) and set(
            labels[chosen].tolist()
        ) == {0, 1, 2}
    assert (
        len(
            visualize.of_different_classes(
                torch.full((9,), -1), 6, torch.Generator().manual_seed(0)
            )
        )
        == 6
    )
    assert visualize.class_names(["a"], torch.tensor([0, -1])).tolist() == ["a", ""]


# ------------------------------------------------------------------------------------------------------------------------- embedding


def clusters(per_class: int, classes: int, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, D) in directions of their class, of any length, and labels (n,), mixed."""
    random = torch.Generator().manual_seed(2)
    labels = torch.arange(classes).repeat(per_class)
    centres = torch.nn.functional.normalize(torch.randn(classes, width, generator=random), dim=1)
    features = centres[labels] + 0.05 * torch.randn(len(labels), width, generator=random)
    return features * (0.1 + 10 * torch.rand(len(labels), 1, generator=random)), labels


def test_separated_clusters_stay_separated(tmp_path: Path) -> None:
    features, labels = clusters(60, 2)
    mixed = torch.randn(120, 16, generator=torch.Generator().manual_seed(3))
    data = kept(
        visualize.embedding_data(
            {"trained": features, "untrained": mixed}, labels, ["a", "b"], seed=0, count=100
        ),
        tmp_path,
    )
    assert (
        data["points"].shape == (2, 100, 2)
        and data["points"].dtype == np.float16
        and data["classes"].tolist() == ["a", "b"]
    )
    assert (
        data["labels"].tolist() == labels[data["rows"]].tolist()
        and len(set(data["rows"].tolist())) == 100
    )
    neighbours = []
    for points in data["points"].astype(np.float64):
        distance = ((points[:, None] - points[None]) ** 2).sum(-1)
        np.fill_diagonal(distance, np.inf)
        neighbours.append((data["labels"][distance.argmin(axis=1)] == data["labels"]).mean())
    assert neighbours[0] == 1.0 and neighbours[1] < 0.8
    again = visualize.embedding_data(
        {"trained": features, "untrained": mixed}, labels, ["a", "b"], seed=0, count=100
    )
    assert np.array_equal(again["points"], data["points"])


def test_embedding_of_many_classes_and_unlabelled_images_keeps_ten() -> None:
    features, labels = clusters(3, 14)
    labels[0] = -1
    data = visualize.embedding_data(
        {"one": features}, labels, [f"class {i}" for i in range(14)], seed=0
    )
    assert (
        len(data["classes"]) == 10
        and 0 not in data["rows"]
        and set(data["labels"].tolist()) == set(range(10))
    )
    assert [data["classes"][label] for label in data["labels"]] == [
        f"class {labels[row]}" for row in data["rows"]
    ]
    with pytest.raises(utils.UserError, match="too few"):
        visualize.embedding_data({"one": features[:4]}, labels[:4], list("abcd"), seed=0)


def test_a_rare_class_that_is_not_drawn_has_no_name() -> None:
    data = visualize.embedding_data(
        {"one": torch.randn(1000, 3)},
        torch.tensor([7] * 999 + [0]),
        list("abcdefgh"),
        seed=0,
        count=8,
    )
    assert data["classes"].tolist() == ["h"] and set(data["labels"].tolist()) == {0}


def test_embedding_without_scikit_learn_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(utils.UserError, match="pip install scikit-learn") as error:
        visualize.embedding_data(
            {"one": torch.randn(9, 3)}, torch.zeros(9, dtype=torch.long), ["a"], seed=0
        )
    assert "\n" not in str(error.value)


def embedding(
    encoders: list[str], apart: float, classes: list[str] = CLASSES
) -> dict[str, np.ndarray]:
    """A made-up map: 300 points around their classes' places, which lie on a line."""
    random = np.random.default_rng(0)
    labels = (np.arange(300) % len(classes)).astype(np.int16)
    points = [
        apart * labels[:, None] * [1.0, 0.3] + random.normal(size=(300, 2)) + 40 for _ in encoders
    ]
    return {
        "encoders": np.array(encoders),
        "points": np.stack(points).astype(np.float16),
        "rows": np.arange(300, dtype=np.int32),
        "labels": labels,
        "classes": np.array(classes),
    }


def test_embedding_figure_shows_every_point_in_its_class() -> None:
    data = embedding(["trained", "untrained"], apart=5.0)
    figure = visualize.embedding_figure(data)
    assert [axes.get_title() for axes in figure.axes] == ["trained", "untrained"]
    looks = []
    for e, axes in enumerate(figure.axes):
        points = data["points"][e].astype(np.float64)
        middle = (points.max(0) + points.min(0)) / 2
        assert len(axes.collections) == 10
        for c, marks in enumerate(axes.collections):
            assert np.allclose(marks.get_offsets() + middle, points[data["labels"] == c], atol=1e-3)
            low, high = axes.get_xlim()
            assert (
                (marks.get_offsets() > low).all()
                and (marks.get_offsets() < high).all()
                and axes.get_ylim() == (low, high)
            )
        looks.append(
            [
                (to_hex(marks.get_facecolor()[0]), marks.get_paths()[0].vertices.tobytes())
                for marks in axes.collections
            ]
        )
        medians = [np.median(points[data["labels"] == c], axis=0) - middle for c in range(10)]
        assert [text.get_text() for text in axes.texts] == CLASSES
        span = axes.get_xlim()[1] - axes.get_xlim()[0]
        assert all(
            np.abs(np.array(text.get_position()) - median).max() < 0.1 * span
            for text, median in zip(axes.texts, medians)
        )
    assert (
        looks[0] == looks[1]
        and len({colour for colour, _ in looks[0]}) == len({marker for _, marker in looks[0]}) == 10
    )
    assert [
        text.get_text() for text in figure.legends[0].get_texts()
    ] == CLASSES and "300 test images" in figure.legends[0].get_title().get_text()
    no_overlap(figure)


def test_names_that_have_room_stand_at_the_medians() -> None:
    data = embedding(["trained"], apart=9.0, classes=["a", "b"])
    axes = visualize.embedding_figure(data).axes[0]
    points = data["points"][0].astype(np.float64)
    for c in range(2):
        median = [sorted(points[data["labels"] == c, axis])[74:76] for axis in range(2)]  # of 150
        expected = np.mean(median, axis=1) - (points.max(0) + points.min(0)) / 2
        assert np.allclose(axes.texts[c].get_position(), expected, atol=1e-3)


@pytest.mark.parametrize("encoders", [["trained"], ["trained", "untrained"]])
def test_class_names_keep_clear_of_each_other_even_in_one_place(encoders: list[str]) -> None:
    shown = no_overlap(visualize.embedding_figure(embedding(encoders, apart=0.0)))
    assert all(len(shown[name]) == len(encoders) + 1 for name in CLASSES)
    no_overlap(
        visualize.embedding_figure(
            embedding(
                encoders, apart=0.0, classes=[f"_a $\\name$ that is long {i}" for i in range(10)]
            )
        )
    )


def test_boxes_move_apart_by_little() -> None:
    low, high = np.array([-10.0, -10.0]), np.array([10.0, 10.0])
    far = np.array([[-5.0, 0.0], [5.0, 0.0]])
    assert np.array_equal(visualize.apart(far, np.ones((2, 2)), low, high), far)
    moved = visualize.apart(
        np.array([[0.0, 0.0], [0.5, 0.25]]), np.array([[4.0, 1.0], [4.0, 1.0]]), low, high
    )
    assert np.allclose(
        moved, [[0.0, -0.375], [0.5, 0.625]]
    )  # half the missing 0.75 each, up and down
    corner = visualize.apart(np.full((3, 2), 10.0), np.full((3, 2), 2.0), low, high)
    assert (corner <= 9.0).all() and all(
        np.abs(a - b).max() >= 2 - 1e-3 for a, b in combinations(corner, 2)
    )


# --------------------------------------------------------------------------------------------------------------------------- filters


def test_filters_are_scaled_each_to_its_own_range_around_grey(tmp_path: Path) -> None:
    weight = (
        torch.randn(64, 3, 7, 7, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-6, 3, 64)[:, None, None, None]
    )
    weight[5] = 0
    weight[6] = weight[6].abs()
    data = kept(
        visualize.filters_data(
            {"trained": torch.nn.Parameter(weight), "untrained": weight.flip(0)}
        ),
        tmp_path,
    )
    assert data["filters"].shape == (2, 64, 3, 7, 7) and data["filters"].dtype == np.uint8
    assert np.array_equal(data["filters"][1], data["filters"][0][::-1])
    for i, picture in enumerate(data["filters"][0].astype(int)):
        largest = float(weight[i].abs().max())
        if i == 5:
            assert (picture == 128).all()
            continue
        assert np.abs(picture - 128).max() == 127
        assert (
            np.abs((picture - 128) / 127 * largest - weight[i].numpy()).max()
            <= 0.5 / 127 * largest * 1.001
        )
    assert data["filters"][0, 6].min() >= 128
    with pytest.raises(ValueError, match="'one'"):
        visualize.filters_data({"one": torch.zeros(4, 1, 3, 3)})


@pytest.mark.parametrize("count, k", [(64, 7), (10, 3)])
def test_filters_figure(count: int, k: int) -> None:
    data = {"encoders": np.array(["trained", "untrained"]), "filters": pixels(0, 2, count, 3, k, k)}
    figure = visualize.filters_figure(data)
    for e, axes in enumerate(figure.axes):
        tiles = sorted(pictures_of(axes), key=lambda item: (round(item[0][1], 3), item[0][0]))
        assert all(
            np.array_equal(picture, expected.transpose(1, 2, 0))
            for (_, picture), expected in zip(tiles, data["filters"][e], strict=True)
        )
        assert len({corner for corner, _ in tiles}) == count
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert all(
            left <= x and x + 1 <= right and top <= y and y + 1 <= bottom for (x, y), _ in tiles
        )
    assert {
        "trained",
        "untrained",
        f"the {count} filters of the first layer, {k} × {k} px, each on its own scale; mid grey: weight 0",
    } <= no_overlap(figure).keys()
