"""Triton kernels of the token head. The mathematics is in `_head_math.py`; here is only how it meets the memory.

Everything is bound by reading `hidden` [N, H] and writing its gradient, so:
- `_rewards_kernel`    reads hidden once (2NH bytes at bf16) and writes N rewards or logits;
- `_fused_kernel`      keeps a tile of rows in registers, so that logit, loss and both gradients come from one read
                       and one write (4NH). A program walks over many tiles and keeps its part of d weight in fp32;
- `_gradient_kernel`   the same gradients from given slopes, for losses whose slopes need all logits first;
- `_reduce_kernel`     adds the programs' parts of d weight in a fixed order: no atomics, bit-equal from run to run;
The action head's d weight is in `_rows_triton.py`, the pairwise loss in `_pairs_triton.py`.
Row offsets are int64. Numbers accumulate in fp32. float64 inputs run the plain-torch formula instead.
"""

import triton
import triton.language as tl

from ._math_triton import WGAN, loss_and_slope, reward_and_slope

# ---- device functions ------------------------------------------------------------------------------------------


@triton.jit
def _add_terms(z, bias, index_rows, offset, rows, ok, BIAS_PER_ROW: tl.constexpr):
    if bias is not None:
        if BIAS_PER_ROW:
            z += tl.load(bias + index_rows, mask=ok, other=0.0).to(tl.float32)
        else:
            z += tl.load(bias).to(tl.float32)
    if offset is not None:
        z += tl.load(offset + rows, mask=ok, other=0.0).to(tl.float32)
    return z


# ---- kernels ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def _rewards_kernel(
    hidden, weight, bias, index, offset, live, out, num_rows, stride_hidden, temperature, clip,
    H: tl.constexpr, BIAS_PER_ROW: tl.constexpr, MODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = rows < num_rows
    if live is not None:  # rows of weight 0 are not read
        ok = ok & (tl.load(live + rows, mask=ok, other=0.0) != 0.0)
    index_rows = rows * 0
    if index is not None:
        index_rows = tl.load(index + rows, mask=ok, other=0)
    products = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
    for first in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK_H)
        inside = columns < H
        tile = ok[:, None] & inside[None, :]
        h = tl.load(hidden + rows[:, None] * stride_hidden + columns[None, :], mask=tile, other=0.0).to(tl.float32)
        if index is not None:
            w = tl.load(weight + index_rows[:, None] * H + columns[None, :], mask=tile, other=0.0).to(tl.float32)
        else:
            w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        products += h * w
    z = _add_terms(tl.sum(products, axis=1), bias, index_rows, offset, rows, ok, BIAS_PER_ROW)
    reward, _ = reward_and_slope(z, temperature, clip, MODE)
    tl.store(out + rows, tl.where(ok, reward, 0.0), mask=rows < num_rows)


@triton.jit
def _fused_kernel(
    hidden, weight, bias, index, offset, targets, factors, logits, slopes, d_hidden, partial_weight, partial_sums,
    num_rows, stride_hidden, smoothing, temperature, clip,
    H: tl.constexpr, BIAS_PER_ROW: tl.constexpr, MODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """factors: the loss's weight of every row, or the incoming gradient of every reward; rows of 0 are not read."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_H)
    inside = columns < H
    if index is None:
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros([BLOCK_H], dtype=tl.float32)
    loss_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    slope_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in tl.range(program, tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        ok = rows < num_rows
        factor = tl.load(factors + rows, mask=ok, other=0.0)
        live = factor != 0.0
        read = live[:, None] & inside[None, :]
        h = tl.load(hidden + rows[:, None] * stride_hidden + columns[None, :], mask=read, other=0.0).to(tl.float32)
        index_rows = rows * 0
        if index is not None:
            index_rows = tl.load(index + rows, mask=live, other=0)
            w = tl.load(weight + index_rows[:, None] * H + columns[None, :], mask=read, other=0.0).to(tl.float32)
        z = _add_terms(tl.sum(h * w, axis=1), bias, index_rows, offset, rows, live, BIAS_PER_ROW)
        if MODE <= WGAN:
            target = tl.load(targets + rows, mask=live, other=0.0)
            value, slope = loss_and_slope(z, target, smoothing, MODE)
            loss_sum += tl.where(live, factor * value, 0.0)
            tl.store(logits + rows, tl.where(live, z, 0.0), mask=ok)
        else:
            _, slope = reward_and_slope(z, temperature, clip, MODE)
        slope = tl.where(live, factor * slope, 0.0)
        slope_sum += slope
        tl.store(slopes + rows, slope, mask=ok)
        if d_hidden is not None:
            gradient = (slope[:, None] * w).to(d_hidden.dtype.element_ty)
            tl.store(d_hidden + rows[:, None] * H + columns[None, :], gradient, mask=ok[:, None] & inside[None, :])
        if partial_weight is not None:
            # A row without slope adds nothing, whatever it holds. What would make 0 * h a NaN has made z no number.
            empty = (slope == 0.0) & ((tl.abs(z) < float("inf")) == 0)
            if tl.max(empty.to(tl.int32), axis=0) > 0:
                h = tl.where(empty[:, None], 0.0, h)
            d_weight += tl.sum(slope[:, None] * h, axis=0)
    if partial_weight is not None:
        tl.store(partial_weight + program.to(tl.int64) * H + columns, d_weight, mask=inside)
    tl.store(partial_sums + program, tl.sum(slope_sum))
    if MODE <= WGAN:
        tl.store(partial_sums + tl.num_programs(0) + program, tl.sum(loss_sum))


@triton.jit
def _gradient_kernel(
    hidden, weight, index, slopes, d_hidden, partial_weight, partial_sums, num_rows, stride_hidden,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < H
    if index is None:
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros([BLOCK_H], dtype=tl.float32)
    slope_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in tl.range(program, tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        ok = rows < num_rows
        slope = tl.load(slopes + rows, mask=ok, other=0.0)
        slope_sum += slope
        moves = (slope != 0.0)[:, None] & inside[None, :]
        if d_hidden is not None:
            if index is not None:
                index_rows = tl.load(index + rows, mask=ok, other=0)
                w = tl.load(weight + index_rows[:, None] * H + columns[None, :], mask=moves, other=0.0).to(tl.float32)
            gradient = tl.where(moves, slope[:, None] * w, 0.0).to(d_hidden.dtype.element_ty)
            tl.store(d_hidden + rows[:, None] * H + columns[None, :], gradient, mask=ok[:, None] & inside[None, :])
        if partial_weight is not None:
            h = tl.load(hidden + rows[:, None] * stride_hidden + columns[None, :], mask=moves, other=0.0)
            d_weight += tl.sum(slope[:, None] * h.to(tl.float32), axis=0)
    if partial_weight is not None:
        tl.store(partial_weight + program.to(tl.int64) * H + columns, d_weight, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(partial_sums + program, tl.sum(slope_sum))


@triton.jit(do_not_specialize=["num_parts"])
def _reduce_kernel(
    partial_weight, partial_sums, d_weight, d_bias, loss, num_parts, H,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Column sums of partial_weight [P, H]; the last program adds up the slopes and the losses instead."""
    lanes = tl.arange(0, BLOCK_P)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        if d_weight is not None:
            columns = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
            total = tl.zeros([BLOCK_P, BLOCK_H], dtype=tl.float32)
            for first in range(0, num_parts, BLOCK_P):
                parts = first + lanes
                mask = (parts < num_parts)[:, None] & (columns < H)[None, :]
                total += tl.load(partial_weight + parts[:, None] * H + columns[None, :], mask=mask, other=0.0)
            tl.store(d_weight + columns, tl.sum(total, axis=0).to(d_weight.dtype.element_ty), mask=columns < H)
    else:
        slope_sum = tl.zeros([BLOCK_P], dtype=tl.float32)
        loss_sum = tl.zeros([BLOCK_P], dtype=tl.float32)
        for first in range(0, num_parts, BLOCK_P):
            parts = first + lanes
            slope_sum += tl.load(partial_sums + parts, mask=parts < num_parts, other=0.0)
            if loss is not None:
                loss_sum += tl.load(partial_sums + num_parts + parts, mask=parts < num_parts, other=0.0)
        if d_bias is not None:
            tl.store(d_bias, tl.sum(slope_sum).to(d_bias.dtype.element_ty))
        if loss is not None:
            tl.store(loss, tl.sum(loss_sum))


@triton.jit
def _scale_kernel(first, second, third, scale, first_size, second_size, third_size, BLOCK: tl.constexpr):
    """Multiply three arrays in place. A scale of 1, the usual one, costs a launch and no traffic."""
    factor = tl.load(scale).to(tl.float32)
    if factor != 1.0:
        _scale_array(first, first_size, factor, BLOCK)
        _scale_array(second, second_size, factor, BLOCK)
        _scale_array(third, third_size, factor, BLOCK)


@triton.jit
def _scale_array(array, size, factor, BLOCK: tl.constexpr):
    for block in tl.range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at = tl.full([], BLOCK, tl.int64) * block + tl.arange(0, BLOCK)
        value = tl.load(array + at, mask=at < size, other=0.0).to(tl.float32) * factor
        tl.store(array + at, value.to(array.dtype.element_ty), mask=at < size)
