"""Results of evaluations: what they say, where they are kept, and which can be compared."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import config
import dataloader
import utils
from config import TestSettings
from evaluation.linear import Classifiers
from evaluation.online import protocol_of
from evaluation.subject import Subject
from evaluation.subsets import Images, open_images

# In result.json, knn_k and resize are what came of these two flags.
GIVEN = {"knn_k": "asked_knn_k", "resize": "asked_resize"}
SETTINGS = {name: GIVEN.get(name, name) for name in config.names_with(TestSettings, "comparable")}
MEASURE = ["dataset", "dataset_root", "train_images", "test_images", "arch", "crop"]
MEASURE += SETTINGS.values()
NEEDED = [*MEASURE, "encoder", "epoch", "first_weights", "class_names"]
NEEDED += ["linear_top1", "linear_top1_ci95", "knn_top1", "trials", "provenance"]


@dataclass
class Evaluation:
    """A result, as it stands in its folder."""

    folder: Path
    result: dict[str, Any]  # of result.json
    accuracy: Tensor  # (trials, epochs) of the linear classifiers, top-1 in percent
    confusion: Tensor  # (C, C) counts over all trials: row the true class, column the predicted


# ------------------------------------------------------------------------- what is compared


def data_name(root: str) -> str:
    """A data set's name in results: its kind, or the name of a folder of class folders."""
    kind = dataloader.detect(root)
    name = re.sub(r"[^\w.]+", "_", Path(root).resolve().name)
    return name if kind == "folders" and name else kind


def data_path(root: str) -> str:
    """A data set's place, the same from wherever it is named."""
    return root if root == "shapes" else str(Path(root).resolve())


def describe_data(settings: TestSettings, images: Images | None = None) -> dict[str, Any]:
    """What result.json says of the data, by default as they are now; UserError without them."""
    images = images or open_images(settings, crop=8, pixels=None)
    return {
        "dataset": data_name(settings.dataset_root),
        "dataset_root": data_path(settings.dataset_root),
        "train_images": len(images.train),
        "test_images": len(images.test),
        "class_names": images.classes,
    }


def describe_measure(settings: TestSettings, subject: Subject) -> dict[str, Any]:
    """What result.json says of the encoder, and how it is measured."""
    measure = {key: getattr(settings, name) for name, key in SETTINGS.items()}
    measure |= {"protocol": protocol_of(settings), "crop": subject.crop}
    if not settings.finetune:
        measure["finetune_lr"] = None
    return measure | subject.record


def same_measure(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results, of whatever encoders, were measured alike on the same data."""
    return all(a[name] == b[name] for name in MEASURE)


def is_baseline(untrained: dict[str, Any], trained: dict[str, Any]) -> bool:
    """Whether a result is that of the encoder from which another's training started."""
    first = trained["first_weights"]
    same_weights = first is not None and untrained["first_weights"] == first
    return untrained["encoder"] == "random" and same_weights and same_measure(untrained, trained)


# --------------------------------------------------------------------------- where it is kept


def result_folder(settings: TestSettings, subject: Subject, dataset: str) -> Path:
    """home/stem, or home/stem-DATASET-KIND for another kind than the default or other data.

    Raises UserError if it holds the result of another file of the same name (--pretrained).
    """
    kind = protocol_of(settings)
    if settings.train_fraction < 1:
        kind += f"-{100 * settings.train_fraction:g}percent"
    if settings.folds:
        kind += "-folds"
    folder = subject.home / subject.stem
    if kind != "cached" or read_any(folder).get("dataset", dataset) != dataset:
        folder = subject.home / f"{subject.stem}-{dataset}-{kind}"
    old, new = read_any(folder).get("checkpoint"), subject.record["checkpoint"]
    if settings.pretrained and old and Path(str(old)).resolve() != Path(new).resolve():
        raise utils.UserError(
            f"{str(folder)!r} holds the result of {old!r}, not of {new!r}: "
            "remove it, or choose another --encoder_output_root"
        )
    return folder


def read_any(folder: Path) -> dict[str, Any]:
    """The result.json of a folder, of whatever version; empty if there is none."""
    result = utils.read_json(folder / "result.json")
    return result if isinstance(result, dict) else {}


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result.json of a folder, None if it is not there or older; UserError for odd values."""
    result = read_any(folder)
    if not all(name in result for name in NEEDED):
        return None
    check(_is_sound(result), folder / "result.json")
    return result


def _is_sound(result: dict[str, Any]) -> bool:
    """Whether the values are as `evaluate` writes them, as far as anything reads them."""
    try:
        flags = {name: result[key] for name, key in SETTINGS.items() if name != "protocol"}
        flags |= {name: result[name] for name in ("dataset_root", "crop")}
        config.from_values(TestSettings, {n: v for n, v in flags.items() if v is not None})
        low, high = result["linear_top1_ci95"]
        shares = [result["knn_top1"], result["linear_top1"], low, high, *result["trials"]]
        texts = [result["dataset"], result["arch"], *result["class_names"]]
        texts.append(result["provenance"]["commit"] or "")
        counts = [len(result["trials"]), result["epoch"] or 0]
    except (utils.UserError, KeyError, TypeError, ValueError):
        return False
    return (
        all(isinstance(share, (int, float)) and 0 <= share <= 100 for share in shares)
        and all(isinstance(text, str) for text in texts)
        and counts[0] > 0
        and isinstance(counts[1], int)
    )


def check(sound: bool, path: Path) -> None:
    if not sound:
        raise utils.UserError(f"{str(path)!r} is damaged: evaluate again with test.py")


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation in a folder, None if there is none; UserError if a file is damaged."""
    result, tables = read_result(folder), [folder / "accuracy.csv", folder / "confusion.csv"]
    if result is None or not all(path.exists() for path in tables):
        return None
    top1, confusion = utils.read_csv(tables[0], ["top1"])["top1"], utils.read_csv(tables[1])
    trials, classes = len(result["trials"]), len(result["class_names"])
    whole = top1 and len(top1) % trials == 0
    check(whole and all(0 <= value <= 100 for value in top1), tables[0])
    columns = list(confusion.values())
    square = [len(column) for column in columns] == [classes] * classes
    check(square and all(count >= 0 for column in columns for count in column), tables[1])
    return Evaluation(folder, result, torch.tensor(top1).view(trials, -1), torch.tensor(columns).T)


def find_stored(
    settings: TestSettings, subject: Subject, data: dict[str, Any] | None
) -> Evaluation | None:
    """The evaluation of a subject that is stored, if it has these settings and enough trials.

    `data` (`describe_data`) must be the same; without them, it is that of the plain folder.
    """
    folder = subject.home / subject.stem
    if data is not None:
        folder = result_folder(settings, subject, data["dataset"])
    stored = read_evaluation(folder)
    if stored is None or len(stored.result["trials"]) < settings.trials:
        return None
    wanted = describe_measure(settings, subject) | (data or {}) | {"checkpoint": None}
    found = {**stored.result, "checkpoint": None}  # its path may be another one now
    return stored if all(found.get(name) == value for name, value in wanted.items()) else None


def save(evaluation: Evaluation, parts: list[Classifiers]) -> None:
    """Write all files, result.json last: where it stands, the others are complete."""
    folder, result = evaluation.folder, evaluation.result
    (folder / "result.json").unlink(missing_ok=True)
    rows = [
        (epoch, trial, f"{top1:.4f}")
        for trial, curve in enumerate(evaluation.accuracy.tolist(), 1)
        for epoch, top1 in enumerate(curve, 1)
    ]
    utils.write_csv(folder / "accuracy.csv", ["epoch", "trial", "top1"], rows)
    counts = evaluation.confusion.tolist()
    utils.write_csv(folder / "confusion.csv", result["class_names"], counts)
    content = {
        "weight": torch.cat([part.weight for part in parts]),  # (trials, C, D)
        "bias": torch.cat([part.bias for part in parts]),  # (trials, C)
        "classes": result["class_names"],
    }
    for name in ("arch", "checkpoint", "epoch", "dataset", "learning_rate"):
        content[name] = result[name]
    if parts[0].encoder is not None:
        content["encoders"] = [part.encoder for part in parts]
    utils.atomic_write(folder / "linear.pth.tar", lambda file: torch.save(content, file))
    utils.write_json(folder / "result.json", result)
