"""The discriminator's heads: what turns a backbone's hidden states into one logit z per completion token.

h_r is the state at the row that predicts the label y_r (loss_rows); h_{r+1} is the state after reading it (label_rows).

- linear:  z = w · h_{r+1} + b, the paper's head.
- action:  z = h_r · U[y_r] + b[y_r], the state before the token, read at the token taken: a reward of (state,
  action), as in AIRL (Fu et al. 2018). U is a full [V, H] table, or U[y] = A E[y] of low rank over the token
  embedding for a real vocabulary.
- logprob: the linear head plus α · log π_ref(y_r), the f - log π of AIRL with a learned α (starting at 0).
"""

from dataclasses import dataclass

import torch
from torch import nn

from airl_fast.types import TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs:
    """Arguments of the token-head ops: hidden [M, H'], weight [H'] or [V, H'], bias [1] or [V],
    index int64 [M] or None, offset f32 [M] or None."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    index: torch.Tensor | None = None
    offset: torch.Tensor | None = None


class LinearHead(nn.Module):
    needs_reference = False

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, hidden: torch.Tensor, batch: TraceBatch, reference: torch.Tensor | None) -> HeadInputs:
        return HeadInputs(hidden=hidden[batch.label_rows], weight=self.weight, bias=self.bias)

    def lipschitz_penalty(self, batch: TraceBatch) -> torch.Tensor:
        """(‖∂z/∂h‖ - 1)², the gradient penalty of WGAN-GP (Gulrajani et al. 2017): z is linear in the head's input."""
        return (self.weight.float().norm() - 1) ** 2


class LogprobHead(LinearHead):
    needs_reference = True

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: torch.Tensor, batch: TraceBatch, reference: torch.Tensor | None) -> HeadInputs:
        inputs = super().forward(hidden, batch, None)
        return HeadInputs(hidden=inputs.hidden, weight=inputs.weight, bias=inputs.bias, offset=self.alpha * reference)


class ActionHead(nn.Module):
    needs_reference = False

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, hidden: torch.Tensor, batch: TraceBatch, reference: torch.Tensor | None) -> HeadInputs:
        return HeadInputs(hidden=hidden[batch.loss_rows], weight=self.weight, bias=self.bias, index=batch.labels)

    def lipschitz_penalty(self, batch: TraceBatch) -> torch.Tensor:
        return ((self.weight[batch.labels].float().norm(dim=-1) - 1) ** 2).mean()


class LowRankActionHead(nn.Module):
    """U[y] = A E[y] with A = down · upᵀ of rank r: h · U[y] = (h · down) · (E[y] · up), so no [V, H] table is made."""

    needs_reference = False

    def __init__(self, embedding: nn.Embedding, rank: int):
        super().__init__()
        vocab_size, hidden_size = embedding.weight.shape
        self.embedding = (embedding,)  # the backbone's, in a tuple so that it is not registered twice
        self.down = nn.Parameter(torch.zeros(hidden_size, rank))
        self.up = nn.Parameter(torch.zeros(hidden_size, rank))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.down, std=hidden_size**-0.5)
        nn.init.normal_(self.up, std=hidden_size**-0.5)

    def forward(self, hidden: torch.Tensor, batch: TraceBatch, reference: torch.Tensor | None) -> HeadInputs:
        table = self._embedding() @ self.up
        before = hidden[batch.loss_rows].to(self.down.dtype) @ self.down
        return HeadInputs(hidden=before, weight=table, bias=self.bias, index=batch.labels)

    def lipschitz_penalty(self, batch: TraceBatch) -> torch.Tensor:
        rows = self._embedding()[batch.labels] @ self.up @ self.down.T
        return ((rows.norm(dim=-1) - 1) ** 2).mean()

    def _embedding(self) -> torch.Tensor:
        return self.embedding[0].weight.to(self.up.dtype)  # the head is float32 over a bfloat16 backbone too


def make_head(name: str, backbone: nn.Module, rank: int) -> nn.Module:
    embedding = backbone.get_input_embeddings()
    vocab_size, hidden_size = embedding.weight.shape
    if name == "linear":
        return LinearHead(hidden_size)
    if name == "logprob":
        return LogprobHead(hidden_size)
    return ActionHead(hidden_size, vocab_size) if rank == 0 else LowRankActionHead(embedding, rank)
