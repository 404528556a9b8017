"""Sums of rows by index, without atomics: d weight[index_t] += slope_t · hidden_t.

The gradient of the action head's weight, and, with every slope 1, that of rows that were gathered (`_rows.py`).
Tokens are sorted by row of the weight, stably, so that every row's tokens are added in their order and the result
is bit-equal from run to run. Programs take chunks of sorted tokens; a row whose tokens span several chunks is joined
by a second kernel. A row that very many tokens share is joined serially: at one row for all of 32768 tokens that is
a thousand steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 32  # sorted tokens one program adds up


@triton.jit
def _runs_kernel(
    hidden, keys, order, slopes, d_weight, d_bias, head, tail, head_bias, tail_bias, num_rows, stride_hidden, H,
    CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Add up slope·hidden over runs of equal keys (sorted) inside one chunk of CHUNK tokens.

    A run inside the chunk goes straight to its row of d weight. The part of a run that began earlier goes to
    head[chunk], that of a run which begins here and goes on to tail[chunk]; `_join_kernel` adds those up.
    """
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < H
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, num_rows) - 1
    inherited = tl.load(keys + first - 1, mask=first > 0, other=-1)
    key = tl.load(keys + first)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    bias_total = 0.0
    for step in range(last - first + 1):
        position = first + step
        row = tl.load(order + position)
        slope = 1.0
        moves = inside
        if slopes is not None:
            slope = tl.load(slopes + row)
            moves = inside & (tl.full([BLOCK_H], slope, tl.float32) != 0.0)
        h = tl.load(hidden + row * stride_hidden + columns, mask=moves, other=0.0)
        total += slope * h.to(tl.float32)
        bias_total += slope
        following = tl.load(keys + position + 1, mask=position + 1 < num_rows, other=-1)
        if (following != key) | (position == last):
            if key == inherited:
                tl.store(head + chunk * H + columns, total, mask=inside)
                tl.store(head_bias + chunk, bias_total)
            elif following == key:
                tl.store(tail + chunk * H + columns, total, mask=inside)
                tl.store(tail_bias + chunk, bias_total)
            else:
                tl.store(d_weight + key * H + columns, total.to(d_weight.dtype.element_ty), mask=inside)
                if d_bias is not None:
                    tl.store(d_bias + key, bias_total.to(d_bias.dtype.element_ty))
            key = following
            inherited = tl.full([], -1, tl.int64)
            total = tl.zeros([BLOCK_H], dtype=tl.float32)
            bias_total = 0.0


@triton.jit
def _join_kernel(
    keys, d_weight, d_bias, head, tail, head_bias, tail_bias, num_rows, num_chunks, H,
    CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rows of d weight whose run begins in this chunk and goes on into later ones."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < H
    first = chunk * CHUNK
    following = first + CHUNK
    key = tl.load(keys + following - 1, mask=following < num_rows, other=-1)
    goes_on = (following < num_rows) & (tl.load(keys + following, mask=following < num_rows, other=-2) == key)
    begins_here = (tl.load(keys + first) != key) | (tl.load(keys + first - 1, mask=first > 0, other=-1) != key)
    if goes_on & begins_here:
        total = tl.load(tail + chunk * H + columns, mask=inside, other=0.0)
        bias_total = tl.load(tail_bias + chunk)
        later = chunk + 1
        while goes_on:
            total += tl.load(head + later * H + columns, mask=inside, other=0.0)
            bias_total += tl.load(head_bias + later)
            later += 1
            goes_on = (later < num_chunks) & (tl.load(keys + later * CHUNK, mask=later < num_chunks, other=-2) == key)
        tl.store(d_weight + key * H + columns, total.to(d_weight.dtype.element_ty), mask=inside)
        if d_bias is not None:
            tl.store(d_bias + key, bias_total.to(d_bias.dtype.element_ty))


def scatter_rows(hidden: Tensor, index: Tensor, slopes: Tensor | None, d_weight: Tensor, d_bias: Tensor | None) -> None:
    """d weight[index_t] = Σ slope_t · hidden_t (slopes None: 1), in the order of the tokens; other rows stay.

    hidden: unit column stride. d weight: contiguous.
    """
    num_rows, width = hidden.shape
    keys, order = torch.sort(index, stable=True)
    chunks, block_h = triton.cdiv(num_rows, _CHUNK), min(1024, max(128, triton.next_power_of_2(width)))
    head_part, tail_part = torch.empty((2, chunks, width), dtype=torch.float32, device=keys.device).unbind(0)
    head_bias, tail_bias = torch.empty((2, chunks), dtype=torch.float32, device=keys.device).unbind(0)
    grid = (chunks, triton.cdiv(width, block_h))
    _runs_kernel[grid](
        hidden, keys, order, slopes, d_weight, d_bias, head_part, tail_part, head_bias, tail_bias,
        num_rows, hidden.stride(0), width, CHUNK=_CHUNK, BLOCK_H=block_h, num_warps=4,
    )  # fmt: skip
    _join_kernel[grid](
        keys, d_weight, d_bias, head_part, tail_part, head_bias, tail_bias, num_rows, chunks, width,
        CHUNK=_CHUNK, BLOCK_H=block_h, num_warps=4,
    )  # fmt: skip


# ---- the ops of `_rows.py` ---------------------------------------------------------------------------------------


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    return hidden.index_select(0, rows)


def add_rows(gradient: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    total = gradient.new_zeros(num_rows, gradient.shape[1])
    if gradient.numel():
        gradient = gradient if gradient.stride(1) == 1 else gradient.contiguous()
        scatter_rows(gradient, rows.contiguous(), None, total, None)
    return total


def shipped_launches() -> dict:
    """The launches that `cross_compile` compiles for every chip: gradients of gathered rows at bf16."""
    rows = torch.empty(16384, dtype=torch.int64, device="meta")
    launches = {}
    for width in (896, 3584):
        gradient = torch.empty((16384, width), dtype=torch.bfloat16, device="meta")
        launches[f"add_rows H={width}"] = lambda g=gradient: add_rows(g, rows, 32768)
    return launches
