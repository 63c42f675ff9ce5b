"""Results of several runs, side by side."""

import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import config
from config import TestSettings
from evaluation.results import SETTINGS, Evaluation, find_stored, is_baseline, read_evaluation
from evaluation.subject import Subject, load_subject
from run import checkpoints
from run.curves import summarize
from utils import UserError, say, warn

COLUMNS = {
    "kNN": "knn_top1",
    "linear": "linear_top1",
    "95 % of linear": "linear_interval",
    "loss": "loss",
    "contrast top-1": "contrast_top1",
    "minutes": "minutes",
}


@dataclass(frozen=True)
class Comparison:
    """What is compared: versions of the encoder, and epochs of one version."""

    folder: Path  # of all runs
    versions: list[str]
    epoch: int | None  # of the versions; None: the last
    version: str
    epochs: list[int]
    seeds: list[int] | None

    def check(self) -> None:
        """UserError unless all checkpoints are there."""
        needed = [(version, self.epoch) for version in self.versions]
        needed += [(self.version, epoch) for epoch in self.epochs]
        for version, epoch in needed:
            for run in self.runs(version):
                checkpoints.path_of(run, epoch)

    def runs(self, version: str) -> list[Path]:
        """The folders of a version: of the run of that name, or of a run for each seed."""
        names = [version] if self.seeds is None else [f"{version}-seed{s}" for s in self.seeds]
        return [self.folder / name for name in names]


def evaluate_runs(
    runs: Iterable[Path],
    epoch: int | None,
    settings: TestSettings,
    data: Mapping[str, Any] | None,
    measure: Callable[[TestSettings, Subject], Evaluation],
) -> list[Evaluation]:
    """The evaluations of a checkpoint of each run: stored ones where they fit, or new ones.

    data: what `describe_data` says of the data set of `settings`; without one (None) nothing can
    be measured: UserError.
    """
    found = []
    for run in runs:
        settings = replace(settings, encoder_exp_version=run.name, load_pretrained_epoch=epoch)
        subject = load_subject(settings)
        name = f"{run.name}, epoch {subject.record['epoch']}"
        evaluation = find_stored(settings, subject, data)
        if evaluation is not None:
            say(f"{name}: stored result on {evaluation.result['dataset']}")
        elif data is None:
            reason = f"{name} has no result with these settings and {settings.trials} trials"
            raise UserError(f"{reason}: give --dataset_root, so that it can be evaluated")
        else:
            say(f"{name}: evaluating")
            evaluation = measure(settings, subject)
        found.append(evaluation)
    return found


def find_untrained(versions: Iterable[Sequence[Evaluation]]) -> list[Evaluation]:
    """The encoders that the runs started from, measured in the same way: one for each seed.

    Each is that of the first version that has one. Returns [] if any is missing.
    """
    found = []
    for same_seed in zip(*versions, strict=True):
        baseline = next(filter(None, map(find_baseline, same_seed)), None)
        if baseline is None:
            reason = f"measure it alike by {baseline_command(same_seed[0])}"
            warn(f"untrained encoders are not shown: {reason}")
            return []
        found.append(baseline)
    return found


def baseline_command(trained: Evaluation) -> str:
    """The command that measures the untrained encoder as the trained one was measured."""
    run, result = trained.folder.parents[1], trained.result
    values = {name: result[key] for name, key in SETTINGS.items()}
    values |= {
        "encoder_output_root": str(run.parents[1]),
        "encoder_dataset_name": run.parent.name,
        "encoder_exp_version": run.name,
        "encoder": "random",
        "dataset_root": result["dataset_root"],
        "crop": result["crop"],
    }
    if result["protocol"] == "finetune":  # which is a flag of its own
        values |= {"protocol": "cached", "finetune": True}
    given = {name: value for name, value in values.items() if value is not None}
    return shlex.join(["python", "test.py", *config.words_of(TestSettings, given)])


def find_baseline(evaluation: Evaluation) -> Evaluation | None:
    """The evaluation beside this one of the untrained encoder, measured in the same way."""
    for folder in sorted(evaluation.folder.parent.glob("random*")):
        untrained = read_evaluation(folder)
        if untrained is not None and is_baseline(untrained.result, evaluation.result):
            return untrained
    return None


def name_data(groups: Iterable[Sequence[Evaluation]]) -> str:
    """The data set that all results are of; UserError if they are of several."""
    names = sorted({each.result["dataset"] for group in groups for each in group})
    if len(names) > 1:
        reason = f"the stored results are of different data sets ({', '.join(names)})"
        raise UserError(f"{reason}: give --dataset_root")
    return names[0]


def curves_of(evaluations: Sequence[Evaluation]) -> list[list[float]]:
    """Accuracies (trials, epochs) of one run; of several, the mean over the trials of each."""
    curves = evaluations[0].accuracy
    if len(evaluations) > 1:
        curves = torch.stack([each.accuracy.double().mean(dim=0) for each in evaluations])
    return [[round(top1, 4) for top1 in curve] for curve in curves.tolist()]


def tabulate(versions: Mapping[str, Sequence[Evaluation]]) -> dict[str, list[dict[str, Any]]]:
    """For each run of a version what was measured, and what its log says of that epoch."""
    table: dict[str, list[dict[str, Any]]] = {}
    for version, evaluations in versions.items():
        for evaluation in evaluations:
            result = evaluation.result
            row = {name: round(result[name], 2) for name in ("knn_top1", "linear_top1")}
            row["linear_interval"] = [round(end, 2) for end in result["linear_top1_ci95"]]
            row["commit"] = result["provenance"]["commit"]
            if result["encoder"] != "random":
                row |= summarize(evaluation.folder.parents[1], result["epoch"])
            table.setdefault(version, []).append(row)
    return table


def cells_of(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[str]]:
    """For each version a cell for each of COLUMNS: means and sample deviations over its runs."""
    cells = {}
    for version, rows in table.items():
        cells[version] = []
        for name in COLUMNS.values():
            values = [row[name] for row in rows if name in row]
            if not values or name == "linear_interval":
                cell = f"{values[0][0]:.2f} to {values[0][1]:.2f}" if len(values) == 1 else ""
            else:
                cell = f"{statistics.fmean(values):.2f}"
                cell += f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells[version].append(cell)
    return cells


def format_table(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line for each version, the cells below their titles."""
    lines = {"": list(COLUMNS), **cells_of(table)}
    return "\n".join(
        f"{version:<12}{''.join(f'{cell:>16}' for cell in cells)}".rstrip()
        for version, cells in lines.items()
    )


def describe_gain(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What the last version gained over the untrained encoder."""
    *_, version = (name for name in table if name != "untrained")

    def change(name: str) -> str:
        trained, untrained = (
            statistics.fmean(r[name] for r in table[v]) for v in (version, "untrained")
        )
        return f"{untrained:.1f} to {trained:.1f} % ({trained - untrained:+.1f} points)"

    knn, linear = change("knn_top1"), change("linear_top1")
    return f"{version}, from untrained to trained: kNN {knn}, linear classifier {linear}"
