"""Launches of the token head's Triton kernels (`_head_triton.py`): tiles, buffers, and which kernels a call takes."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ._common import num_multiprocessors
from ._head_math import bce_of, reward_of, wgan_of
from ._head_triton import _fused_kernel, _gradient_kernel, _reduce_kernel, _rewards_kernel, _scale_kernel
from ._math_triton import MODES, WGAN
from ._pairs_triton import pairwise
from ._residency import resident_programs
from ._rows_triton import scatter_rows

# ---- launch configurations -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """block_n rows by block_h columns; num_stages - 1 tiles of hidden under way.

    A multiprocessor of an H200 needs about 40 KB of loads under way to draw its share of the memory's rate.
    """

    block_n: int
    block_h: int
    num_warps: int
    num_stages: int


# Columns a tile spans: rows, warps and stages of the fused kernel. A thread holds up to 64 numbers: the loss of a row
# is computed by each of its threads, and the sums over a row cross all warps, so few threads a row waste least.
_FUSED = {512: (8, 2, 4), 1024: (4, 2, 4), 2048: (2, 2, 4), 4096: (2, 4, 3), 8192: (2, 8, 3)}


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
    rows, num_warps, stages = _FUSED[block_h]
    return Tile(max(1, rows // 2) if indexed else rows, block_h, num_warps, stages)


def gradient_tile(width: int) -> Tile:
    """No row needs another column here, so columns are split over programs as well."""
    return Tile(4, min(1024, max(512, triton.next_power_of_2(width))), 4, 3)


def _programs(num_rows: int, tile: Tile, most: int) -> int:
    """As many as run at once (`most`): more would only add parts of d weight to add up."""
    return max(1, min(triton.cdiv(num_rows, tile.block_n), most))


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
    dense_weight = need_weight and head.index is None
    inputs = (
        head.hidden, head.weight, head.bias, head.index, head.offset, targets, factors, logits, slopes,
        gradients.d_hidden,
    )  # fmt: skip
    numbers = num_rows, head.hidden.stride(0), smoothing, temperature, clip
    options = {
        "H": width, "BIAS_PER_ROW": head.bias_per_row, "MODE": mode, "BLOCK_N": tile.block_n, "BLOCK_H": tile.block_h,
        "STAGES": tile.num_stages, "num_warps": tile.num_warps,
    }  # fmt: skip
    parts = (loss if dense_weight else None, loss)  # of their type
    most = resident_programs(_fused_kernel, (*inputs, *parts, *numbers), options, device)
    programs = _programs(num_rows, tile, most)
    partial_weight = torch.empty((programs, width), dtype=torch.float32, device=device) if dense_weight else None
    partial_sums = torch.empty((2, programs), dtype=torch.float32, device=device)
    _fused_kernel[(programs,)](*inputs, partial_weight, partial_sums, *numbers, **options)
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
            BLOCK_P=512, BLOCK_H=16, num_warps=8,
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
        tile, dense_weight = gradient_tile(width), need_weight and index is None
        inputs = head.hidden, head.weight, head.index, slopes, gradients.d_hidden
        numbers = num_rows, head.hidden.stride(0)
        options = {
            "H": width, "BLOCK_N": tile.block_n, "BLOCK_H": tile.block_h, "STAGES": tile.num_stages,
            "num_warps": tile.num_warps,
        }  # fmt: skip
        parts = (slopes if dense_weight else None, slopes)  # of their type
        columns = triton.cdiv(width, tile.block_h)
        most = resident_programs(_gradient_kernel, (*inputs, *parts, *numbers), options, hidden.device) // columns
        programs = _programs(num_rows, tile, most)
        partial_weight = (
            torch.empty((programs, width), dtype=torch.float32, device=hidden.device) if dense_weight else None
        )
        partial_sums = torch.empty((1, programs), dtype=torch.float32, device=hidden.device)
        _gradient_kernel[(programs, columns)](*inputs, partial_weight, partial_sums, *numbers, **options)
        _finish(head, slopes, gradients, partial_weight, partial_sums, None)
    return gradients.tensors(hidden, weight)


def token_rewards_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, offset: Tensor | None,
    kind: str, temperature: float, clip: float | None, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tile = fused_tile(hidden.shape[1], index is not None)
    if tile is None:
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
