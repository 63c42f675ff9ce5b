"""Time of one training step: ours against a plain rendering of the reference's step, in one process, alternating.

    python benchmarks/step.py                                        the three rows of benchmarks/README.md
    python benchmarks/step.py --arch resnet50 --side 64 --batch 32 --groups 1 8

The plain step is what the paper's pseudo-code costs when written down directly: two torchvision encoders in NCHW float32,
an update per parameter, a clone of the queue, a host read of the pointer. Ours is model.MoCo in channels-last with the
precision that `--precision auto` picks. Views are random and ready: the input path is not part of it. On a GPU TF32 and cudnn.benchmark are on for both.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import parallel
import utils
from model import MoCo, contrastive_loss

JOBS = [("resnet50", 64, 32), ("resnet18", 32, 128), ("resnet18", 32, 64)]


class PlainStep:
    """The reference's step, written plainly."""

    def __init__(self, arch: str, keys: int, device: torch.device) -> None:
        self.q = torchvision.models.get_model(arch, num_classes=128).to(device)
        self.k = copy.deepcopy(self.q)
        self.queue, self.ptr = F.normalize(torch.randn(128, keys, device=device), dim=0), torch.zeros(1, dtype=torch.long, device=device)
        self.optimizer = torch.optim.SGD(self.q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)

    def __call__(self, im_q: torch.Tensor, im_k: torch.Tensor) -> None:
        q = F.normalize(self.q(im_q), dim=1)
        with torch.no_grad():
            for k, p in zip(self.k.parameters(), self.q.parameters()):
                k.data = k.data * 0.999 + p.data * 0.001
            keys = F.normalize(self.k(im_k), dim=1)
        positive = torch.einsum("nc,nc->n", q, keys).unsqueeze(-1)
        logits = torch.cat([positive, torch.einsum("nc,ck->nk", q, self.queue.clone().detach())], dim=1) / 0.07
        ptr = int(self.ptr)
        self.queue[:, ptr:ptr + len(keys)] = keys.T
        self.ptr[0] = (ptr + len(keys)) % self.queue.shape[1]
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class OurStep:
    """The body of train.py's loop."""

    def __init__(self, arch: str, keys: int, groups: int, precision: str, device: torch.device) -> None:
        self.moco = MoCo(arch, num_keys=keys, bn_groups=groups).to(device=device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.moco.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)
        self.precision, self.groups, self.device = precision, groups, device

    def __call__(self, im_q: torch.Tensor, im_k: torch.Tensor) -> None:
        permutation = torch.randperm(len(im_k)).to(self.device) if self.groups > 1 else None
        im_q, im_k = (x.contiguous(memory_format=torch.channels_last) for x in (im_q, im_k))
        with parallel.autocast(self.precision, self.device):
            logits, labels, keys = self.moco(im_q, im_k, shuffle=permutation)
        loss = contrastive_loss(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.moco.enqueue(keys)


def seconds(step: Callable, views: list[torch.Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    step(*views)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(arch: str, side: int, batch: int, keys: int, groups: list[int], repeats: int, device: torch.device, precision: str) -> None:
    steps = {"plain": PlainStep(arch, keys, device)} | {f"ours G {g}": OurStep(arch, keys, g, precision, device) for g in groups}
    views = [torch.randn(batch, 3, side, side, device=device) for _ in range(2)]
    times = {name: [] for name in steps}
    for repeat in range(repeats + 2):  # two rounds of warm-up
        for name, step in steps.items():
            elapsed = seconds(step, views, device)
            if repeat >= 2:
                times[name].append(elapsed)
    plain, first = times["plain"], times[f"ours G {groups[0]}"]
    for name, own in times.items():
        speed, cost = (statistics.median(pairs) for pairs in ([p / t for p, t in zip(plain, own)], [t / f for f, t in zip(first, own)]))
        print(f"| {arch}, {side} px, batch {batch}, K {keys} | {name} | {speed:.2f} | {cost:.2f} | {batch / statistics.median(own):,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    device = parallel.pick_device(args.device)
    precision = parallel.pick_precision(args.precision, device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    made_by = utils.provenance()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"commit {made_by['commit']}, torch {made_by['torch']}, {device} ({name}), ours in {precision}; medians of {args.repeats}\n")
    print(f"| job | step | speed, plain = 1 | time, ours G {args.groups[0]} = 1 | images/s |\n| --- | --- | --- | --- | --- |")
    for arch, side, batch in [(args.arch, args.side, args.batch)] if args.arch else JOBS:
        compare(arch, side, batch, args.keys, args.groups, args.repeats, device, precision)


if __name__ == "__main__":
    main()
