"""Triton kernels of the token head. The mathematics is in `token_head.py`; here is only how it meets the memory.

Everything is bound by reading `hidden` [N, H] and writing its gradient, so:
- `_rewards_kernel`    reads hidden once (2NH bytes at bf16) and writes N rewards or logits;
- `_fused_kernel`      keeps a tile of rows in registers, so that logit, loss and both gradients come from one read
                       and one write (4NH). A program walks over many tiles and keeps its part of d weight in fp32;
- `_gradient_kernel`   the same gradients from given slopes, for losses whose slopes need all logits first;
- `_reduce_kernel`     adds the programs' parts of d weight in a fixed order: no atomics, bit-equal from run to run;
The action head's d weight is in `_rows_triton.py`, the pairwise loss in `_pairs_triton.py`.
Row offsets are int64. Numbers accumulate in fp32. float64 inputs run the plain-torch formula instead.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import num_multiprocessors
from ._math_triton import MODES, WGAN, loss_and_slope, reward_and_slope
from ._pairs_triton import pairwise
from ._rows_triton import scatter_rows

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


@triton.jit
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
        moves = slope[:, None] != 0.0  # a row without slope adds nothing, whatever it holds
        if d_hidden is not None:
            gradient = tl.where(moves, slope[:, None] * w, 0.0).to(d_hidden.dtype.element_ty)
            tl.store(d_hidden + rows[:, None] * H + columns[None, :], gradient, mask=ok[:, None] & inside[None, :])
        if partial_weight is not None:
            d_weight += tl.sum(tl.where(moves, slope[:, None] * h, 0.0), axis=0)
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


@triton.jit
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


# ---- launch configurations -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """block_n rows by block_h columns; num_stages tiles of hidden in flight; programs resident on a multiprocessor.

    A multiprocessor of an H200 needs about 40 KB of loads under way to draw its share of the memory's rate.
    """

    block_n: int
    block_h: int
    num_warps: int
    num_stages: int
    programs: int = 1


# Columns a tile spans: rows, warps and resident programs of the fused kernel. The sums over a row cross all warps.
_FUSED = {512: (8, 4, 4), 1024: (4, 4, 4), 2048: (2, 4, 3), 4096: (2, 4, 2), 8192: (2, 8, 1)}


def rewards_tile(indexed: bool) -> Tile:
    """A row's 256 columns are one 16-byte load a lane; the loop over columns keeps two tiles of 8 KB in flight."""
    return Tile(8, 256, 4, 2) if indexed else Tile(16, 256, 4, 3)


def fused_tile(width: int, indexed: bool) -> Tile | None:
    """Whole rows in registers, so that logit, loss and gradients need one read; wider rows leave room for fewer.

    None where a row is too wide for that; those shapes read hidden twice.
    """
    block_h = max(512, triton.next_power_of_2(width))
    if block_h > 8192:
        return None
    rows, num_warps, programs = _FUSED[block_h]
    return Tile(max(1, rows // 2) if indexed else rows, block_h, num_warps, 3, programs)


def gradient_tile(width: int) -> Tile:
    """No row needs another column here, so columns are split over programs as well."""
    return Tile(4, min(1024, max(512, triton.next_power_of_2(width))), 4, 3, 2)


def _programs(num_rows: int, tile: Tile, device: torch.device) -> int:
    """As many as run at once: more would only add parts of d weight to add up."""
    return max(1, min(triton.cdiv(num_rows, tile.block_n), tile.programs * num_multiprocessors(device)))


# ---- launchers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The head's tensors as the kernels want them: rows contiguous, strides in elements."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    index: Tensor | None
    offset: Tensor | None

    @property
    def bias_per_row(self) -> bool:
        return self.index is not None and self.bias is not None and self.bias.numel() > 1


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, offset: Tensor | None) -> _Head:
    return _Head(
        hidden=hidden if hidden.stride(1) == 1 else hidden.contiguous(),
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        index=None if index is None else index.contiguous(),
        offset=None if offset is None else offset.contiguous(),
    )


def token_rewards(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, offset: Tensor | None,
    kind: str, temperature: float, clip: float | None, live: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """live: rows where it is 0 are not read and give 0."""
    head = _head(hidden, weight, bias, index, offset)
    num_rows, width = hidden.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    if num_rows:
        tile = rewards_tile(index is not None)
        _rewards_kernel[(triton.cdiv(num_rows, tile.block_n),)](
            head.hidden, head.weight, head.bias, head.index, head.offset, live, out,
            num_rows, head.hidden.stride(0), temperature, clip,
            H=width, BIAS_PER_ROW=head.bias_per_row, MODE=MODES[kind], BLOCK_N=tile.block_n, BLOCK_H=tile.block_h,
            STAGES=tile.num_stages, num_warps=tile.num_warps,
        )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Where the kernels write; None where the caller wants nothing."""

    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None

    def tensors(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            hidden.new_empty(0) if self.d_hidden is None else self.d_hidden,
            weight.new_empty(0) if self.d_weight is None else self.d_weight,
            weight.new_empty(0) if self.d_bias is None else self.d_bias,
        )


def _allocate(head: _Head, need_hidden: bool, need_weight: bool) -> _Gradients:
    # Rows of the action head that no token uses are not written by any kernel.
    fresh = torch.zeros_like if head.index is not None or not head.hidden.shape[0] else torch.empty_like
    return _Gradients(
        torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if need_hidden else None,
        fresh(head.weight) if need_weight else None,
        fresh(head.bias) if need_weight and head.bias is not None else None,
    )


def _fused(
    head: _Head, mode: int, targets: Tensor | None, factors: Tensor, smoothing: float, temperature: float,
    clip: float | None, need_hidden: bool, need_weight: bool, tile: Tile,
) -> tuple[Tensor, Tensor, _Gradients, Tensor]:  # fmt: skip
    """(loss, logits, gradients, slopes) for the modes whose slope is a function of the row alone."""
    num_rows, width = head.hidden.shape
    device = head.hidden.device
    gradients = _allocate(head, need_hidden, need_weight)
    loss = torch.empty((), dtype=torch.float32, device=device)
    logits, slopes = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    if not num_rows:
        return loss.zero_(), logits, gradients, slopes
    programs = _programs(num_rows, tile, device)
    dense_weight = need_weight and head.index is None
    partial_weight = torch.empty((programs, width), dtype=torch.float32, device=device) if dense_weight else None
    partial_sums = torch.empty((2, programs), dtype=torch.float32, device=device)
    _fused_kernel[(programs,)](
        head.hidden, head.weight, head.bias, head.index, head.offset, targets, factors, logits, slopes,
        gradients.d_hidden, partial_weight, partial_sums,
        num_rows, head.hidden.stride(0), smoothing, temperature, clip,
        H=width, BIAS_PER_ROW=head.bias_per_row, MODE=mode, BLOCK_N=tile.block_n, BLOCK_H=tile.block_h,
        STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    _finish(head, slopes, gradients, partial_weight, partial_sums, loss if mode <= WGAN.value else None)
    return loss, logits, gradients, slopes


def _finish(
    head: _Head, slopes: Tensor, gradients: _Gradients, partial_weight: Tensor | None, partial_sums: Tensor,
    loss: Tensor | None,
) -> None:  # fmt: skip
    """The sums over programs, and for the action head the gradient of the weight's rows."""
    width, programs = head.hidden.shape[1], partial_sums.shape[1]
    columns = triton.cdiv(width, 16) if partial_weight is not None else 0
    d_bias = None if head.bias_per_row else gradients.d_bias
    if columns or d_bias is not None or loss is not None:
        _reduce_kernel[(columns + 1,)](
            partial_weight, partial_sums, gradients.d_weight if columns else None, d_bias, loss, programs, width,
            BLOCK_P=256, BLOCK_H=16, num_warps=4,
        )  # fmt: skip
    if head.index is not None and gradients.d_weight is not None:
        scatter_rows(
            head.hidden, head.index, slopes, gradients.d_weight, gradients.d_bias if head.bias_per_row else None
        )


def head_gradients(
    slopes: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d hidden, d weight, d bias) for d z = slopes [N]."""
    head = _head(hidden, weight, bias, index, None)
    num_rows, width = hidden.shape
    gradients = _allocate(head, need_hidden, need_weight)
    if num_rows and (need_hidden or need_weight):
        tile = gradient_tile(width)
        programs = _programs(num_rows, tile, hidden.device)
        dense_weight = need_weight and index is None
        partial_weight = (
            torch.empty((programs, width), dtype=torch.float32, device=hidden.device) if dense_weight else None
        )
        partial_sums = torch.empty((1, programs), dtype=torch.float32, device=hidden.device)
        _gradient_kernel[(programs, triton.cdiv(width, tile.block_h))](
            head.hidden, head.weight, head.index, slopes, gradients.d_hidden, partial_weight, partial_sums,
            num_rows, head.hidden.stride(0), H=width, BLOCK_N=tile.block_n, BLOCK_H=tile.block_h,
            STAGES=tile.num_stages, num_warps=tile.num_warps,
        )  # fmt: skip
        _finish(head, slopes, gradients, partial_weight, partial_sums, None)
    return gradients.tensors(hidden, weight)


def token_rewards_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, offset: Tensor | None,
    kind: str, temperature: float, clip: float | None, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tile = fused_tile(hidden.shape[1], index is not None)
    if tile is None:
        from .token_head import reward_of

        z = token_rewards(hidden, weight, bias, index, offset, "logit", 1.0, None)
        slopes = (grad * reward_of(z, kind, temperature, clip)[1]).contiguous()
        return *head_gradients(slopes, hidden, weight, bias, index, need_hidden, need_weight), slopes
    head = _head(hidden, weight, bias, index, offset)
    _, _, gradients, slopes = _fused(
        head, MODES[kind], None, grad.contiguous(), 0.0, temperature, clip, need_hidden, need_weight, tile
    )
    return *gradients.tensors(hidden, weight), slopes


def discriminator_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, index: Tensor | None,
    offset: Tensor | None, cu_seqlens: Tensor | None, pairs: Tensor | None, loss: str, label_smoothing: float,
    margin: float, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    targets, weights = targets.contiguous(), weights.contiguous()
    tile = fused_tile(hidden.shape[1], index is not None)
    if loss != "pairwise" and tile is not None:
        head = _head(hidden, weight, bias, index, offset)
        value, logits, gradients, slopes = _fused(
            head, MODES[loss], targets, weights, label_smoothing, 1.0, None, need_hidden, need_weight, tile
        )
        return value, logits, *gradients.tensors(hidden, weight), slopes
    logits = token_rewards(hidden, weight, bias, index, offset, "logit", 1.0, None, live=weights)
    if loss == "pairwise":
        value, slopes = pairwise(logits, weights, cu_seqlens.contiguous(), pairs.contiguous(), margin)
    else:
        from .token_head import bce_of, wgan_of

        value, slopes = bce_of(logits, targets, weights, label_smoothing) if loss == "bce" else wgan_of(
            logits, targets, weights
        )  # fmt: skip
    return value, logits, *head_gradients(slopes, hidden, weight, bias, index, need_hidden, need_weight), slopes


def scale_gradients_(gradients: list[Tensor], scale: Tensor) -> None:
    """One launch for d hidden, d weight and d bias; those not needed are empty."""
    sizes = [gradient.numel() for gradient in gradients]
    grid = (min(triton.cdiv(max(*sizes, 1), 4096), 8 * num_multiprocessors(scale.device)),)
    _scale_kernel[grid](*gradients, scale, *sizes, BLOCK=4096, num_warps=8)


def shipped_launches() -> dict:
    """The launches that are compiled for every chip by `cross_compile`: the shapes of the benchmark, at bf16."""
    num_rows, sequences, vocabulary = 32768, 256, 151936
    vector = torch.empty(num_rows, device="meta")
    index = torch.empty(num_rows, dtype=torch.int64, device="meta")
    segments = torch.empty(sequences + 1, dtype=torch.int32, device="meta"), index[:sequences]

    def head(width: int, indexed: bool) -> tuple[Tensor | None, ...]:
        """hidden, weight, bias, index, offset."""
        hidden, rows = torch.empty((num_rows + vocabulary, width), dtype=torch.bfloat16, device="meta").split(
            (num_rows, vocabulary)
        )
        return (hidden, rows, vector.new_empty(vocabulary), index, vector) if indexed else (
            hidden, rows[0], vector[:1], None, None
        )  # fmt: skip

    launches = {}
    for width, indexed in ((896, False), (1536, False), (3584, False), (4096, False), (8192, False), (896, True),
                           (4096, True)):  # fmt: skip
        args = head(width, indexed)
        name = f"{'action' if indexed else 'linear'} H={width}"
        for loss in ("bce", "pairwise") if width in (896, 4096) else ("bce",):
            launches[f"discriminator_loss {loss} {name}"] = lambda a=args, loss=loss: discriminator_loss(
                *a[:3], vector, vector, *a[3:], *segments, loss, 0.1, 1.0, True, True
            )
        if width in (896, 4096):  # the other tiles depend on the width less
            launches[f"token_rewards {name}"] = lambda a=args: token_rewards(*a, "gail", 1.0, 5.0)
            launches[f"scale_gradients {name}"] = lambda a=args: scale_gradients_(list(a[:3]), vector[0])
            launches[f"token_rewards backward {name}"] = lambda a=args: token_rewards_backward(
                vector, *a, "logd", 1.0, None, True, True
            )
    return launches
