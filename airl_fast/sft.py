"""Supervised steps: the warm start, and the SFT baseline on demonstrations."""

from dataclasses import dataclass

import torch

from airl_fast.models.forward import token_logprobs
from airl_fast.models.load import LanguageModel
from airl_fast.optim import Optimiser
from airl_fast.pack import micro_batches
from airl_fast.types import TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SftStats:
    """loss: mean negative log-likelihood of completion tokens, in nats."""

    loss: torch.Tensor
    grad_norm: torch.Tensor


def update(lm: LanguageModel, batch: TraceBatch, optimiser: Optimiser, padded_tokens: int) -> SftStats:
    """One step on the mean over all completion tokens of the batch, however it is cut into micro-batches."""
    total = torch.zeros((), device=batch.tokens.device)
    for part, _ in micro_batches(batch, padded_tokens):
        loss = -token_logprobs(lm, part).sum() / batch.num_loss_tokens
        loss.backward()
        total += loss.detach()
    return SftStats(loss=total, grad_norm=optimiser.step())
