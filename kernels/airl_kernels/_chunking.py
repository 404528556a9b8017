"""How many rows of logits to hold at once, and the matrix products between the row kernels.

Every product writes into a given tensor: such calls take part in no autocast, which would change their type.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import accumulate_dtype

_MIB = 1 << 20
# The CPU budget is fixed so that results there repeat bit for bit whatever else the machine is doing. It stays
# below the size from which glibc returns every freed buffer to the kernel and pays for its pages again (32 MiB).
_CPU_BUDGET = 24 * _MIB
# On CUDA a quarter of what is free, up to a ceiling. Every chunk but the first reads and writes the fp32 gradient of
# the weight once more: 8·V·H bytes beside its three products of 2·C·V·H operations, predicted to be 320 / C of their
# time for C rows (3 TB/s, 720 TFLOP/s, nothing hidden). The ceiling is 8192 rows of a vocabulary of 152,064: 2% for
# 16384 rows in two chunks. `python -m bench.chunk_sweep` measures it.
_CUDA_SHARE, _CUDA_FLOOR, _CUDA_CEILING = 0.25, 256 * _MIB, 2560 * _MIB

# Of fewer rows MKL adds up a float32 product's terms one after the other: over a vocabulary, ten to fifty times the
# error of four rows.
_FEWEST = 4


def logits_budget(device: torch.device) -> int:
    """Bytes one chunk of logits may take on this device."""
    if device.type != "cuda":
        return _CPU_BUDGET
    allocated = torch.cuda.memory_allocated(device)
    if torch.cuda.is_current_stream_capturing():  # no question to the driver while a graph is recorded
        free = torch.cuda.get_device_properties(device).total_memory - allocated
    else:
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated
    return int(min(max(free * _CUDA_SHARE, _CUDA_FLOOR), _CUDA_CEILING))


class Head(NamedTuple):
    """What the products read. hidden [N, H]; weight [V, H] and bias [V] or None of the tokens that count, in the type
    of hidden. dtype: that of the logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def logit_bytes(self) -> int:
        """Of one logit and, where the logits are wider than the products, of its gradient beside it."""
        narrow = self.hidden.dtype.itemsize
        return narrow if self.dtype == self.hidden.dtype else self.dtype.itemsize + narrow


def make_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, num_tokens: int, fp32_logits: bool) -> Head:
    """The first `num_tokens` rows of weight and bias, cast to the type of hidden where that is autocast's.

    Logits of float16 are always float32: beyond 65,504 they would be infinite.
    """
    wide = fp32_logits or hidden.dtype == torch.float16
    weight, bias = (None if t is None else t[:num_tokens].to(hidden.dtype) for t in (weight, bias))
    return Head(hidden, weight, bias, accumulate_dtype(hidden) if wide else hidden.dtype)


def chunk_slices(hidden: Tensor, weight: Tensor, chunk_rows: int, logit_bytes: int) -> list[slice]:
    """Cut the rows of hidden into the fewest chunks whose logits fit, of near equal size, the largest first.

    chunk_rows: the most rows of one chunk; 0 takes it from `logits_budget`. logit_bytes: of one logit.
    All but one are whole tiles of the products, as large as balance allows. None has fewer than `_FEWEST` rows where
    the fewest chunks can be cut so.
    """
    num_rows = hidden.shape[0]
    if num_rows == 0:
        return []
    most = chunk_rows or max(1, logits_budget(hidden.device) // (weight.shape[0] * logit_bytes))
    chunks = -(-num_rows // most)
    for tile in (128, 64, 32, 16, 1):
        cuts = [(2 * number * num_rows + chunks * tile) // (2 * chunks * tile) * tile for number in range(chunks)]
        sizes = sorted((end - start for start, end in pairwise([*cuts, num_rows])), reverse=True)
        if sizes[0] <= most and 3 * sizes[0] <= 4 * sizes[-1] and sizes[-1] >= _FEWEST:
            break
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def logit_chunks(head: Head, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, hidden[rows] @ weight.T + bias), one buffer for all; the caller may overwrite it."""
    hidden, weight, bias, dtype = head
    parts = chunk_slices(hidden, weight, chunk_rows, head.logit_bytes)
    if not parts:
        return
    vocab = weight.shape[0]
    # On CUDA rows start on whole cache lines, whatever the vocabulary: wide loads need it, and so does cuBLAS.
    stride = -(-vocab // 64) * 64 if hidden.is_cuda else vocab
    buffer = hidden.new_empty(parts[0].stop, stride, dtype=dtype)
    widened = dtype != hidden.dtype
    columns = (weight.to(dtype) if widened and not hidden.is_cuda else weight).t()
    for part in parts:
        rows = hidden[part]
        logits = buffer[: rows.shape[0], :vocab]
        if widened and hidden.is_cuda:
            torch.mm(rows, columns, out_dtype=dtype, out=logits)
        elif widened:  # the CPU has no product of bf16 into fp32
            torch.mm(rows.to(dtype), columns, out=logits)
        elif bias is None:
            torch.mm(rows, columns, out=logits)
        else:
            torch.addmm(bias, rows, columns, out=logits)
        if widened and bias is not None:
            logits += bias
        yield part, logits


class Gradients:
    """Gradients of hidden, weight and bias, built chunk by chunk from logits that are overwritten by their own.

    Those of weight and bias accumulate in fp32 (fp64 for fp64 inputs), over chunks of any size; rows of tokens that
    do not count get 0.
    """

    def __init__(
        self, kernels: ModuleType | type, head: Head, vocab: int, needs: Sequence[bool], compact: bool = False
    ) -> None:
        """vocab: all rows of the weight. needs: which of hidden, weight, bias. compact: leave rows without gradient
        out of the products."""
        self.head, self.kernels, self.compact = head, kernels, compact
        self.need_hidden, self.need_weight, self.need_bias = needs
        hidden, counted = head.hidden, head.weight.shape[0]
        self.dtype = accumulate_dtype(hidden)
        self.d_hidden = hidden.new_empty(hidden.shape if self.need_hidden else 0)
        self.d_weight = hidden.new_empty((vocab, hidden.shape[1]) if self.need_weight else 0, dtype=self.dtype)
        self.d_bias = hidden.new_zeros(vocab if self.need_bias else 0, dtype=self.dtype)
        self.d_weight[counted:].zero_()
        self._counted, self._narrow, self._started = slice(counted), hidden.new_empty(0), False

    def add(
        self,
        part: slice,
        logits: Tensor,
        targets: Tensor,
        mapping: NamedTuple,
        row_max: Tensor,
        log_sum: Tensor,
        entropy: Tensor | None,
        grad_logprob: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> None:
        """Add the rows `part`. logits are this chunk's, consumed here; all other tensors hold every row, [M].

        grad_logprob None means 1 everywhere. `compact` looks at grad_logprob alone.
        """
        hidden, weight, _, _ = self.head
        rows, columns = hidden[part], (targets, row_max, log_sum, entropy, grad_logprob, grad_entropy)
        columns = [None if c is None else c[part] for c in columns]
        keep = None
        if self.compact:
            keep = columns[4].nonzero()[:, 0]  # the host waits for the device here
            vocab, stride = logits.shape[1], logits.stride(0)
            padded = logits.as_strided((logits.shape[0], stride), (stride, 1))
            rows, logits = rows.index_select(0, keep), padded.index_select(0, keep)[:, :vocab]
            columns = [None if c is None else c.index_select(0, keep) for c in columns]
        gradient = self._room_for(logits)
        self.kernels.logit_gradient_(logits, columns[0], mapping, *columns[1:], gradient)
        if self.need_hidden and keep is None:
            torch.mm(gradient, weight, out=self.d_hidden[part])
        elif self.need_hidden:
            product = torch.mm(gradient, weight, out=torch.empty_like(rows))
            self.d_hidden[part].zero_().index_copy_(0, keep, product)
        if self.need_bias:
            self.d_bias[self._counted] += gradient.sum(0, dtype=self.dtype)
        if self.need_weight:
            self._add_product(gradient.t(), rows)

    def _room_for(self, logits: Tensor) -> Tensor:
        """Where the gradient goes: over the logits, or beside them when they are wider than the products."""
        dtype = self.head.hidden.dtype
        if logits.dtype == dtype:
            return logits
        rows, stride = logits.shape[0], logits.stride(0)
        if self._narrow.numel() < rows * stride:
            self._narrow = logits.new_empty(rows * stride, dtype=dtype)
        return self._narrow[: rows * stride].view(rows, stride)[:, : logits.shape[1]]

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        """d_weight += left @ right, or = on the first call."""
        total, beta = self.d_weight[self._counted], 1.0 if self._started else 0.0
        if left.dtype == self.dtype:
            torch.addmm(total, left, right, beta=beta, out=total)
        elif left.is_cuda:
            torch.addmm(total, left, right, out_dtype=self.dtype, beta=beta, out=total)
        else:  # the CPU has no product of bf16 into fp32
            torch.addmm(total, left.to(self.dtype), right.to(self.dtype), beta=beta, out=total)
        self._started = True

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(d hidden in its dtype, d weight and d bias in the accumulation type), empty where not needed."""
        if not self._started:
            self.d_weight.zero_()
        return self.d_hidden, self.d_weight, self.d_bias
