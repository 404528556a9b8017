"""Clipped policy-gradient losses straight from hidden states, with gradients made in the forward pass.

The loss is that of `policy_loss.py`, the log-probabilities those of `logprob.py`. A chunk of logits is made by one
matrix product and reduced to log-probabilities; the loss and its slope in each follow per token; the logits are
overwritten by their gradient, which is multiplied by weight and hidden. Three products for loss and gradients
together, two with a frozen weight, one without gradients. The backward pass scales what is there by d loss.
A policy that is its own old one, as before the first update of a batch, needs no pass of its own to be known.

This file is the contract and the CPU's implementation; on CUDA the row kernels are Triton's.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ._chunking import Gradients, Head, chunk_slices, logit_chunks, make_head
from ._common import accumulate_dtype, define_op
from ._policy_terms import NUM_TERMS, Clip, Reference, TokenInputs
from .logprob import LogitMap, check_head, check_layout, check_mapping, scaled
from .policy_loss import PolicyStats, check_loss, sequence_terms, summarise


def linear_loss_forward(
    kernels: ModuleType | type,
    head: Head,
    vocab: int,
    targets: Tensor,
    inputs: TokenInputs,
    cu_seqlens: Tensor | None,
    by_sequence: Sequence[bool],
    clip: Clip,
    mapping: LogitMap,
    entropy: bool,
    compact: bool,
    chunk_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(Σ objective [], means [13], terms [12, M], d hidden, d weight, d bias). vocab: all rows of the weight."""
    hidden, dtype = head.hidden, accumulate_dtype(head.hidden)
    num_rows = hidden.shape[0]
    logprobs, row_max, log_sum, slope = (hidden.new_empty(num_rows, dtype=dtype) for _ in range(4))
    entropies = torch.empty_like(logprobs) if entropy else None
    terms = logprobs.new_empty(NUM_TERMS, num_rows)
    # A sequence's ratio or weight needs all its rows before the first slope is known. With several chunks that leaves
    # two ways: with a frozen weight, gradients of log π itself, scaled afterwards; otherwise logits made twice.
    several = len(chunk_slices(hidden, head.weight, chunk_rows, head.logit_bytes)) > 1
    late = any(by_sequence) and several
    frozen = late and needs[0] and not needs[1] and not needs[2]
    gradients = Gradients(kernels, head, vocab, needs, compact and not frozen)
    norms = row_max, log_sum, None

    def slopes_of(rows: slice) -> None:
        entropy_rows = None if entropies is None else entropies[rows]
        sequence = sequence_terms(kernels, logprobs, inputs, cu_seqlens, by_sequence)
        given = logprobs[rows], entropy_rows, inputs.part(rows)
        kernels.surrogate_terms(*given, *sequence, clip, terms[:, rows], slope[rows])

    for part, logits in logit_chunks(head, chunk_rows):
        reduced = logprobs[part], row_max[part], log_sum[part], None if entropies is None else entropies[part]
        kernels.row_stats(logits, targets[part], mapping, *reduced)
        if not late:
            slopes_of(part)
        if any(needs) and (frozen or not late):
            gradients.add(part, logits, targets, mapping, *norms, None if frozen else slope, None)
    if late:
        slopes_of(slice(0, num_rows))
    if frozen:
        gradients.d_hidden = kernels.scale_rows(gradients.d_hidden, slope, hidden.dtype)
    elif late and any(needs):
        for part, logits in logit_chunks(head, chunk_rows):
            gradients.add(part, logits, targets, mapping, *norms, slope, None)
    return *kernels.totals(terms, inputs.mask), terms, *gradients.finish()


# ---- op, fake, autograd ----------------------------------------------------------------------------------------


def linear_ppo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    is_ratio: Tensor | None,
    sampler_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    by_sequence: Sequence[bool],
    surrogate: str,
    clip: Sequence[float],
    mapping: Sequence[float],
    entropy: bool,
    compact: bool,
    chunk_rows: int,
    num_tokens: int,
    fp32_logits: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = TokenInputs(old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio, sampler_logprobs)
    return linear_loss_forward(
        Reference, make_head(hidden, weight, bias, num_tokens, fp32_logits), weight.shape[0], targets, inputs,
        cu_seqlens, by_sequence, Clip(surrogate, *clip), LogitMap(*mapping), entropy, compact, chunk_rows, needs,
    )  # fmt: skip


_linear_ppo_loss = define_op("policy_loss", linear_ppo_loss_reference)


@_linear_ppo_loss.register_fake
def _(hidden, weight, targets, bias, old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio,
      sampler_logprobs, cu_seqlens, by_sequence, surrogate, clip, mapping, entropy, compact, chunk_rows, num_tokens,
      fp32_logits, needs):  # fmt: skip
    dtype = accumulate_dtype(hidden)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(NUM_TERMS + 1, dtype=dtype),
        hidden.new_empty(NUM_TERMS, hidden.shape[0], dtype=dtype),
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=dtype),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=dtype),
    )


def _setup(ctx, inputs, output) -> None:
    _, means, terms, *gradients = output
    ctx.mark_non_differentiable(means, terms, *gradients)
    ctx.set_materialize_grads(False)  # no zeros the size of the weight for the outputs nobody differentiates
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [None if t is None else t.dtype for t in (inputs[0], inputs[1], inputs[3])]


def _backward(ctx, grad: Tensor | None, *_ignored):
    need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    d_hidden, d_weight, d_bias = (
        scaled(gradient, grad, dtype) if wanted and grad is not None else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, need, strict=True)
    )
    return d_hidden, d_weight, None, d_bias, *(None,) * 18


_linear_ppo_loss.register_autograd(_backward, setup_context=_setup)


# ---- public function -------------------------------------------------------------------------------------------


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    variant: str = "ppo",
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    is_ratio: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    is_ceiling: float = 2.0,
    is_level: str = "token",
    denominator: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    rows: Tensor | None = None,
    entropy: bool = True,
    compact: bool = False,
    chunk_rows: int | None = None,
    num_tokens: int | None = None,
    fp32_logits: bool = False,
) -> tuple[Tensor, PolicyStats]:
    """`ppo_loss` of the log-probabilities of `targets` under softmax of `hidden` times `weight`.

    hidden: [N, H]. weight: [V, H], bias: [V] or None, same dtype (inside autocast as in `linear_logprob`). targets:
    int64 [M], within 0 and V-1 (num_tokens-1) where the mask is true. rows: int64 [M], the rows of hidden that count;
    every other per-token argument, cu_seqlens and all statistics then refer to these M rows, and no other row reaches
    a matrix product. None: M is N. A row may come several times, as the last one of a prompt that several completions
    share: its gradient is the sum.
    old_logprobs to denominator: as in `ppo_loss`. temperature, softcap, logit_scale, chunk_rows, num_tokens,
    fp32_logits: as in `linear_logprob`.
    entropy: report the entropy (one more pass over the logits in registers; no gradient).
    compact: keep rows whose slope is 0 (masked, clipped, of zero advantage) out of the backward products. The host
    waits for the device once per chunk, so not inside CUDA graphs; the kept rows of logits are copied once.
    Returns (loss [], PolicyStats); gradients reach hidden, weight and bias. No second derivatives.

    Products of the size of the vocabulary: 3 with a trainable weight or bias, 2 with a frozen one, 1 without
    gradients; also where old_logprobs is absent. A trainable weight needs 4 where a slope depends on a whole sequence
    ("gspo" with old_logprobs; is_level="sequence") and the logits of all rows do not fit in one chunk.
    Raises as `ppo_loss` and `linear_logprob`.
    """
    rows_hidden = check_head(hidden, weight, bias, targets, rows)
    mapping = check_mapping(temperature, softcap, logit_scale)
    given = check_loss(
        rows_hidden.shape[0], accumulate_dtype(hidden), old_logprobs, advantages, loss_mask, cu_seqlens, clip_low,
        clip_high, variant, dual_clip, ref_logprobs, beta, is_ratio, sampler_logprobs, is_ceiling, is_level,
        denominator,
    )  # fmt: skip
    if loss_mask is not None:
        targets = torch.where(loss_mask, targets, 0)
    training = torch.is_grad_enabled()
    needs = [training and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    total, means, terms, *_ = _linear_ppo_loss(
        rows_hidden, weight, targets, bias, *given.tokens.columns(), given.cu_seqlens, given.by_sequence,
        given.clip.surrogate, given.clip.constants(), mapping, entropy, compact,
        *check_layout(weight, chunk_rows, num_tokens, fp32_logits), needs,
    )  # fmt: skip
    # Divided outside the op: the gradients are stored without the (small) factor and scaled by it once, in fp32.
    return total / given.divisor, summarise(means, terms, entropy)
