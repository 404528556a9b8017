"""The policy's step: PPO-clip on packed traces with per-token advantages (Schulman et al. 2017)."""

from dataclasses import dataclass

import torch
from airl_kernels import ppo_loss

from airl_fast.config import PolicyConfig
from airl_fast.models.forward import token_logprobs
from airl_fast.models.load import LanguageModel
from airl_fast.optim import Optimiser
from airl_fast.pack import micro_batches, select
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

    def update(self, batch: TraceBatch, advantages: torch.Tensor) -> PolicyStats:
        """`epochs` clipped steps. advantages: f32 [M] on the batch's loss rows."""
        batch, advantages = self._training_rows(batch, advantages)
        old = batch.behaviour_logprobs.clone()
        unsampled = old.isnan()  # demonstrations: π_old is the policy as it stands before this update
        reference = self._reference_logprobs(batch)
        start = torch.empty_like(old)  # log-probabilities and entropy before the first step
        entropy = torch.empty_like(old)
        for epoch in range(self.config.epochs):
            current = torch.empty_like(old)
            total = old.new_zeros(())
            for part, index in micro_batches(batch, self.config.optim.tokens_per_micro_batch):
                logprobs, part_entropy = token_logprobs(self.lm, part, temperature=self.temperature, entropy=True)
                current[index] = logprobs.detach()
                if epoch == 0:
                    entropy[index] = part_entropy.detach()
                    old[index] = torch.where(unsampled[index], current[index], old[index])
                loss, _ = ppo_loss(
                    logprobs,
                    old[index],
                    advantages[index],
                    clip_low=self.config.clip_low,
                    clip_high=self.config.clip_high,
                    ref_logprobs=None if reference is None else reference[index],
                    beta=self.config.kl_coef,
                    denominator=batch.num_loss_tokens,
                )
                loss.backward()
                total += loss.detach()
            if epoch == 0:
                start = current
            grad_norm = self.optimiser.step()
        return self._stats(batch, advantages, old, start, current, entropy, reference, total, grad_norm)

    def _training_rows(self, batch: TraceBatch, advantages: torch.Tensor) -> tuple[TraceBatch, torch.Tensor]:
        """Leave out perturbed traces, and experts where the configuration says so; weigh the experts."""
        kept = [Kind.POLICY] if self.config.expert_in_policy == "none" else [Kind.POLICY, Kind.EXPERT]
        sequences = [s for s, kind in enumerate(batch.kind.tolist()) if kind in kept]
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
        logprobs = torch.empty_like(batch.behaviour_logprobs)
        for part, index in micro_batches(batch, 2 * self.config.optim.tokens_per_micro_batch):
            logprobs[index] = token_logprobs(self.reference, part, temperature=self.temperature)
        return logprobs

    def _stats(self, batch, advantages, old, start, current, entropy, reference, loss, grad_norm) -> PolicyStats:
        weight = batch.per_token(batch.kind == Kind.POLICY).float()
        weight = weight / weight.sum()
        sampled = batch.behaviour_logprobs
        mismatch = torch.where(sampled.isnan(), 0.0, start - sampled)
        change = current - old
        clipped = torch.where(
            advantages > 0, change.exp() > 1 + self.config.clip_high, change.exp() < 1 - self.config.clip_low
        ) & (advantages != 0)
        missing = torch.full_like(loss, float("nan"))
        return PolicyStats(
            loss=loss,
            clip_fraction=(clipped * weight).sum(),
            approx_kl=(_k3(change) * weight).sum(),
            entropy=(entropy * weight).sum(),
            kl_to_start=missing if reference is None else (_k3(reference - current) * weight).sum(),
            mismatch_kl=(_k3(mismatch) * weight).sum(),
            mismatch_max_ratio=mismatch.max().exp(),
            grad_norm=grad_norm,
        )


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimator exp(x) - 1 - x of KL(p || q), x = log q - log p on samples of p: never negative."""
    return torch.expm1(log_ratio) - log_ratio
