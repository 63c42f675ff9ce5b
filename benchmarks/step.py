"""Time of one training step: ours against a plain rendering of the reference's step, in one process, alternating.

    python benchmarks/step.py                                        the three rows of benchmarks/README.md
    python benchmarks/step.py --arch resnet50 --side 64 --batch 32 --groups 1 8 --compile
    python benchmarks/step.py --arch resnet50 --side 64 --batch 256 --keys 65536 --groups 8 --compile      on a GPU; then --limit; then --batch 1024
    python benchmarks/step.py --keys 4096 65536 262144               how the step of ResNet-50 at 64 px, batch 32, grows with the queue

The plain step is what the paper's pseudo-code costs when written down directly: two torchvision encoders in NCHW float32,
an update per parameter, a clone of the queue, a host read of the pointer. Ours is model.MoCo in channels-last with the
precision that `--precision auto` picks; with --compile also as torch.compile makes it. Where lightly is installed, its MoCo is a third candidate. Views are random and ready: the input path is not part of it. On a GPU TF32 and cudnn.benchmark are on for both.
"""

import argparse
import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

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
        self.queue, self.ptr = (
            F.normalize(torch.randn(128, keys, device=device), dim=0),
            torch.zeros(1, dtype=torch.long, device=device),
        )
        self.optimizer = torch.optim.SGD(self.q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)

    def __call__(self, im_q: torch.Tensor, im_k: torch.Tensor) -> None:
        q = F.normalize(self.q(im_q), dim=1)
        with torch.no_grad():
            for k, p in zip(self.k.parameters(), self.q.parameters()):
                k.data = k.data * 0.999 + p.data * 0.001
            keys = F.normalize(self.k(im_k), dim=1)
        positive = torch.einsum("nc,nc->n", q, keys).unsqueeze(-1)
        logits = (
            torch.cat([positive, torch.einsum("nc,ck->nk", q, self.queue.clone().detach())], dim=1)
            / 0.07
        )
        ptr = int(self.ptr)
        self.queue[:, ptr : ptr + len(keys)] = keys.T
        self.ptr[0] = (ptr + len(keys)) % self.queue.shape[1]
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class OurStep:
    """The body of train.py's loop."""

    def __init__(
        self,
        arch: str,
        keys: int,
        groups: int,
        precision: str,
        device: torch.device,
        example: torch.Tensor | None = None,
    ) -> None:
        self.moco = (
            MoCo(arch, num_keys=keys, bn_groups=groups)
            .to(device=device, memory_format=torch.channels_last)
            .train()
        )
        self.optimizer = torch.optim.SGD(
            self.moco.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True
        )
        self.precision, self.groups, self.device = precision, groups, device
        for encoder in (self.moco.encoder_q, self.moco.encoder_k) if example is not None else ():
            if reason := parallel.compile_encoder(
                encoder, example.contiguous(memory_format=torch.channels_last), precision
            ):
                sys.exit(f"error: torch.compile failed: {reason}")

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


class Traffic(TorchDispatchMode):
    """Counts the bytes that the operations of a step read and write, each operation by itself: what fusing saves is not taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.bytes += sum(
                x.numel() * x.element_size()
                for x in tree_leaves((args, kwargs, out))
                if isinstance(x, torch.Tensor)
            )
        return out


def limit(step: "OurStep", views: list[torch.Tensor], device: torch.device, repeats: int) -> None:
    """A step's time over what its operations, or its bytes, need at the rates of a large matrix product and a large copy on this device."""
    step(*views)
    with FlopCounterMode(display=False) as counted:
        step(*views)
    with Traffic() as traffic:
        step(*views)
    on_gpu, dtype = (
        device.type == "cuda",
        torch.bfloat16 if step.precision == "bf16" else torch.float32,
    )
    side, length = (8192, 2**29) if on_gpu else (2048, 2**26)
    a, big = torch.randn(side, side, device=device, dtype=dtype), torch.zeros(length, device=device)
    other = torch.empty_like(big)
    rates = {
        "ops": 2 * side**3 / min(seconds(lambda *_: a @ a, views, device) for _ in range(10)),
        "bytes": 2
        * 4
        * length
        / min(seconds(lambda *_: other.copy_(big), views, device) for _ in range(10)),
    }
    took = statistics.median(seconds(step, views, device) for _ in range(repeats))
    needs = counted.get_total_flops() / rates["ops"], traffic.bytes / rates["bytes"]
    print(
        f"\n| {counted.get_total_flops() / 1e9:.1f} G operations, at {rates['ops'] / 1e12:.2f} T/s | {traffic.bytes / 1e9:.2f} GB, at {rates['bytes'] / 1e9:.0f} GB/s | a step | over the larger |"
        f"\n| --- | --- | --- | --- |\n| {1e3 * needs[0]:.1f} ms | {1e3 * needs[1]:.1f} ms | {1e3 * took:.1f} ms | {took / max(needs):.2f} |"
    )


class LightlyStep:
    """The MoCo example of lightly's documentation: its loss with the memory bank, its momentum update, its projection head."""

    def __init__(self, arch: str, keys: int, device: torch.device) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead

        backbone = torchvision.models.get_model(arch)
        width = backbone.fc.in_features
        backbone.fc = torch.nn.Identity()
        self.q = torch.nn.Sequential(backbone, MoCoProjectionHead(width, width, 128)).to(device)
        self.k = copy.deepcopy(self.q).requires_grad_(False)
        self.loss = NTXentLoss(temperature=0.07, memory_bank_size=(keys, 128)).to(device)
        self.optimizer = torch.optim.SGD(self.q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)

    def __call__(self, im_q: torch.Tensor, im_k: torch.Tensor) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.q, self.k, m=0.999)
        with torch.no_grad():
            keys = self.k(im_k)
        loss = self.loss(self.q(im_q), keys)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def seconds(step: Callable, views: list[torch.Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    step(*views)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    arch: str,
    side: int,
    batch: int,
    keys: int,
    groups: list[int],
    repeats: int,
    device: torch.device,
    precision: str,
    compiled: bool,
) -> None:
    views = [torch.randn(batch, 3, side, side, device=device) for _ in range(2)]
    steps = {"plain": PlainStep(arch, keys, device)} | {
        f"ours G {g}": OurStep(arch, keys, g, precision, device) for g in groups
    }
    if compiled:
        steps |= {
            f"ours G {g}, compiled": OurStep(arch, keys, g, precision, device, views[0])
            for g in groups
        }
    if importlib.util.find_spec("lightly"):
        steps["lightly"] = LightlyStep(arch, keys, device)
    times = alternating(steps, views, repeats, device)
    plain, first = times["plain"], times[f"ours G {groups[0]}"]
    for name, own in times.items():
        speed, cost = (
            statistics.median(pairs)
            for pairs in ([p / t for p, t in zip(plain, own)], [t / f for f, t in zip(first, own)])
        )
        print(
            f"| {arch}, {side} px, batch {batch}, K {keys} | {name} | {speed:.2f} | {cost:.2f} | {batch / statistics.median(own):,.0f} |",
            flush=True,
        )


def growth(keys: list[int], repeats: int, device: torch.device, precision: str) -> None:
    """The same step with longer queues."""
    times = alternating(
        {k: OurStep("resnet50", k, 1, precision, device) for k in keys},
        [torch.randn(32, 3, 64, 64, device=device) for _ in range(2)],
        repeats,
        device,
    )
    print(f"| ResNet-50, 64 px, batch 32, K | time, K {keys[0]:,} = 1 | ms |\n| --- | --- | --- |")
    for k, own in times.items():
        print(
            f"| {k:,} | {statistics.median(t / f for f, t in zip(times[keys[0]], own)):.2f} | {1e3 * statistics.median(own):.0f} |"
        )


def alternating(
    steps: dict, views: list[torch.Tensor], repeats: int, device: torch.device
) -> dict[object, list[float]]:
    """Seconds of each step in turn, `repeats` times."""
    times: dict[object, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):  # two rounds of warm-up
        for name, step in steps.items():
            elapsed = seconds(step, views, device)
            if repeat >= 2:
                times[name].append(elapsed)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--keys",
        type=int,
        nargs="+",
        default=[4096],
        help="several: only how the step grows with them",
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--limit", action="store_true", help="only: our time over what the device allows"
    )
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
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(
        f"commit {made_by['commit']}, torch {made_by['torch']}, {device} ({name}), ours in {precision}; medians of {args.repeats}\n"
    )
    if len(args.keys) > 1:
        return growth(args.keys, args.repeats, device, precision)
    if args.limit:
        step = OurStep(args.arch or "resnet50", args.keys[0], args.groups[0], precision, device)
        return limit(
            step,
            [torch.randn(args.batch, 3, args.side, args.side, device=device) for _ in range(2)],
            device,
            args.repeats,
        )
    print(
        f"| job | step | speed, plain = 1 | time, ours G {args.groups[0]} = 1 | images/s |\n| --- | --- | --- | --- | --- |"
    )
    for arch, side, batch in [(args.arch, args.side, args.batch)] if args.arch else JOBS:
        compare(
            arch,
            side,
            batch,
            args.keys[0],
            args.groups,
            args.repeats,
            device,
            precision,
            args.compile,
        )


if __name__ == "__main__":
    main()
