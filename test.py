"""Evaluate a pretrained encoder, frozen: kNN and a linear classifier on its pooled features.

    python test.py --dataset_root=ROOT/STL-10 --load_pretrained_epoch=100     a run: output/IMAGENET-64/v1, epoch 100
    python test.py --dataset_root=ROOT/STL-10 --encoder_exp_version M3        another run, its last checkpoint
    python test.py --dataset_root=ROOT/STL-10 --encoder random                the baseline: the same encoder, untrained
    python test.py --dataset_root=shapes --pretrained FILE                    a checkpoint file from elsewhere
    torchrun --standalone --nproc_per_node=6 test.py --dataset_root=...       features on six GPUs (plain python: nn.DataParallel)
    python test.py --help                                                     every flag with its default

Top-1 is that of the test split after the classifier's last epoch, mean over --trials; its learning rate is chosen on a held-out
tenth of the training split. Writes output/DATASET_NAME/EXP_VERSION/eval/epoch_0100/ (or eval/random/): result.json, accuracy.csv,
accuracy.png, linear.pth.tar. A second data set gets a folder of its own, eval/epoch_0100-DATASET-PROTOCOL/.
"""

from pathlib import Path
from typing import Any

import evaluate
import parallel
import utils


def main(argv: list[str]) -> None:
    cfg = utils.load_config("test", argv)
    launch = utils.checked(parallel.launch, cfg.device)
    subject = evaluate.load_subject(cfg)
    record = subject.record
    if launch.rank == 0:
        print(f"encoder  {record['arch']}, " + ("untrained" if cfg.encoder == "random" else f"epoch {record['epoch']}, {record['checkpoint']}"), flush=True)
    with launch:
        folder, result, accuracy = evaluate.evaluate_subject(cfg, subject, launch)
    if launch.rank == 0:
        import visualize  # matplotlib is needed only here
        visualize.write_figure(folder / "accuracy.png", visualize.accuracy_figure(accuracy, result))
        print(table(result, untrained_result(folder, result)))
        print(f"written  {folder}/result.json, accuracy.csv, accuracy.png, linear.pth.tar after {utils.duration(result['seconds'])}")


def untrained_result(folder: Path, result: dict[str, Any]) -> dict[str, Any] | None:
    """The untrained encoder's result beside this one, if it is there and was measured the same way."""
    others = (evaluate.read_result(path.parent) for path in sorted(folder.parent.glob("random*/result.json")) if path.parent != folder)
    return next((other for other in others if other and evaluate.same_measure(other, result)), None)


def table(result: dict[str, Any], untrained: dict[str, Any] | None) -> str:
    """What was measured, as a few aligned lines; `untrained` adds a column."""
    vote = f"T = {result['knn_temperature']:g}" if result["knn_weighted"] else "plain vote"
    trials = f"{len(result['trials'])} trial{'s' * (len(result['trials']) > 1)}"
    rows = [("kNN", "knn_top1", f"k = {result['knn_k']}, {vote}"),
            ("linear", "linear_top1", f"{trials}, std {result['linear_top1_std']:.2f}, {result['linear_epochs']} epochs, lr {result['learning_rate']:g}")]
    lines = ["top-1 (%)         " + ("untrained   " if untrained else "")]
    for name, key, how in rows:
        lines.append(f"{name:<8} {result[key]:>7.2f}  " + (f"{untrained[key]:>9.2f}   " if untrained else "") + how)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    utils.main_guard(main)
