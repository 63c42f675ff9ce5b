"""Give the encoder of a checkpoint, or its features of images, to other tools.

    python export.py output/IMAGENET-64/v1/checkpoints/last.pth.tar OUT.pth --format torchvision
    python export.py CHECKPOINT OUT.pth --format timm
    python export.py CHECKPOINT OUT.pkl --format detectron2        for MODEL.WEIGHTS of Detectron2
    python export.py CHECKPOINT OUT --features IMAGES              features of a folder of images
    ... --nearest IMAGE                     and the images that are most like one
    ... --predict RUN/eval/epoch_0100/linear.pth.tar               and their classes

CHECKPOINT is one of ours, one of the reference's, another tool's weights, or the linear.pth.tar of
a finetuned encoder. --format writes the query encoder alone, without its head, and prints the lines
that load it. --features writes OUT.npy, float32 (n, D), and OUT.csv, with the path of each row.
"""

import os
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import config
import encoders
import parallel
from config import ExportSettings, TrainSettings
from data.base import Size, height_width, in_px
from data.folders import FolderImages, image_files, tell_skipped
from evaluation import embed
from evaluation.features import Extractor
from utils import UserError, atomic_write, check_replaceable, guard, say


def main(argv: list[str]) -> None:
    settings = config.parse(ExportSettings, argv, __doc__)
    if (settings.format is None) == (settings.features is None):
        raise UserError("give --format TOOL for the encoder, or --features IMAGES: one of the two")
    if settings.features is None and (settings.nearest or settings.predict):
        raise UserError("--nearest and --predict need --features IMAGES")
    if os.path.basename(settings.out) in ("", ".", "..", ".npy"):
        raise UserError(f"{settings.out!r} names no file: give a name for OUT")
    out = re.sub(r"\.npy$", "", settings.out) if settings.features else settings.out
    names = [f"{out}.npy", f"{out}.csv"] if settings.features else [out]
    if (there := [name for name in names if Path(name).exists()]) and not settings.overwrite:
        raise UserError(f"{there[0]!r} is there already: name another file, or --overwrite it")
    for name in names:
        check_replaceable(name)
    loaded = encoders.load(settings.checkpoint, settings.arch)
    say(f"read     {settings.checkpoint}: {loaded.description}")
    if settings.features is None:
        export_encoder(settings, loaded)
    else:
        export_features(settings, loaded, Path(out))


def export_features(settings: ExportSettings, loaded: encoders.LoadedEncoder, out: Path) -> None:
    guess = config.from_values(TrainSettings, encoders.images_of(loaded.arch))
    training = loaded.settings or guess
    crop = training.crop if settings.crop == "auto" else settings.crop
    if encoders.has_fixed_size(loaded.arch) and crop != training.crop:
        only = f"{loaded.arch} takes images of {in_px(training.crop)} only"
        raise UserError(f"--crop {in_px(crop)}: {only}")
    if parallel.several_processes():
        raise UserError("--features is for one process: use plain python, on as many GPUs")
    pixels = config.pixels_of(training)
    images = open_images(settings.features, Size("center", settings.resize, crop, pixels))
    with parallel.open_launch(settings.device) as launch:
        extractor = Extractor(
            loaded.encoder,
            training.mean,
            training.std,
            launch,
            settings.precision,
            settings.batch_size,
            settings.num_workers,
        )
        classifier = None
        if settings.predict is not None:
            with torch.no_grad():
                shape = 1, loaded.channels, *height_width(crop)
                blank = torch.zeros(shape, dtype=extractor.dtype, device=launch.device)
                loaded.encoder.eval()
                width = extractor.encode(blank).shape[1]
            classifier = embed.read_classifier(settings.predict, width)
        query = None
        if settings.nearest is not None:
            query = next(embed.extract(extractor, open_images(settings.nearest, images.size)))
        rows = embed.write_features(extractor, images, out, classifier)
    say(f"written  {out}.npy, {out}.csv: {rows:,} images")
    if query is not None:
        paths = [row[0] for row in embed.read_rows(out)]
        features = np.load(f"{out}.npy", mmap_mode="r")
        for cosine, row in embed.nearest(features, query[1][0], k=10):
            say(f"{cosine:.3f}    {paths[row]}")


def open_images(root: str, size: Size) -> FolderImages:
    """All images below a folder, or one file; UserError if there are none."""
    skipped: Counter[str] = Counter()
    paths = [root] if Path(root).is_file() else list(image_files(Path(root), skipped))
    tell_skipped(Path(root), skipped)
    if not paths:
        raise UserError(f"{root!r} has no images")
    return FolderImages(paths, [-1] * len(paths), [], size)


def export_encoder(settings: ExportSettings, loaded: encoders.LoadedEncoder) -> None:
    out, form = settings.out, settings.format
    if loaded.arch.startswith(encoders.TIMM) and form != "timm":
        raise UserError(f"{settings.checkpoint!r} is a model of timm: use --format timm")
    if loaded.small_stem and form == "detectron2":
        reason = "has a small stem, which Detectron2's ResNet does not have"
        raise UserError(f"{settings.checkpoint!r} {reason}: use torchvision or timm")
    state = {name: value.contiguous() for name, value in loaded.encoder.state_dict().items()}
    if form == "detectron2":
        content = {"model": rename(state), "__author__": "MoCo", "matching_heuristics": True}
        state = content["model"]
        atomic_write(out, lambda file: pickle.dump(content, file))
        lines = lines_for_detectron2(out, loaded)
    else:
        atomic_write(out, lambda file: torch.save(state, file))
        lines = lines_for_python(form, out, loaded)
    say(f"written  {out}: {len(state)} tensors of the encoder, for {form}")
    say("\n".join("         " + line for line in lines))


def rename(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The weights under the names of Detectron2's ResNet: stem, res2 to res5, norm, shortcut."""
    renamed = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        name = re.sub(r"^layer(\d)", lambda layer: f"res{int(layer[1]) + 1}", name)
        name = name if name.startswith("res") else f"stem.{name}"
        name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[name] = value.numpy()
    return renamed


def normalization(loaded: encoders.LoadedEncoder) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (3,) of the training's images; of ImageNet's if not known."""
    settings = loaded.settings or config.from_values(TrainSettings, {})
    return np.array(settings.mean), np.array(settings.std)


def lines_for_python(form: str, out: str, loaded: encoders.LoadedEncoder) -> list[str]:
    """The lines that load the result, and what its images must be."""
    size = f", img_size={loaded.settings.crop}" if encoders.has_fixed_size(loaded.arch) else ""
    size += f", in_chans={loaded.channels}" if loaded.channels != 3 else ""
    name = loaded.arch.removeprefix(encoders.TIMM)
    lines = [f'encoder = timm.create_model("{name}", num_classes=0{size})']
    if form == "torchvision":
        lines = [f'encoder = torchvision.models.get_model("{loaded.arch}")']
        lines.append("encoder.fc = torch.nn.Identity()")
    stem = "3, padding=1" if loaded.small_stem else "7, stride=2, padding=3"
    if loaded.small_stem or (loaded.channels != 3 and form == "torchvision"):
        conv = f"torch.nn.Conv2d({loaded.channels}, 64, {stem}, bias=False)"
        lines.append(f"encoder.conv1 = {conv}")
    if loaded.small_stem:
        lines.append("encoder.maxpool = torch.nn.Identity()")
    lines.append(f'encoder.load_state_dict(torch.load("{out}", weights_only=True))')
    mean, std = (values.round(4).tolist() for values in normalization(loaded))
    size = f"; trained on views of {in_px(loaded.settings.crop)}" if loaded.settings else ""
    what = "RGB" if loaded.channels == 3 else f"{loaded.channels} channels"
    return [*lines, f"# images: {what} in [0, 1], less {mean}, over {std}{size}"]


def lines_for_detectron2(out: str, loaded: encoders.LoadedEncoder) -> list[str]:
    """The settings under which Detectron2 builds this encoder and loads the result."""
    depth, *more = re.findall(r"\d+", loaded.arch)
    network = f"MODEL.RESNETS.DEPTH {depth}  MODEL.RESNETS.STRIDE_IN_1X1 False"
    if loaded.arch in ("resnet18", "resnet34"):
        network += "  MODEL.RESNETS.RES2_OUT_CHANNELS 64"
    if loaded.arch.startswith("wide"):
        network += "  MODEL.RESNETS.WIDTH_PER_GROUP 128"
    if loaded.arch.startswith("resnext"):
        groups, width = more
        network += f"  MODEL.RESNETS.NUM_GROUPS {groups}  MODEL.RESNETS.WIDTH_PER_GROUP {width}"
    mean, std = ((255 * values).round(3).tolist() for values in normalization(loaded))
    return [
        f'MODEL.WEIGHTS "{out}"  INPUT.FORMAT "RGB"',
        network,
        f"MODEL.PIXEL_MEAN {mean}  MODEL.PIXEL_STD {std}",
    ]


if __name__ == "__main__":
    guard(main)
