"""The views that visualize.py shows are those of training."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import write_fashion_mnist, write_folders
from scripts import script_module

import config
import dataloader
import parallel
from config import TrainSettings, VisualizeSettings


@pytest.mark.parametrize("kind", ["grey", "colour"])
@pytest.mark.parametrize("aug_plus", [False, True])
def test_views_are_those_of_training(tmp_path: Path, kind: str, aug_plus: bool) -> None:
    (write_fashion_mnist if kind == "grey" else write_folders)(tmp_path)
    root = str(tmp_path)
    dataset = dataloader.open_dataset(root, "train", fit="square", resize="auto", crop=16)
    values = {"crop": 16, "resize": dataset.resize, "aug_plus": aug_plus, "seed": 3}
    values |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "batch_size": 6}
    values["pixel_boxes"] = kind == "grey"  # which is for images of one size
    training = config.from_values(TrainSettings, values | {"precision": "fp32"})
    collect_views = script_module("visualize").collect_views

    def collect(seed: int) -> dict[str, np.ndarray]:
        settings = config.from_values(VisualizeSettings, {"dataset_root": root, "seed": seed})
        return collect_views(settings, training)

    data = collect(seed=3)
    assert data["images"].dtype == data["query"].dtype == data["key"].dtype == np.uint8
    assert data["images"].shape[:2] == (6, 1 if kind == "grey" else 3)
    assert data["query"].shape == (6, 3, 16, 16)
    images = dataset.fetch(torch.arange(len(dataset))).images.numpy()
    stored = [image.tobytes() for image in images]
    rows = [stored.index(image.tobytes()) for image in data["images"]]
    assert data["names"].tolist() == [dataset.classes[dataset.labels[row]] for row in rows]
    assert len(set(rows)) == 6 and len(set(data["names"])) == (6 if kind == "grey" else 3)

    batch, launch = dataset.fetch(torch.tensor(rows)), parallel.open_launch("cpu")
    pair = script_module("train").make_views(batch, training, 0, launch)
    for name, view in zip(("query", "key"), pair, strict=True):
        for i, c in product(range(6), range(3)):
            expected = 255 * (view[i, c].double().numpy() * training.std[c] + training.mean[c])
            assert np.abs(data[name][i, c] - expected).max() <= 0.5 + 1e-3
    assert not np.array_equal(data["query"], data["key"])
    other = collect(seed=4)
    assert not np.array_equal(other["query"], data["query"])
    assert not np.array_equal(other["images"], data["images"])
