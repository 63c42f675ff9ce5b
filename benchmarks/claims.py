"""The experiment M0 to M3 with several seeds, start to end: pretrain, evaluate, draw. What is done is skipped, what was stopped goes on.

    python benchmarks/claims.py ROOT/fashion-mnist                          Fashion-MNIST on a small machine: preset claims, two seeds, a run on each core
    python benchmarks/claims.py ROOT/fashion-mnist --lanes 4 --device cuda --seeds 0 1 2 -- --max_epoch 100 --schedule 60 80
    python benchmarks/claims.py ROOT/ILSVRC/Data/CLS-LOC --preset none --dataset_name IMAGENET-64 --lanes 1 --test_root ROOT/STL-10

What follows `--` goes to train.py, and may be anything but what this experiment sets itself. Runs are output/DATASET_NAME/M0-seed0, ...; their messages are in claims.log beside them. The figures go to --result_path, their
data to RESULT_PATH/data. Ctrl-C and SIGTERM stop the runs after their step; the same command goes on.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dataloader
import evaluate
import utils

VERSIONS = ["M0", "M1", "M2", "M3"]
OWN = {
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


class Lane:
    """The commands of one run, one after the other; one may be a function that says, when its turn has come, what there is to do."""

    def __init__(
        self,
        name: str,
        folder: Path,
        commands: list[list[str] | Callable[[], list[str]]],
        environment: dict[str, str],
    ) -> None:
        self.name, self.folder, self.commands, self.environment = (
            name,
            folder,
            commands,
            environment,
        )
        self.process: subprocess.Popen | None = None

    def alive(self) -> bool:
        """Start the next command where the last has ended; UserError if that failed."""
        if self.process is not None and self.process.poll() is None:
            return True
        if self.process is not None and self.process.returncode:
            raise utils.UserError(
                f"{self.name} failed (status {self.process.returncode}): {self.last_line()} (all of it: {self.folder / 'claims.log'})"
            )
        while self.commands:
            command = self.commands.pop(0)
            script, *flags = command if isinstance(command, list) else command() or [""]
            if script:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / "claims.log", "ab") as log:
                    self.process = subprocess.Popen(
                        [sys.executable, str(ROOT / script), *flags],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=self.environment,
                    )
                return True
        return False

    def last_line(self) -> str:
        lines = (self.folder / "claims.log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else ""


def steps_done(folder: Path) -> int:
    try:
        return int(utils.read_csv(folder / "log.csv", ["step"])["step"][-1])
    except (utils.UserError, IndexError):
        return 0


def main(argv: list[str]) -> None:
    more = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = utils.Parser(
        prog="python benchmarks/claims.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dataset_root")
    parser.add_argument(
        "--test_root", help="where the encoders are evaluated (default: dataset_root)"
    )
    parser.add_argument(
        "--preset",
        default="claims",
        help="the settings that all versions share; none: train.py's defaults",
    )
    parser.add_argument("--dataset_name", default="FASHION-MNIST")
    parser.add_argument("--output_root", default="output")
    parser.add_argument("--result_path", default="img")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=VERSIONS)
    parser.add_argument(
        "--lanes", type=int, help="runs side by side (default: the number of cores, on a GPU 1)"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    if own := sorted(OWN & {word.split("=")[0].removeprefix("--") for word in more}):
        raise utils.UserError(
            f"--{own[0]} after -- would make the runs differ in more than momentum and shuffling, or is set before it: leave it out there"
        )
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    args.lanes = args.lanes if args.lanes is not None else 1 if on_gpu else os.cpu_count() or 1
    if args.lanes < 1:
        raise utils.UserError(f"--lanes {args.lanes} must be 1 or more")
    preset = [] if args.preset == "none" else [args.preset]
    place = [f"--device={args.device}"]
    flags = [
        *(["--preset", *preset] if preset else []),
        f"--encoder_output_root={args.output_root}",
        f"--encoder_dataset_name={args.dataset_name}",
        f"--dataset_root={args.test_root or args.dataset_root}",
        *place,
    ]
    cores = str(os.cpu_count() or 1) if on_gpu else str(max(1, (os.cpu_count() or 1) // args.lanes))
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores)}

    def options(version: str, seed: int) -> list[str]:
        return [
            "--preset",
            *preset,
            version,
            f"--exp_version={version}-seed{seed}",
            f"--seed={seed}",
            f"--dataset_root={args.dataset_root}",
            f"--dataset_name={args.dataset_name}",
            f"--output_root={args.output_root}",
            *place,
            *more,
        ]

    cfg = utils.load_config("train", options("M3", 0))  # all errors before any work
    epochs = cfg.max_epoch
    images = len(
        dataloader.open_dataset(
            args.dataset_root, "pretrain", view="square", resize=cfg.resize, crop=cfg.crop
        )
    )
    steps = epochs * (images // cfg.batch_size)
    lanes, folders = [], []
    for seed in args.seeds:
        for version in args.versions:
            run = f"{version}-seed{seed}"
            folder = utils.run_folder(args.output_root, args.dataset_name, run)
            folders.append(folder)
            evaluation = [
                "visualize.py",
                *flags,
                f"--encoder_exp_version={run}",
                f"--load_pretrained_epoch={epochs}",
                "--figures",
                "accuracy",  # reuses a result that fits
                f"--result_path={folder}/figures",
            ]
            lanes.append(
                Lane(
                    run,
                    folder,
                    [["train.py", *options(version, seed), "--resume"], evaluation],
                    environment,
                )
            )  # a run that is done has nothing left to do
            if version == args.versions[-1]:
                command = ["test.py", *flags, f"--encoder_exp_version={run}", "--encoder=random"]
                lanes[-1].commands.append(
                    lambda folder=folder, command=command: untrained_command(
                        folder, args.test_root or args.dataset_root, epochs, command
                    )
                )
    done = sum(
        (folder / "checkpoints" / f"epoch_{epochs:04d}.pth.tar").exists() for folder in folders
    )
    print(
        f"{len(folders)} runs of {steps:,} steps, {done} of them trained; {args.lanes} side by side, {environment['OMP_NUM_THREADS']} threads each",
        flush=True,
    )
    run_all(lanes, args.lanes, folders, steps)
    kept = sorted({*range(cfg.save_weight_epoch, epochs + 1, cfg.save_weight_epoch), epochs})
    command = [
        "visualize.py",
        *flags,
        f"--result_path={args.result_path}",
        f"--encoder_exp_version={args.versions[-1]}",
        f"--load_pretrained_epoch={epochs}",
        "--multiple_encoder_exp_version",
        *args.versions,
        "--loss_exp_version",
        *args.versions,
        "--seeds",
        *map(str, args.seeds),
        "--multiple_pretrained_epoch",
        *map(str, kept),
    ]
    print("python " + shlex.join(command), flush=True)
    sys.exit(subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode)


def untrained_command(folder: Path, test_root: str, epochs: int, command: list[str]) -> list[str]:
    """The command, unless the untrained encoder was measured as the trained one was, which the newest result on these data says."""
    paths = sorted(folder.glob("eval/*/result.json"), key=os.path.getmtime)
    results = [result for path in paths if (result := evaluate.read_result(path.parent))]
    trained = [
        result
        for result in results
        if result["epoch"] == epochs and result["dataset_root"] == evaluate.data_path(test_root)
    ]
    return (
        []
        if trained and any(evaluate.is_baseline(result, trained[-1]) for result in results)
        else command
    )


def run_all(waiting: list[Lane], lanes: int, folders: list[Path], steps: int) -> None:
    """Keep `lanes` runs going until all are done; says every minute how far they are. Stops them all on Ctrl-C, or when one fails."""
    running: list[Lane] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    started, first, told = (
        time.monotonic(),
        sum(min(steps, steps_done(folder)) for folder in folders),
        0.0,
    )
    try:
        while waiting or running:
            while waiting and len(running) < lanes:
                running.append(waiting.pop(0))
            running = [lane for lane in running if lane.alive()]
            if running and time.monotonic() - told > 60:
                told, done = (
                    time.monotonic(),
                    sum(min(steps, steps_done(folder)) for folder in folders),
                )
                rate = (done - first) / (told - started)
                left = (
                    utils.duration((steps * len(folders) - done) / rate)
                    if rate > 0
                    else "not known yet"
                )
                print(
                    ", ".join(f"{lane.name} step {steps_done(lane.folder):,}" for lane in running)
                    + f"; time left for training: {left}",
                    flush=True,
                )
            time.sleep(1)
    except (KeyboardInterrupt, utils.UserError) as error:
        for lane in running:
            if lane.process is not None and lane.process.poll() is None:
                lane.process.send_signal(signal.SIGTERM)
        for lane in running:
            if lane.process is not None:
                lane.process.wait()
        if isinstance(error, KeyboardInterrupt):
            print("stopped: the same command goes on", file=sys.stderr)
        raise


if __name__ == "__main__":
    utils.main_guard(main)
