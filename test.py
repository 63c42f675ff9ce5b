"""Evaluate an encoder: kNN and a linear classifier on its frozen features.

    python test.py --dataset_root=ROOT/STL-10 --load_pretrained_epoch=100
        of a run, output/IMAGENET-64/v1, epoch 100; or of another:
        --encoder_exp_version M3     another run, its last checkpoint
        --encoder random             the baseline: the same encoder, untrained
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
rate is chosen on a held-out tenth of the training split. Writes eval/epoch_0100/ (or eval/random/)
in the run's folder: result.json, accuracy.csv, confusion.csv, accuracy.png, confusion.png,
linear.pth.tar. Other data, another protocol and a part of the labels get folders of their own,
eval/epoch_0100-DATASET-PROTOCOL/.
"""

from typing import Any

import config
import utils
from config import TestSettings
from evaluation.compare import find_baseline
from evaluation.evaluate import evaluate, resolve
from evaluation.subject import load_subject
from figures import confusion, curves, style
from parallel import open_launch


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
        done = evaluate(settings, subject, launch)
    if launch.rank > 0:
        return
    folder, result = done.folder, done.result
    style.save(folder / "accuracy.png", curves.accuracy_figure(done.accuracy, result))
    style.save(folder / "confusion.png", confusion.confusion_figure(done.confusion, result))
    untrained = find_baseline(done) if settings.encoder == "trained" else None
    utils.say(format_result(result, untrained.result if untrained else None))
    files = "result.json, accuracy.csv, confusion.csv, accuracy.png, confusion.png, linear.pth.tar"
    utils.say(f"written  {folder}/{files} after {utils.duration(result['seconds'])}")


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
