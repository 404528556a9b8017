"""Triton row kernels over logits [C, V], between the matrix products. The mathematics is in `logprob.py`.

- `_stats_kernel`     one program per row: maximum, sum of exponentials and entropy in one read (2CV bytes at bf16);
- `_gradient_kernel`  one program per tile of a row: the logits overwritten by their gradient (4CV bytes), or by
                      zeros without reading them where the row's gradient is 0; wider logits keep theirs beside them;
- `_scale_kernel`     rows of a matrix times one factor each, cast to another type on the way.

Together 6CV bytes, the floor for logits that pass through memory once each way. Exponents come from the maximum and
the log of the sum kept apart, so that large logits lose nothing. Row offsets are int64. Whole tiles are read without
a mask: with one, a vocabulary that is not a multiple of 16 would be read element by element.
"""

import sys
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._chunking import Gradients, make_head
from .logprob import LogitMap, logprob_backward, logprob_forward
from .selective import selective_forward

_INFINITY = tl.constexpr(float("inf"))


# ---- device functions ------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """tanh to a few ulp: a series where 1 - exp(-2x) would cancel."""
    y = x * x
    series = x * (
        1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * (0.021869488 - y * 0.0088632355))))
    )
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(y < 0.0625, series, tl.where(x < 0.0, -far, far))


@triton.jit
def _score(x, inner, outer, CAPPED: tl.constexpr):
    """The score of a raw logit: outer · tanh(inner · x), or inner · outer · x without a cap."""
    return outer * _tanh(x * inner) if CAPPED else x * (inner * outer)


@triton.jit
def _weights(top, base):
    """(exp(top - base), top - base), both 0 where nothing but -inf was met: -inf - -inf must not be computed."""
    shift = tl.where(top == -_INFINITY, 0.0, top - base)
    return tl.where(top == -_INFINITY, 0.0, tl.exp(shift)), shift


@triton.jit
def _add_tile(z, top, sums, dots, ENTROPY: tl.constexpr):
    """Fold a tile of scores into each lane's maximum, Σ exp(z - top) and Σ exp(z - top)·(z - top).

    A lane is eight neighbours, one 16-byte load of bf16, and has a maximum of its own: no tile waits for the others.
    """
    z = tl.reshape(z, [top.shape[0], 8])
    new_top = tl.maximum(top, tl.max(z, axis=1))
    base = tl.where(new_top == -_INFINITY, 0.0, new_top)
    decay, shift = _weights(top, base)
    distance = z - base[:, None]
    e = tl.exp(distance)
    if ENTROPY:
        dots = decay * (dots + shift * sums) + tl.sum(tl.where(e == 0.0, 0.0, e * distance), axis=1)
    sums = decay * sums + tl.sum(e, axis=1)
    return new_top, sums, dots


# ---- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _stats_kernel(
    logits, targets, logprob, row_max, log_sum, entropy, stride, vocab, inner, outer,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK // 8], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([BLOCK // 8], dtype=tl.float32)
    dots = tl.zeros([BLOCK // 8], dtype=tl.float32)
    whole = vocab // BLOCK * BLOCK
    for first in tl.range(0, whole, BLOCK, num_stages=STAGES):
        z = _score(tl.load(start + first + columns).to(tl.float32), inner, outer, CAPPED)
        tops, sums, dots = _add_tile(z, tops, sums, dots, ENTROPY)
    if whole < vocab:
        inside = whole + columns < vocab
        x = tl.load(start + whole + columns, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, _score(x, inner, outer, CAPPED), -_INFINITY)
        tops, sums, dots = _add_tile(z, tops, sums, dots, ENTROPY)
    top = tl.max(tops, axis=0)
    weights, shifts = _weights(tops, top)
    total = tl.sum(weights * sums, axis=0)
    log_total = tl.log(total)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocab)
    z = _score(tl.load(start + target, mask=known, other=0.0).to(tl.float32), inner, outer, CAPPED)
    tl.store(logprob + row, tl.where(known, z - top - log_total, float("nan")))
    tl.store(row_max + row, top)
    tl.store(log_sum + row, log_total)
    if ENTROPY:
        tl.store(entropy + row, log_total - tl.sum(weights * (dots + shifts * sums), axis=0) / total)


@triton.jit
def _gradient_kernel(
    logits, gradients, targets, row_max, log_sum, entropy, grad_logprob, grad_entropy, stride, vocab, inner, outer,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    place = row.to(tl.int64) * stride + columns
    tile = logits + place
    g = 1.0
    live = True
    if grad_logprob is not None:
        g = tl.load(grad_logprob + row)
        live = g != 0.0
    if grad_entropy is not None:
        e = tl.load(grad_entropy + row)
        live = live | (e != 0.0)
    if live:
        if first + BLOCK <= vocab:
            x = tl.load(tile).to(tl.float32)
        else:
            x = tl.load(tile, mask=columns < vocab, other=0.0).to(tl.float32)
        logp = _score(x, inner, outer, CAPPED) - tl.load(row_max + row) - tl.load(log_sum + row)
        p = tl.exp(logp)
        pull = g
        if grad_entropy is not None:
            pull += e * (tl.where(p == 0.0, 0.0, logp) + tl.load(entropy + row))
        gradient = tl.where(columns == tl.load(targets + row), g, 0.0) - p * pull
        slope = inner * outer
        if CAPPED:
            capped = _tanh(x * inner)
            slope *= 1.0 - capped * capped
        gradient *= slope
    else:
        gradient = tl.zeros([BLOCK], dtype=tl.float32)
    gradient = gradient.to(gradients.dtype.element_ty)
    if first + BLOCK <= vocab:
        tl.store(gradients + place, gradient)
    else:
        tl.store(gradients + place, gradient, mask=columns < vocab)


@triton.jit
def _scale_kernel(matrix, factors, product, width, numel, FACTOR_STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = row.to(tl.int64) * width + columns
    inside = (columns < width) & (offsets < numel)
    factor = tl.load(factors + row * FACTOR_STRIDE).to(tl.float32)
    read = inside & (columns < tl.where(factor == 0.0, 0, width))
    x = tl.load(matrix + offsets, mask=read, other=0.0).to(tl.float32)
    tl.store(product + offsets, (x * factor).to(product.dtype.element_ty), mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------


def stats_tile(vocab: int) -> tuple[int, int, int]:
    """(block, warps, stages). 16 elements a thread leave room for four programs on a multiprocessor."""
    block = min(4096, max(128, triton.next_power_of_2(vocab)))
    return block, max(1, min(8, block // 512)), 3 if vocab > block else 1


def gradient_tile(vocab: int) -> tuple[int, int]:
    """(block, warps)."""
    block = min(4096, max(128, triton.next_power_of_2(vocab)))
    return block, max(1, min(8, block // 512))


def _coefficients(mapping: LogitMap) -> tuple[float, float, bool]:
    """inner, outer and whether there is a cap, as `_score` wants them."""
    if mapping.softcap:
        return mapping.logit_scale / mapping.softcap, mapping.softcap / mapping.temperature, True
    return mapping.logit_scale, 1.0 / mapping.temperature, False


def row_stats(
    logits: Tensor, targets: Tensor, mapping: LogitMap,
    logprob: Tensor, row_max: Tensor, log_sum: Tensor, entropy: Tensor | None,
) -> None:  # fmt: skip
    """As `logprob.row_stats`; a target outside the vocabulary gives NaN."""
    rows, vocab = logits.shape
    inner, outer, capped = _coefficients(mapping)
    block, warps, stages = stats_tile(vocab)
    if rows:
        _stats_kernel[(rows,)](
            logits, targets, logprob, row_max, log_sum, entropy, logits.stride(0), vocab, inner, outer,
            CAPPED=capped, ENTROPY=entropy is not None, BLOCK=block, STAGES=stages, num_warps=warps,
        )  # fmt: skip


def logit_gradient_(
    logits: Tensor, targets: Tensor, mapping: LogitMap, row_max: Tensor, log_sum: Tensor, entropy: Tensor | None,
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, out: Tensor | None = None,
) -> None:  # fmt: skip
    """As `logprob.logit_gradient_`; out has the stride of the logits."""
    rows, vocab = logits.shape
    inner, outer, capped = _coefficients(mapping)
    block, warps = gradient_tile(vocab)
    if rows:
        _gradient_kernel[(rows, triton.cdiv(vocab, block))](
            logits, logits if out is None else out, targets, row_max, log_sum, entropy, grad_logprob, grad_entropy,
            logits.stride(0), vocab, inner, outer, CAPPED=capped, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def scale_rows(matrix: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """As `logprob.scale_rows`, in one read and one write."""
    matrix, factors = matrix.contiguous(), factors.contiguous()
    product = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    if matrix.numel():
        # With one factor for all, the matrix is cut into rows as suits the kernel.
        width = matrix.numel() // matrix.shape[0] if factors.dim() else 4096
        block = min(4096, triton.next_power_of_2(width))
        _scale_kernel[(triton.cdiv(matrix.numel(), width), triton.cdiv(width, block))](
            matrix, factors, product, width, matrix.numel(),
            FACTOR_STRIDE=factors.dim(), BLOCK=block, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return product


# ---- ops: the loops of `logprob.py` around these kernels -------------------------------------------------------


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, mapping: Sequence[float],
    entropy: bool, jacobian: bool, chunk_rows: int, num_tokens: int, fp32_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    head = make_head(hidden, weight, bias, num_tokens, fp32_logits)
    return logprob_forward(_KERNELS, head, targets.contiguous(), LogitMap(*mapping), entropy, jacobian, chunk_rows)


def linear_logprob_backward(
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor,
    bias: Tensor | None, row_max: Tensor, log_sum: Tensor, entropy: Tensor, mapping: Sequence[float],
    needs: Sequence[bool], chunk_rows: int, num_tokens: int, fp32_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head = make_head(hidden, weight, bias, num_tokens, fp32_logits)
    gradients, norms = Gradients(_KERNELS, head, weight.shape[0], needs), (row_max, log_sum, entropy)
    settings = grad_logprob, grad_entropy, LogitMap(*mapping), chunk_rows, weight, bias
    return logprob_backward(gradients, targets.contiguous(), norms, *settings)


def selective_log_softmax(
    logits: Tensor, targets: Tensor, temperature: float, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return selective_forward(_KERNELS, rows_dense(logits), targets.contiguous(), LogitMap(temperature))


def selective_log_softmax_backward_(
    logits: Tensor, targets: Tensor, row_max: Tensor, log_sum: Tensor, grad: Tensor, temperature: float
) -> None:
    dense, mapping = rows_dense(logits), LogitMap(temperature)
    logit_gradient_(dense, targets.contiguous(), mapping, row_max, log_sum, None, grad.contiguous(), None)
    if dense is not logits:
        logits.copy_(dense)


def rows_dense(logits: Tensor) -> Tensor:
    """The logits themselves when a row is contiguous, which is all the kernels ask, else a copy."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


_KERNELS = sys.modules[__name__]


def shipped_launches() -> dict[str, Callable[[], object]]:
    """The launches that `cross_compile` compiles for every chip: the benchmark's vocabularies and an odd one."""
    rows = 4096
    numbers = torch.empty(rows, device="meta")
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    plain, capped = LogitMap(), LogitMap(0.7, 30.0, 0.5)
    launches = {}
    for vocab in (151936, 152064, 128256, 50257, 17):
        # The ops pad rows to whole cache lines.
        logits = torch.empty((rows, -(-vocab // 64) * 64), dtype=torch.bfloat16, device="meta")[:, :vocab]
        for mapping, name in ((plain, ""), (capped, " softcap")):
            for entropy in (None, numbers):
                kind = f"V={vocab}{name}{'' if entropy is None else ' entropy'}"
                launches[f"row_stats {kind}"] = lambda x=logits, m=mapping, e=entropy: row_stats(
                    x, targets, m, numbers, numbers, numbers, e
                )
                launches[f"logit_gradient {kind}"] = lambda x=logits, m=mapping, e=entropy: logit_gradient_(
                    x, targets, m, numbers, numbers, e, numbers, e
                )
        if vocab == 151936:  # logits in float32, their gradient beside them
            deep = torch.empty((rows, vocab), device="meta")
            launches[f"row_stats V={vocab} fp32"] = lambda x=deep: row_stats(
                x, targets, plain, numbers, numbers, numbers, numbers
            )
            launches[f"logit_gradient V={vocab} fp32"] = lambda x=deep, y=logits: logit_gradient_(
                x, targets, plain, numbers, numbers, None, numbers, None, y
            )
        launches[f"jacobian V={vocab}"] = lambda x=logits: logit_gradient_(
            x, targets, plain, numbers, numbers, None, None, None
        )
    for width in (896, 3584, 4096):
        jacobian = torch.empty((rows, width), dtype=torch.bfloat16, device="meta")
        launches[f"scale_rows H={width}"] = lambda x=jacobian: scale_rows(x, numbers, torch.bfloat16)
        weight = torch.empty((151936, width), device="meta")
        launches[f"scale_rows weight H={width}"] = lambda x=weight: scale_rows(x, numbers[0], torch.bfloat16)
    return launches
