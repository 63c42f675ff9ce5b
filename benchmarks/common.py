"""What the benchmarks share: runs that alternate, medians, tables."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import MoCo
from utils import UserError


def build_parser(description: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False)


def alternate(
    candidates: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 0
) -> dict[str, list[float]]:
    """Seconds of each candidate, in turn: what disturbs the machine disturbs all of them."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(-warm_up, repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of values that were measured next to each other."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def change_encoders(
    moco: MoCo, change: Callable[..., str | None], example: torch.Tensor, precision: str
) -> None:
    """Let a function of `compute` change both encoders; UserError where it fails."""
    for encoder in (moco.encoder_q, moco.encoder_k):
        if reason := change(encoder, example, precision):
            raise UserError(f"{change.__name__} failed: {reason}")


def print_header(*columns: str) -> None:
    print_row(*columns)
    print_row(*["---"] * len(columns))


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)
