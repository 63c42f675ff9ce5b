"""Batch norm in groups on a GPU: two kernels forward and two backward, however many groups.

Written in Triton, which PyTorch's CUDA builds bring along. An activation (N, C, H, W) lies in
memory channels last, as rows of C numbers; a group's rows follow one another. Each group's rows are
cut into parts. The first kernel sums over each part, the second adds the parts up and goes over the
rows again. Sums are taken in float32 at least, in the same order every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, COLUMNS = 32, 64  # of the tile that a program holds at a time
PARTS = 64  # of a group, at most
PROGRAMS = 1024  # for a large activation: a few for each processor of a GPU


@triton.jit
def _rows_of(rows, size, PARTS: tl.constexpr):
    """The rows of this program's group and part: the group's first, its number, from, to."""
    first = tl.program_id(0).to(tl.int64) * size
    count = tl.minimum(size, rows - first)
    each = tl.cdiv(size, PARTS)
    start = tl.minimum(tl.program_id(1) * each, count)
    return first, count, start, tl.minimum(start + each, count)


@triton.jit
def _columns_of(columns, COLUMNS: tl.constexpr):
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    return c, c < columns


@triton.jit
def _block(row, first, end, c, inside, columns, ROWS: tl.constexpr):
    """Where ROWS rows of a group from `row` on lie, and which of them are before `end`."""
    r = row + tl.arange(0, ROWS)
    return (first + r)[:, None] * columns + c[None, :], (r < end)[:, None] & inside[None, :]


@triton.jit
def _total(partial, group, c, inside, columns, PARTS: tl.constexpr):
    """The two sums of a group from those of its parts: partial (groups, PARTS, 2, C)."""
    part = tl.arange(0, PARTS)[:, None]
    place = partial + ((group * PARTS + part) * 2) * columns + c[None, :]
    one = tl.load(place, mask=inside[None, :], other=0.0)
    two = tl.load(place + columns, mask=inside[None, :], other=0.0)
    return tl.sum(one, 0), tl.sum(two, 0)


@triton.jit
def _moments(x, partial, group, size, rows, c, inside, columns, PARTS: tl.constexpr):
    """Mean and variance of a group, and its number of rows."""
    first = group.to(tl.int64) * size
    count = tl.minimum(size, rows - first)
    one, two = _total(partial, group, c, inside, columns, PARTS)
    one, two = one / count, two / count
    shift = tl.load(x + first * columns + c, mask=inside, other=0.0).to(one.dtype)
    var = tl.maximum(two - one * one, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return shift + one, var, count


@triton.jit
def _sum_forward(
    x, partial, rows, size, columns, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums of x - s and its square, where s is the group's first row: so they do not cancel."""
    dtype = partial.dtype.element_ty
    first, _, start, end = _rows_of(rows, size, PARTS)
    c, inside = _columns_of(columns, COLUMNS)
    shift = tl.load(x + first * columns + c, mask=inside, other=0.0).to(dtype)
    one = tl.zeros((ROWS, COLUMNS), dtype)
    two = tl.zeros((ROWS, COLUMNS), dtype)
    for row in range(start, end, ROWS):
        place, mask = _block(row, first, end, c, inside, columns, ROWS)
        value = tl.load(x + place, mask=mask, other=0.0)
        value = tl.where(mask, value.to(dtype) - shift[None, :], 0.0)
        one += value
        two += value * value
    place = (tl.program_id(0) * PARTS + tl.program_id(1)) * 2 * columns + c
    tl.store(partial + place, tl.sum(one, 0), mask=inside)
    tl.store(partial + place + columns, tl.sum(two, 0), mask=inside)


@triton.jit
def _normalize(
    x,
    y,
    weight,
    bias,
    partial,
    saved,
    running_mean,
    running_var,
    tracked,
    rows,
    size,
    columns,
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    GROUPS: tl.constexpr,
    UPDATE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = (x - mean) / deviation * weight + bias. Saves (groups, C) of mean, variance (unbiased)
    and 1 / deviation, and moves the running statistics to the mean over the groups."""
    group = tl.program_id(0)
    first, _, start, end = _rows_of(rows, size, PARTS)
    c, inside = _columns_of(columns, COLUMNS)
    mean, var, count = _moments(x, partial, group, size, rows, c, inside, columns, PARTS)
    scale = 1 / tl.sqrt(var + EPS)
    if tl.program_id(1) == 0:
        place, step = saved + group * columns + c, GROUPS * columns
        tl.store(place, mean, mask=inside)
        tl.store(place + step, var * count / (count - 1), mask=inside)
        tl.store(place + 2 * step, scale, mask=inside)
        if UPDATE and group == 0:
            mean_sum, var_sum = tl.zeros_like(mean), tl.zeros_like(var)
            for g in range(GROUPS):
                g_mean, g_var, n = _moments(
                    x, partial, group + g, size, rows, c, inside, columns, PARTS
                )
                mean_sum += g_mean
                var_sum += g_var * n / (n - 1)
            old = tl.load(running_mean + c, mask=inside)
            tl.store(running_mean + c, old + MOMENTUM * (mean_sum / GROUPS - old), mask=inside)
            old = tl.load(running_var + c, mask=inside)
            tl.store(running_var + c, old + MOMENTUM * (var_sum / GROUPS - old), mask=inside)
            if tl.program_id(2) == 0:
                tl.store(tracked, tl.load(tracked) + 1)
    factor = scale * tl.load(weight + c, mask=inside, other=0.0)
    offset = tl.load(bias + c, mask=inside, other=0.0)
    for row in range(start, end, ROWS):
        place, mask = _block(row, first, end, c, inside, columns, ROWS)
        value = tl.load(x + place, mask=mask, other=0.0).to(mean.dtype) - mean[None, :]
        tl.store(y + place, value * factor[None, :] + offset[None, :], mask=mask)


@triton.jit
def _sum_backward(
    x,
    dy,
    saved,
    partial,
    rows,
    size,
    columns,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of dy and of dy times the normalised x."""
    dtype = partial.dtype.element_ty
    group = tl.program_id(0)
    first, _, start, end = _rows_of(rows, size, PARTS)
    c, inside = _columns_of(columns, COLUMNS)
    mean = tl.load(saved + group * columns + c, mask=inside, other=0.0)
    scale = tl.load(saved + (2 * GROUPS + group) * columns + c, mask=inside, other=0.0)
    one = tl.zeros((ROWS, COLUMNS), dtype)
    two = tl.zeros((ROWS, COLUMNS), dtype)
    for row in range(start, end, ROWS):
        place, mask = _block(row, first, end, c, inside, columns, ROWS)
        value = tl.load(x + place, mask=mask, other=0.0).to(dtype)
        slope = tl.load(dy + place, mask=mask, other=0.0).to(dtype)
        one += slope
        two += slope * (value - mean[None, :])
    place = (group * PARTS + tl.program_id(1)) * 2 * columns + c
    tl.store(partial + place, tl.sum(one, 0), mask=inside)
    tl.store(partial + place + columns, tl.sum(two, 0) * scale, mask=inside)


@triton.jit
def _backward(
    x,
    dy,
    dx,
    weight,
    saved,
    partial,
    dweight,
    dbias,
    rows,
    size,
    columns,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx = (dy - mean of dy - z * mean of dy z) / deviation * weight, where z is x normalised."""
    dtype = partial.dtype.element_ty
    group = tl.program_id(0)
    first, count, start, end = _rows_of(rows, size, PARTS)
    c, inside = _columns_of(columns, COLUMNS)
    if group == 0 and tl.program_id(1) == 0:
        one_sum, two_sum = tl.zeros((COLUMNS,), dtype), tl.zeros((COLUMNS,), dtype)
        for g in range(GROUPS):
            one, two = _total(partial, g, c, inside, columns, PARTS)
            one_sum += one
            two_sum += two
        tl.store(dbias + c, one_sum, mask=inside)
        tl.store(dweight + c, two_sum, mask=inside)
    mean = tl.load(saved + group * columns + c, mask=inside, other=0.0)
    scale = tl.load(saved + (2 * GROUPS + group) * columns + c, mask=inside, other=0.0)
    one, two = _total(partial, group, c, inside, columns, PARTS)
    one, two = one / count, two / count * scale
    factor = scale * tl.load(weight + c, mask=inside, other=0.0)
    for row in range(start, end, ROWS):
        place, mask = _block(row, first, end, c, inside, columns, ROWS)
        value = tl.load(x + place, mask=mask, other=0.0).to(dtype) - mean[None, :]
        slope = tl.load(dy + place, mask=mask, other=0.0).to(dtype)
        slope = (slope - one[None, :] - value * two[None, :]) * factor[None, :]
        tl.store(dx + place, slope, mask=mask)


class GroupBatchNorm(torch.autograd.Function):
    """Batch norm of x (N, C, H, W) on the current GPU, in the groups of torch.chunk.

    `running` is running mean, running variance and their count, which it updates, or None.
    Returns y, and the mean, unbiased variance and 1 / deviation of each group: (3, groups, C).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running, groups, momentum, eps):
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.plan = plan = _plan(x, groups)
        rows, size, columns, groups, grid, tiles = plan
        dtype = torch.promote_types(x.dtype, torch.float32)
        partial = torch.empty(groups, tiles["PARTS"], 2, columns, dtype=dtype, device=x.device)
        saved = torch.empty(3, groups, columns, dtype=dtype, device=x.device)
        y = torch.empty_like(x)
        _sum_forward[grid](x, partial, rows, size, columns, **tiles)
        _normalize[grid](
            x,
            y,
            weight,
            bias,
            partial,
            saved,
            *(running or (None, None, None)),
            rows,
            size,
            columns,
            EPS=eps,
            MOMENTUM=momentum,
            GROUPS=groups,
            UPDATE=running is not None,
            **tiles,
        )
        ctx.save_for_backward(x, weight, saved)
        ctx.mark_non_differentiable(saved)
        return y, saved

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, weight, saved = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        rows, size, columns, groups, grid, tiles = ctx.plan
        partial = saved.new_empty(groups, tiles["PARTS"], 2, columns)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        _sum_backward[grid](x, dy, saved, partial, rows, size, columns, GROUPS=groups, **tiles)
        _backward[grid](
            x,
            dy,
            dx,
            weight,
            saved,
            partial,
            dweight,
            dbias,
            rows,
            size,
            columns,
            GROUPS=groups,
            **tiles,
        )
        return dx, dweight, dbias, None, None, None, None


def _plan(x: Tensor, groups: int) -> tuple:
    """Rows, rows of a group, columns, groups, the grid of programs, and the tiles."""
    n, columns, height, width = x.shape
    images = -(-n // groups)  # as torch.chunk
    groups, size = -(-n // images), images * height * width
    if n * height * width - (groups - 1) * size < 2:
        raise ValueError(f"a batch-norm group of one value a channel, in {list(x.shape)}")
    block = min(COLUMNS, triton.next_power_of_2(columns))
    blocks = -(-columns // block)
    wanted = min(-(-PROGRAMS // (groups * blocks)), -(-size // ROWS), PARTS)
    tiles = {"PARTS": triton.next_power_of_2(wanted), "ROWS": ROWS, "COLUMNS": block}
    return n * height * width, size, columns, groups, (groups, tiles["PARTS"], blocks), tiles
