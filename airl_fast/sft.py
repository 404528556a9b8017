"""Supervised steps: the warm start, and the SFT baseline on demonstrations."""

from dataclasses import dataclass

import torch

from airl_fast.microbatch import MicroBatch, TokenBudget, over_micro_batches
from airl_fast.models.forward import token_logprobs
from airl_fast.models.load import LanguageModel
from airl_fast.optim import Optimiser
from airl_fast.types import TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SftStats:
    """loss: mean negative log-likelihood of completion tokens, in nats."""

    loss: torch.Tensor
    grad_norm: torch.Tensor


def update(lm: LanguageModel, batch: TraceBatch, optimiser: Optimiser, budget: TokenBudget) -> SftStats:
    """One step on the mean over all completion tokens of the batch, however it is cut into micro-batches."""
    total = torch.zeros((), device=batch.tokens.device)

    def work(part: MicroBatch) -> None:
        loss = -token_logprobs(lm, part.batch).sum() / batch.num_loss_tokens
        loss.backward()
        total.add_(loss.detach())

    def restart() -> None:
        total.zero_()
        optimiser.clear()

    over_micro_batches(batch, budget, work, restart)
    return SftStats(loss=total, grad_norm=optimiser.step())
