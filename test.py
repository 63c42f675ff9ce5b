"""Evaluate an encoder: kNN and a linear classifier on its frozen features.

    python test.py --dataset_root=ROOT/STL-10 --load_pretrained_epoch=100
        of a run, output/IMAGENET-64/v1, epoch 100; or of another:
        --encoder_exp_version M3     another run, its last checkpoint
        --encoder random             the baseline alone: the same encoder, untrained
        --pretrained FILE            a file from elsewhere: MoCo's own, torchvision's weights
        in another way:
        --folds                      on STL-10's ten official folds
        --train_fraction 0.1         with a tenth of the labels
        --finetune                   the encoder trained, too
        --protocol reference         as the reference's script (or: original)
    torchrun --standalone --nproc_per_node=6 test.py --dataset_root=...
        features on six GPUs (plain python: nn.DataParallel)
    python test.py --help

Top-1 is that of the test split after the classifier's last epoch, mean over --trials; its learning
rate is chosen on a held-out tenth of the training split. The untrained encoder is measured, too,
and shown beside it. Writes eval/epoch_0100/ (or eval/random/)
in the run's folder: result.json, accuracy.csv, confusion.csv, accuracy.png, confusion.png,
linear.pth.tar. Other data, another protocol and a part of the labels get folders of their own,
eval/epoch_0100-DATASET-PROTOCOL/.
"""

from dataclasses import replace
from typing import Any

import config
import utils
from config import TestSettings
from evaluation.compare import baseline_command, find_baseline
from evaluation.evaluate import evaluate, resolve
from evaluation.results import Evaluation
from evaluation.subject import Subject, load_subject
from figures import confusion, curves, style
from parallel import Launch, open_launch


def main(argv: list[str]) -> None:
    settings = resolve(config.parse(TestSettings, argv, __doc__))
    launch = open_launch(settings.device)
    subject = load_subject(settings)
    record = subject.record
    what = "untrained" if settings.encoder == "random" else record["checkpoint"]
    if record["epoch"] is not None:
        what = f"epoch {record['epoch']}, {what}"
    utils.say(f"encoder  {record['arch']}, {what}")
    if subject.found:
        utils.say(f"found    {subject.found}")
    with launch:
        done = measure(settings, subject, launch)
        untrained = measure_untrained(settings, done, launch)
    if launch.rank > 0:
        return
    result = done.result
    utils.say(format_result(result, untrained.result if untrained else None))
    files = "result.json, accuracy.csv, confusion.csv, accuracy.png, confusion.png, linear.pth.tar"
    utils.say(f"written  {done.folder}/{files} after {utils.duration(result['seconds'])}")
    if untrained:
        compare_with(untrained.result, result)


def measure(settings: TestSettings, subject: Subject, launch: Launch) -> Evaluation:
    """Evaluate an encoder, and draw what came of it."""
    done = evaluate(settings, subject, launch)
    if launch.rank == 0:
        accuracy = curves.accuracy_figure(done.accuracy, done.result)
        style.save(done.folder / "accuracy.png", accuracy)
        table = confusion.confusion_figure(done.confusion, done.result)
        style.save(done.folder / "confusion.png", table)
    return done


def measure_untrained(
    settings: TestSettings, trained: Evaluation, launch: Launch
) -> Evaluation | None:
    """The encoder from which a run started, measured alike, if it is not measured yet.

    A protocol that takes a hundred epochs is left to the user, who is told the command.
    """
    if settings.encoder == "random" or settings.pretrained is not None:
        return None
    if (stored := find_baseline(trained)) is not None:
        return stored
    if trained.result["protocol"] != "cached":
        utils.say(f"note     of the untrained encoder: {baseline_command(trained)}")
        return None
    first = replace(settings, encoder="random", load_pretrained_epoch=None)
    try:
        subject = load_subject(first)
    except utils.UserError as error:  # epoch_0000.pth.tar of a run with --init was deleted
        utils.warn(f"the untrained encoder is not measured: {error}")
        return None
    utils.say("encoder  as it was before training, for comparison")
    return measure(first, subject, launch)


def compare_with(untrained: dict[str, Any], trained: dict[str, Any]) -> None:
    """Warn where the training made an encoder worse than it was."""
    for name, key in (("kNN", "knn_top1"), ("linear", "linear_top1")):
        if trained[key] < untrained[key]:
            utils.warn(
                f"{name}: the trained encoder ({trained[key]:.2f} %) is worse than the untrained "
                f"one ({untrained[key]:.2f} %): docs/faq.md says what to look at"
            )


def format_result(result: dict[str, Any], untrained: dict[str, Any] | None) -> str:
    """What was measured, as a few aligned lines; the untrained encoder's result adds a column."""
    vote = f"T = {result['knn_temperature']:g}" if result["knn_weighted"] else "plain vote"
    when = ", before the finetuning" if result["protocol"] == "finetune" else ""
    trials = f"{len(result['trials'])} {'fold' if result['folds'] else 'trial'}"
    trials += "s" if len(result["trials"]) > 1 else ""
    low, high = result["linear_top1_ci95"]
    linear = (
        f"{trials}, std {result['linear_top1_std']:.2f}, {result['linear_epochs']} epochs, "
        f"lr {result['learning_rate']:g}; 95 % interval {low:.2f} to {high:.2f}"
    )
    rows = [
        ("kNN", "knn_top1", f"k = {result['knn_k']}, {vote}{when}"),
        ("linear", "linear_top1", linear),
    ]
    if result["classes"] > 20:
        rows.append(("  top-5", "linear_top5", ""))
    lines = [f"top-1 (%)         {'untrained   ' if untrained else ''}{result['protocol']}"]
    for name, key, how in rows:
        column = f"{untrained[key]:>9.2f}   " if untrained else ""
        lines.append(f"{name:<8} {result[key]:>7.2f}  {column}{how}".rstrip())
    pairs = zip(result["per_class_top1"], result["class_names"], strict=True)
    ranked = sorted(pair for pair in pairs if pair[0] is not None)
    worst, best = (f"{top1:.1f} ({name})" for top1, name in (ranked[0], ranked[-1]))
    lines.append(f"classes  from {worst} to {best}")
    return "\n".join(lines)


if __name__ == "__main__":
    utils.guard(main)
