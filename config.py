"""Every flag of every script, declared once: its type, range and help, and what it means.

A script's settings are a dataclass with a field for each flag. Default values and presets are in
config.yaml. Later wins: defaults, --preset NAME, --config FILE, flags. All of them pass through
one argparse parser, which checks every value.
"""

import argparse
import dataclasses
import difflib
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from data.base import Pixels
from run.flags import Auto, Parser, add_flags, flag, show, to_words
from utils import UserError, atomic_write

CONFIG_FILE = Path(__file__).with_name("config.yaml")

# What a flag means for a run and its result. A flag without a trait is fixed for the run's life.
MAY_CHANGE = "may_change"  # when the run is resumed: the training does not depend on it
PER_MACHINE = "per_machine"  # as MAY_CHANGE, and it may differ between the machines of a launch
COMPARABLE = "comparable"  # two results can be compared only where it is the same


Precision = Literal["auto", "fp32", "bf16", "fp16", "fp64"]
Figure = Literal["loss", "accuracy", "views", "neighbours", "embedding", "filters"]
DATA, VIEWS, MODEL = partial(flag, "data"), partial(flag, "augmentation"), partial(flag, "model")
OPTIM, RUN, ENCODER = partial(flag, "optimization"), partial(flag, "run"), partial(flag, "encoder")
KNN, LINEAR = partial(flag, "kNN"), partial(flag, "linear classifier")
FIGURES, FEATURES = partial(flag, "figures"), partial(flag, "features of images")


@dataclass
class TrainSettings:
    """Flags of train.py."""

    dataset_root: str | None = DATA("folder of images (docs/data.md), or shapes", trait=PER_MACHINE)
    dataset_name: str = DATA("its name in output/DATASET_NAME/EXP_VERSION", trait=MAY_CHANGE)
    exp_version: str = DATA("name of the run", trait=MAY_CHANGE)
    output_root: str = DATA("where runs are kept", trait=PER_MACHINE)
    crop: int | list[int] = DATA("side of the views, or height and width, px", 8, 4096)
    resize: int | Auto = DATA(
        "side of stored images, px; auto: 2 x crop or the native size", 8, 4096
    )
    channels: int = DATA("channels of the images; --mean and --std take as many", 1, 10_000)
    value_range: list[float] | None = DATA(
        "of values of more than 8 bits, black and white; default: by the images",
        -math.inf,
        count=2,
    )
    background: int = DATA("grey value behind what is transparent", 0, 255)
    num_workers: int | Auto = DATA("decoding processes; auto: cores, up to 8", trait=PER_MACHINE)
    pack: str | None = DATA("folder for decoded images; auto: beside the data", trait=PER_MACHINE)
    download: bool = DATA("fetch STL-10 if it is not there", trait=MAY_CHANGE)

    aug_plus: bool = VIEWS("MoCo v2's augmentation: weaker hue, jitter with p 0.8, blur")
    blur: float = VIEWS("probability of a blurred view, with --aug_plus", 0, 1)
    crop_scale: list[float] = VIEWS(
        "area of a crop, as a part of the image, from - to", 0, 1, count=2
    )
    pixel_boxes: bool = VIEWS("crops on whole pixels, as torchvision's; for images of 28 px")
    hflip: float = VIEWS("probability of a view mirrored left to right", 0, 1)
    vflip: float = VIEWS("probability of one mirrored top to bottom", 0, 1)
    rotate90: float = VIEWS("probability of one turned by 90, 180 or 270 degrees", 0, 1)
    jitter: list[float] | None = VIEWS(
        "strengths of brightness, contrast, saturation, hue; default: as the papers", 0, 1, count=4
    )
    grayscale: float = VIEWS("probability of a greyscale view", 0, 1)
    mean: list[float] = VIEWS("normalisation: mean of each channel")
    std: list[float] = VIEWS("normalisation: standard deviation of each channel", 1e-6)

    arch: str = MODEL("a ResNet of torchvision, or timm:NAME, as timm:vit_small_patch16_224")
    init: str | None = MODEL("file of weights to start from; null: random ones")
    feature_dim: int = MODEL("C, the width of queries and keys", 1, 2**20)
    small_stem: bool = MODEL("for images up to 64 px: 3 x 3 first convolution, no max pool")
    mlp: bool = MODEL("MoCo v2's head: Linear-ReLU-Linear")
    num_keys: int = MODEL("K, the keys in the queue", 1)
    momentum: float = MODEL("m, the momentum of the key encoder", 0, 1)
    temperature: float = MODEL("T, the temperature of the contrastive loss", 1e-4)
    shuffle_bn: bool = MODEL("shuffled batch norm, as the method of the paper has it")
    bn_groups: int | Auto = MODEL("groups of batch norm; auto: the devices, 8 on one", 1, 4096)
    queue_init: Literal["keys", "random"] = MODEL("first queue: keys of images, or random vectors")

    symmetric: bool = OPTIM("each view is query and key; the loss is the mean of both")
    batch_size: int = OPTIM("images in a step, over all devices", 2, 2**24)
    max_epoch: int = OPTIM("epochs", 1, 10**6)
    optimizer: Literal["sgd", "adamw"] = OPTIM("adamw: as is usual for ViTs")
    lr: float = OPTIM("learning rate")
    warmup_epochs: float = OPTIM("epochs in which the learning rate rises from 0")
    schedule: list[int] = OPTIM("epochs after which the learning rate falls to a tenth")
    cosine: bool = OPTIM("cosine learning rate in place of the schedule")
    sgd_momentum: float = OPTIM("momentum of SGD", 0, 1)
    weight_decay: float = OPTIM("weight decay; with adamw not of biases and norms")

    device: str = RUN("auto (the fastest there is), cpu, cuda, cuda:N or mps", trait=MAY_CHANGE)
    precision: Precision = RUN("auto: bf16, or fp16, where the hardware computes in it, else fp32")
    compile: bool = RUN("compile the encoders with torch.compile", trait=MAY_CHANGE)
    cuda_graph: bool = RUN("launch each encoder as one CUDA graph", trait=MAY_CHANGE)
    seed: int = RUN("same seed, same curve")
    log_every: int = RUN("steps between rows of log.csv", 1, trait=MAY_CHANGE)
    save_weight_epoch: int = RUN("epochs between checkpoints of their own", 1, trait=MAY_CHANGE)
    keep: int | None = RUN("of those, the newest that stay; null: all", 1, trait=MAY_CHANGE)
    save_every_minutes: float = RUN("minutes between saves of last.pth.tar", trait=MAY_CHANGE)
    knn_every: int = RUN("epochs between kNN accuracies in the log; 0: none", trait=MAY_CHANGE)
    knn_root: str | None = RUN("labelled images for them; null: the training's", trait=PER_MACHINE)
    knn_images: int = RUN("bank images; a quarter as many are classified", 10, trait=MAY_CHANGE)
    tensorboard: bool = RUN("write TensorBoard's files, too", trait=MAY_CHANGE)
    resume: bool = RUN("continue the run, or start it if there is none", trait=MAY_CHANGE)
    overwrite: bool = RUN("delete an earlier run in the folder first", trait=MAY_CHANGE)


@dataclass
class TestSettings:
    """Flags of test.py."""

    encoder_output_root: str = ENCODER("where the run is kept")
    encoder_dataset_name: str = ENCODER("its data set, as in output/DATASET_NAME/EXP_VERSION")
    encoder_exp_version: str = ENCODER("name of the run")
    load_pretrained_epoch: int | None = ENCODER(
        "epoch of the checkpoint; null: the last one", 0, 10**6
    )
    pretrained: str | None = ENCODER("a file of weights, in place of a run's checkpoint")
    encoder: Literal["trained", "random"] = ENCODER("random: as it was before training")
    arch: str = ENCODER("of a random encoder without a run; auto: the run's")

    dataset_root: str | None = DATA("labelled images (docs/data.md), or shapes")
    crop: int | list[int] | Auto = DATA("centre crop, px; auto: as in training", 8, 4096)
    resize: int | Auto = DATA("shorter side, px; auto: 8/7 x crop", 8, 4096, trait=COMPARABLE)
    train_fraction: float = DATA("share of each class's labels", 1e-6, 1, trait=COMPARABLE)
    folds: bool = DATA("STL-10's ten folds of 1,000 training images", trait=COMPARABLE)
    num_workers: int | Auto = DATA("processes that decode images; auto: the cores, up to 8")
    download: bool = DATA("fetch STL-10 if it is not there")

    knn_k: int = KNN("k, the nearest neighbours that vote", 1, trait=COMPARABLE)
    knn_temperature: float = KNN("T: a vote weighs exp(cosine / T)", 1e-4, trait=COMPARABLE)
    knn_weighted: bool = KNN("weigh the votes; without, each counts the same", trait=COMPARABLE)

    protocol: Literal["cached", "original", "reference"] = LINEAR(
        "cached: on stored features; the others: on new crops in each epoch", trait=COMPARABLE
    )
    finetune: bool = LINEAR("train the encoder, too")
    finetune_lr: float = LINEAR("learning rate of the encoder with --finetune", trait=COMPARABLE)
    linear_epochs: int | Auto = LINEAR(
        "auto: 30, or the protocol's 100", 1, 100_000, trait=COMPARABLE
    )
    linear_lrs: list[float] | None = LINEAR(
        "learning rates, chosen from on a held-out tenth; default: the protocol's",
        1e-7,
        trait=COMPARABLE,
    )
    linear_batch_size: int = LINEAR("images in a step", 1, 2**24, trait=COMPARABLE)
    linear_views: int = LINEAR("1: each image; 2: its mirror image, too", 1, 2, trait=COMPARABLE)
    trials: int | Auto = LINEAR("classifiers with different seeds; auto: 3, or 1", 1, 1000)

    eval_batch_size: int = RUN("images in a batch of the encoder", 1, 2**24)
    device: str = RUN("auto, cpu, cuda, cuda:N or mps; auto: the fastest there is")
    precision: Precision = RUN("of the encoder", trait=COMPARABLE)
    seed: int = RUN("of classifiers, and of a random encoder without a run", trait=COMPARABLE)


@dataclass
class VisualizeSettings(TestSettings):
    """Flags of visualize.py, which evaluates what has no result yet."""

    multiple_encoder_exp_version: list[str] | None = FIGURES("runs to compare; default: one")
    multiple_pretrained_epoch: list[int] | None = FIGURES("epochs of the run to compare", 0, 10**6)
    loss_exp_version: list[str] | None = FIGURES("runs whose loss is drawn; default: those and M0")
    seeds: list[int] | None = FIGURES("V stands for the runs V-seed0, V-seed1, ...", 0, 2**63)
    figures: list[Figure] | None = FIGURES("which figures; default: all")
    report: bool = FIGURES("write report.html, too: one page with all of it")
    redraw: bool = FIGURES("draw from RESULT_PATH/data, which an earlier call left")
    result_path: str | None = FIGURES("folder; null: OUTPUT_ROOT/DATASET_NAME/figures")


@dataclass
class ExportSettings:
    """Flags of export.py."""

    checkpoint: str = ENCODER("ours, the reference's, another tool's weights, or linear.pth.tar")
    out: str = ENCODER("the file to write; with --features OUT.npy and OUT.csv")
    format: Literal["torchvision", "timm", "detectron2"] | None = ENCODER(
        "who will read the encoder"
    )
    arch: str = ENCODER("of weights that do not say it; auto: by the file")
    overwrite: bool = ENCODER("replace OUT if it is there")

    features: str | None = FEATURES("a folder of images, of any depth, or one image")
    nearest: str | None = FEATURES("an image whose ten nearest of them are shown")
    predict: str | None = FEATURES("a linear.pth.tar of test.py, whose classes go to OUT.csv, too")
    crop: int | list[int] | Auto = FEATURES("centre crop, px; auto: the training's", 8, 4096)
    resize: int | Auto = FEATURES("shorter side, px; auto: 8/7 x crop", 8, 4096)
    batch_size: int = FEATURES("images at once, over all devices", 1, 2**24)
    num_workers: int | Auto = FEATURES("processes that decode images; auto: as train.py")
    device: str = FEATURES("auto, cpu, cuda, cuda:N or mps")
    precision: Precision = FEATURES("of the encoder")


SECTIONS = dict(  # of config.yaml
    train=TrainSettings, test=TestSettings, visualize=VisualizeSettings, export=ExportSettings
)
Settings = TypeVar("Settings")


# ------------------------------------------------------------------------------- settings


def parse(cls: type[Settings], argv: list[str], description: str | None = None) -> Settings:
    """The settings of a script by its command line; `description` heads its --help.

    Raises UserError, in one line that names flag, value and remedy, for an unknown flag, key or
    preset, and for a value of the wrong type or out of range.
    """
    parser = build_parser(cls, description)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}: {suggest(unknown[0], names_of(cls))}")
    layers = [read_defaults(cls), *(find_preset(name) for name in given.preset or [])]
    if given.config:
        layers.append(read_config(given.config))
    words = [word for layer in layers for word in to_words(cls, layer)]
    return to_settings(cls, parser.parse_args([*words, *argv]))


def build_parser(cls: type[Settings], description: str | None = None) -> Parser:
    """A parser with the flags of a script, --preset and --config."""
    parser = Parser(description)
    presets = f"by name, a later one wins: {', '.join(read_yaml(CONFIG_FILE)['presets'])}"
    sets = parser.add_argument_group("sets of values")
    sets.add_argument("--preset", nargs="+", action="extend", metavar="NAME", help=presets)
    sets.add_argument("--config", metavar="FILE", help="a YAML file, as a run's config.yaml")
    add_flags(parser, cls, read_defaults(cls))
    return parser


def from_values(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The default settings but for some values, which are checked as flags are (UserError).

    Names that are no flags of the script are left out.
    """
    words = [*to_words(cls, read_defaults(cls)), *to_words(cls, values)]
    return to_settings(cls, build_parser(cls).parse_args(words))


def to_settings(cls: type[Settings], parsed: argparse.Namespace) -> Settings:
    return cls(**{name: getattr(parsed, name) for name in names_of(cls)})


def pixels_of(settings: TrainSettings) -> Pixels:
    """How a run's images are decoded."""
    low_high = settings.value_range
    return Pixels(settings.channels, low_high and tuple(low_high), settings.background)


def names_of(cls: type[Settings]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def names_with(cls: type[Settings], trait: str) -> list[str]:
    """The flags of a script that have a trait; what is PER_MACHINE is also MAY_CHANGE."""
    traits = {trait, PER_MACHINE} if trait == MAY_CHANGE else {trait}
    return [f.name for f in dataclasses.fields(cls) if f.metadata["trait"] in traits]


def words_of(cls: type[Settings], values: Mapping[str, Any]) -> list[str]:
    """The flags that set a script's values where they are not the defaults."""
    defaults = read_defaults(cls)
    return to_words(cls, {name: v for name, v in values.items() if v != defaults.get(name, v)})


def describe(settings: Settings, title: str) -> str:
    """All values, in as few lines as they take."""
    items = [f"{name}={show(value)}" for name, value in dataclasses.asdict(settings).items()]
    wrap = textwrap.TextWrapper(98, "  ", "  ", break_long_words=False, break_on_hyphens=False)
    return f"{title}:\n{wrap.fill('  '.join(items))}"


def write(path: Path, settings: Settings) -> None:
    """Save all values, as --config reads them."""
    text = yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, default_flow_style=None)
    atomic_write(path, lambda file: file.write(text.encode()))


# ------------------------------------------------------------------------ files of values


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, but a key that appears twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"the key {key!r} appears twice in a configuration: keep one")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file; UserError if it cannot be read."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"config {str(path)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: it is no text
        reason = " ".join(str(error).split())
        raise UserError(f"config {str(path)!r} is not valid YAML: {reason}") from None


def read_defaults(cls: type[Settings]) -> dict[str, Any]:
    """A script's values in config.yaml; visualize.py has those of test.py, too."""
    content, values = read_yaml(CONFIG_FILE), {}
    for name, section in SECTIONS.items():
        if issubclass(cls, section):
            values |= content[name]
    return values


def find_preset(name: str) -> dict[str, Any]:
    presets = read_yaml(CONFIG_FILE)["presets"]
    if name not in presets:
        raise UserError(f"preset {name!r} is not known: choose one of {', '.join(presets)}")
    return refuse_unknown(presets[name], f"preset {name}")


def read_config(path: str) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"config {path!r} holds no keys: write lines such as 'batch_size: 128'")
    return refuse_unknown(content, f"config {path!r}")


def refuse_unknown(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The values, if each is a flag of some script: a preset may be for several of them."""
    known = {name for cls in SECTIONS.values() for name in names_of(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"unknown key {name!r} in {source}: {suggest(str(name), known)}")
    return values


def suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.split("=")[0].lstrip("-"), known, n=1)
    return f"did you mean --{near[0]}?" if near else "see --help"
