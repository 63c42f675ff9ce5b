"""The experiment M0 to M3 with several seeds, start to end: pretrain, evaluate, draw.

    python benchmarks/claims.py ROOT/cifar-10       on a small machine: a run on each core
    python benchmarks/claims.py ROOT/cifar-10 --lanes 4 --device cuda --seeds 0 1 2 \\
        -- --max_epoch 100 --schedule 60 80
    python benchmarks/claims.py ROOT/ILSVRC/Data/CLS-LOC --preset none \\
        --dataset_name IMAGENET-64 --lanes 1 --test_root ROOT/STL-10

What is done is skipped, what was stopped goes on. What follows -- goes to train.py, and may be
anything but what this experiment sets itself. Runs are output/DATASET_NAME/M0-seed0, ...; their
messages are in claims.log beside them. The figures go to --result_path, what they are drawn from
to RESULT_PATH/data. Ctrl-C and SIGTERM stop the runs after their step.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from common import build_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config
import dataloader
import utils
from config import TrainSettings
from evaluation.results import data_path, is_baseline, read_result
from run.folder import path_of

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ["M0", "M1", "M2", "M3"]
OWN = {  # flags that this experiment sets itself
    "preset",
    "config",
    "seed",
    "momentum",
    "shuffle_bn",
    "no-shuffle_bn",
    "exp_version",
    "dataset_root",
    "dataset_name",
    "output_root",
    "device",
    "resume",
    "overwrite",
}
Command = list[str]  # a script and its flags


@dataclass
class Experiment:
    """The flags of this script, and the commands that follow from them."""

    dataset_root: str
    test_root: str
    preset: list[str]
    dataset_name: str
    output_root: str
    result_path: list[str]
    device: str
    versions: list[str]
    seeds: list[int]
    more: list[str]
    settings: TrainSettings = field(init=False)
    steps: int = field(init=False)  # of a run

    def __post_init__(self) -> None:
        """UserError for anything that is wrong, before any work."""
        self.settings = config.parse(TrainSettings, self.train_flags("M3", 0))
        images = len(
            dataloader.open_dataset(
                self.dataset_root,
                "pretrain",
                fit="square",
                resize=self.settings.resize,
                crop=self.settings.crop,
            )
        )
        self.steps = self.settings.max_epoch * (images // self.settings.batch_size)

    def folder(self, version: str, seed: int) -> Path:
        return path_of(self.output_root, self.dataset_name, f"{version}-seed{seed}")

    def train_flags(self, version: str, seed: int) -> list[str]:
        return [
            "--preset",
            *self.preset,
            version,
            f"--exp_version={version}-seed{seed}",
            f"--seed={seed}",
            f"--dataset_root={self.dataset_root}",
            f"--dataset_name={self.dataset_name}",
            f"--output_root={self.output_root}",
            f"--device={self.device}",
            *self.more,
        ]

    def test_flags(self, run: str) -> list[str]:
        return [
            *(["--preset", *self.preset] if self.preset else []),
            f"--encoder_output_root={self.output_root}",
            f"--encoder_dataset_name={self.dataset_name}",
            f"--encoder_exp_version={run}",
            f"--dataset_root={self.test_root}",
            f"--device={self.device}",
        ]

    def lanes(self) -> "list[Lane]":
        """A lane for each run: train, evaluate, and for the last version the untrained encoder."""
        lanes = []
        for seed in self.seeds:
            for version in self.versions:
                folder = self.folder(version, seed)
                flags = self.test_flags(folder.name)
                commands = [
                    partial(self.train, version, seed),
                    partial(self.evaluate, folder, flags),
                ]
                if version == self.versions[-1]:
                    commands.append(partial(self.baseline, folder, flags))
                lanes.append(Lane(folder, commands))
        return lanes

    def train(self, version: str, seed: int) -> Command:
        return ["train.py", *self.train_flags(version, seed), "--resume"]

    def evaluate(self, folder: Path, flags: list[str]) -> Command:
        """visualize.py evaluates what has no result that fits."""
        epoch = f"--load_pretrained_epoch={self.settings.max_epoch}"
        place = f"--result_path={folder}/figures"
        return ["visualize.py", *flags, epoch, "--figures", "accuracy", place]

    def baseline(self, folder: Path, flags: list[str]) -> Command | None:
        """The untrained encoder, unless it was measured already."""
        if has_baseline(folder, self.test_root, self.settings.max_epoch):
            return None
        return ["test.py", *flags, "--encoder=random"]

    def draw(self) -> Command:
        epochs, every = self.settings.max_epoch, self.settings.save_weight_epoch
        return [
            "visualize.py",
            *self.test_flags(self.versions[-1]),
            *self.result_path,
            f"--load_pretrained_epoch={epochs}",
            "--multiple_encoder_exp_version",
            *self.versions,
            "--loss_exp_version",
            *self.versions,
            "--seeds",
            *map(str, self.seeds),
            "--multiple_pretrained_epoch",
            *map(str, sorted({*range(every, epochs + 1, every), epochs})),
        ]


def has_baseline(folder: Path, test_root: str, epoch: int) -> bool:
    """Whether a run's untrained encoder was measured as its newest result of an epoch was."""
    paths = sorted(folder.glob("eval/*/result.json"), key=os.path.getmtime)
    results = [result for path in paths if (result := read_result(path.parent))]
    data = data_path(test_root)
    trained = [r for r in results if r["epoch"] == epoch and r["dataset_root"] == data]
    return bool(trained) and any(is_baseline(result, trained[-1]) for result in results)


@dataclass
class Lane:
    """The commands of one run, one after the other; None is a command with nothing to do."""

    folder: Path
    commands: list[Callable[[], Command | None]]
    process: subprocess.Popen | None = None

    def go_on(self, environment: dict[str, str]) -> bool:
        """Start the next command where the last has ended; False when all are done.

        Raises UserError if a command failed.
        """
        if self.process is not None and self.process.poll() is None:
            return True
        log = self.folder / "claims.log"
        if self.process is not None and self.process.returncode:
            last = (log.read_text(errors="replace").splitlines() or [""])[-1]
            status = self.process.returncode
            raise utils.UserError(
                f"{self.folder.name} failed (status {status}): {last} (all of it: {log})"
            )
        while self.commands:
            command = self.commands.pop(0)()
            if command is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(log, "ab") as file:
                    self.process = subprocess.Popen(
                        [sys.executable, str(ROOT / command[0]), *command[1:]],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                return True
        return False

    def steps_done(self) -> int:
        try:
            return int(utils.read_csv(self.folder / "log.csv", ["step"])["step"][-1])
        except (utils.UserError, IndexError):
            return 0

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        if self.process is not None:
            self.process.wait()


def run_all(lanes: list[Lane], side_by_side: int, threads: str, steps: int) -> None:
    """Run all lanes, and say every minute how far they are.

    Stops them on Ctrl-C, SIGTERM, or when one fails (UserError).
    """
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    waiting, running = list(lanes), []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    started, first, told = time.monotonic(), total_steps(lanes, steps), 0.0
    try:
        while waiting or running:
            while waiting and len(running) < side_by_side:
                running.append(waiting.pop(0))
            running = [lane for lane in running if lane.go_on(environment)]
            if running and time.monotonic() - told > 60:
                told, done = time.monotonic(), total_steps(lanes, steps)
                rate, missing = (done - first) / (told - started), steps * len(lanes) - done
                left = utils.duration(missing / rate) if rate > 0 else "not known yet"
                now = ", ".join(f"{ln.folder.name} step {ln.steps_done():,}" for ln in running)
                print(f"{now}; time left for training: {left}", flush=True)
            time.sleep(1)
    except (KeyboardInterrupt, utils.UserError) as error:
        for lane in running:
            lane.stop()
        for lane in running:
            lane.wait()
        if isinstance(error, KeyboardInterrupt):
            print("stopped: the same command goes on", file=sys.stderr)
        raise


def total_steps(lanes: list[Lane], steps: int) -> int:
    return sum(min(steps, lane.steps_done()) for lane in lanes)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of this script; `more` are those of train.py. UserError for those that clash."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = build_parser(__doc__)
    parser.add_argument("dataset_root")
    parser.add_argument("--test_root", help="to evaluate on (default: dataset_root)")
    parser.add_argument("--preset", default="claims", help="of all versions; none: no preset")
    parser.add_argument("--dataset_name", default="CIFAR-10")
    parser.add_argument("--output_root", default="output")
    parser.add_argument("--result_path", help="default: OUTPUT_ROOT/DATASET_NAME/figures")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=VERSIONS)
    parser.add_argument("--lanes", type=int, help="runs side by side (default: cores, or 1 GPU)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv[:split])
    args.more = argv[split + 1 :]
    clash = sorted(OWN & {word.split("=")[0].removeprefix("--") for word in args.more})
    if clash:
        raise utils.UserError(
            f"--{clash[0]} after -- would make the runs differ in more than momentum and "
            "shuffling, or is set before it: leave it out there"
        )
    if args.lanes is not None and args.lanes < 1:
        raise utils.UserError(f"--lanes {args.lanes} must be 1 or more")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    experiment = Experiment(
        dataset_root=args.dataset_root,
        test_root=args.test_root or args.dataset_root,
        preset=[] if args.preset == "none" else [args.preset],
        dataset_name=args.dataset_name,
        output_root=args.output_root,
        result_path=[] if args.result_path is None else [f"--result_path={args.result_path}"],
        device=args.device,
        versions=args.versions,
        seeds=args.seeds,
        more=args.more,
    )
    cores, on_gpu = os.cpu_count() or 1, torch.cuda.is_available() and args.device != "cpu"
    side_by_side = args.lanes or (1 if on_gpu else cores)
    threads = cores if on_gpu else max(1, cores // side_by_side)
    threads = os.environ.get("OMP_NUM_THREADS", str(threads))
    lanes = experiment.lanes()
    last = f"epoch_{experiment.settings.max_epoch:04d}.pth.tar"
    trained = sum((lane.folder / "checkpoints" / last).exists() for lane in lanes)
    print(
        f"{len(lanes)} runs of {experiment.steps:,} steps, {trained} of them trained; "
        f"{side_by_side} side by side, {threads} threads each",
        flush=True,
    )
    run_all(lanes, side_by_side, threads, experiment.steps)
    script, *flags = experiment.draw()
    print(f"python {shlex.join([script, *flags])}", flush=True)
    sys.exit(subprocess.run([sys.executable, str(ROOT / script), *flags]).returncode)


if __name__ == "__main__":
    utils.guard(main)
