"""Files that a stranger or an accident has changed: what may stand in them, drawn from a seed."""

import copy
import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

VALUES = [None, True, -1, 0, 2.5, 1e308, float("nan"), float("inf"), 10**40, "", "text", "\0"]
VALUES += ["../x", [], {}, [[]], [None], [1, "a"], {"a": 1}, [0.5] * 3]
TENSORS = [torch.zeros(0), torch.full((3,), float("nan")), torch.ones(2, 2).to_sparse()]
TENSORS += [torch.tensor(-1), torch.ones(1, 1, 1, 1, 1), torch.zeros(3, dtype=torch.complex64)]
CELLS = ["nan", "inf", "-1", "0", "0.5", "1e308", "1e-320", "", "text", '"', "9" * 400, "\0"]


def mutate(path: Path, draw: random.Random) -> str:
    """Change a file in some way, of which it gives a description."""
    ways = {".json": mutate_json, ".csv": mutate_csv, ".npz": mutate_npz, ".tar": mutate_checkpoint}
    way = ways.get(path.suffix, mutate_bytes)
    return draw.choice([way, way, mutate_bytes])(path, draw)


def mutate_bytes(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    how = draw.choice(["flip", "cut", "empty", "remove", "repeat", "overwrite", "insert", "nest"])
    if how == "flip" and data:
        data[at % len(data)] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "empty":
        data.clear()
    elif how == "remove":
        del data[at : min(end, at + 1000)]
    elif how == "repeat":
        data[at:at] = data[at : min(end, at + 1000)]
    elif how == "overwrite":
        data[at : min(end, at + 100)] = draw.randbytes(min(end, at + 100) - at)
    elif how == "insert":
        data[at:at] = draw.randbytes(draw.randrange(1, 100))
    elif how == "nest":
        data = b"[" * 100_000
    path.write_bytes(data)
    return f"{how} at byte {at}"


def places(content: Any, at: tuple = ()) -> list[tuple]:
    """The paths to all values in dicts and lists."""
    found = []
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            found += [(*at, key), *places(value, (*at, key))]
    return found


def mutate_tree(content: Any, draw: random.Random, values: list) -> tuple[Any, str]:
    """Nested dicts and lists with one value replaced, removed or nested, or with none of them."""
    if draw.random() < 0.1:
        value = draw.choice(values)
        return value, f"all of it -> {value!r:.60}"
    by_depth: dict[int, list] = {}
    for place in places(content):
        by_depth.setdefault(len(place), []).append(place)
    *way, key = draw.choice(by_depth[draw.choice(list(by_depth))])
    holder = content
    for step in way:
        holder = holder[step]
    how = draw.choice(["remove", "nest", "replace", "replace", "replace"])
    what = ""
    if how == "remove":
        del holder[key]
    elif how == "nest":
        for _ in range(150):
            holder[key] = [holder[key]]
    else:
        holder[key] = draw.choice([v for v in values if v is not content])
        what = f"by {holder[key]!r:.60}"
    return content, f"{how} {[*way, key]} {what}"


def mutate_json(path: Path, draw: random.Random) -> str:
    content, how = mutate_tree(json.loads(path.read_text()), draw, copy.deepcopy(VALUES))
    path.write_text(json.dumps(content))
    return how


def mutate_checkpoint(path: Path, draw: random.Random) -> str:
    content = torch.load(path, weights_only=True)
    content, how = mutate_tree(content, draw, copy.deepcopy(VALUES) + TENSORS)
    torch.save(content, path)
    return how


def mutate_csv(path: Path, draw: random.Random) -> str:
    rows = list(csv.reader(io.StringIO(path.read_text())))
    i, how = (
        draw.randrange(len(rows)),
        draw.choice(["cell", "cell", "cell", "row", "twice", "column"]),
    )
    j = draw.randrange(len(rows[i]))
    if how == "cell":
        rows[i][j] = draw.choice(CELLS)
        how = f"cell {i} {j} -> {rows[i][j]!r:.20}"
    elif how == "row":
        del rows[i]
    elif how == "twice":
        rows.insert(draw.randrange(len(rows)), rows[i])
    elif draw.random() < 0.5:
        rows = [row[:j] + row[j + 1 :] for row in rows]
    else:
        rows = [[*row, row[j]] for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.write_text(text.getvalue())
    return f"{how} ({i}, {j})"


def mutate_npz(path: Path, draw: random.Random) -> str:
    with np.load(path) as arrays:
        content = dict(arrays)
    name = draw.choice(list(content))
    old = content[name]
    content[name] = draw.choice(
        [
            old[:0] if old.ndim else old,
            old[None],
            old.astype(str),
            old.ravel()[:1],
            np.full(old.shape, -7.0),
            np.full(old.shape, np.nan),
            np.array(0),
            np.array(["x"]),
        ]
    )
    how = f"{name} {old.dtype} {old.shape} -> {content[name].dtype} {content[name].shape}"
    if draw.random() < 0.2:
        del content[name]
        how = f"without {name}"
    np.savez(path, **content)
    return how
