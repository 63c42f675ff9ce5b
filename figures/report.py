"""report.html: what was run and what came of it, on one page that needs no other file."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from figures.style import title_of

CAPTIONS = {  # the name of each figure, and how to read it
    "loss": (
        "Loss of pretraining",
        "The contrastive loss over the steps. At the dashed line a query cannot tell its own key "
        "from those in the queue. A low loss alone says nothing of the features.",
    ),
    "knn": (
        "kNN while training",
        "Left: how often the nearest neighbours of images that were held out name their class. "
        "Right: in how many directions the queue spreads; a fall to a few is a collapse.",
    ),
    "versions": (
        "Linear classifier, by version",
        "Test accuracy of a linear classifier on frozen features over its epochs.",
    ),
    "epochs": (
        "Linear classifier, by epoch of pretraining",
        "Left: test accuracy after so many epochs of pretraining. Right: each classifier's epochs.",
    ),
    "views": (
        "Views",
        "Images, and the two random views of each that make a positive pair.",
    ),
    "neighbours": (
        "Nearest neighbours",
        "Test images drawn at random, and their nearest training images by the features.",
    ),
    "embedding": (
        "Map of the features",
        "t-SNE of test images. Neighbours are near in the features, too; distances between groups "
        "mean nothing.",
    ),
    "filters": ("Filters", "The first layer's filters."),
}

MEASURE = (  # below the table
    "Top-1 in percent on the test images: of the nearest neighbours (kNN), and of a linear "
    "classifier, the mean over its trials. Several seeds: mean ± standard deviation. One run: the "
    "95 % interval that the number of test images leaves. Loss and contrast top-1 (how often a "
    "query's own key is above all others): means of the last epoch of pretraining; minutes: all "
    "its steps."
)


def report_html(data: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    """The page; `pictures` are the files of the figures that were drawn.

    data: `dataset`; `table`, {version: cells} under `columns`; `differences`, {version: {setting:
    value}}; `settings`, {version: text}; `commands`; `made_by`;
    and `missing`, {figure: why it is not there}.
    """
    figures = []
    for name, (title, caption) in CAPTIONS.items():
        figure = {"alt": title, "caption": caption}
        if name in pictures:
            figure["picture"] = base64.b64encode(pictures[name].read_bytes()).decode()
        elif name in data["missing"]:
            figure["missing"] = data["missing"][name]
        else:
            continue
        figures.append(figure)
    differences = data["differences"]
    names = next(iter(differences.values()), {})
    versions = ", ".join(data["settings"])
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template)
    return page.render(
        **data,
        title=f"Momentum Contrast: {versions}",
        summary=f"Pretraining without labels, evaluated on {title_of(data['dataset'])}."
        if data["dataset"]
        else "Pretraining without labels.",
        differing={name: [each[name] for each in differences.values()] for name in names},
        alone="they differ in their names and seeds only" if len(differences) > 1 else "one run",
        measure=MEASURE,
        figures=figures,
    )
