"""The policy's step: PPO-clip on packed traces with per-token advantages (Schulman et al. 2017)."""

from dataclasses import dataclass, field

import torch
from airl_kernels import PolicyStats as LossStats
from airl_kernels import linear_ppo_loss

from airl_fast.config import PolicyConfig
from airl_fast.microbatch import MicroBatch, TokenBudget, over_micro_batches, over_tokens
from airl_fast.models.forward import hidden_states, token_logprobs
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
        corrected = self.config.importance_sampling != "none"
        start = step = _Tokens(batch)
        old: dict[str, torch.Tensor] = {}  # what later passes know of the policy before the first
        for epoch in range(self.config.epochs):
            step = _Tokens(batch)
            total = advantages.new_zeros(())

            def work(part: MicroBatch, epoch=epoch, step=step, total=total) -> None:
                index = part.index
                former = {name: values[index] for name, values in old.items()} or self._first(part.batch)
                loss, seen = linear_ppo_loss(
                    hidden_states(self.lm.backbone, part.batch),
                    targets=part.batch.labels,
                    rows=part.batch.loss_rows,
                    advantages=advantages[index],
                    clip_low=self.config.clip_low,
                    clip_high=self.config.clip_high,
                    ref_logprobs=None if reference is None else reference[index],
                    beta=self.config.kl_coef,
                    denominator=batch.num_loss_tokens,
                    temperature=self.temperature,
                    entropy=epoch == 0,
                    **former,
                    **self.lm.projection,
                )
                loss.backward()
                total += loss.detach()
                step.keep(index, seen)

            def restart(total=total) -> None:
                total.zero_()
                self.optimiser.clear()

            over_micro_batches(batch, self.budget, work, restart)
            if epoch == 0:
                start = step
                sampled = batch.behaviour_logprobs
                old["old_logprobs"] = torch.where(sampled.isnan() | corrected, start["logprobs"], sampled)
                if corrected:
                    old["is_ratio"] = start["is_ratio"]
            grad_norm = self.optimiser.step()
        return self._stats(batch, start, step, total, grad_norm)

    def _first(self, batch: TraceBatch) -> dict[str, object]:
        """The old policy of the first pass over a batch, as `linear_ppo_loss` takes it.

        π_old is the sampler where it is known to be the trainer's policy. Under truncated importance sampling (Yao
        et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training") it is the trainer's
        before this update, and min(π_trainer / π_sampler, ceiling) weighs the loss, a token's own or its sequence's
        ratio. Demonstrations have no sampler (NaN): π_old is the trainer's, their weight 1.
        """
        if self.config.importance_sampling == "none":
            return {"old_logprobs": batch.behaviour_logprobs}
        return {
            "old_logprobs": None,
            "sampler_logprobs": batch.behaviour_logprobs,
            "is_ceiling": self.config.importance_ceiling,
            "is_level": self.config.importance_sampling,
            "cu_seqlens": batch.loss_cu_seqlens,
        }

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
    def _stats(self, batch: TraceBatch, start: "_Tokens", last: "_Tokens", loss, grad_norm) -> PolicyStats:
        """Means over policy tokens of what the first and the last pass saw."""
        counted = batch.per_token(batch.kind == Kind.POLICY)
        drift = torch.where(counted, start["logprobs"] - batch.behaviour_logprobs, 0.0)
        mismatch = drift.expm1() - drift
        rows = torch.stack([last["clipped"], last["approx_kl"], start["entropy"], last["reference_kl"], mismatch])
        means = (torch.where(counted, rows, 0.0).sum(1) / counted.sum().clamp(min=1)).unbind()
        clip_fraction, approx_kl, entropy, kl_to_start, mismatch_kl = means
        return PolicyStats(
            loss=loss,
            clip_fraction=clip_fraction,
            approx_kl=approx_kl,
            entropy=entropy,
            kl_to_start=kl_to_start if self.config.kl_coef else torch.full_like(loss, float("nan")),
            mismatch_kl=mismatch_kl,
            mismatch_max_ratio=drift.max().exp(),
            grad_norm=grad_norm,
        )


class _Tokens:
    """What one pass over a batch saw of every token, f32 [M] each, by the names of `airl_kernels.PolicyStats`."""

    # Rows of one tensor, so that a micro-batch costs two launches. The entropy comes last: later passes leave it out.
    NAMES = ("logprobs", "is_ratio", "clipped", "approx_kl", "reference_kl", "entropy")

    def __init__(self, batch: TraceBatch) -> None:
        self._rows = torch.empty(len(self.NAMES), batch.num_loss_tokens, device=batch.tokens.device)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._rows[self.NAMES.index(name)]

    def keep(self, index: torch.Tensor, seen: LossStats) -> None:
        found = [getattr(seen, f"token_{name}") for name in self.NAMES]
        found = torch.stack([values for values in found if values is not None])
        self._rows[: found.shape[0]].index_copy_(1, index, found)
