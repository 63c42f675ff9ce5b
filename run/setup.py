"""Before a run starts: check what its flags mean together, and tell the user what will run."""

import dataclasses
import importlib.util
import math
import zlib
from pathlib import Path

import torch

import config
import dataloader
import encoders
from config import TrainSettings, pixels_of
from data.base import Dataset, height_width, in_px
from data.decoding import LOOKED_AT
from parallel import Launch
from run import compute, splits
from run.flags import show
from run.memory import check_memory, image_bytes
from utils import UserError, provenance, say, warn


def resolve(settings: TrainSettings, launch: Launch, checkpoint: dict | None) -> Dataset:
    """Open the data, resolve every `auto`, and check what the flags mean together.

    Errors come before any work: UserError. A resumed run keeps what `auto` chose when it began.
    """
    check_flags(settings)
    check_launch(settings, launch)
    encoder = check_encoder(settings, fresh=checkpoint is None)
    for name in ("bn_groups", "precision"):
        if checkpoint is not None and getattr(settings, name) == "auto":
            setattr(settings, name, checkpoint.get("config", {}).get(name, "auto"))
    settings.device = launch.device.type
    settings.precision = compute.pick_precision(settings.precision, launch.device)
    groups = splits.resolve_bn_groups(settings.bn_groups, settings.batch_size, launch)
    if settings.bn_groups == "auto" and launch.devices == 1 and groups < 8:
        say(f"--bn_groups auto: {groups}, not 8, for groups of {splits.FEW} images or more")
    settings.bn_groups = groups
    dataset = dataloader.open_dataset(
        settings.dataset_root,
        "pretrain",
        fit="square",
        resize=settings.resize,
        crop=settings.crop,
        pixels=pixels_of(settings),
        download=settings.download,
    )
    settings.resize, low_high = dataset.resize, dataset.size.pixels.value_range
    settings.value_range = None if low_high is None else list(low_high)
    check_sizes(settings, dataset)
    check_channels(settings, dataset)
    check_step(settings, dataset, launch, encoder)
    return dataset


def check_flags(settings: TrainSettings) -> None:
    """UserError for flags that are missing, or contradict each other."""
    if settings.dataset_root is None:
        raise UserError("--dataset_root is missing: give a folder of images, or the word shapes")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package: pip install tensorboard")
    if settings.knn_root is not None and not settings.knn_every:
        raise UserError(f"--knn_root {settings.knn_root!r} needs --knn_every: give it, too")
    smallest, largest = settings.crop_scale
    if not 0 < smallest <= largest:
        raise UserError(f"--crop_scale {smallest} {largest} must rise from above 0, as 0.2 1 does")
    if settings.value_range and len(set(settings.value_range)) == 1:
        raise UserError(f"--value_range {show(settings.value_range)}: black and white must differ")


def check_launch(settings: TrainSettings, launch: Launch) -> None:
    """UserError for flags that do not go with the launch."""
    if settings.download and launch.processes > 1:
        raise UserError("--download is for one process: fetch the data with plain python first")
    for name in ("compile", "cuda_graph"):
        if getattr(settings, name) and launch.devices > launch.processes:
            raise UserError(f"--{name} does not work with nn.DataParallel: use torchrun")
    if settings.cuda_graph and launch.device.type != "cuda":
        raise UserError(f"--cuda_graph needs a GPU, not {launch.device.type}: leave it out")
    if settings.cuda_graph and settings.symmetric:  # two passes forward, then two backward
        raise UserError("--cuda_graph does not work with --symmetric: leave one out")


def check_encoder(settings: TrainSettings, fresh: bool) -> torch.nn.Module:
    """The encoder; UserError unless it can be built, and for a fresh run read from --init."""
    encoder = encoders.build_from(settings)
    has_norms = any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules())
    if not has_norms and (settings.shuffle_bn or settings.bn_groups != "auto"):
        warn(f"{settings.arch} has no batch norm: --bn_groups and --shuffle_bn have no effect")
    if settings.init is not None and fresh:
        loaded = encoders.load(settings.init, settings.arch)
        if loaded.small_stem != settings.small_stem:
            remedy = "add --small_stem" if loaded.small_stem else "leave out --small_stem"
            raise UserError(f"--init {settings.init!r} has another first layer: {remedy}")
        if loaded.channels not in (3, settings.channels):
            raise UserError(
                f"--init {settings.init!r} is for {loaded.channels} channels: give as many"
            )
    return encoder


def check_sizes(settings: TrainSettings, dataset: Dataset) -> None:
    images = len(dataset)
    if settings.num_keys > images:
        raise UserError(
            f"--num_keys {settings.num_keys} is larger than the data set ({images} images), so "
            "each image's old key would be among its negatives: "
            f"use --num_keys {fitting_keys(images)}"
        )
    if settings.batch_size > images:
        raise UserError(
            f"--batch_size {settings.batch_size} is larger than the data set ({images} images)"
        )
    if settings.pixel_boxes and dataset.native != settings.resize:
        raise UserError(
            "--pixel_boxes needs a data set of one size kept at that size, not "
            f"{dataset.name} at --resize {settings.resize}: leave it out"
        )
    if settings.rotate90 and len(set(height_width(settings.crop))) > 1:
        raise UserError(f"--rotate90 needs square views, not --crop {in_px(settings.crop)}")
    smallest = min(splits.chunks(settings.batch_size, settings.bn_groups))
    if smallest < splits.FEW:
        enough = max(1, settings.batch_size // splits.FEW)
        warn(
            f"--batch_size {settings.batch_size} in --bn_groups {settings.bn_groups} leaves "
            f"{smallest} images in a group, too few for their mean and variance, so the loss may "
            f"stop being finite: use {enough} groups or fewer, or a larger batch"
        )
    if settings.shuffle_bn and settings.bn_groups == 1:
        warn("--shuffle_bn has no effect with one batch-norm group (--bn_groups 1)")


def check_channels(settings: TrainSettings, dataset: Dataset) -> None:
    """UserError without a mean and a deviation for each channel, and with what it would be."""
    channels = settings.channels
    if len(settings.mean) == len(settings.std) == channels:
        return
    some = torch.arange(0, len(dataset), math.ceil(len(dataset) / LOOKED_AT))
    values = dataset.fetch(some).images.double() / 255
    mean, std = (
        " ".join(f"{x:.3g}" for x in of(dim=(0, 2, 3)).tolist()) for of in (values.mean, values.std)
    )
    raise UserError(
        f"--channels {channels} needs {channels} values of --mean and of --std; those of "
        f"{len(some)} of the images are: --mean {mean} --std {std}"
    )


def check_step(
    settings: TrainSettings, dataset: Dataset, launch: Launch, encoder: torch.nn.Module
) -> None:
    """UserError if a step takes more memory than there is."""
    rows = max(launch.device_rows(settings.batch_size, settings.bn_groups))
    kept, _ = image_bytes(encoder, settings.channels, settings.crop, settings.precision)
    what = f"--batch_size {settings.batch_size} of {settings.arch} at --crop {in_px(settings.crop)}"
    remedy = "use a smaller --batch_size, --crop or --resize"
    check_memory(rows * (kept + dataset.image_bytes), launch.device, what, remedy)


def announce(
    settings: TrainSettings,
    folder: Path,
    dataset: Dataset,
    launch: Launch,
    checkpoint: dict | None,
) -> None:
    made_by = provenance()
    commit = f"{made_by['commit']}{' (changed)' if made_by['changed'] else ''}"
    say(f"MoCo, commit {commit}, torch {made_by['torch']}, {launch.name}, {settings.precision}")
    say(config.describe(settings, "configuration"))
    say(
        f"data: {len(dataset):,} images ({dataset.name}), stored at {dataset.resize} px, views of "
        f"{in_px(settings.crop)}; chance loss log(K+1) = {math.log(settings.num_keys + 1):.2f}"
    )
    if launch.note:
        say(f"note: {launch.note}")
    if checkpoint is not None:
        say(f"resumed after step {checkpoint['step']}")
    elif settings.resume:
        say("nothing to resume: a fresh start")
    say(f"run: {folder}")


def advise(settings: TrainSettings, images: int) -> None:
    """Warn of a queue, a momentum or a schedule that do not suit the data set and its epochs."""
    share = settings.num_keys / images
    if share > 1 / 4:
        warn(
            f"--num_keys {settings.num_keys} is {100 * share:.0f} % of the {images} images, so "
            f"many of a query's negatives are its own image: try {fitting_keys(images)}"
        )
    steps_per_epoch = images // settings.batch_size
    steps, m = settings.max_epoch * steps_per_epoch, settings.momentum
    if round(steps * (1 - m), 6) < 5:  # the key encoder does not leave its start behind
        remedy = "use --momentum 0.999"
        if m < 1:
            epochs = math.ceil(round(5 / (1 - m), 6) / steps_per_epoch)
            remedy = f"give it --max_epoch {epochs}, or a lower momentum (which may collapse)"
        warn(
            f"with --momentum {m:g} the key encoder moves by {1 - m:.2g} of the way to the query "
            f"encoder in a step, and there are {steps} steps: {remedy}"
        )
    schedule = settings.schedule
    if schedule and not settings.cosine and min(schedule) >= settings.max_epoch:
        early = " ".join(str(round(part * settings.max_epoch)) for part in (0.6, 0.8))
        warn(
            f"--schedule {show(schedule)} begins after --max_epoch {settings.max_epoch}, so "
            f"the learning rate never falls: try --schedule {early}, or --cosine"
        )


def fitting_keys(images: int) -> int:
    """The largest power of two for K that is a quarter of the images at most."""
    return 2 ** max(0, math.floor(math.log2(images / 4)))


def compare_processes(
    settings: TrainSettings,
    launch: Launch,
    dataset: Dataset,
    step: int,
    monitor_images: int,
) -> None:
    """UserError unless all processes see the same checkpoint, settings and images."""
    local = config.names_with(TrainSettings, config.PER_MACHINE)
    shared = {n: v for n, v in dataclasses.asdict(settings).items() if n not in local}
    seen = {
        "step of the checkpoint": step,
        "checksum of the settings": zlib.crc32(repr(sorted(shared.items())).encode()),
        "number of images": len(dataset),
        "names of the images": dataset.checksum,
        "number of labelled images for --knn_every": monitor_images,
    }
    for what, value in seen.items():
        lowest, highest = launch.largest([-value, value])
        if -lowest != highest:
            raise UserError(
                f"the processes disagree on the {what}: {value} here, from {-lowest} to {highest} "
                "over all. Give all machines the same flags and hardware, and --output_root and "
                "--dataset_root on file systems that they share"
            )
