"""The encoder that is evaluated."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import config
import encoders
import run.checkpoints
import run.folder
import utils
from config import TestSettings, TrainSettings
from data.base import Crop, in_px


@dataclass
class Subject:
    """An encoder to evaluate, and where its results go: the folder `home`/`stem`."""

    encoder: nn.Module  # without head
    home: Path
    stem: str
    crop: Crop
    found: str  # what was recognised in the file, to tell the user
    settings: TrainSettings  # of its training; train.py's defaults where they are not known
    # for result.json: encoder, arch, checkpoint, epoch, step, first_weights
    record: dict[str, Any]


def load_subject(settings: TestSettings) -> Subject:
    """The encoder that the settings name: of a run, of a file (--pretrained), or an untrained one.

    Raises UserError if it does not exist or does not fit, or if flags contradict each other.
    """
    path, home = find_file(settings)
    untrained, foreign = settings.encoder == "random", settings.pretrained is not None
    loaded = encoders.load(path, settings.arch) if path else None
    known = loaded.settings if loaded else None
    training = known or guess_settings(settings, path)
    if loaded:
        training = replace(training, arch=loaded.arch)
    crop = training.crop if settings.crop == "auto" else settings.crop
    found, checkpoint = "", {}
    if encoders.has_fixed_size(training.arch) and crop != training.crop:
        trained = f"{training.arch} was trained at {in_px(training.crop)}"
        raise utils.UserError(f"--crop {in_px(crop)}: {trained} and takes no other size")
    if untrained:
        encoder, stem = first_encoder(training, home.parent), "random"
        if training.init is not None:
            found = f"the run started from {training.init}, not from random weights"
    else:
        encoder, checkpoint = loaded.encoder, loaded.checkpoint
        stem = name_result(path, checkpoint, known)
        if known and foreign:
            of_run = re.sub(r"[^\w.-]+", "_", f"{known.dataset_name}-{known.exp_version}")
            stem = f"{of_run}-{stem}"  # a stranger's file names no folder outside
        if not known:
            guess = f"crop {in_px(crop)}, ImageNet's mean and deviation"
            found = f"{loaded.description}; it does not say its settings: {guess}"
        elif foreign:
            found = loaded.description
    first = {name: getattr(training, name) for name in ("seed", "feature_dim", "mlp", "small_stem")}
    if training.channels != 3:
        first["channels"] = training.channels
    if training.init is not None:
        first["init"] = training.init
    record = {
        "encoder": settings.encoder,
        "arch": training.arch,
        "checkpoint": None if untrained else str(path),
        "epoch": checkpoint.get("epoch"),
        "step": checkpoint.get("step"),
        "first_weights": first if known or untrained else None,
    }
    return Subject(encoder, home, stem, crop, found, training, record)


def find_file(settings: TestSettings) -> tuple[Path | None, Path]:
    """The file of weights, and the folder for results; no file for an encoder without a run."""
    output, epoch = settings.encoder_output_root, settings.load_pretrained_epoch
    given = {
        f"--pretrained {settings.pretrained!r}": settings.pretrained is not None,
        "--encoder random": settings.encoder == "random",
        f"--load_pretrained_epoch {epoch}": epoch is not None,
    }
    if sum(given.values()) > 1:
        flags = " and ".join(flag for flag, is_given in given.items() if is_given)
        raise utils.UserError(f"{flags} contradict each other: give one")
    if settings.pretrained is not None:
        return Path(settings.pretrained), Path(output) / "eval"
    folder = run.folder.path_of(output, settings.encoder_dataset_name, settings.encoder_exp_version)
    if settings.encoder == "random" and not any(folder.glob("checkpoints/*.pth.tar")):
        if settings.arch == "auto":
            raise utils.UserError(
                f"--encoder random: there is no run {str(folder)!r} whose untrained encoder could "
                "be measured: name one with --encoder_exp_version, or an encoder with --arch"
            )
        return None, folder / "eval"
    return run.checkpoints.path_of(folder, epoch), folder / "eval"


def guess_settings(settings: TestSettings, path: Path | None) -> TrainSettings:
    """The training's settings where no file says them: train.py's defaults.

    Files from elsewhere are of ImageNet at 224 px.
    """
    if path is not None:
        return config.from_values(TrainSettings, encoders.images_of(settings.arch))
    arch = {} if settings.arch == "auto" else {"arch": settings.arch}
    return config.from_values(TrainSettings, {"seed": settings.seed, **arch})


def first_encoder(settings: TrainSettings, folder: Path) -> nn.Module:
    """The encoder that the run in a folder started from, without head."""
    if settings.init is not None:
        return encoders.load(run.checkpoints.path_of(folder, 0)).encoder
    return encoders.remove_head(encoders.build_untrained(settings))


def name_result(path: Path, checkpoint: dict[str, Any], known: TrainSettings | None) -> str:
    """epoch_0100, or step_012345 of a checkpoint between two epochs; of other files their name."""
    epoch, step, images = (checkpoint.get(name) for name in ("epoch", "step", "images"))
    if known is None or epoch is None:
        return re.sub(r"(\.(pth|pt|tar))+$", "", path.name)
    if step and images and step % max(1, images // known.batch_size):
        return f"step_{step:06d}"
    return f"epoch_{epoch:04d}"
