"""Time of one training step: ours against a plain rendering of the reference's step.

    python benchmarks/step.py                             the table of benchmarks/README.md
    python benchmarks/step.py --arch resnet50 --side 64 --batch 32 --groups 1 8 --compile
    python benchmarks/step.py --keys 4096 65536 262144    how the step grows with the queue
    python benchmarks/step.py --limit                     our time over what the device allows

All candidates run in one process, alternating. The plain step is what the paper's pseudo-code
costs when written down directly: two torchvision encoders in NCHW float32, an update per
parameter, a clone of the queue, a host read of the pointer. Ours is model.MoCo in channels-last
with the precision that --precision auto picks; with --compile also as torch.compile makes it, with
--cuda_graph also as CUDA graphs.
Where lightly is installed, its MoCo is a third candidate. Views are random and ready: the input
path is not part of it. On a GPU TF32 and cudnn.benchmark are on for all.
"""

import argparse
import copy
import dataclasses
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from common import alternate, build_parser, change_encoders, print_header, print_row, ratio
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils
from model import MoCo, contrastive_loss
from run import compute

JOBS = [("resnet50", 64, 32), ("resnet18", 32, 128), ("resnet18", 32, 64)]
PROBES = {"cpu": (2048, 2**26), "cuda": (8192, 2**29)}  # side of a product, numbers in a copy


@dataclass(frozen=True)
class Job:
    arch: str
    side: int
    batch: int
    keys: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.arch}, {self.side} px, batch {self.batch}, K {self.keys}"

    def views(self) -> list[torch.Tensor]:
        """A query view and a key view of a batch, each (N, 3, side, side)."""
        shape = (self.batch, 3, self.side, self.side)
        return [torch.randn(shape, device=self.device) for _ in range(2)]


class PlainStep:
    """The reference's step, written plainly."""

    def __init__(self, job: Job) -> None:
        self.encoder_q = torchvision.models.get_model(job.arch, num_classes=128).to(job.device)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.queue = F.normalize(torch.randn(128, job.keys, device=job.device), dim=0)
        self.ptr = torch.zeros(1, dtype=torch.long, device=job.device)
        self.optimizer = sgd(self.encoder_q)

    def __call__(self, im_q: torch.Tensor, im_k: torch.Tensor) -> None:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            pairs = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
            for old, new in pairs:
                old.data = old.data * 0.999 + new.data * 0.001
            keys = F.normalize(self.encoder_k(im_k), dim=1)
        positive = torch.einsum("nc,nc->n", q, keys).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / 0.07
        ptr = int(self.ptr)
        self.queue[:, ptr : ptr + len(keys)] = keys.T
        self.ptr[0] = (ptr + len(keys)) % self.queue.shape[1]
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class OurStep:
    """The body of train.py's loop."""

    def __init__(self, job: Job, groups: int, precision: str) -> None:
        moco = MoCo(job.arch, num_keys=job.keys, bn_groups=groups)
        self.moco = moco.to(device=job.device, memory_format=torch.channels_last).train()
        self.optimizer = sgd(self.moco.encoder_q, fused=True)
        self.job, self.groups, self.precision = job, groups, precision

    def changed(self, changes: list[Callable[..., str | None]]) -> "OurStep":
        """With both encoders changed by functions of `compute`."""
        example = self.job.views()[0].contiguous(memory_format=torch.channels_last)
        for change in changes:
            change_encoders(self.moco, change, example, self.precision)
        return self

    def __call__(self, im_q: torch.Tensor, im_k: torch.Tensor) -> None:
        device = self.job.device
        permutation = torch.randperm(len(im_k)).to(device) if self.groups > 1 else None
        im_q, im_k = (x.contiguous(memory_format=torch.channels_last) for x in (im_q, im_k))
        with compute.autocast(self.precision, device):
            logits, labels, keys = self.moco(im_q, im_k, shuffle=permutation)
        loss = contrastive_loss(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.moco.enqueue(keys)


class LightlyStep:
    """The MoCo example of lightly's documentation: memory bank, projection head of two layers."""

    def __init__(self, job: Job) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead

        backbone = torchvision.models.get_model(job.arch)
        width = backbone.fc.in_features
        backbone.fc = torch.nn.Identity()
        head = MoCoProjectionHead(width, width, 128)
        self.encoder_q = torch.nn.Sequential(backbone, head).to(job.device)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        bank = (job.keys, 128)
        self.loss = NTXentLoss(temperature=0.07, memory_bank_size=bank).to(job.device)
        self.optimizer = sgd(self.encoder_q)

    def __call__(self, im_q: torch.Tensor, im_k: torch.Tensor) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.encoder_q, self.encoder_k, m=0.999)
        with torch.no_grad():
            keys = self.encoder_k(im_k)
        loss = self.loss(self.encoder_q(im_q), keys)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def sgd(encoder: torch.nn.Module, fused: bool = False) -> torch.optim.SGD:
    return torch.optim.SGD(
        encoder.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4, fused=fused
    )


def on_views(step: Callable, views: list[torch.Tensor]) -> Callable[[], None]:
    """A step as a candidate for `alternate`, which waits until the device is done."""

    def run() -> None:
        step(*views)
        if views[0].device.type == "cuda":
            torch.cuda.synchronize()

    return run


def compare(job: Job, args: argparse.Namespace) -> None:
    """All candidates on one job, a row each."""
    ways: dict[str, list[Callable]] = {"": []}
    if args.compile:
        ways[", compiled"] = [compute.compile_encoder]
    if args.cuda_graph:
        ways |= {f"{way}, graphs": [*done, compute.graph_encoder] for way, done in ways.items()}
    groups, precision, repeats = args.groups, args.precision, args.repeats
    steps: dict[str, Callable] = {"plain": PlainStep(job)}
    for way, changes in ways.items():
        steps |= {f"ours G {g}{way}": OurStep(job, g, precision).changed(changes) for g in groups}
    if importlib.util.find_spec("lightly"):
        steps["lightly"] = LightlyStep(job)
    views = job.views()
    candidates = {name: on_views(step, views) for name, step in steps.items()}
    times = alternate(candidates, repeats, warm_up=2)
    for name, own in times.items():
        speed, cost = ratio(times["plain"], own), ratio(own, times[f"ours G {groups[0]}"])
        images = job.batch / statistics.median(own)
        print_row(str(job), name, f"{speed:.2f}", f"{cost:.2f}", f"{images:,.0f}")


def growth(job: Job, keys: list[int], repeats: int, precision: str) -> None:
    """The same step with longer queues."""
    views = job.views()
    steps = {f"{k:,}": OurStep(dataclasses.replace(job, keys=k), 1, precision) for k in keys}
    candidates = {name: on_views(step, views) for name, step in steps.items()}
    times = alternate(candidates, repeats, warm_up=2)
    first = next(iter(times))
    place = f"{job.arch}, {job.side} px, batch {job.batch}, K"
    print_header(place, f"time, K {first} = 1", "ms")
    for name, own in times.items():
        print_row(name, f"{ratio(own, times[first]):.2f}", f"{1e3 * statistics.median(own):.0f}")


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each by itself: fusing is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def limit(step: OurStep, repeats: int) -> None:
    """A step's time over what its operations, or its bytes, need.

    The rates are those of a large matrix product and a large copy on the same device.
    """
    views, device = step.job.views(), step.job.device
    step(*views)
    with FlopCounterMode(display=False) as counted:
        step(*views)
    with Traffic() as traffic:
        step(*views)
    side, length = PROBES[device.type]
    dtype = torch.bfloat16 if step.precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    source, target = torch.zeros(2, length, device=device)
    probes = {"product": lambda *_: a @ a, "copy": lambda *_: target.copy_(source)}
    times = alternate({name: on_views(probe, views) for name, probe in probes.items()}, 10)
    flops, flop_rate = counted.get_total_flops(), 2 * side**3 / min(times["product"])
    byte_rate = 2 * 4 * length / min(times["copy"])
    took = statistics.median(alternate({"step": on_views(step, views)}, repeats)["step"])
    needs = flops / flop_rate, traffic.bytes / byte_rate
    print_header(
        f"{flops / 1e9:.1f} G operations, at {flop_rate / 1e12:.2f} T/s",
        f"{traffic.bytes / 1e9:.2f} GB, at {byte_rate / 1e9:.0f} GB/s",
        "a step",
        "over the larger",
    )
    milliseconds = [f"{1e3 * seconds:.1f} ms" for seconds in (*needs, took)]
    print_row(*milliseconds, f"{took / max(needs):.2f}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--arch", help="one job of this encoder, in place of the three")
    parser.add_argument("--side", type=int, default=64, help="px")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--keys", type=int, nargs="+", default=[4096], help="K; several: only how a step grows"
    )
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8], help="batch-norm groups")
    parser.add_argument("--compile", action="store_true", help="ours compiled, too")
    parser.add_argument("--cuda_graph", action="store_true", help="ours as CUDA graphs, too")
    parser.add_argument("--limit", action="store_true", help="only: over what the device allows")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = compute.pick_device(args.device)
    precision = args.precision = compute.pick_precision(args.precision, device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    name = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    made_by = utils.provenance()
    print(f"commit {made_by['commit']}, torch {made_by['torch']}, {device} ({name})")
    print(f"ours in {precision}; medians of {args.repeats}\n")
    job = Job(args.arch or "resnet50", args.side, args.batch, args.keys[0], device)
    if len(args.keys) > 1:
        growth(job, args.keys, args.repeats, precision)
    elif args.limit:
        limit(OurStep(job, args.groups[0], precision), args.repeats)
    else:
        costs = f"time, ours G {args.groups[0]} = 1"
        print_header("job", "step", "speed, plain = 1", costs, "images/s")
        standard = [Job(*sizes, args.keys[0], device) for sizes in JOBS]
        for each in [job] if args.arch else standard:
            compare(each, args)


if __name__ == "__main__":
    utils.guard(main)
