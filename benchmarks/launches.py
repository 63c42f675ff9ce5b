"""What a training step asks of a GPU: kernels to launch, copies, and waits of the host, by phase.

    python benchmarks/launches.py                        ResNet-50, 64 px, batch 256, 8 groups
    python benchmarks/launches.py --groups 1 --compile --cuda_graph
    python benchmarks/launches.py --precision fp32 --aug_plus

On a GPU PyTorch's profiler sees them. On a machine without one they are counted by a stand-in for
the CUDA driver, a library loaded before all others that answers its calls and exports counters
(fake_n, fake_name, fake_get); there, kernels of cuDNN and cuBLAS are counted apart.
"""

import argparse
import contextlib
import ctypes
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from common import build_parser, change_encoders, print_header, print_row
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import augment
import utils
from model import MoCo, contrastive_loss, to_device
from run import compute

PHASES = ["augmentation", "query forward", "key forward", "backward", "all else"]
COLUMNS = ["launches", "cuDNN, cuBLAS", "copies", "pageable", "waits"]
CALLS = {  # a part of the name of a call that the profiler sees: its column
    "LaunchKernel": "launches",
    "GraphLaunch": "launches",
    "Memcpy": "copies",
    "Synchronize": "waits",
}
COUNTERS = {  # of the stand-in
    "launch": "launches",
    "gemm": "cuDNN, cuBLAS",
    "conv": "cuDNN, cuBLAS",
    "h2d_pinned": "copies",
    "h2d_pageable": "pageable",
    "d2h": "copies",
    "d2d": "copies",
    "sync_stream": "waits",
    "sync_device": "waits",
    "sync_event": "waits",
}
Table = dict[str, Counter]


class StandIn:
    """The counters of a stand-in for the CUDA driver, by phase."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.fake_get.restype, library.fake_name.restype = ctypes.c_uint64, ctypes.c_char_p
        self.table: Table = {name: Counter() for name in PHASES}
        self._phase, self._last = "all else", self._read()

    def _read(self) -> Counter:
        numbers: Counter = Counter()
        for i in range(self._library.fake_n()):
            column = COUNTERS.get(self._library.fake_name(i).decode())
            if column is not None:
                numbers[column] += self._library.fake_get(i)
        numbers["copies"] += numbers["pageable"]
        return numbers

    def _enter(self, name: str) -> str:
        now, before = self._read(), self._phase
        self.table[before] += now - self._last
        self._phase, self._last = name, now
        return before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._enter(name)
        yield
        self._enter(before)

    def count(self, step: Callable) -> Table:
        """The table of one step, which says its phases by `phase`."""
        self.table = {name: Counter() for name in PHASES}
        self._last = self._read()
        step(self.phase)
        self._enter("all else")
        return self.table


def profiled(step: Callable) -> Table:
    """The table of one step, by PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step(record_function)
        torch.cuda.synchronize()
    events = [(e.name, e.time_range.start, e.time_range.end) for e in seen.events()]
    table = tally(events)
    table["all else"]["waits"] -= 1  # our own
    return table


def tally(events: list[tuple[str, float, float]]) -> Table:
    """Calls by the phase in which they were made, from events (name, start, end).

    Of phases within each other it is the innermost: the one that began last. The copies' own
    events, on the GPU, name the kind of memory but not the phase: "all else" has them.
    """
    table: Table = {name: Counter() for name in PHASES}
    ranges = [event for event in events if event[0] in PHASES]
    for name, moment, _ in events:
        around = [r for r in ranges if r[1] <= moment <= r[2]]
        phase = max(around, key=lambda r: r[1])[0] if around else "all else"
        if name.startswith("Memcpy HtoD (Pageable"):
            table["all else"]["pageable"] += 1
        elif name.startswith(("cuda", "cu", "hip")):
            for part, column in CALLS.items():
                table[phase][column] += part in name
    return table


class Step:
    """The body of train.py's loop, with its phases."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device, self.precision, self.batch = device, args.precision, args.batch
        moco = MoCo(args.arch, num_keys=args.keys, bn_groups=args.groups)
        self.moco = moco.to(device, memory_format=torch.channels_last).train()
        parameters = self.moco.encoder_q.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=0.03, momentum=0.9, fused=True)
        self.images = torch.randint(256, (args.batch, 3, 128, 128), dtype=torch.uint8)
        self.recipe = augment.recipe("v2" if args.aug_plus else "v1", args.side)
        changes = {"compile": compute.compile_encoder, "cuda_graph": compute.graph_encoder}
        example = torch.zeros(args.batch, 3, args.side, args.side, device=device)
        example = example.contiguous(memory_format=torch.channels_last)
        for name in filter(partial(getattr, args), changes):
            start = time.monotonic()
            change_encoders(self.moco, changes[name], example, args.precision)
            print(f"--{name}: done in {utils.duration(time.monotonic() - start)}", flush=True)

    def __call__(self, phase: Callable[[str], contextlib.AbstractContextManager]) -> None:
        def named(name: str, function: Callable) -> Callable:
            def run(x: torch.Tensor) -> torch.Tensor:
                with phase(name):
                    return function(x)

            return run

        moco, n = self.moco, self.batch
        moco.encode_q = named("query forward", moco.encoder_q)
        moco.encode_k = named("key forward", moco.encoder_k)
        random = [utils.generator(0, stream) for stream in ("query", "key")]
        with phase("augmentation"):
            images, rows = to_device(self.images, self.device), slice(None)
            im_q, im_k = augment.views(images, torch.ones(n), self.recipe, random, n, rows)
        with compute.autocast(self.precision, self.device):
            logits, labels, keys = moco(im_q, im_k, shuffle=torch.randperm(n))
        loss = contrastive_loss(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        with phase("backward"):
            loss.backward()
        self.optimizer.step()
        moco.enqueue(keys)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--side", type=int, default=64, help="px")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--groups", type=int, default=8, help="batch-norm groups")
    parser.add_argument("--keys", type=int, default=65536, help="K")
    parser.add_argument("--aug_plus", action="store_true", help="v2's augmentation")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda_graph", action="store_true")
    parser.add_argument("--precision", default="auto")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise utils.UserError("there is no GPU here whose calls could be counted")
    device = compute.pick_device("cuda:0")
    args.precision = compute.pick_precision(args.precision, device)
    compute.set_backends(tune=True)
    loaded = ctypes.CDLL(None)
    count = StandIn(loaded).count if hasattr(loaded, "fake_get") else profiled
    made_by = utils.provenance()
    print(f"commit {made_by['commit']}, torch {made_by['torch']}, {args.precision}")
    job = f"{args.arch}, {args.side} px, batch {args.batch}, {args.groups} groups"
    step = Step(args, device)
    for _ in range(3):  # libraries are set up, kernels compiled and tuned
        step(lambda name: contextlib.nullcontext())
    table = count(step)
    print_header(job, *COLUMNS)
    for name in PHASES:
        print_row(name, *(f"{table[name][column]:,}" for column in COLUMNS))
    whole = sum(table.values(), Counter())
    print_row("a step", *(f"{whole[column]:,}" for column in COLUMNS))


if __name__ == "__main__":
    utils.guard(main)
