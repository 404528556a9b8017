"""Log-probabilities of given tokens from logits that somebody else made.

The mathematics and the row kernels are those of `logprob.py`; here is no matrix product. The backward pass can
overwrite the logits by their gradient, which halves the peak memory of a model that returns full logits.
"""

from types import ModuleType

import torch
from torch import Tensor

from ._common import accumulate_dtype, define_op, require_dtype, require_floating
from .logprob import LogitMap, Reference, check_mapping, logit_gradient_


def selective_forward(
    kernels: ModuleType | type, logits: Tensor, targets: Tensor, mapping: LogitMap
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p [N], max [N], log-sum [N]) from given logits [N, V]."""
    logprob, row_max, log_sum = (logits.new_empty(logits.shape[0], dtype=accumulate_dtype(logits)) for _ in range(3))
    if logits.shape[0]:
        kernels.row_stats(logits, targets, mapping, logprob, row_max, log_sum, None)
    return logprob, row_max, log_sum


def selective_log_softmax_reference(
    logits: Tensor, targets: Tensor, temperature: float, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return selective_forward(Reference, logits, targets, LogitMap(temperature))


_selective = define_op("logprob", selective_log_softmax_reference)


@_selective.register_fake
def _(logits, targets, temperature, inplace):
    return tuple(logits.new_empty(logits.shape[0], dtype=accumulate_dtype(logits)) for _ in range(3))


def selective_log_softmax_backward__reference(
    logits: Tensor, targets: Tensor, row_max: Tensor, log_sum: Tensor, grad: Tensor, temperature: float
) -> None:
    """Overwrite the logits by their gradient."""
    logit_gradient_(logits, targets, LogitMap(temperature), row_max, log_sum, None, grad, None)


_selective_backward_ = define_op("logprob", selective_log_softmax_backward__reference, mutates=("logits",))


@_selective_backward_.register_fake
def _(logits, targets, row_max, log_sum, grad, temperature):
    return None


def _selective_setup(ctx, inputs, output) -> None:
    logits, targets, ctx.temperature, ctx.inplace = inputs
    _, row_max, log_sum = output
    ctx.mark_non_differentiable(row_max, log_sum)
    ctx.save_for_backward(logits, targets, row_max, log_sum)


def _selective_backward(ctx, grad: Tensor, *_ignored):
    logits, targets, row_max, log_sum = ctx.saved_tensors
    gradient = logits.detach() if ctx.inplace else logits.detach().clone()
    _selective_backward_(gradient, targets, row_max, log_sum, grad, ctx.temperature)
    return gradient, None, None, None


_selective.register_autograd(_selective_backward, setup_context=_selective_setup)


def selective_log_softmax(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, inplace_backward: bool = False
) -> Tensor:
    """log_softmax(logits / temperature) at `targets`, without making the log_softmax.

    logits: floating [..., V], one stride per row and dense along V for no copy. targets: int64 [...].
    inplace_backward: the backward pass overwrites `logits` with its gradient and allocates nothing of its size.
    The logits must then be an intermediate result that nothing else saved for its own backward (autograd raises
    otherwise), and backward can run once.
    Returns float32 [...] (float64 for float64 logits). Targets, infinities and errors as in `linear_logprob`.
    """
    require_floating("logits", logits)
    require_dtype("targets", targets, torch.int64)
    if logits.dim() < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of logits without its last dimension, {list(logits.shape[:-1])}, "
            f"got {list(targets.shape)}."
        )
    mapping = check_mapping(temperature, None, 1.0)
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace_backward would overwrite a leaf tensor; pass logits computed from parameters.")
    flat = logits.reshape(-1, logits.shape[-1])
    return _selective(flat, targets.reshape(-1), mapping.temperature, inplace_backward)[0].view(targets.shape)
