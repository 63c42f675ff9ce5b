"""What a figure shows and says, whether it can be read, and what its data may be."""

from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import Tensor

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


def texts_of(axes: Axes) -> list[Text]:
    """All texts of the axes, but for ticks beyond their limits, which are not drawn."""
    texts = [axes.title, axes._left_title, axes._right_title, *axes.texts]
    for i, axis in enumerate((axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = axis.get_ticklabels()
        texts += [axis.label, *(tick for tick in ticks if low <= tick.get_position()[i] <= high)]
    return texts


def read_figure(figure: Figure) -> dict[str, list[Bbox]]:
    """The places of all texts of a figure: within it, of 8 points or more, none over another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for axes in figure.axes for text in texts_of(axes)]
    for legend in figure.legends:
        texts += [legend.get_title(), *legend.get_texts()]
    texts += [text for text in (figure._suptitle, figure._supxlabel) if text]
    texts = [text for text in texts if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert text.get_fontsize() >= 8, text
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (text, box), (other, other_box) in combinations(zip(texts, boxes, strict=True), 2):
        assert not box.overlaps(other_box), (text, other)
    shown: dict[str, list[Bbox]] = {}
    for text, box in zip(texts, boxes, strict=True):
        shown.setdefault(text.get_text(), []).append(box)
    return shown


def pictures_of(axes: Axes) -> list[tuple[tuple[float, float], np.ndarray]]:
    """Upper left corner and pixels (H, W, 3) of each picture in the axes, row by row."""
    pictures = []
    for picture in axes.get_images():
        left, _, _, top = picture.get_extent()
        pictures.append(((left, top), np.asarray(picture.get_array())))
    return sorted(pictures, key=lambda item: (round(item[0][1], 3), item[0][0]))


def pixels(seed: int, *shape: int) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))


def save_and_load(data: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The data from a file, without pickle; it must be what it was, and small."""
    np.savez(folder / "data.npz", **data)
    with np.load(folder / "data.npz", allow_pickle=False) as file:
        loaded = dict(file)
    assert loaded.keys() == data.keys()
    for name, array in data.items():
        assert isinstance(array, np.ndarray) and array.dtype == loaded[name].dtype, name
        assert np.array_equal(array, loaded[name]), name
    assert (folder / "data.npz").stat().st_size < 2e6
    return loaded
