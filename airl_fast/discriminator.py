"""The discriminator D: a token classifier of expert against other completions, and the reward it implies.

Fanconi et al., arXiv 2510.01857, section 3 and Algorithm 1. Its batch may be tokenised otherwise than the policy's.
"""

from dataclasses import dataclass

import torch
from airl_kernels import discriminator_loss, token_rewards
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from airl_fast.config import DiscriminatorConfig, RewardConfig
from airl_fast.errors import UserError
from airl_fast.granularity import reward_tokens
from airl_fast.microbatch import MicroBatch, TokenBudget, over_micro_batches, over_tokens
from airl_fast.models.forward import hidden_states, token_logprobs
from airl_fast.models.load import LanguageModel
from airl_fast.models.regimes import Regimes, regimes_of
from airl_fast.optim import Optimiser
from airl_fast.types import Kind, TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscriminatorStats:
    """Scalars on the device. reward_gap: mean logit of expert tokens less that of policy tokens.

    accuracy: class-balanced share of tokens on the right side of zero. perturbed_accuracy: of perturbed tokens.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor
    perturbed_accuracy: torch.Tensor
    reward_gap: torch.Tensor
    grad_norm: torch.Tensor


class Discriminator(nn.Module):
    """Backbone and head. Tensors named here per token are [M], on the loss rows of the batch given."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        config: DiscriminatorConfig,
        reward: RewardConfig,
        reference: LanguageModel | None = None,
    ):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.config, self.reward = config, reward
        self.budget = TokenBudget(config.optim.tokens_per_micro_batch, "discriminator.optim.tokens_per_micro_batch")
        self.reference = (reference,)  # the frozen start policy, not a part of D; in a tuple so as not to register
        if config.lipschitz == "spectral_norm":
            if not hasattr(head, "weight"):
                raise UserError(
                    "discriminator.lipschitz=spectral_norm needs a head with a weight of its own; "
                    "set discriminator.action_rank=0 or discriminator.lipschitz=gradient_penalty."
                )
            spectral_norm(head, "weight")
            head.eval()  # in training mode every look at the weight, scoring's too, would move its estimate

    @property
    def regimes(self) -> Regimes:
        """Of everything that reads its batch: pack with them."""
        own = regimes_of(self.backbone)
        return own | self.reference[0].regimes if self.head.needs_reference else own

    def update(self, batch: TraceBatch, optimiser: Optimiser) -> DiscriminatorStats:
        """One optimiser step on expert (target 1) against policy and perturbed completions (target 0)."""
        if self.config.lipschitz == "spectral_norm":
            self._estimate_spectral_norm()
        weights = self.loss_weights(batch)
        targets = batch.per_token(self.positives(batch)).float()
        num_pairs = (batch.pair >= 0).sum().clamp_min(1)
        logits = torch.empty_like(weights)
        total = weights.new_zeros(())

        def work(micro: MicroBatch) -> None:
            part, index = micro.batch, micro.index
            inputs = self._head_inputs(part)
            loss, part_logits = discriminator_loss(
                inputs.hidden,
                inputs.weight,
                inputs.bias,
                targets[index],
                weights[index],
                index=inputs.index,
                offset=inputs.offset,
                loss=self.config.loss,
                label_smoothing=self.config.label_smoothing,
                cu_seqlens=part.loss_cu_seqlens,
                pairs=part.pair,
                margin=self.config.margin,
            )
            if self.config.loss == "pairwise":  # the op means over the pairs it sees
                loss = loss * ((part.pair >= 0).sum() / num_pairs)
            if self.config.lipschitz == "gradient_penalty":
                share = part.num_loss_tokens / batch.num_loss_tokens
                loss = loss + self.config.penalty_coef * share * self.head.lipschitz_penalty(part)
            loss.backward()
            logits[index] = part_logits
            total.add_(loss.detach())

        def restart() -> None:
            total.zero_()
            optimiser.clear()

        over_micro_batches(batch, self.budget, work, restart)
        return self._stats(batch, weights > 0, logits, total, optimiser.step())

    @torch.no_grad()
    def logits(self, batch: TraceBatch) -> torch.Tensor:
        """z, f32 [M]: the log-odds log D - log(1 - D) that the token is an expert's."""
        return self._rewards(batch, kind="logit", temperature=1.0, clip=None)

    @torch.no_grad()
    def score(self, batch: TraceBatch) -> torch.Tensor:
        """The dense reward of every completion token, f32 [M]; granularity is applied by `advantages`."""
        return self._rewards(batch, kind=self.reward.kind, temperature=self.reward.temperature, clip=self.reward.clip)

    def loss_weights(self, batch: TraceBatch) -> torch.Tensor:
        """f32 [M], summing to one: a mean per sequence, then half for the experts and half for all others.

        Under interval and sparse rewards only the tokens that will carry a reward are trained on.
        """
        counted = reward_tokens(batch, self.reward).float()
        sequence = batch.per_token(torch.arange(batch.num_sequences, device=counted.device))
        expert = self.positives(batch)
        scale = torch.where(batch.kind == Kind.PERTURBED, self.config.neg_weight, 1.0)
        share = torch.where(expert, 0.5 / expert.sum().clamp_min(1), 0.0)
        rest = torch.where(expert, 0.0, scale)
        share = share + 0.5 * rest / rest.sum().clamp_min(1e-12)
        tokens = torch.zeros(batch.num_sequences, device=counted.device).index_add_(0, sequence, counted)
        return counted * (share / tokens)[sequence]

    def positives(self, batch: TraceBatch) -> torch.Tensor:
        """bool [S]: the sequences D is to call expert."""
        expert = batch.kind == Kind.EXPERT
        if self.config.positives == "expert_and_correct":
            expert = expert | ((batch.kind == Kind.POLICY) & batch.correct)
        return expert

    @torch.no_grad()
    def _estimate_spectral_norm(self) -> None:
        """One power iteration an update, however many micro-batches it has."""
        self.head.train()
        self.head.weight  # noqa: B018  the look is what iterates
        self.head.eval()

    def _rewards(self, batch: TraceBatch, **options) -> torch.Tensor:
        def values(part: TraceBatch) -> torch.Tensor:
            inputs = self._head_inputs(part)
            return token_rewards(
                inputs.hidden, inputs.weight, inputs.bias, index=inputs.index, offset=inputs.offset, **options
            )

        return over_tokens(batch, self.budget, values)

    def _head_inputs(self, batch: TraceBatch):
        reference = None
        if self.head.needs_reference:
            with torch.no_grad():
                reference = token_logprobs(self.reference[0], batch)
        return self.head(hidden_states(self.backbone, batch), batch, reference)

    def _stats(
        self,
        batch: TraceBatch,
        counted: torch.Tensor,
        logits: torch.Tensor,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
    ) -> DiscriminatorStats:
        kind = batch.per_token(batch.kind)
        expert, policy, perturbed = (
            _mean_where(counted & (kind == k)) for k in (Kind.EXPERT, Kind.POLICY, Kind.PERTURBED)
        )
        positive = batch.per_token(self.positives(batch))
        right = torch.where(positive, logits > 0, logits < 0).float()
        accuracy = (_mean_where(counted & positive)(right) + _mean_where(counted & ~positive)(right)) / 2
        return DiscriminatorStats(
            loss=loss,
            accuracy=accuracy,
            perturbed_accuracy=perturbed(right),
            reward_gap=expert(logits) - policy(logits),
            grad_norm=grad_norm,
        )


def _mean_where(mask: torch.Tensor):
    weight = mask.float() / mask.sum()  # nan where the batch has none of the kind, which the log shows as missing
    return lambda values: (values * weight).sum()
