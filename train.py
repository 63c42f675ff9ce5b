"""Pretrain an image encoder with Momentum Contrast.

    python train.py --dataset_root=ROOT/ILSVRC/Data/CLS-LOC/train --shuffle_bn      ResNet-50 at 64 px, 200 epochs
    python train.py --preset demo                                                   built-in data, minutes on a laptop
    python train.py --preset M0 --dataset_root=...                                  M0, M1, M2, M3, mocov2: see config.yaml
    torchrun --standalone --nproc_per_node=6 train.py --dataset_root=...            six GPUs, a process each (plain python: nn.DataParallel)
    python train.py --help                                                          every flag with its default

Writes output/DATASET_NAME/EXP_VERSION/: config.yaml, log.csv, loss.png, checkpoints/epoch_NNNN.pth.tar and last.pth.tar.
Same seed, same curve, on any number of devices: every random number comes from (seed, epoch) or (seed, step), and --bn_groups
says how the batch is normalised. `--resume` goes on exactly where the last save was, on whatever devices; Ctrl-C and
SIGTERM finish the step and save first.
"""

import importlib.util
import itertools
import math
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import augment
import dataloader
import evaluate
import parallel
import utils
from model import (
    ARCHS,
    MoCo,
    alignment,
    contrast_hits,
    contrastive_loss,
    effective_rank,
    uniformity,
)
from utils import UserError

LOG_COLUMNS = [
    "step",
    "epoch",
    "loss",
    "contrast_top1",
    "lr",
    "images_per_second",
    "data_wait_percent",
    "peak_memory_mb",
    "alignment",
    "uniformity",
    "effective_rank",
    "knn_top1",
]
AUTO_FROM_CHECKPOINT = (
    "bn_groups",
    "precision",
)  # on --resume auto is what it was, whatever the hardware now
MAY_CHANGE_ON_RESUME = {
    "dataset_root",
    "dataset_name",
    "exp_version",
    "output_root",
    "num_workers",
    "pack",
    "compile",
    "download",
    "device",
    "log_every",
    "save_weight_epoch",
    "save_every_minutes",
    "knn_every",
    "knn_root",
    "knn_images",
    "tensorboard",
    "resume",
    "overwrite",
}
MAY_DIFFER_BETWEEN_MACHINES = {
    "dataset_root",
    "output_root",
    "knn_root",
    "num_workers",
    "pack",
}  # of a launch
QUEUE_EPOCH = (
    2**32
)  # the epoch number under which images for the first queue are drawn: no training epoch is called so


def main(argv: list[str]) -> None:
    cfg = utils.load_config("train", argv)
    launch = utils.checked(parallel.launch, cfg.device)
    folder = utils.run_folder(cfg.output_root, cfg.dataset_name, cfg.exp_version)
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one")
    lock = utils.FolderLock(folder)
    if launch.rank == 0 and cfg.resume and folder.is_dir():
        lock.take()  # before the checkpoint is read
    checkpoint, path = utils.checkpoint_to_resume(folder) if cfg.resume else (None, None)
    dataset, recipe, monitor = set_up(cfg, launch, checkpoint)
    if checkpoint is not None:
        refuse_changes(checkpoint, cfg, dataset, path)
    if launch.rank == 0:
        utils.prepare_run_folder(folder, lock, cfg.resume, cfg.overwrite)
        announce(cfg, folder, dataset, launch, checkpoint)
        advise(cfg, len(dataset))
    if cfg.pack is not None:
        dataset = dataloader.packed(dataset, cfg.dataset_root, cfg.pack, cfg.num_workers)
    cfg.resume = cfg.overwrite = False  # how this process began is no property of the run
    with launch:
        train(cfg, launch, folder, dataset, recipe, monitor, checkpoint)


def train(
    cfg: SimpleNamespace,
    launch: parallel.OneDevice,
    folder: Path,
    dataset: Any,
    recipe: augment.Recipe,
    monitor: evaluate.Monitor | None,
    checkpoint: dict[str, Any] | None,
) -> None:
    """Set up the model, and the loop."""
    device = launch.device
    torch.manual_seed(utils.generator(cfg.seed, "weights").initial_seed())
    moco = MoCo(
        arch=cfg.arch,
        feature_dim=cfg.feature_dim,
        num_keys=cfg.num_keys,
        momentum=cfg.momentum,
        temperature=cfg.temperature,
        bn_groups=cfg.bn_groups // launch.devices,
        mlp=cfg.mlp,
        small_stem=cfg.small_stem,
    )
    moco.to(
        device=device,
        dtype=parallel.precision_dtype(cfg.precision),
        memory_format=torch.channels_last,
    )
    optimizer = torch.optim.SGD(
        moco.encoder_q.parameters(),
        lr=cfg.lr,
        momentum=cfg.sgd_momentum,
        weight_decay=cfg.weight_decay,
        fused=device.type != "mps",
    )
    failures = dataloader.Failures(
        len(dataset), folder / "unreadable.txt" if launch.rank == 0 else None
    )
    stop = utils.StopSignal()
    steps_per_epoch = len(dataset) // cfg.batch_size
    meter = Meter(launch, parallel.precision_dtype(cfg.precision))
    step = 0 if checkpoint is None else restore(checkpoint, moco, optimizer, meter)
    if cfg.compile:
        compile_encoders(moco, cfg, launch)
    launch.attach(moco, cfg.batch_size, cfg.bn_groups)
    start_together(launch, cfg, dataset, step, monitor)
    if checkpoint is None and cfg.queue_init == "keys":
        fill_queue(moco, dataset, recipe, cfg, launch, failures, stop)
    if launch.rank == 0:
        log = utils.Log(folder / "log.csv", LOG_COLUMNS, step)
        saver = utils.Saver(folder, log, cfg.save_every_minutes, step if checkpoint else None)
        board = utils.Board(folder, step) if cfg.tensorboard else None
        utils.write_yaml(folder / "config.yaml", cfg)

    total = cfg.max_epoch * steps_per_epoch
    started = last_save = time.monotonic()
    meter.start(checkpoint["meter"].get("seconds", 0.0) if checkpoint else 0.0)
    batches = dataloader.iterate(
        dataset,
        order(len(dataset), cfg, step, launch),
        num_workers=cfg.num_workers,
        failures=failures,
    )
    moco.train()
    watch = utils.Stopwatch(device)
    for step, batch in enumerate(batches, start=step + 1):
        watch.lap("data")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, (step - 1) / steps_per_epoch)
        im_q, im_k = two_views(batch, recipe, cfg, step, launch)
        watch.lap("augmentation")
        with parallel.autocast(cfg.precision, device):
            logits, labels, keys = moco(im_q, im_k, shuffle=key_permutation(cfg, step))
            if cfg.symmetric:  # the views change places; both losses meet the queue as it was
                swapped = moco(
                    im_k, im_q, shuffle=key_permutation(cfg, step, "shuffle back"), update=False
                )
                logits, labels, keys = map(torch.cat, zip((logits, labels, keys), swapped))
        loss = contrastive_loss(logits, labels) * launch.weight()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        watch.lap("forward and backward")
        optimizer.step()
        moco.enqueue(keys)  # after the backward pass, which needs the queue as it was
        watch.lap("update")
        meter.add(loss, contrast_hits(logits), alignment(logits, cfg.temperature), len(keys))

        epoch, epoch_ends = (step - 1) // steps_per_epoch + 1, step % steps_per_epoch == 0
        watched = (
            monitor is not None and epoch_ends and (epoch % cfg.knn_every == 0 or step == total)
        )
        logs = step % cfg.log_every == 0 or step == total or watched
        keep = epoch_ends and (epoch % cfg.save_weight_epoch == 0 or step == total)
        due = time.monotonic() - last_save > 60 * cfg.save_every_minutes
        stopped, due, broken = launch.agreed(
            [stop.received or 0, due, len(failures.untold)], meeting=logs
        )
        if broken:
            failures.tell(launch)
        if logs or keep or stopped or due:  # the only places where a number leaves the device
            means = meter.read(
                step, folder
            )  # a loss that is not finite stops here, before it reaches a checkpoint
        if logs:
            spent = watch.read()
            row = {
                "step": step,
                "epoch": epoch,
                **means,
                "lr": optimizer.param_groups[0]["lr"],
                "data_wait_percent": 100 * spent.get("data", 0.0) / sum(spent.values()),
                "peak_memory_mb": parallel.peak_memory_mb(device),
                "uniformity": float(uniformity(keys[: min(1024, cfg.batch_size)])),
                "effective_rank": float(effective_rank(moco.queue)),
                "knn_top1": monitor.top1(launch.state_dict(moco.encoder_q))
                if watched
                else math.nan,
            }
            if launch.rank == 0:
                log.add(row)
                report(row, cfg, total)
                if board is not None:
                    board.scalars(row)
                if board is not None and (epoch_ends or step == cfg.log_every):
                    show(board, step, batch, (im_q, im_k), monitor if watched else None, cfg)
            meter.reset()
        if keep or stopped or due:
            content = snapshot(
                cfg, step, steps_per_epoch, moco, optimizer, meter, len(dataset), folder
            )
            if launch.rank == 0:
                saver.save(content, epoch if keep else None, last_chance=bool(stopped))
            last_save = time.monotonic()
        if stopped and step < total:
            if launch.rank == 0:
                print(
                    f"stopped by signal {stopped} after step {step}: saved; continue with --resume",
                    flush=True,
                )
            sys.exit(128 + stopped)
        watch.lap("kNN" if watched else "other")
    if launch.rank == 0:
        finish(folder, cfg, time.monotonic() - started, watch)


def set_up(
    cfg: SimpleNamespace, launch: parallel.OneDevice, checkpoint: dict[str, Any] | None
) -> tuple[Any, augment.Recipe, evaluate.Monitor | None]:
    """Check what the flags mean together, replace every `auto` in cfg, open the data: all errors come before any work."""
    if cfg.dataset_root is None:
        raise UserError(
            "--dataset_root is missing: give a folder of images, or the word shapes for the built-in data set"
        )
    if cfg.download and launch.processes > 1:
        raise UserError("--download is for one process: fetch the data with plain python first")
    for name in AUTO_FROM_CHECKPOINT:  # what other hardware would choose otherwise
        if checkpoint is not None and getattr(cfg, name) == "auto":
            setattr(cfg, name, checkpoint.get("config", {}).get(name, "auto"))
    cfg.device, cfg.precision = (
        launch.device.type,
        utils.checked(parallel.pick_precision, cfg.precision, launch.device),
    )
    if len(cfg.crop_scale) != 2 or not 0 < cfg.crop_scale[0] <= cfg.crop_scale[1]:
        raise UserError(
            f"--crop_scale {cfg.crop_scale} must be two areas in rising order, above 0, such as 0.2 1"
        )
    if len(cfg.mean) != 3 or len(cfg.std) != 3:
        raise UserError(f"--mean {cfg.mean} and --std {cfg.std} must have three numbers each")
    cfg.bn_groups = utils.checked(parallel.resolve_bn_groups, cfg.bn_groups, cfg.batch_size, launch)
    if cfg.arch not in ARCHS:
        raise UserError(f"--arch {cfg.arch!r} is not known: choose one of {', '.join(ARCHS)}")
    dataset = dataloader.open_dataset(
        cfg.dataset_root,
        "pretrain",
        view="square",
        resize=cfg.resize,
        crop=cfg.crop,
        download=cfg.download,
    )
    cfg.resize = dataset.resize
    if cfg.num_keys > len(dataset):
        raise UserError(
            f"--num_keys {cfg.num_keys} is larger than the data set ({len(dataset)} images), so every image would meet "
            f"itself as a negative: use at most {len(dataset)}"
        )
    if cfg.batch_size > len(dataset):
        raise UserError(
            f"--batch_size {cfg.batch_size} is larger than the data set ({len(dataset)} images)"
        )
    if cfg.shuffle_bn and cfg.bn_groups == 1 and launch.rank == 0:
        print(
            "warning: --shuffle_bn has no effect with one batch-norm group (--bn_groups 1)",
            file=sys.stderr,
        )
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if cfg.compile and launch.devices > launch.processes:
        raise UserError(
            "--compile does not work with nn.DataParallel: start a process for each GPU with torchrun, or leave it out"
        )
    if cfg.pixel_boxes and dataset.native != cfg.resize:
        raise UserError(
            f"--pixel_boxes needs a data set of one size kept at that size, not {dataset.name} at --resize {cfg.resize}: leave it out"
        )
    recipe = augment.training_recipe(vars(cfg), grid=cfg.resize)
    if cfg.knn_root is not None and not cfg.knn_every:
        raise UserError(
            f"--knn_root {cfg.knn_root!r} has no use without --knn_every: give the number of epochs between two kNN"
        )
    monitor = evaluate.Monitor(cfg, launch) if cfg.knn_every else None
    return dataset, recipe, monitor


def advise(cfg: SimpleNamespace, images: int) -> None:
    """Warn of a queue or a momentum that do not suit the size of the data set, with values that do."""
    steps = cfg.max_epoch * (images // cfg.batch_size)
    if 4 * cfg.num_keys > images:
        print(
            f"warning: --num_keys {cfg.num_keys} is {100 * cfg.num_keys / images:.0f} % of the {images} images, so many of a query's negatives are its own image: "
            f"try {2 ** max(0, math.floor(math.log2(images / 8)))}",
            file=sys.stderr,
        )
    if round(steps * (1 - cfg.momentum), 6) < 5:
        fits = next(
            (
                f"try {m}, or more epochs"
                for m in (0.999, 0.996, 0.99, 0.97, 0.9)
                if round(steps * (1 - m), 6) >= 5
            ),
            "give it more epochs",
        )
        print(
            f"warning: with --momentum {cfg.momentum:g} the key encoder moves by {1 - cfg.momentum:.2g} of the way to the query encoder in a step, "
            f"and there are {steps} steps: {fits}",
            file=sys.stderr,
        )


def start_together(
    launch: parallel.OneDevice,
    cfg: SimpleNamespace,
    dataset: Any,
    step: int,
    monitor: evaluate.Monitor | None,
) -> None:
    """UserError unless all processes see the same checkpoint, settings and numbers of images."""
    settings = zlib.crc32(
        repr(
            sorted(
                (name, value)
                for name, value in vars(cfg).items()
                if name not in MAY_DIFFER_BETWEEN_MACHINES
            )
        ).encode()
    )
    asked = sum(len(rows) for _, rows in monitor.parts) if monitor else 0
    for name, value in (
        ("checkpoint (its step is", step),
        ("settings (their checksum is", settings),
        ("data set (its images are", len(dataset)),
        ("labelled images for --knn_every (they are", asked),
    ):
        lowest, highest = launch.agreed([-value, value])
        if -lowest != highest:
            raise UserError(
                f"the processes do not see the same {name} {value} here, from {-lowest} to {highest} over all): give all machines the "
                "same flags and hardware, and --output_root and --dataset_root on file systems that they share"
            )


def order(n: int, cfg: SimpleNamespace, step: int, launch: parallel.OneDevice) -> Any:
    """This process's rows of the batches (index tensors) of the run, from after `step` to its end."""
    per_epoch, rows = n // cfg.batch_size, launch.rows()
    batches = itertools.chain.from_iterable(
        dataloader.epoch_batches(
            n,
            cfg.batch_size,
            cfg.seed,
            epoch,
            start=step - epoch * per_epoch if epoch == step // per_epoch else 0,
        )
        for epoch in range(step // per_epoch, cfg.max_epoch)
    )
    return (batch[rows] for batch in batches)


def two_views(
    batch: dataloader.Batch,
    recipe: augment.Recipe,
    cfg: SimpleNamespace,
    step: int,
    launch: parallel.OneDevice,
    streams: tuple[str, ...] = ("query", "key"),
) -> list[torch.Tensor]:
    """Views (n, 3, crop, crop) of this process's rows of a batch, one for each stream of random numbers."""
    return augment.views(
        batch.images.to(launch.device, non_blocking=True),
        batch.aspect,
        recipe,
        [utils.generator(cfg.seed, stream, step) for stream in streams],
        cfg.batch_size,
        launch.rows(),
        parallel.precision_dtype(cfg.precision),
    )


def compile_encoders(moco: MoCo, cfg: SimpleNamespace, launch: parallel.OneDevice) -> None:
    """torch.compile for both encoders, or a warning why not."""
    rows = parallel.shares(cfg.batch_size, launch.devices, cfg.bn_groups)[launch.rank]
    example = torch.zeros(
        rows,
        3,
        cfg.crop,
        cfg.crop,
        dtype=parallel.precision_dtype(cfg.precision),
        device=launch.device,
    )
    start = time.monotonic()
    for encoder in (moco.train().encoder_q, moco.encoder_k):
        reason = parallel.compile_encoder(
            encoder, example.contiguous(memory_format=torch.channels_last), cfg.precision
        )
        if reason and launch.rank == 0:
            print(
                f"warning: --compile failed, going on without it: {reason}",
                file=sys.stderr,
                flush=True,
            )
        if reason:
            return
    if launch.rank == 0:
        print(f"compiled in {utils.duration(time.monotonic() - start)}", flush=True)


def key_permutation(
    cfg: SimpleNamespace, step: int, stream: str = "shuffle"
) -> torch.Tensor | None:
    """The permutation of the keys of the global batch (N,), on the CPU; None without shuffled BN."""
    return (
        torch.randperm(cfg.batch_size, generator=utils.generator(cfg.seed, stream, step))
        if cfg.shuffle_bn
        else None
    )


def learning_rate(cfg: SimpleNamespace, epoch: float) -> float:
    """The learning rate at a moment of training, in epochs: cosine by the step, or a tenth after each epoch of the schedule."""
    if cfg.cosine:
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * epoch / cfg.max_epoch))
    return cfg.lr * 0.1 ** sum(epoch >= milestone for milestone in cfg.schedule)


def fill_queue(
    moco: MoCo,
    dataset: Any,
    recipe: augment.Recipe,
    cfg: SimpleNamespace,
    launch: parallel.OneDevice,
    failures: dataloader.Failures,
    stop: utils.StopSignal,
) -> None:
    """Start the queue with keys of real images (`queue_init: keys`), from streams of their own; SystemExit if a signal asks to stop."""
    needed = math.ceil(cfg.num_keys / cfg.batch_size)
    epochs = (
        dataloader.epoch_batches(len(dataset), cfg.batch_size, cfg.seed, QUEUE_EPOCH + i)
        for i in itertools.count()
    )
    rows = launch.rows()
    batches = [
        batch[rows] for batch in itertools.islice(itertools.chain.from_iterable(epochs), needed)
    ]
    loader = dataloader.iterate(dataset, batches, num_workers=cfg.num_workers, failures=failures)
    moco.train()
    for i, batch in enumerate(utils.progress(loader, "first queue", total=needed)):
        with parallel.autocast(cfg.precision, launch.device):
            moco.fill_queue(*two_views(batch, recipe, cfg, i, launch, streams=("queue",)))
        (stopped,) = launch.agreed([stop.received or 0])
        if stopped:
            if launch.rank == 0:
                print(
                    f"stopped by signal {stopped} before the first step: there is nothing to save",
                    flush=True,
                )
            sys.exit(128 + stopped)


class Meter:
    """Sums since the last row of the log, kept on the device of each process."""

    def __init__(self, launch: parallel.OneDevice, dtype: torch.dtype) -> None:
        self.launch, self.dtype = launch, dtype
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(
            3, dtype=self.dtype, device=self.launch.device
        )  # loss, contrast hits, alignment
        self.sound = torch.zeros(
            (), dtype=torch.int64, device=self.launch.device
        )  # steps before the first loss that is not finite
        self.steps, self.queries = 0, 0
        self.start()

    def start(self, seconds: float = 0.0) -> None:
        """Measure the time from now on; `seconds` were before."""
        self.since = time.monotonic() - seconds

    def add(
        self, loss: torch.Tensor, hits: torch.Tensor, aligned: torch.Tensor, queries: int
    ) -> None:
        """A step's mean loss and alignment on this process, its hits, and the queries of all processes."""
        self.sums += torch.stack(
            [
                loss.detach() / self.launch.processes,
                hits,
                aligned * self.launch.weight() / self.launch.processes,
            ]
        )
        self.sound += self.sums[0].isfinite()  # once it is not, it stays so
        self.steps, self.queries = self.steps + 1, self.queries + queries

    def read(self, step: int, folder: Path) -> dict[str, float]:
        """Mean loss, contrast accuracy in percent, alignment and images/s, over all processes; UserError if a loss was not finite."""
        loss, hits, aligned = self.launch.total(self.sums).tolist()
        if not math.isfinite(loss):
            first = step - self.steps + 1 - self.launch.agreed([-int(self.sound)])[0]
            raise UserError(
                f"the loss of step {first} was not finite: {last_good(folder)}; try a lower --lr"
            )
        return {
            "loss": loss / max(1, self.steps),
            "contrast_top1": 100 * hits / max(1, self.queries),
            "alignment": aligned / max(1, self.steps),
            "images_per_second": self.launch.batch_size
            * self.steps
            / max(1e-9, time.monotonic() - self.since),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": self.launch.total(self.sums),
            "steps": self.steps,
            "images": self.queries,
            "seconds": time.monotonic() - self.since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self.steps, self.queries = state["steps"], state["images"]
        self.sound += self.steps
        if self.launch.rank == 0:  # the sums of all processes
            self.sums[: len(state["sums"])] = state["sums"].to(
                self.sums
            )  # older ones hold no alignment


def last_good(folder: Path) -> str:
    path = folder / "checkpoints" / "last.pth.tar"
    return f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"


def snapshot(
    cfg: SimpleNamespace,
    step: int,
    steps_per_epoch: int,
    moco: MoCo,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    images: int,
    folder: Path,
) -> dict[str, Any]:
    """All that an exact continuation needs, on any launch; state_dict under the reference's keys (module.encoder_q.*, module.queue).

    UserError if a weight is not finite, which the loss would show at the next step only.
    """
    state = moco.launch.state_dict(moco)
    wrong = [name for name, value in state.items() if not value.isfinite().all()]
    if wrong:
        raise UserError(
            f"after step {step} {wrong[0]} is not finite: {last_good(folder)}; try a lower --lr"
        )
    return {
        "epoch": step // steps_per_epoch,
        "step": step,
        "arch": cfg.arch,
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": optimizer.state_dict(),
        "config": vars(cfg),
        "images": images,
        "meter": meter.state_dict(),
        "provenance": utils.provenance(),
    }


def refuse_changes(
    checkpoint: dict[str, Any], cfg: SimpleNamespace, dataset: Any, path: Path
) -> None:
    """UserError if the run that wrote the checkpoint was another one than cfg's, or is past its end."""
    defaults = {
        name: key.default for name, key in utils.config_keys("train").items()
    }  # of settings that are newer than the checkpoint
    old, new, end = (
        defaults | checkpoint.get("config", {}),
        vars(cfg),
        cfg.max_epoch * (len(dataset) // cfg.batch_size),
    )
    missing = [name for name in ("config", "step", "optimizer", "meter") if name not in checkpoint]
    if missing:
        raise UserError(
            f"checkpoint {str(path)!r} cannot be continued: it has no {', '.join(missing)}"
        )
    free = MAY_CHANGE_ON_RESUME | (set() if cfg.cosine else {"max_epoch"})
    changed = [
        f"{name} {old[name]!r} -> {new[name]!r}"
        for name in new
        if name not in free and old[name] != new[name]
    ]
    if checkpoint.get("images") != len(dataset):
        changed.append(f"images {checkpoint.get('images')} -> {len(dataset)}")
    if changed:
        raise UserError(
            f"--resume with other settings than those of {path}: {'; '.join(changed)}: go back to them, or name another --exp_version"
        )
    if checkpoint["step"] > end:
        raise UserError(
            f"--max_epoch {cfg.max_epoch} ends at step {end}, but {str(path)!r} is already at step {checkpoint['step']}: use a larger one"
        )


def restore(
    checkpoint: dict[str, Any], moco: MoCo, optimizer: torch.optim.Optimizer, meter: Meter
) -> int:
    """Put a checkpoint's state back; returns its step."""
    fused = optimizer.defaults["fused"]  # a matter of the device
    try:
        moco.load_state_dict(
            {
                name.removeprefix("module."): value
                for name, value in checkpoint["state_dict"].items()
            }
        )
        optimizer.load_state_dict(checkpoint["optimizer"])
        meter.load_state_dict(checkpoint["meter"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the checkpoint does not fit its own settings, it is damaged: {' '.join(str(error).split())[:160]}"
        ) from None
    for group in optimizer.param_groups:
        group["fused"] = fused
    return checkpoint["step"]


def announce(
    cfg: SimpleNamespace,
    folder: Path,
    dataset: Any,
    launch: parallel.OneDevice,
    checkpoint: dict[str, Any] | None,
) -> None:
    made_by = utils.provenance()
    print(
        f"MoCo, commit {made_by['commit']}{' (changed)' if made_by['changed'] else ''}, torch {made_by['torch']}, {launch.name}, {cfg.precision}"
    )
    print(utils.describe(cfg, "configuration"))
    print(
        f"data: {len(dataset):,} images ({dataset.name}), stored at {dataset.resize} px, views of {cfg.crop} px; "
        f"chance loss log(K+1) = {math.log(cfg.num_keys + 1):.2f}"
    )
    if launch.note:
        print(f"note: {launch.note}")
    if cfg.resume:
        print(
            f"resumed after step {checkpoint['step']}"
            if checkpoint
            else "nothing to resume: a fresh start"
        )
    print(f"run: {folder}", flush=True)


def show(
    board: utils.Board,
    step: int,
    batch: dataloader.Batch,
    views: tuple[torch.Tensor, torch.Tensor],
    monitor: evaluate.Monitor | None,
    cfg: SimpleNamespace,
) -> None:
    """A few images and their views for TensorBoard, and after a kNN the neighbours and the features."""
    import visualize  # matplotlib is needed only here

    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    pixels = [
        (255 * (view[:6].float().cpu() * std + mean)).round().clamp(0, 255).to(torch.uint8).numpy()
        for view in views
    ]
    board.figure(
        "views",
        visualize.views_figure(
            {
                "images": batch.images[:6].numpy(),
                "aspect": batch.aspect[:6].numpy(),
                "query": pixels[0],
                "key": pixels[1],
                "names": np.array([""] * len(batch.images[:6])),
            }
        ),
        step,
    )
    if monitor is not None:
        (bank, voters), (asked, askers) = monitor.parts
        labels, images = (
            (bank.labels[voters], asked.labels[askers]),
            (visualize.ImagesOf(bank, voters), visualize.ImagesOf(asked, askers)),
        )
        found = visualize.neighbours_data(
            images[0],
            labels[0],
            images[1],
            labels[1],
            {"trained": tuple(monitor.features)},
            bank.classes,
            cfg.seed,
            k=min(6, len(voters)),
        )
        board.figure("neighbours", visualize.neighbours_figure(found), step)
        board.features(
            monitor.features[1][:2000],
            [bank.classes[label] for label in labels[1][:2000].tolist()],
            step,
        )


def report(row: dict[str, float], cfg: SimpleNamespace, total: int) -> None:
    left = (total - row["step"]) * cfg.batch_size / row["images_per_second"]
    print(
        f"epoch {row['epoch']}/{cfg.max_epoch}  step {row['step']}/{total}  loss {row['loss']:.3f}  contrast top-1 {row['contrast_top1']:.1f} %  "
        + (f"kNN {row['knn_top1']:.1f} %  " if not math.isnan(row["knn_top1"]) else "")
        + f"lr {row['lr']:.4g}  {row['images_per_second']:.0f} images/s  left {utils.duration(left)}",
        flush=True,
    )


def finish(folder: Path, cfg: SimpleNamespace, seconds: float, watch: utils.Stopwatch) -> None:
    """Draw the loss, say where the time went and where everything is."""
    import visualize  # matplotlib is needed only here

    try:
        figure = visualize.loss_figure({cfg.exp_version: [visualize.read_loss(folder)]})
        utils.atomic_write(
            folder / "loss.png", lambda file: figure.savefig(file, format="png", dpi=120)
        )
        log = utils.read_csv(folder / "log.csv", LOG_COLUMNS)
        if any(not math.isnan(top1) for top1 in log["knn_top1"]):
            visualize.write_figure(folder / "knn.png", visualize.knn_figure(log))
    except UserError as error:  # what counts is saved
        print(f"warning: a figure is not drawn: {error}", file=sys.stderr)
    watch.read()
    parts = [
        f"{name} {100 * spent / sum(watch.total.values()):.0f} %"
        for name, spent in watch.total.items()
    ]
    print("time: " + ", ".join(parts) if parts else "time: no step was left to do")
    print(
        f"done after {utils.duration(seconds)}: {folder}/checkpoints/last.pth.tar, log.csv, loss.png",
        flush=True,
    )


if __name__ == "__main__":
    utils.main_guard(main)
