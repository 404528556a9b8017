"""The policy's step: PPO-clip on packed traces with per-token advantages (Schulman et al. 2017)."""

from dataclasses import dataclass, field

import torch
from airl_kernels import ppo_loss

from airl_fast.config import PolicyConfig
from airl_fast.microbatch import MicroBatch, TokenBudget, over_micro_batches, over_tokens
from airl_fast.models.forward import token_logprobs
from airl_fast.models.load import LanguageModel
from airl_fast.optim import Optimiser
from airl_fast.pack import select
from airl_fast.types import Kind, TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStats:
    """Scalars on the device, means over policy tokens. mismatch_kl, mismatch_max_ratio: trainer against sampler,
    before the first update (k3 estimator of KL(sampler || trainer); largest π/π_sampler)."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor
    approx_kl: torch.Tensor
    entropy: torch.Tensor
    kl_to_start: torch.Tensor
    mismatch_kl: torch.Tensor
    mismatch_max_ratio: torch.Tensor
    grad_norm: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    lm: LanguageModel
    optimiser: Optimiser
    config: PolicyConfig
    temperature: float  # of the sampler: ratios compare the distributions that were sampled from
    reference: LanguageModel | None = None  # the start policy, needed when kl_coef > 0
    budget: TokenBudget = field(init=False)

    def __post_init__(self) -> None:
        budget = TokenBudget(self.config.optim.tokens_per_micro_batch, "policy.optim.tokens_per_micro_batch")
        object.__setattr__(self, "budget", budget)

    def update(self, batch: TraceBatch, advantages: torch.Tensor) -> PolicyStats:
        """`epochs` clipped steps. advantages: f32 [M] on the batch's completion tokens."""
        batch, advantages = self._training_rows(batch, advantages)
        reference = self._reference_logprobs(batch)
        old = torch.empty_like(batch.behaviour_logprobs)
        weight = torch.empty_like(old)  # of trainer against sampler, truncated; 1 without a correction
        entropy = torch.empty_like(old)
        start, current = old, torch.empty_like(old)
        for epoch in range(self.config.epochs):
            current = torch.empty_like(old)
            total = old.new_zeros(())

            def work(part: MicroBatch, epoch=epoch, current=current, total=total) -> None:
                index = part.index
                logprobs, part_entropy = token_logprobs(self.lm, part.batch, temperature=self.temperature, entropy=True)
                current[index] = logprobs.detach()
                if epoch == 0:
                    entropy[index] = part_entropy.detach()
                    old[index], weight[index] = self._old_logprobs(part.batch, logprobs.detach())
                loss, _ = ppo_loss(
                    logprobs,
                    old[index],
                    advantages[index],
                    clip_low=self.config.clip_low,
                    clip_high=self.config.clip_high,
                    ref_logprobs=None if reference is None else reference[index],
                    beta=self.config.kl_coef,
                    is_ratio=None if self.config.importance_sampling == "none" else weight[index],
                    denominator=batch.num_loss_tokens,
                )
                loss.backward()
                total += loss.detach()

            def restart(total=total) -> None:
                total.zero_()
                self.optimiser.clear()

            over_micro_batches(batch, self.budget, work, restart)
            if epoch == 0:
                start = current
            grad_norm = self.optimiser.step()
        return self._stats(batch, advantages, old, start, current, entropy, reference, total, grad_norm)

    def _old_logprobs(self, batch: TraceBatch, trainer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log π_old and the importance weight of every token, f32 [M]; `trainer`: the policy before this update.

        π_old is the sampler where it is known to be the trainer's policy. Under truncated importance sampling (Yao
        et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training") it is the trainer's,
        and min(π_trainer / π_sampler, ceiling) weighs the loss, a token's own or its sequence's ratio. Demonstrations
        have no sampler: π_old is the trainer's, their weight 1.
        """
        sampled = batch.behaviour_logprobs
        unsampled = sampled.isnan()
        if self.config.importance_sampling == "none":
            return torch.where(unsampled, trainer, sampled), torch.ones_like(trainer)
        log_ratio = torch.where(unsampled, 0.0, trainer - sampled)
        if self.config.importance_sampling == "sequence":
            sequence = batch.per_token(torch.arange(batch.num_sequences, device=sampled.device))
            sums = torch.zeros(batch.num_sequences, device=sampled.device).index_add_(0, sequence, log_ratio)
            log_ratio = sums[sequence]
        return trainer, log_ratio.exp().clamp_max(self.config.importance_ceiling)

    def _training_rows(self, batch: TraceBatch, advantages: torch.Tensor) -> tuple[TraceBatch, torch.Tensor]:
        """Leave out perturbed traces, and experts where the configuration says so; weigh the experts."""
        kept = [Kind.POLICY] if self.config.expert_in_policy == "none" else [Kind.POLICY, Kind.EXPERT]
        sequences = [s for s, kind in enumerate(batch.kinds) if kind in kept]
        if len(sequences) < batch.num_sequences:
            batch, index = select(batch, sequences)
            advantages = advantages[index]
        if self.config.expert_in_policy == "balanced":  # as many expert tokens as policy tokens, in effect
            expert = batch.per_token(batch.kind == Kind.EXPERT)
            weight = (~expert).sum() / expert.sum().clamp_min(1)
            advantages = torch.where(expert, weight * advantages, advantages)
        return batch, advantages

    @torch.no_grad()
    def _reference_logprobs(self, batch: TraceBatch) -> torch.Tensor | None:
        if self.config.kl_coef == 0:
            return None
        return over_tokens(
            batch, self.budget, lambda part: token_logprobs(self.reference, part, temperature=self.temperature)
        )

    @torch.no_grad()
    def _stats(self, batch, advantages, old, start, current, entropy, reference, loss, grad_norm) -> PolicyStats:
        """Over policy tokens, as `ppo_loss` itself counts them."""
        counted = batch.per_token(batch.kind == Kind.POLICY)
        clip = {"clip_low": self.config.clip_low, "clip_high": self.config.clip_high}
        _, step = ppo_loss(current, old, advantages, counted, ref_logprobs=reference, **clip)
        sampled = torch.where(counted, batch.behaviour_logprobs, 0.0)
        _, mismatch = ppo_loss(start, sampled, advantages, counted)
        return PolicyStats(
            loss=loss,
            clip_fraction=step.clip_fraction,
            approx_kl=step.approx_kl,
            entropy=torch.where(counted, entropy, 0.0).sum() / step.num_tokens,
            kl_to_start=torch.full_like(loss, float("nan")) if reference is None else step.reference_kl,
            mismatch_kl=mismatch.approx_kl,
            mismatch_max_ratio=mismatch.token_log_ratio.max().exp(),
            grad_norm=grad_norm,
        )
