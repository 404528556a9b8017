"""From packed tokens to hidden states and log-probabilities."""

import torch
from airl_kernels import linear_logprob

from airl_fast.models.load import LanguageModel
from airl_fast.types import TraceBatch


def hidden_states(backbone: torch.nn.Module, batch: TraceBatch) -> torch.Tensor:
    """Last hidden state of every packed token, [N, H].

    Sequences are padded on the right to the longest of the batch. Under causal attention no real token sees the
    padding, so no mask is built and the fast causal attention kernel runs.
    """
    lengths = batch.cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=lengths.device), lengths, output_size=len(batch.tokens)
    )
    padded = batch.tokens.new_zeros(len(lengths), batch.max_seqlen)
    padded[sequence, batch.positions] = batch.tokens
    hidden = backbone(input_ids=padded, use_cache=False).last_hidden_state
    return hidden[sequence, batch.positions]


def token_logprobs(
    lm: LanguageModel, batch: TraceBatch, *, temperature: float = 1.0, entropy: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log π(label) of every loss row, f32 [M]; with `entropy` also the entropy of its distribution, f32 [M]."""
    hidden = hidden_states(lm.model.base_model, batch)
    return linear_logprob(
        hidden,
        lm.head.weight,
        batch.labels,
        bias=getattr(lm.head, "bias", None),
        temperature=temperature,
        softcap=lm.softcap,
        logit_scale=lm.logit_scale,
        rows=batch.loss_rows,
        entropy=entropy,
    )
