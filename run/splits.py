"""How the rows of a batch are split into batch-norm groups and over devices.

A batch is split into groups as torch.chunk does it, 256 over 6 into 43 x 5 + 41, and each device
holds equally many neighbouring groups. In evaluation each device holds one chunk.
"""

import itertools
from typing import TYPE_CHECKING

from utils import UserError

if TYPE_CHECKING:
    from parallel import Launch


FEW = 4  # images in a batch-norm group; with fewer their statistics say little


def chunks(n: int, parts: int) -> list[int]:
    """The sizes of the parts, possibly fewer, into which torch.chunk splits n rows."""
    size = max(1, -(-n // parts))
    return [min(size, n - start) for start in range(0, n, size)]


def shares(n: int, devices: int, groups: int) -> list[int]:
    """The rows of n that each device holds: its groups / devices neighbouring groups, or none."""
    sizes, each = chunks(n, groups), groups // devices
    return [sum(sizes[i * each : (i + 1) * each]) for i in range(devices)]


def rows_of(sizes: list[int], part: int) -> slice:
    """Where a part lies, of parts that follow one another."""
    return slice(sum(sizes[:part]), sum(sizes[: part + 1]))


def fits(batch_size: int, groups: int, launch: "Launch") -> bool:
    """Whether a batch gives `groups` groups of 2 images or more, as many on each device."""
    sizes, each = chunks(batch_size, groups), groups // launch.devices
    if groups % launch.devices or len(sizes) != groups or min(sizes) < 2:
        return False
    held = launch.device_rows(batch_size, groups)
    return [size for rows in held for size in chunks(rows, each)] == sizes


def resolve_bn_groups(bn_groups: int | str, batch_size: int, launch: "Launch") -> int:
    """The number of batch-norm groups of the global batch (paper, section 3.3).

    `auto` is the number of devices, or on one device the largest up to 8, the paper's 8 GPUs, that
    leaves groups of 4 images or more. Raises UserError, with the nearest numbers that fit, unless a
    batch gives that many groups of 2 images or more, as many on each device.
    """
    devices = launch.devices
    groups = devices if bn_groups == "auto" else bn_groups
    if bn_groups == "auto" and devices == 1:
        large = (count for count in range(8, 0, -1) if min(chunks(batch_size, count)) >= FEW)
        groups = next((count for count in large if fits(batch_size, count, launch)), 1)
    if fits(batch_size, groups, launch):
        return groups
    counts = range(devices, min(batch_size // 2, 2 * groups + devices) + 1, devices)
    counts = sorted(counts, key=lambda count: abs(count - groups))
    fitting = (count for count in counts if fits(batch_size, count, launch))
    near = sorted(itertools.islice(fitting, 2))
    numbers = " or ".join(map(str, near))
    remedy = f"use --bn_groups {numbers}, or another batch size" if near else "use a larger batch"
    raise UserError(
        f"--batch_size {batch_size} does not split into {groups} batch-norm groups of at least "
        f"2 images{f', as many on each of {devices} devices' if devices > 1 else ''}: {remedy}"
    )
