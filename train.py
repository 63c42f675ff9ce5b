"""Pretrain an image encoder with Momentum Contrast.

    python train.py --preset demo                             built-in images, minutes on a laptop
    python train.py --dataset_root=IMAGENET/train --shuffle_bn       ResNet-50 at 64 px, one device
    python train.py --preset M3 --dataset_root=...                M0 to M3, mocov2, ...: config.yaml
    torchrun --standalone --nproc_per_node=6 train.py --dataset_root=...   six GPUs, a process each

Writes output/DATASET_NAME/EXP_VERSION/: config.yaml, log.csv, loss.png, checkpoints/.
Same seed, same curve, on any number of devices: every random number comes from (seed, epoch) or
(seed, step), and --bn_groups says how a batch is normalised. --resume goes on exactly where the
last save was; Ctrl-C and SIGTERM finish the step and save first.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import augment
import config
import dataloader
import encoders
import parallel
from config import TrainSettings
from data import store
from data.base import Batch, Dataset, height_width
from evaluation.monitor import Monitor
from model import MoCo, contrastive_loss, to_device
from parallel import Launch
from run import checkpoints, compute, resume, setup, splits
from run.folder import FolderLock, claim, clear, path_of
from run.keeper import Keeper
from utils import (
    UserError,
    cosine,
    duration,
    generator,
    guard,
    progress,
    say,
    warn,
)

QUEUE_EPOCH = 2**32  # where the images of the first queue are drawn: no training epoch is so late


def main(argv: list[str]) -> None:
    settings = config.parse(TrainSettings, argv, __doc__)
    launch = parallel.open_launch(settings.device)
    folder = path_of(settings.output_root, settings.dataset_name, settings.exp_version)
    if settings.resume and settings.overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one")
    init = Path(settings.init).resolve() if settings.init is not None else None
    if settings.overwrite and init is not None and folder.resolve() in init.parents:
        reason = "is of the run that --overwrite deletes: copy it elsewhere first"
        raise UserError(f"--init {settings.init!r} {reason}")
    lock = FolderLock(folder)
    if launch.rank == 0 and settings.resume and folder.is_dir():
        lock.take()  # before the checkpoint is read
    checkpoint, path = checkpoints.load_last(folder) if settings.resume else (None, None)
    dataset = setup.resolve(settings, launch, checkpoint)
    monitor = Monitor(settings, launch) if settings.knn_every else None
    if checkpoint is not None:
        resume.check(checkpoint, path, settings, len(dataset))
    if launch.rank == 0:
        claim(folder, lock, settings.resume, settings.overwrite)
        setup.announce(settings, folder, dataset, launch, checkpoint)
        setup.advise(settings, len(dataset))
    if settings.pack is not None:
        dataset = store.pack(dataset, settings.dataset_root, settings.pack, settings.num_workers)
    if launch.rank == 0:
        clear(folder, settings.resume, settings.overwrite)
    settings.resume = settings.overwrite = False  # how this process began is no part of the run
    with launch:
        train(settings, launch, folder, dataset, monitor, checkpoint)


def train(
    settings: TrainSettings,
    launch: Launch,
    folder: Path,
    dataset: Dataset,
    monitor: Monitor | None,
    checkpoint: dict | None,
) -> None:
    """Algorithm 1 of the paper. What goes on beside it is the keeper's: rows, saves, stops."""
    keeper = Keeper(settings, launch, folder, images=len(dataset))
    moco, optimizer = build_model(settings, launch, fresh=checkpoint is None)
    scaler = keeper.scaler = compute.Scaler(settings.precision, launch.device, optimizer)
    done = resume.restore(checkpoint, moco, optimizer, keeper.meter) if checkpoint else 0
    spread(moco, settings, launch)
    setup.compare_processes(settings, launch, dataset, done, monitor.images if monitor else 0)
    if checkpoint is None and settings.queue_init == "keys":
        fill_queue(moco, dataset, settings, launch, keeper)
    batches = read_batches(dataset, batch_indices(settings, len(dataset), done), launch, keeper)

    moco.train()
    untrained = keeper.measure_knn(monitor, moco) if monitor and not done else None
    watch = keeper.start(done, monitor, untrained)
    keeper.save_start(done, moco, optimizer)
    step = done
    for step, batch in enumerate(batches, start=done + 1):
        watch.lap("data")
        lr = learning_rate(settings, epoch=(step - 1) / keeper.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        im_q, im_k = make_views(batch, settings, step, launch)
        watch.lap("augmentation")
        with compute.autocast(settings.precision, launch.device):
            logits, labels, keys = moco(im_q, im_k, shuffle=key_permutation(settings, step))
            if settings.symmetric:  # the views change places; both halves meet the same queue
                permutation = key_permutation(settings, step, "shuffle back")  # another stream
                swapped = moco(im_k, im_q, shuffle=permutation, update=False)
                halves = zip((logits, labels, keys), swapped, strict=True)
                logits, labels, keys = map(torch.cat, halves)
        loss = contrastive_loss(logits, labels) * launch.loss_weight
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # the loss itself, but in fp16
        watch.lap("forward and backward")
        scaler.step(optimizer)
        moco.enqueue(keys)  # after the backward pass, which needs the queue as it was
        watch.lap("update")
        keeper.meter.add(loss, logits, len(keys))

        due = keeper.due(step)
        if due.row or due.save:  # only here do numbers leave the device
            keeper.read_means(step)
        if due.row:
            top1 = keeper.measure_knn(monitor, moco) if due.knn else math.nan
            keeper.write_row(step, lr, top1, keys, moco.queue)
            keeper.show(due, step, batch, [im_q, im_k])
        if due.save:
            keeper.save(due, step, moco, optimizer)
        if due.stop:
            keeper.leave(due, step)
        watch.lap("kNN" if due.knn else "other")
    keeper.finish(step, moco, optimizer)


# ------------------------------------------------------------------------------- the model


def build_model(
    settings: TrainSettings, launch: Launch, fresh: bool
) -> tuple[MoCo, torch.optim.Optimizer]:
    """The model at its start, of a fresh run with the weights of --init, and its optimizer."""
    torch.manual_seed(generator(settings.seed, "weights").initial_seed())
    moco = MoCo(
        settings.arch,
        settings.feature_dim,
        settings.num_keys,
        settings.momentum,
        settings.temperature,
        bn_groups=settings.bn_groups // launch.devices,
        mlp=settings.mlp,
        small_stem=settings.small_stem,
        crop=settings.crop,
        channels=settings.channels,
    )
    if fresh and settings.init is not None:
        load_first_weights(moco, settings)
    dtype = compute.precision_dtype(settings.precision)
    moco.to(launch.device, dtype, memory_format=torch.channels_last)
    options = {"lr": settings.lr, "fused": launch.device.type != "mps"}
    decay, parameters = settings.weight_decay, list(moco.encoder_q.parameters())
    if settings.optimizer == "sgd":
        momentum = settings.sgd_momentum
        return moco, torch.optim.SGD(parameters, momentum=momentum, weight_decay=decay, **options)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},  # biases, norms
    ]
    return moco, torch.optim.AdamW([group for group in groups if group["params"]], **options)


def load_first_weights(moco: MoCo, settings: TrainSettings) -> None:
    """Put the weights of --init into both encoders: the body, and the head if it fits."""
    loaded = encoders.load(settings.init, settings.arch)
    ours = moco.encoder_q.state_dict()
    head = {n: value for n, value in loaded.head.items() if n in ours}
    fits = len(head) == len(loaded.head) > 0 and all(ours[n].shape == head[n].shape for n in head)
    body = encoders.fit_channels(loaded.encoder.state_dict(), settings.channels)
    moco.encoder_q.load_state_dict(body | (head if fits else {}), strict=False)
    moco.encoder_k.load_state_dict(moco.encoder_q.state_dict())
    head = "and its head" if fits else "but not its head, which does not fit" if loaded.head else ""
    say(f"init: {settings.init}, {loaded.description}: the encoder {head}".rstrip())


def spread(moco: MoCo, settings: TrainSettings, launch: Launch) -> None:
    """Let the encoders run on all devices; compiled, and as CUDA graphs, if they are to be."""
    if settings.compile:
        say("compiling the encoders, which may take minutes")
        change_encoders("compile", compute.compile_encoder, moco, settings, launch)
    if settings.cuda_graph:
        change_encoders("cuda_graph", compute.graph_encoder, moco, settings, launch)
    launch.attach(moco, settings.batch_size, settings.bn_groups)


def change_encoders(
    flag: str,
    change: Callable[[torch.nn.Module, torch.Tensor, str], str | None],
    moco: MoCo,
    settings: TrainSettings,
    launch: Launch,
) -> None:
    """Let one of `compute`'s functions change both encoders; where it fails, warn why."""
    start = time.monotonic()
    rows = splits.shares(settings.batch_size, launch.devices, settings.bn_groups)[launch.rank]
    dtype = compute.precision_dtype(settings.precision)
    shape = rows, settings.channels, *height_width(settings.crop)
    views = torch.zeros(shape, dtype=dtype, device=launch.device)
    views = views.contiguous(memory_format=torch.channels_last)
    moco.train()
    for name in ("encoder_q", "encoder_k"):
        if reason := change(getattr(moco, name), views, settings.precision):
            warn(f"--{flag} failed for {name}, going on without it there: {reason}")
            return
    say(f"--{flag}: done in {duration(time.monotonic() - start)}")


def learning_rate(settings: TrainSettings, epoch: float) -> float:
    """The learning rate at a moment of training: a cosine, or a tenth after each milestone."""
    warmup = settings.warmup_epochs
    if epoch < warmup:
        return settings.lr * epoch / warmup
    if settings.cosine:
        return settings.lr * cosine(epoch - warmup, settings.max_epoch - warmup)
    return settings.lr * 0.1 ** sum(epoch >= milestone for milestone in settings.schedule)


def key_permutation(
    settings: TrainSettings, step: int, stream: str = "shuffle"
) -> torch.Tensor | None:
    """A permutation of the global batch (N,), on the CPU; None without shuffled batch norm."""
    if not settings.shuffle_bn:
        return None
    return torch.randperm(settings.batch_size, generator=generator(settings.seed, stream, step))


def fill_queue(
    moco: MoCo, dataset: Dataset, settings: TrainSettings, launch: Launch, keeper: Keeper
) -> None:
    """Start the queue with keys of real images, from random streams of their own."""
    epochs = itertools.chain.from_iterable(
        dataloader.epoch_batches(len(dataset), settings.batch_size, settings.seed, epoch)
        for epoch in itertools.count(QUEUE_EPOCH)
    )
    needed = math.ceil(settings.num_keys / settings.batch_size)
    batches = read_batches(dataset, itertools.islice(epochs, needed), launch, keeper)
    moco.train()
    for i, batch in enumerate(progress(batches, "first queue", total=needed)):
        (im_k,) = make_views(batch, settings, i, launch, streams=("queue",))
        with compute.autocast(settings.precision, launch.device):
            moco.fill_queue(im_k)
        keeper.leave_before_start()
    keeper.leave_before_start()  # if a signal came while it waited for images


# -------------------------------------------------------------------------------- the data


def batch_indices(settings: TrainSettings, images: int, step: int) -> Iterator[torch.Tensor]:
    """The indices (N,) of each batch from after `step` to the end of the run."""
    per_epoch = images // settings.batch_size
    first, done = divmod(step, per_epoch)
    for epoch in range(first, settings.max_epoch):
        start = done if epoch == first else 0
        yield from dataloader.epoch_batches(
            images, settings.batch_size, settings.seed, epoch, start=start
        )


def read_batches(
    dataset: Dataset, batches: Iterator[torch.Tensor], launch: Launch, keeper: Keeper
) -> Iterator[Batch]:
    """This process's rows of batches of indices, read ahead; up to a stop signal."""
    batches = dataloader.iterate(
        dataset,
        (indices[launch.batch_rows] for indices in batches),
        num_workers=keeper.settings.num_workers,
        failures=keeper.failures,
        pin=launch.device.type == "cuda",
    )
    return keeper.wait_for(batches)


def make_views(
    batch: Batch,
    settings: TrainSettings,
    step: int,
    launch: Launch,
    streams: tuple[str, ...] = ("query", "key"),
) -> list[torch.Tensor]:
    """Random views (n, C, height, width) of a process's images, one for each random stream."""
    return augment.views(
        to_device(batch.images, launch.device),
        batch.aspect,
        augment.training_recipe(settings, grid=settings.resize),
        [generator(settings.seed, stream, step) for stream in streams],
        settings.batch_size,
        launch.batch_rows,
        compute.precision_dtype(settings.precision),
    )


if __name__ == "__main__":
    guard(main)
