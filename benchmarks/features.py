"""Features of a folder of images: export.py against a plain loop.

    python benchmarks/features.py IMAGES --arch resnet18 --crop 32

The plain loop is what a user would write: torchvision's transforms in a DataLoader of as many
workers, the same encoder in the same precision and batches, features in a list. Both run in one
process, in turn; the ratio is a median. First it is checked that the features agree.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from common import alternate, build_parser, ratio
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import encoders
import export
from augment import IMAGENET_MEAN, IMAGENET_STD
from data.folders import image_files


class Images(Dataset):
    def __init__(self, paths: list[str], crop: int, resize: int) -> None:
        steps = [T.Resize(resize), T.CenterCrop(crop), T.ToTensor()]
        self.paths = paths
        self.transform = T.Compose([*steps, T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def plain_loop(args: argparse.Namespace, encoder: nn.Module, paths: list[str]) -> np.ndarray:
    images = Images(paths, args.crop, args.resize)
    loader = DataLoader(images, args.batch, num_workers=args.workers)
    found = []
    with torch.no_grad():
        for batch in loader:
            found.append(encoder(batch.contiguous(memory_format=torch.channels_last)))
    return torch.cat(found).numpy()


def main(argv: list[str]) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("images", help="folder of images, all of which are taken")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--resize", type=int, help="shorter side (default: 8/7 crop)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    args.resize = args.resize or round(args.crop * 8 / 7)
    paths = list(image_files(Path(args.images)))

    with tempfile.TemporaryDirectory() as folder:
        weights, out = f"{folder}/weights.pth", f"{folder}/ours"
        encoder = torchvision.models.get_model(args.arch)
        torch.save(encoder.state_dict(), weights)
        encoder = encoders.remove_head(encoder).eval().to(memory_format=torch.channels_last)
        flags = [weights, out, f"--features={args.images}", f"--crop={args.crop}", "--overwrite"]
        flags += [f"--resize={args.resize}", f"--batch_size={args.batch}", "--precision=fp32"]
        flags += [f"--num_workers={args.workers}", "--device=cpu"]

        def ours() -> np.ndarray:
            with contextlib.redirect_stdout(io.StringIO()):
                export.main(flags)
            return np.load(f"{out}.npy")

        theirs = plain_loop(args, encoder, paths)
        near = (ours() * theirs).sum(1) / np.linalg.norm(ours(), axis=1)
        near /= np.linalg.norm(theirs, axis=1)
        print(f"cosine of the features of an image: {near.min():.4f} or more")
        run = {"export.py": ours, "plain": lambda: plain_loop(args, encoder, paths)}
        times = alternate(run, args.repeats)
    gain = ratio(times["plain"], times["export.py"])
    speed = len(paths) / float(np.median(times["export.py"]))
    print(f"{len(paths):,} images, {speed:,.0f} images/s: {gain:.2f} times the plain loop")


if __name__ == "__main__":
    main(sys.argv[1:])
