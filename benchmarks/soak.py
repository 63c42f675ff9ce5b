"""Kill a training run with SIGKILL at random moments, resume it, and compare it bit by bit with one that was left alone.

    python benchmarks/soak.py                    20 runs, each killed once: about 10 minutes
    python benchmarks/soak.py --kills 5 --seed 1

Works in output/soak (about 1 GB) and leaves result.json there. Not part of `make test`, which kills twice (tests/test_survival.py).
The runs read PNG files with two worker processes, save every second, and last some 15 seconds from start to end; the moments are spread evenly
over that time, so some fall into the start, the first queue, a save or the drawing of the loss. Exit status 1 if any run differs.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dataloader
import utils

RUN = [
    "--arch=resnet18",
    "--crop=16",
    "--resize=16",
    "--num_keys=512",
    "--batch_size=32",
    "--bn_groups=4",
    "--shuffle_bn",
    "--max_epoch=12",
    "--log_every=7",
    "--save_every_minutes=0.015",
    "--save_weight_epoch=6",
    "--num_workers=2",
    "--device=cpu",
    "--precision=fp32",
    "--resume",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="runs, each killed once")
    parser.add_argument(
        "--minutes", type=float, default=40, help="start no further run after this time"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "soak")
    args = parser.parse_args()
    moments, began = random.Random(args.seed), time.monotonic()
    shutil.rmtree(args.out, ignore_errors=True)
    write_images(args.out / "data")
    run(args.out, "whole")
    lasted = min(
        run(args.out, f"again{i}") for i in range(2)
    )  # that two such runs are the same is the condition for all else
    assert differences(args.out, "again0") == differences(args.out, "again1") == []

    rows = []
    for number in range(1, args.kills + 1):
        if time.monotonic() - began < 60 * args.minutes:
            at = moments.uniform(0, lasted)
            run(args.out, "killed", kill_after=at)
            rows.append(
                {
                    "run": number,
                    "killed_after_s": round(at, 2),
                    **left_behind(args.out / "SOAK" / "killed"),
                }
            )
            run(args.out, "killed")
            rows[-1]["differences"] = differences(args.out, "killed")
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
            shutil.rmtree(args.out / "SOAK" / "killed")
    same = sum(not row["differences"] for row in rows)
    result = {
        "seed": args.seed,
        "undisturbed_s": round(lasted, 1),
        "identical": same,
        "of": len(rows),
        "runs": rows,
        "seconds": round(time.monotonic() - began),
        **utils.provenance(),
    }
    utils.write_json(args.out / "result.json", result)
    print(
        f"{same} of {len(rows)} runs that were killed end bit-identical to the one that was not "
        f"({utils.duration(result['seconds'])}, commit {result['commit']}, seed {args.seed})"
    )
    sys.exit(same < len(rows))


def write_images(folder: Path, n: int = 600) -> None:
    images, labels = dataloader.make_shapes(n, seed=3)
    for i, (image, label) in enumerate(zip(images.transpose(0, 2, 3, 1), labels)):
        path = folder / dataloader.SHAPE_CLASSES[label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def run(out: Path, name: str, kill_after: float | None = None) -> float | None:
    """Seconds that train.py took; None if it was killed. It ends the program if train.py fails."""
    command = [
        sys.executable,
        "train.py",
        f"--dataset_root={out / 'data'}",
        f"--output_root={out}",
        "--dataset_name=SOAK",
        f"--exp_version={name}",
        *RUN,
    ]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, err = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    if process.returncode:
        sys.exit(f"train.py ended with status {process.returncode}: {err}")
    return time.monotonic() - began


def left_behind(folder: Path) -> dict[str, object]:
    """What a killed run left: the step of its last checkpoint, and whether it was killed in the midst of writing a file."""
    last = folder / "checkpoints" / "last.pth.tar"
    return {
        "saved_step": utils.load_checkpoint(last)["step"] if last.exists() else None,
        "half_a_file": any(folder.rglob("*.tmp")),
    }


def differences(out: Path, name: str) -> list[str]:
    """Where a run is not the undisturbed one: every checkpoint, bit by bit, and the log but for the speed."""
    whole, other = out / "SOAK" / "whole", out / "SOAK" / name
    found = []
    for path in sorted((whole / "checkpoints").iterdir()):
        a, b = (
            utils.load_checkpoint(folder / "checkpoints" / path.name) for folder in (whole, other)
        )
        a, b = (
            {
                "step": c["step"],
                **c["state_dict"],
                **{
                    f"momentum.{i}": s["momentum_buffer"]
                    for i, s in c["optimizer"]["state"].items()
                },
            }
            for c in (a, b)
        )
        found += [
            f"{path.name}: {key}"
            for key in a.keys() | b.keys()
            if not torch.equal(torch.as_tensor(a.get(key)), torch.as_tensor(b.get(key)))
        ]
    logs = [utils.read_csv(folder / "log.csv") for folder in (whole, other)]
    found += [
        f"log.csv: {name}"
        for name in ("step", "epoch", "loss", "contrast_top1", "lr")
        if logs[0][name] != logs[1][name]
    ]
    found += [f"left: {path.name}" for path in other.rglob("*.tmp")]
    Image.open(other / "loss.png").verify()
    return found


if __name__ == "__main__":
    main()
