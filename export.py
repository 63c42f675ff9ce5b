"""Write the encoder of a checkpoint in another tool's format: the query encoder alone, without its head.

    python export.py output/IMAGENET-64/v1/checkpoints/last.pth.tar resnet50.pth --format torchvision
    python export.py CHECKPOINT resnet50.pth --format timm              timm.create_model("resnet50", num_classes=0)
    python export.py CHECKPOINT R-50.pkl --format detectron2            MODEL.WEIGHTS of Detectron2

CHECKPOINT is one of ours, one of the reference's, or torchvision's weights. The lines printed at the end load the result.
"""

import argparse
import pickle
import re
from pathlib import Path

import torch

import evaluate
import model
import utils

LOADING = {
    "torchvision": 'encoder = torchvision.models.get_model("{arch}"); encoder.fc = torch.nn.Identity()',
    "timm": 'encoder = timm.create_model("{arch}", num_classes=0)',
}
SMALL_STEM = "encoder.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False); encoder.maxpool = torch.nn.Identity()"


def main(argv: list[str]) -> None:
    parser = utils.Parser(
        prog="python export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--format", required=True, choices=[*LOADING, "detectron2"])
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    args = parser.parse_args(argv)
    if Path(args.out).exists() and not args.overwrite:
        raise utils.UserError(
            f"{args.out!r} is there already: name another file, or --overwrite it"
        )
    checkpoint = utils.load_checkpoint(args.checkpoint, bare=True)
    encoder, found = evaluate.read_checkpoint(Path(args.checkpoint), checkpoint)
    state = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    if args.format == "detectron2":
        if found.small_stem:
            raise utils.UserError(
                f"{args.checkpoint!r} has a small stem, which Detectron2's ResNet has not: use torchvision or timm"
            )
        content = {
            "model": detectron2_state(state),
            "__author__": "MoCo",
            "matching_heuristics": True,
        }
        utils.atomic_write(args.out, lambda file: pickle.dump(content, file))
    else:
        utils.atomic_write(args.out, lambda file: torch.save(state, file))
    print(f"read     {args.checkpoint}: {found}")
    print(f"written  {args.out}: {len(state)} tensors of the encoder, for {args.format}")
    print(
        "\n".join(
            "         " + line
            for line in how_to_load(
                args.format,
                args.out,
                found,
                evaluate.own_config(checkpoint, utils.config_keys("train")),
            )
        )
    )


def detectron2_state(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """A torchvision ResNet's state under Detectron2's names: stem, res2 to res5, conv1.norm, shortcut; without counters, as numpy arrays."""
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


def how_to_load(form: str, out: str, found: model.Found, config: dict) -> list[str]:
    """The lines that load the result, and what its images must be."""
    defaults = {name: key.default for name, key in utils.config_keys("train").items()}
    mean, std = (
        [round(value, 4) for value in config.get(name, defaults[name])] for name in ("mean", "std")
    )
    if form == "detectron2":
        depth = re.sub(r"\D*(\d+).*", r"\1", found.arch)
        if found.arch in ("resnet18", "resnet34"):
            depth += "  MODEL.RESNETS.RES2_OUT_CHANNELS 64"
        if found.arch.startswith("wide"):
            depth += "  MODEL.RESNETS.WIDTH_PER_GROUP 128"
        if wide := re.search(r"_(\d+)x(\d+)d$", found.arch):
            depth += (
                f"  MODEL.RESNETS.NUM_GROUPS {wide[1]}  MODEL.RESNETS.WIDTH_PER_GROUP {wide[2]}"
            )
        return [
            f'MODEL.WEIGHTS "{out}"  MODEL.RESNETS.DEPTH {depth}  MODEL.RESNETS.STRIDE_IN_1X1 False  INPUT.FORMAT "RGB"',
            f"MODEL.PIXEL_MEAN {[round(255 * value, 3) for value in mean]}  MODEL.PIXEL_STD {[round(255 * value, 3) for value in std]}",
        ]
    lines = [
        LOADING[form].format(arch=found.arch),
        *([SMALL_STEM] if found.small_stem else []),
        f'encoder.load_state_dict(torch.load("{out}", weights_only=True))',
    ]
    return [
        *lines,
        f"images: RGB in [0, 1], less {mean}, over {std}"
        + (f"; trained on views of {config['crop']} px" if "crop" in config else ""),
    ]


if __name__ == "__main__":
    utils.main_guard(main)
