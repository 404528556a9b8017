"""The policy's step against PPO-clip written anew in float64, one sequence at a time."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch

from airl_fast import sft
from airl_fast.config import OptimConfig, PolicyConfig
from airl_fast.microbatch import TokenBudget
from airl_fast.models.forward import token_logprobs
from airl_fast.pack import pack, select
from airl_fast.policy import Policy, PolicyStats
from airl_fast.rollout.builtin import SamplingParams, sample
from airl_fast.types import Kind, TraceBatch
from tests.airl_fast.model_cases import (
    CPU,
    EVERYTHING,
    assert_close,
    copied,
    gradients_of,
    language_model,
    plain_optimiser,
    random_traces,
    trace,
    whole_sequences,
)

START = language_model(seed=8, spread=0.25)


def policy(optimiser=None, *, lm=None, temperature=1.0, reference=None, budget=EVERYTHING, **config) -> Policy:
    lm = lm or copied(START)
    settings = PolicyConfig(**config, optim=OptimConfig(tokens_per_micro_batch=budget))
    optimiser = optimiser or plain_optimiser(lm.model.parameters(), 1e-3)
    return Policy(lm=lm, optimiser=optimiser, config=settings, temperature=temperature, reference=reference)


def gradients(batch, advantages, lm=None, **config):
    lm, stats = lm or copied(START), []

    def step(optimiser):
        stats.append(policy(optimiser, lm=lm, **config).update(batch, advantages))

    return gradients_of(lm.model, step), stats[0]


def rollout(temperature=1.0, seed=0, groups=3) -> TraceBatch:
    """Real samples with the sampler's log-probabilities, a demonstration each, and one perturbed trace."""
    others = [t for t in random_traces(seed, groups, 0) if t.group < groups]
    prompts = [t.prompt_tokens for t in others[:groups]]
    params = SamplingParams(
        temperature=temperature, top_p=1.0, max_new_tokens=20, end_token=3, seed=seed, batch_size=64
    )
    samples = [
        trace(one.tokens, prompt=prompts[g], group=g, logprobs=one.logprobs)
        for g, group in enumerate(sample(START, prompts, 3, params))
        for one in group
    ]
    return pack(others + samples, CPU)


def shifted(batch: TraceBatch, amount: torch.Tensor) -> TraceBatch:
    """As if the sampler had been another policy: ratios become exp(-amount)."""
    return replace(batch, behaviour_logprobs=batch.behaviour_logprobs + amount)


def sequence_logprobs(model, batch: TraceBatch, temperature: float) -> list[torch.Tensor]:
    found = []
    for tokens, count in zip(whole_sequences(batch), batch.loss_lengths, strict=True):
        logp = (model(input_ids=tokens[None]).logits[0, -count - 1 : -1] / temperature).log_softmax(-1)
        found.append(logp.gather(1, tokens[-count:, None])[:, 0])
    return found


def expected(batch, advantages, *, temperature=1.0, clip=(0.2, 0.2), experts="one", kl=0.0, reference=None, lm=None):
    """The loss and its gradients, from section 1 of the paper's method and Schulman's PPO."""
    model = copy.deepcopy((lm or START).model).double().requires_grad_(True)
    start = None if reference is None else copy.deepcopy(reference.model).double()
    logprobs = sequence_logprobs(model, batch, temperature)
    kinds = batch.kind.tolist()
    counted = [k == Kind.POLICY or (k == Kind.EXPERT and experts != "none") for k in kinds]
    length = {kind: sum(n for n, k in zip(batch.loss_lengths, kinds, strict=True) if k == kind) for kind in Kind}
    total, tokens = 0.0, 0
    behaviour = batch.behaviour_logprobs.double().split(batch.loss_lengths)
    pieces = zip(kinds, counted, logprobs, behaviour, advantages.double().split(batch.loss_lengths), strict=True)
    for s, (kind, counts, logp, old, advantage) in enumerate(pieces):
        if not counts:
            continue
        if kind == Kind.EXPERT:
            old = logp.detach()
            if experts == "balanced":
                advantage = advantage * length[Kind.POLICY] / length[Kind.EXPERT]
        ratio = (logp - old).exp()
        held = ratio.clamp(1 - clip[0], 1 + clip[1])
        total = total - torch.minimum(ratio * advantage, held * advantage).sum()
        if kl:
            distance = sequence_logprobs(start, batch, temperature)[s].detach() - logp
            total = total + kl * (distance.exp() - 1 - distance).sum()
        tokens += len(logp)
    (total / tokens).backward()
    return (total / tokens).item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("experts", ["none", "one", "balanced"])
@pytest.mark.parametrize(("temperature", "kl"), [(1.0, 0.0), (0.7, 0.0), (0.7, 0.3)])
def test_loss_and_gradient(experts, temperature, kl):
    batch = rollout(temperature)
    batch = shifted(batch, torch.randn(batch.num_loss_tokens) * 0.4)
    advantages = torch.randn(batch.num_loss_tokens)
    reference = language_model(seed=9, spread=0.25) if kl else None
    options = {"temperature": temperature, "reference": reference}
    found, stats = gradients(
        batch, advantages, **options, expert_in_policy=experts, kl_coef=kl, clip_low=0.15, clip_high=0.3
    )
    loss, wanted = expected(batch, advantages, **options, experts=experts, kl=kl, clip=(0.15, 0.3))
    assert stats.loss.item() == pytest.approx(loss, abs=1e-5)
    assert_close(found, wanted)
    assert 0.1 < stats.clip_fraction < 0.6


def test_experts_take_part_as_configured():
    batch = rollout()
    expert = batch.per_token(batch.kind == Kind.EXPERT)
    sampled = batch.per_token(batch.kind == Kind.POLICY)
    advantages = torch.randn(batch.num_loss_tokens)
    found = {mode: gradients(batch, advantages, expert_in_policy=mode)[0] for mode in ("none", "one", "balanced")}
    only = {
        name: gradients(batch, torch.where(mask, advantages, 0.0), expert_in_policy="one")[0]
        for name, mask in (("expert", expert), ("policy", sampled))
    }
    both, samples = (expert | sampled).sum() / 1.0, sampled.sum() / 1.0
    for name, none in found["none"].items():
        # The mean runs over the tokens that take part: without experts the samples' part weighs more.
        torch.testing.assert_close(none, only["policy"][name] * both / samples, atol=1e-5, rtol=1e-3)
        one = only["policy"][name] + only["expert"][name]
        torch.testing.assert_close(found["one"][name], one, atol=1e-5, rtol=1e-3)
        balanced = only["policy"][name] + only["expert"][name] * samples / expert.sum()
        torch.testing.assert_close(found["balanced"][name], balanced, atol=1e-5, rtol=1e-3)
    assert max(gradient.abs().max() for gradient in only["expert"].values()) > 1e-2


def test_perturbed_traces_never_reach_the_policy():
    batch = rollout()
    advantages = torch.randn(batch.num_loss_tokens)
    kept = [s for s, kind in enumerate(batch.kind.tolist()) if kind != Kind.PERTURBED]
    assert len(kept) < batch.num_sequences
    part, index = select(batch, kept)
    whole, alone = gradients(batch, advantages), gradients(part, advantages[index])
    assert whole[1].loss == alone[1].loss
    assert_close(whole[0], alone[0], 1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_on_policy_the_ratio_is_one(temperature):
    batch = rollout(temperature)
    advantages = torch.randn(batch.num_loss_tokens)
    found, stats = gradients(batch, advantages, temperature=temperature)
    assert stats.clip_fraction == 0
    assert stats.mismatch_kl.abs() < 1e-8 and abs(stats.mismatch_max_ratio - 1) < 1e-5
    assert stats.approx_kl.abs() < 1e-8
    # The gradient is that of -mean(A log π): no ratio is held.
    lm = copied(START)
    part, index = select(batch, [s for s, kind in enumerate(batch.kind.tolist()) if kind != Kind.PERTURBED])
    (-(advantages[index] * token_logprobs(lm, part, temperature=temperature)).mean()).backward()
    assert_close(found, {name: parameter.grad for name, parameter in lm.model.named_parameters()})


def test_the_clip_is_not_inert():
    """Ratio 1.5 everywhere: a positive advantage is past its bound and moves nothing, a negative one still does."""
    batch = rollout()
    batch = shifted(batch, torch.full((batch.num_loss_tokens,), -math.log(1.5)))
    ones = torch.ones(batch.num_loss_tokens)
    held, stats = gradients(batch, ones, expert_in_policy="none")
    assert stats.clip_fraction.item() == pytest.approx(1, abs=1e-5)
    assert stats.loss.item() == pytest.approx(-1.2, abs=1e-5)
    assert all(not gradient.any() for gradient in held.values())
    free, stats = gradients(batch, -ones, expert_in_policy="none")
    assert stats.clip_fraction == 0 and stats.loss.item() == pytest.approx(1.5, abs=1e-5)
    assert all(gradient.any() for gradient in free.values())
    assert stats.mismatch_max_ratio.item() == pytest.approx(1.5, abs=1e-4)
    assert stats.mismatch_kl.item() == pytest.approx(0.5 - math.log(1.5), abs=1e-5)
    # Demonstrations have no sampler: their ratio is one, so they always count.
    shown, stats = gradients(batch, ones, expert_in_policy="one")
    assert any(gradient.any() for gradient in shown.values())


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_micro_batches_change_nothing(kl):
    batch = rollout(seed=5)
    batch = shifted(batch, torch.randn(batch.num_loss_tokens) * 0.3)
    advantages = torch.randn(batch.num_loss_tokens)
    assert batch.segments.num_rows > 256
    reference = language_model(seed=9, spread=0.25)
    whole = None
    for budget in (EVERYTHING, 1024, 256, 64, 1):
        found, stats = gradients(batch, advantages, budget=budget, kl_coef=kl, reference=reference)
        whole = whole or (found, stats)
        assert_close(found, whole[0])
        for field in fields(PolicyStats):
            ours, theirs = getattr(stats, field.name).item(), getattr(whole[1], field.name).item()
            assert ours == pytest.approx(theirs, abs=1e-5, nan_ok=True), field.name


def test_a_second_epoch_keeps_the_first_ones_old_policy():
    batch = rollout()
    advantages = torch.randn(batch.num_loss_tokens)
    twice = policy(epochs=2)
    stats = twice.update(batch, advantages)
    # By hand: the demonstrations' old log-probabilities are those before the first step, both times.
    by_hand = policy()
    before = token_logprobs(by_hand.lm, batch).detach()
    old = torch.where(batch.behaviour_logprobs.isnan(), before, batch.behaviour_logprobs)
    fixed = replace(batch, behaviour_logprobs=old)
    by_hand.update(fixed, advantages)
    last = by_hand.update(fixed, advantages)
    for ours, theirs in zip(twice.lm.model.parameters(), by_hand.lm.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert stats.loss.item() == pytest.approx(last.loss.item(), abs=1e-6)
    assert stats.approx_kl > 1e-6  # after one step the ratio has left one
    assert stats.mismatch_kl.abs() < 1e-8  # measured before it


def test_the_kl_term_pulls_towards_the_start_and_nothing_else_does():
    start, batch = language_model(seed=8, spread=0.25), rollout()
    nothing = torch.zeros(batch.num_loss_tokens)
    drifted = copied(START)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in drifted.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def distance(lm):
        return (token_logprobs(lm, batch) - token_logprobs(start, batch)).abs().mean().item()

    away = distance(drifted)
    pulled, free = copied(drifted), copied(drifted)
    stats = [
        p.update(batch, nothing)
        for p in [policy(lm=pulled, reference=start, kl_coef=0.5, expert_in_policy="none")]
        for _ in range(60)
    ]
    assert stats[0].kl_to_start > 0.01
    assert stats[-1].kl_to_start < stats[0].kl_to_start / 3
    assert distance(pulled) < away / 1.5
    policy(lm=free, reference=start).update(batch, nothing)
    assert all(map(torch.equal, free.model.parameters(), drifted.model.parameters()))
    at_start, stats = gradients(batch, nothing, reference=start, kl_coef=1.0)
    assert stats.kl_to_start.abs() < 1e-8
    assert max(gradient.abs().max() for gradient in at_start.values()) < 1e-5  # already there


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(value):
    batch = rollout()
    good = torch.randn(batch.num_loss_tokens)
    bad = good.clone()
    bad[torch.nonzero(batch.per_token(batch.kind == Kind.POLICY))[4]] = value
    steady, disturbed = policy(), policy()
    for one in (steady, disturbed):
        one.update(batch, good)
    before = {name: tensor.clone() for name, tensor in disturbed.lm.model.state_dict().items()}
    stats = disturbed.update(batch, bad)
    assert not stats.grad_norm.isfinite()
    after = disturbed.lm.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(parameter.grad is None for parameter in disturbed.lm.model.parameters())
    steady.update(batch, good), disturbed.update(batch, good)  # moments and schedule were left alone too
    assert all(map(torch.equal, steady.lm.model.parameters(), disturbed.lm.model.parameters()))
    assert not all(torch.equal(tensor, before[name]) for name, tensor in disturbed.lm.model.state_dict().items())


def test_what_the_log_shows():
    batch = rollout(0.7)
    batch = shifted(batch, torch.randn(batch.num_loss_tokens) * 0.2)
    reference = language_model(seed=9, spread=0.25)
    one = policy(temperature=0.7, reference=reference, kl_coef=0.1)
    model = copy.deepcopy(one.lm.model).double()
    stats = one.update(batch, torch.randn(batch.num_loss_tokens))
    kept = batch.per_token(batch.kind == Kind.POLICY)
    now = torch.cat(sequence_logprobs(model, batch, 0.7))[kept]
    start = torch.cat(sequence_logprobs(reference.model.double(), batch, 0.7))[kept]
    sampler = batch.behaviour_logprobs[kept].double()

    def k3(ratio):  # an estimate of KL(p || q) from the ratio q / p on samples of p
        return (ratio - 1 - ratio.log()).mean().item()

    assert stats.kl_to_start.item() == pytest.approx(k3((start - now).exp()), rel=1e-4)
    assert stats.mismatch_kl.item() == pytest.approx(k3((now - sampler).exp()), rel=1e-4)
    assert stats.approx_kl.item() == pytest.approx(stats.mismatch_kl.item(), rel=1e-4)  # one epoch: the same two
    assert stats.mismatch_max_ratio.item() == pytest.approx((now - sampler).exp().max().item(), rel=1e-4)
    assert gradients(batch, torch.zeros(batch.num_loss_tokens))[1].kl_to_start.isnan()
    entropies = []
    for tokens, count, kind in zip(whole_sequences(batch), batch.loss_lengths, batch.kind.tolist(), strict=True):
        if kind == Kind.POLICY:
            logp = (model(input_ids=tokens[None]).logits[0, -count - 1 : -1] / 0.7).log_softmax(-1)
            entropies.append(-(logp.exp() * logp).sum(-1))
    assert stats.entropy.item() == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-5)


def test_learning_raises_what_is_rewarded():
    batch = rollout()
    liked = batch.per_token(batch.kind == Kind.POLICY) & (batch.labels % 2 == 0)
    advantages = torch.where(liked, 1.0, -1.0)
    one = policy(epochs=3, expert_in_policy="none")
    before = token_logprobs(one.lm, batch).detach()
    for _ in range(5):
        one.update(batch, advantages)
    change = token_logprobs(one.lm, batch).detach() - before
    sampled = batch.per_token(batch.kind == Kind.POLICY)
    assert change[liked].mean() > 0.1 and change[sampled & ~liked].mean() < -0.1


# ---- supervised steps ----


def test_a_supervised_step_is_the_mean_over_all_completion_tokens():
    batch = pack(random_traces(3), CPU)
    model = copy.deepcopy(START.model).double()
    loss = -torch.cat(sequence_logprobs(model, batch, 1.0)).mean()
    loss.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    for budget in (EVERYTHING, 1024, 256, 1):
        lm, stats = copied(START), []
        found = gradients_of(
            lm.model, lambda o, lm=lm, s=stats, b=budget: s.append(sft.update(lm, batch, o, TokenBudget(b, "x")))
        )
        assert stats[0].loss.item() == pytest.approx(loss.item(), abs=1e-5)
        assert_close(found, wanted)


@pytest.mark.parametrize("form", ["token", "sequence"])
@pytest.mark.parametrize("budget", [EVERYTHING, 64])
def test_truncated_importance_sampling(form, budget):
    """min(π_trainer / π_sampler, ceiling) weighs every token's advantage, π_old being the trainer: a policy gradient
    of the weighted advantages at the first step. Demonstrations weigh one."""
    batch = rollout(seed=7)
    batch = shifted(batch, torch.randn(batch.num_loss_tokens) * 0.3)
    advantages = torch.randn(batch.num_loss_tokens)
    options = {"importance_sampling": form, "importance_ceiling": 1.2}
    found, stats = gradients(batch, advantages, budget=budget, **options)
    model = copy.deepcopy(START.model).double().requires_grad_(True)
    total, tokens, ratios = 0.0, 0, []
    pieces = zip(batch.kind.tolist(), sequence_logprobs(model, batch, 1.0),
                 batch.behaviour_logprobs.double().split(batch.loss_lengths),
                 advantages.double().split(batch.loss_lengths), strict=True)  # fmt: skip
    for kind, logp, sampled, advantage in pieces:
        if kind == Kind.PERTURBED:
            continue
        apart = torch.zeros_like(logp) if kind == Kind.EXPERT else (logp - sampled).detach()
        ratios.append(apart.exp())
        apart = apart.sum() if form == "sequence" else apart
        total = total - (apart.exp().clamp_max(1.2) * advantage * logp).sum()
        tokens += len(logp)
    (total / tokens).backward()
    assert_close(found, {name: parameter.grad for name, parameter in model.named_parameters()})
    assert (torch.cat(ratios) > 1.2).any() and (torch.cat(ratios) < 0.9).any()
    # What is logged is the mismatch itself, before any ceiling.
    assert stats.mismatch_max_ratio.item() == pytest.approx(torch.cat(ratios).max().item(), rel=1e-4)
    assert stats.mismatch_max_ratio > 1.2 and stats.clip_fraction == 0


def test_without_a_mismatch_the_correction_changes_nothing():
    batch = rollout(seed=3)
    advantages = torch.randn(batch.num_loss_tokens)
    plain, _ = gradients(batch, advantages)
    for form in ("token", "sequence"):
        corrected, _ = gradients(batch, advantages, importance_sampling=form)
        assert_close(corrected, plain)
