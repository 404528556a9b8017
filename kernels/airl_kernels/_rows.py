"""Picking rows of hidden states that carry a loss, and adding their gradients back where they came from.

A row may be picked more than once: the last position of a shared prompt predicts the first token of every
completion. Its gradient is then the sum, taken in the order of `rows` in fp32 (fp64 for fp64 inputs) and rounded
once. torch's own `index_add_` on CUDA would add in any order, by atomics in the type of the gradient.

The Triton half is in `_rows_triton.py`.
"""

from torch import Tensor

from ._common import accumulate_dtype, define_op


def gather_rows_reference(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden [N, H] at rows int64 [M]: [M, H]."""
    return hidden.index_select(0, rows)


gather_rows = define_op("_rows", gather_rows_reference)


@gather_rows.register_fake
def _(hidden, rows):
    return hidden.new_empty(rows.shape[0], hidden.shape[1])


def add_rows_reference(gradient: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows, H]: row n is the sum of gradient[m] over rows[m] = n, in the type of gradient [M, H]."""
    total = gradient.new_zeros(num_rows, gradient.shape[1], dtype=accumulate_dtype(gradient))
    return total.index_add_(0, rows, gradient.to(total.dtype)).to(gradient.dtype)


_add_rows = define_op("_rows", add_rows_reference)


@_add_rows.register_fake
def _(gradient, rows, num_rows):
    return gradient.new_empty(num_rows, gradient.shape[1])


def _setup(ctx, inputs, output) -> None:
    hidden, rows = inputs
    ctx.num_rows = hidden.shape[0]
    ctx.save_for_backward(rows)


def _backward(ctx, gradient: Tensor):
    (rows,) = ctx.saved_tensors
    return _add_rows(gradient, rows, ctx.num_rows), None


gather_rows.register_autograd(_backward, setup_context=_setup)
