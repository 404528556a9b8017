"""The policy's step from hidden states against the one it replaces, log-probabilities first and the loss from them:
the same losses, gradients and log, in fewer products of the vocabulary's size."""

from dataclasses import fields, replace

import pytest
import torch
from airl_kernels import ppo_loss
from airl_kernels.testing import products

from airl_fast.microbatch import over_micro_batches
from airl_fast.models.forward import token_logprobs
from airl_fast.policy import Policy, PolicyStats
from airl_fast.types import Kind, TraceBatch
from tests.airl_fast.model_cases import (
    EVERYTHING,
    assert_close,
    copied,
    gradients_of,
    language_model,
    plain_optimiser,
)
from tests.airl_fast.test_policy import START, policy, rollout, shifted

# Padding beyond the tokenizer's words, and every map between a product and a score.
MAPPED = replace(START, num_tokens=START.num_tokens - 3, softcap=4.0, logit_scale=0.9)


# ---- the composition -------------------------------------------------------------------------------------------


def composed_update(one: Policy, batch: TraceBatch, advantages: torch.Tensor) -> PolicyStats:
    """`Policy.update` by `linear_logprob` and `ppo_loss`: four products with a trainable head, but every old
    log-probability is known when the loss is taken."""
    config = one.config
    batch, advantages = one._training_rows(batch, advantages)
    reference = one._reference_logprobs(batch)
    old, weight, entropy = (torch.empty_like(batch.behaviour_logprobs) for _ in range(3))
    passes = []
    for epoch in range(config.epochs):
        passes.append(torch.empty_like(old))
        total = old.new_zeros(())

        def work(part, epoch=epoch, total=total) -> None:
            index = part.index
            logprobs, part_entropy = token_logprobs(one.lm, part.batch, temperature=one.temperature, entropy=True)
            passes[epoch][index] = logprobs.detach()
            if epoch == 0:
                entropy[index] = part_entropy.detach()
                old[index], weight[index] = old_and_weight(one, part.batch, logprobs.detach())
            loss, _ = ppo_loss(
                logprobs, old[index], advantages[index], clip_low=config.clip_low, clip_high=config.clip_high,
                ref_logprobs=None if reference is None else reference[index], beta=config.kl_coef,
                is_ratio=None if config.importance_sampling == "none" else weight[index],
                denominator=batch.num_loss_tokens,
            )  # fmt: skip
            loss.backward()
            total += loss.detach()

        over_micro_batches(batch, one.budget, work)
        grad_norm = one.optimiser.step()
    counted = batch.per_token(batch.kind == Kind.POLICY)
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    _, step = ppo_loss(passes[-1], old, advantages, counted, ref_logprobs=reference, **clip)
    sampled = torch.where(counted, batch.behaviour_logprobs, 0.0)
    _, mismatch = ppo_loss(passes[0], sampled, advantages, counted)
    return PolicyStats(
        loss=total,
        clip_fraction=step.clip_fraction,
        approx_kl=step.approx_kl,
        entropy=torch.where(counted, entropy, 0.0).sum() / step.num_tokens,
        kl_to_start=torch.full_like(total, float("nan")) if reference is None else step.reference_kl,
        mismatch_kl=mismatch.approx_kl,
        mismatch_max_ratio=mismatch.token_log_ratio.max().exp(),
        grad_norm=grad_norm,
    )


def old_and_weight(one: Policy, batch: TraceBatch, trainer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sampled = batch.behaviour_logprobs
    unsampled = sampled.isnan()
    if one.config.importance_sampling == "none":
        return torch.where(unsampled, trainer, sampled), torch.ones_like(trainer)
    log_ratio = torch.where(unsampled, 0.0, trainer - sampled)
    if one.config.importance_sampling == "sequence":
        sums = [part.sum().expand_as(part) for part in log_ratio.split(batch.loss_lengths)]
        log_ratio = torch.cat(sums)
    return trainer, log_ratio.exp().clamp_max(one.config.importance_ceiling)


# ---- the same --------------------------------------------------------------------------------------------------


CASES = {
    "plain": {},
    "no experts": {"expert_in_policy": "none"},
    "balanced": {"expert_in_policy": "balanced"},
    "kl": {"kl_coef": 0.3},
    "token weights": {"importance_sampling": "token", "importance_ceiling": 1.2},
    "sequence weights": {"importance_sampling": "sequence", "importance_ceiling": 1.2, "kl_coef": 0.1},
}


@pytest.mark.parametrize(
    ("epochs", "budget", "chunked"),
    [(1, EVERYTHING, False), (3, 256, False), (2, EVERYTHING, True)],
    ids=["one pass", "micro-batches", "chunks of logits"],
)
@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_the_composition(monkeypatch, case, epochs, budget, chunked):
    lm = MAPPED
    batch = rollout(0.7)
    batch = shifted(batch, torch.randn(batch.num_loss_tokens) * 0.3)
    batch = replace(batch, labels=batch.labels.clamp(max=lm.num_tokens - 1))
    advantages = torch.randn(batch.num_loss_tokens)
    reference = replace(language_model(seed=9, spread=0.25), softcap=lm.softcap, logit_scale=lm.logit_scale)
    if chunked:
        monkeypatch.setattr("airl_kernels._chunking._CPU_BUDGET", 37 * lm.num_tokens * 4)
    settings = {"temperature": 0.7, "reference": reference, "budget": budget, "epochs": epochs, **CASES[case]}
    found = []
    for update in (Policy.update, composed_update):
        mine = replace(lm, model=copied(lm).model)
        stats = []

        def step(optimiser, mine=mine, stats=stats, update=update) -> None:
            stats.append(update(policy(optimiser, lm=mine, **settings), batch, advantages))

        found.append((gradients_of(mine.model, step), stats[0]))
    (ours, logged), (theirs, expected) = found
    assert_close(ours, theirs, 1e-5)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-2
    for field in fields(PolicyStats):
        a, b = getattr(logged, field.name).item(), getattr(expected, field.name).item()
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6, nan_ok=True), field.name
    assert logged.clip_fraction > 0 or epochs == 1


# ---- in fewer products -----------------------------------------------------------------------------------------


TOKENS, ROWS = 41, 43  # of the vocabulary and of the output layer: no other layer has a side of 41


def vocabulary_products(one: Policy, update) -> float:
    """Products of one update with as many columns, rows or terms as there are tokens, in units of rows·H·V."""
    batch = rollout()
    advantages = torch.randn(batch.num_loss_tokens)
    trained, _ = one._training_rows(batch, advantages)
    assert trained.num_loss_tokens != TOKENS
    seen = [p for p in products(lambda: update(one, batch, advantages)) if TOKENS in p]
    return sum(m * k * n for m, k, n in seen) / (trained.num_loss_tokens * one.lm.head.weight.shape[1] * TOKENS)


@pytest.mark.parametrize(("frozen", "before", "after"), [(False, 4, 3), (True, 2, 2)], ids=["trainable", "frozen"])
@pytest.mark.parametrize(("form", "epochs"), [("none", 1), ("none", 2), ("token", 1), ("sequence", 2)])
def test_products_of_a_step(form, epochs, frozen, before, after):
    """Per pass over the batch, with demonstrations in it."""
    for update, count in ((Policy.update, after), (composed_update, before)):
        lm = replace(language_model(vocab_size=ROWS), num_tokens=TOKENS)
        lm.head.weight.requires_grad_(not frozen)
        optimiser = plain_optimiser([p for p in lm.model.parameters() if p.requires_grad], 1e-3)
        one = policy(optimiser, lm=lm, epochs=epochs, importance_sampling=form)
        assert vocabulary_products(one, update) == count * epochs
