"""Evaluate a pretrained encoder: kNN and a linear classifier on its frozen, pooled features.

    python test.py --dataset_root=ROOT/STL-10 --load_pretrained_epoch=100     a run: output/IMAGENET-64/v1, epoch 100
    python test.py --dataset_root=ROOT/STL-10 --encoder_exp_version M3        another run, its last checkpoint
    python test.py --dataset_root=ROOT/STL-10 --encoder random                the baseline: the same encoder, untrained
    python test.py --dataset_root=ROOT/STL-10 --folds                         STL-10's ten official folds
    python test.py --dataset_root=ROOT/STL-10 --protocol reference            as the reference's script (or: original)
    python test.py --dataset_root=ROOT/STL-10 --train_fraction 0.1            with a tenth of the labels (with --finetune: the encoder trained, too)
    python test.py --dataset_root=shapes --pretrained FILE                    a file from elsewhere: MoCo's published ones, torchvision's weights
    torchrun --standalone --nproc_per_node=6 test.py --dataset_root=...       features on six GPUs (plain python: nn.DataParallel)
    python test.py --help                                                     every flag with its default

Top-1 is that of the test split after the classifier's last epoch, mean over --trials; its learning rate is chosen on a held-out tenth of the training
split. Writes output/DATASET_NAME/EXP_VERSION/eval/epoch_0100/ (or eval/random/): result.json, accuracy.csv, confusion.csv, accuracy.png,
confusion.png, linear.pth.tar. A second data set, another protocol or part of the labels get a folder of their own, eval/epoch_0100-DATASET-PROTOCOL/.
"""

from pathlib import Path
from typing import Any

import evaluate
import parallel
import utils


def main(argv: list[str]) -> None:
    cfg = evaluate.settled(utils.load_config("test", argv))
    launch = utils.checked(parallel.launch, cfg.device)
    subject = evaluate.load_subject(cfg)
    record = subject.record
    if launch.rank == 0:
        what = (
            "untrained"
            if cfg.encoder == "random"
            else subject.record["checkpoint"]
            if record["epoch"] is None
            else f"epoch {record['epoch']}, {record['checkpoint']}"
        )
        print(
            f"encoder  {record['arch']}, {what}"
            + f"\nfound    {subject.found}" * bool(subject.found),
            flush=True,
        )
    with launch:
        folder, result, linear = evaluate.evaluate_subject(cfg, subject, launch)
    if launch.rank == 0:
        import visualize  # matplotlib is needed only here

        visualize.draw_evaluation(folder, result, linear)
        print(table(result, untrained_result(folder, result)))
        print(
            f"written  {folder}/result.json, accuracy.csv, confusion.csv, accuracy.png, confusion.png, linear.pth.tar after {utils.duration(result['seconds'])}"
        )


def untrained_result(folder: Path, result: dict[str, Any]) -> dict[str, Any] | None:
    """The untrained encoder's result beside this one, if it is there and was measured the same way."""
    others = (
        evaluate.read_result(path.parent)
        for path in sorted(folder.parent.glob("random*/result.json"))
        if path.parent != folder
    )
    return next((other for other in others if other and evaluate.is_baseline(other, result)), None)


def table(result: dict[str, Any], untrained: dict[str, Any] | None) -> str:
    """What was measured, as a few aligned lines; `untrained` adds a column."""
    vote = f"T = {result['knn_temperature']:g}" if result["knn_weighted"] else "plain vote"
    count, low_high = (
        len(result["trials"]),
        " to ".join(f"{bound:.2f}" for bound in result["linear_top1_ci95"]),
    )
    spread = f"{count} {'fold' if result['folds'] else 'trial'}{'s' * (count > 1)}, std {result['linear_top1_std']:.2f}"
    rows = [
        (
            "kNN",
            "knn_top1",
            f"k = {result['knn_k']}, {vote}"
            + ", before the finetuning" * (result["protocol"] == "finetune"),
        ),
        (
            "linear",
            "linear_top1",
            f"{spread}, {result['linear_epochs']} epochs, lr {result['learning_rate']:g}; 95 % interval {low_high}",
        ),
    ]
    if result["classes"] > 20:
        rows.append(("  top-5", "linear_top5", ""))
    lines = [f"top-1 (%)         {'untrained   ' if untrained else ''}{result['protocol']}"]
    for name, key, how in rows:
        lines.append(
            f"{name:<8} {result[key]:>7.2f}  "
            + (f"{untrained[key]:>9.2f}   " if untrained else "")
            + how
        )
    ranked = sorted(
        (top1, name)
        for top1, name in zip(result["per_class_top1"], result["class_names"])
        if top1 is not None
    )
    lines.append(
        f"classes  from {ranked[0][0]:.1f} ({ranked[0][1]}) to {ranked[-1][0]:.1f} ({ranked[-1][1]})"
    )
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    utils.main_guard(main)
