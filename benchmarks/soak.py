"""Kill runs with SIGKILL at random moments, resume them, and compare with one left alone.

    python benchmarks/soak.py                    20 runs, each killed once: about 10 minutes
    python benchmarks/soak.py --kills 5 --seed 1

Works in output/soak (about 1 GB) and leaves result.json there. The runs read PNG files with two
worker processes, save every second, and last some 15 seconds. The moments are spread evenly over
that time, so some fall into the start, the first queue, a save or the drawing of the loss. Exit
status 1 if any run differs, in any bit.
"""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import build_parser
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils
from data.shapes import CLASSES, make_shapes
from run import checkpoints

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--arch=resnet18",
    "--crop=16",
    "--resize=16",
    "--num_keys=512",
    "--batch_size=32",
    "--bn_groups=4",
    "--shuffle_bn",
    "--log_every=7",
    "--save_every_minutes=0.015",
    "--save_weight_epoch=6",
    "--num_workers=2",
    "--device=cpu",
    "--precision=fp32",
    "--resume",
]
SAME = ("step", "epoch", "loss", "contrast_top1", "lr")  # columns of the log: all but speed


def write_images(folder: Path, n: int = 600) -> None:
    images, labels = make_shapes(n, seed=3)
    for i, (image, label) in enumerate(zip(images.transpose(0, 2, 3, 1), labels, strict=True)):
        path = folder / CLASSES[label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


class Soak:
    """Runs of train.py below a folder."""

    def __init__(self, out: Path, epochs: int) -> None:
        self.out, self.epochs = out, epochs

    def folder(self, name: str) -> Path:
        return self.out / "SOAK" / name

    def run(self, name: str, kill_after: float | None = None) -> float | None:
        """Seconds that a run took, None if it was killed; UserError if it failed."""
        places = [f"--dataset_root={self.out / 'data'}", f"--output_root={self.out}"]
        names = ["--dataset_name=SOAK", f"--exp_version={name}"]
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "train.py", *places, *names, *FLAGS, f"--max_epoch={self.epochs}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, err = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        if process.returncode:
            raise utils.UserError(f"train.py ended with status {process.returncode}: {err}")
        return time.monotonic() - began

    def kill_and_resume(self, kill_after: float) -> dict[str, object]:
        """One run that is killed and resumed: when, what it left behind, and what differs."""
        self.run("killed", kill_after)
        folder = self.folder("killed")
        last = folder / "checkpoints" / "last.pth.tar"
        row = {
            "killed_after_s": round(kill_after, 2),
            "saved_step": checkpoints.load(last)["step"] if last.exists() else None,
            "half_a_file": any(folder.rglob("*.tmp")),
        }
        self.run("killed")
        row["differences"] = self.differences("killed")
        shutil.rmtree(folder)
        return row

    def differences(self, name: str) -> list[str]:
        """Where a run is not the undisturbed one: checkpoints, bit by bit, and the log."""
        whole, other = self.folder("whole"), self.folder(name)
        found = []
        for path in sorted((whole / "checkpoints").iterdir()):
            a, b = (read_state(folder / "checkpoints" / path.name) for folder in (whole, other))
            differ = [key for key in a.keys() | b.keys() if not same(a.get(key), b.get(key))]
            found += [f"{path.name}: {key}" for key in differ]
        a, b = (utils.read_csv(folder / "log.csv") for folder in (whole, other))
        found += [f"log.csv: {column}" for column in SAME if a[column] != b[column]]
        found += [f"left: {path.name}" for path in other.rglob("*.tmp")]
        Image.open(other / "loss.png").verify()
        return found


def read_state(path: Path) -> dict[str, torch.Tensor | int]:
    checkpoint = checkpoints.load(path)
    moments = checkpoint["optimizer"]["state"].items()
    return {
        "step": checkpoint["step"],
        **checkpoint["state_dict"],
        **{f"momentum.{i}": state["momentum_buffer"] for i, state in moments},
    }


def same(a: torch.Tensor | int | None, b: torch.Tensor | int | None) -> bool:
    if a is None or b is None:
        return False
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def main(argv: list[str]) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="runs, each killed once")
    parser.add_argument("--minutes", type=float, default=40, help="no further run after these")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments")
    parser.add_argument("--epochs", type=int, default=12, help="of a run; fewer for a slow disk")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "soak")
    args = parser.parse_args(argv)
    moments, began = random.Random(args.seed), time.monotonic()
    soak = Soak(args.out.resolve(), args.epochs)
    shutil.rmtree(soak.out, ignore_errors=True)
    write_images(soak.out / "data")
    soak.run("whole")
    lasted = soak.run("again")
    if soak.differences("again"):
        raise utils.UserError("two runs that were left alone differ: nothing can be compared")

    rows = []
    for number in range(1, args.kills + 1):
        if time.monotonic() - began < 60 * args.minutes:
            rows.append({"run": number, **soak.kill_and_resume(moments.uniform(0, lasted))})
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    identical = sum(not row["differences"] for row in rows)
    result = {
        "seed": args.seed,
        "undisturbed_s": round(lasted, 1),
        "identical": identical,
        "of": len(rows),
        "runs": rows,
        "seconds": round(time.monotonic() - began),
        **utils.provenance(),
    }
    utils.write_json(soak.out / "result.json", result)
    print(
        f"{identical} of {len(rows)} runs that were killed end bit-identical to the one that was "
        f"not ({utils.duration(result['seconds'])}, commit {result['commit']}, seed {args.seed})"
    )
    sys.exit(identical < len(rows))


if __name__ == "__main__":
    utils.guard(main)
