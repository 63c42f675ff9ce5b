"""One process of several, in the environment that torchrun gives; started by launches.py.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost python tests/ranks.py '[[PORT, "train", FLAG], ...]'

Runs the scripts one after the other, each with a process group of its own, and prints how
often each collective was called.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch.distributed as dist
from scripts import script_module

COLLECTIVES = (
    "all_to_all_single",
    "all_gather_single",
    "all_gather_into_tensor",
    "all_gather",
    "all_reduce",
    "broadcast",
    "gather",
    "scatter",
)


def main() -> None:
    calls: Counter = Counter()
    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, counted(getattr(dist, name), name, calls))
    for port, script, *flags in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        calls.clear()
        script_module(script).main(flags)
        print("CALLS", json.dumps(calls), flush=True)


def counted(function, name, calls):
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    main()
