"""The discriminator against the formulas written anew, sequence by sequence, in float64."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from airl_fast.config import DiscriminatorConfig, OptimConfig, RewardConfig
from airl_fast.discriminator import Discriminator
from airl_fast.errors import UserError
from airl_fast.models.heads import make_head
from airl_fast.pack import Boundaries, pack
from airl_fast.types import Kind, Trace, TraceBatch
from tests.airl_fast.model_cases import (
    CPU,
    EVERYTHING,
    assert_close,
    gradients_of,
    language_model,
    plain_optimiser,
    random_traces,
    trace,
    whole_sequences,
)

HEADS = {"linear": ("linear", 0), "action": ("action", 0), "low-rank action": ("action", 3), "logprob": ("logprob", 0)}
LOSSES = {
    "bce": {},
    "wgan gradient penalty": {"loss": "wgan", "lipschitz": "gradient_penalty", "penalty_coef": 2.0},
    "wgan spectral norm": {"loss": "wgan", "lipschitz": "spectral_norm"},
    "pairwise": {"loss": "pairwise", "margin": 0.7},
}
CASES = [(head, loss) for head in HEADS for loss in LOSSES if (head, loss) != ("low-rank action", "wgan spectral norm")]


def discriminator(head="linear", *, budget=EVERYTHING, reward=None, dtype=torch.float32, **config) -> Discriminator:
    kind, rank = HEADS[head]
    backbone = language_model("llama", seed=7).model.base_model.to(dtype)
    torch.manual_seed(1)
    made = make_head(kind, backbone, rank)
    with torch.no_grad():  # what starts at zero would hide a missing term
        made.bias.normal_()
        if kind == "logprob":
            made.alpha.fill_(0.3)
    settings = DiscriminatorConfig(head=kind, action_rank=rank, optim=OptimConfig(tokens_per_micro_batch=budget))
    settings = settings.model_copy(update=config)
    return Discriminator(backbone, made, settings, reward or RewardConfig(), language_model(seed=3))


def boundaries(t: Trace) -> Boundaries:
    return Boundaries(steps=tuple(range(2, len(t.tokens), 4)), blocks=(len(t.tokens) // 2,))


def batch_of(seed=0, groups=3) -> TraceBatch:
    return pack(random_traces(seed, groups), CPU, boundaries)


# ---- the same, one sequence at a time ----


def sequence_logits(model: Discriminator, batch: TraceBatch) -> list[torch.Tensor]:
    """z of every completion, from the formulas of the design; parameters of `model` in float64."""
    found = []
    head = model.head
    reference = copy.deepcopy(model.reference[0].model).double()
    for tokens, count in zip(whole_sequences(batch), batch.loss_lengths, strict=True):
        states = model.backbone(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        rows = []
        for t in range(len(tokens) - count, len(tokens)):  # the completion's tokens
            token = tokens[t]
            if model.config.head == "action" and model.config.action_rank:
                matrix = head.down @ head.up.T
                rows.append(states[t - 1] @ matrix @ model.backbone.embed_tokens.weight[token] + head.bias[token])
            elif model.config.head == "action":
                rows.append(states[t - 1] @ head.weight[token] + head.bias[token])
            else:
                rows.append(states[t] @ head.weight + head.bias[0])
                if model.config.head == "logprob":
                    logp = reference(input_ids=tokens[None]).logits[0, t - 1].log_softmax(-1)[token]
                    rows[-1] = rows[-1] + head.alpha[0] * logp.detach()
        found.append(torch.stack(rows))
    return found


def carriers(model: Discriminator, batch: TraceBatch) -> list[torch.Tensor]:
    """Which completion tokens count under the model's granularity."""
    kind = model.reward.granularity
    steps, blocks = batch.step_ends.split(batch.loss_lengths), batch.block_ends.split(batch.loss_lengths)
    found = []
    for step, block in zip(steps, blocks, strict=True):
        last = torch.arange(len(step)) == len(step) - 1
        every = {"dense": last | True, "interval": step, "sparse": last, "multiscale": step | block}
        found.append(every[kind])
    return found


def expected_loss(model: Discriminator, batch: TraceBatch) -> torch.Tensor:
    config, kinds = model.config, batch.kind.tolist()
    z = [zs[keep] for zs, keep in zip(sequence_logits(model, batch), carriers(model, batch), strict=True)]
    positive = [k == Kind.EXPERT for k in kinds]
    if config.positives == "expert_and_correct":
        right = batch.correct.tolist()
        positive = [p or (k == Kind.POLICY and c) for p, k, c in zip(positive, kinds, right, strict=True)]
    share = [config.neg_weight if k == Kind.PERTURBED else 1.0 for k in kinds]
    rest = sum(s for s, p in zip(share, positive, strict=True) if not p)
    total = 0.0
    if config.loss == "pairwise":
        pairs = [(p, s) for s, p in enumerate(batch.pair.tolist()) if p >= 0]
        return sum(softplus(config.margin - (z[p].mean() - z[s].mean())) for p, s in pairs) / len(pairs)
    for s, zs in enumerate(z):
        weight = 0.5 / sum(positive) if positive[s] else 0.5 * share[s] / rest
        if config.loss == "bce":
            y = (1 - config.label_smoothing / 2) if positive[s] else config.label_smoothing / 2
            total = total + weight * -(y * logsigmoid(zs) + (1 - y) * logsigmoid(-zs)).mean()
        else:
            total = total + weight * (-zs.mean() if positive[s] else zs.mean())
    if config.lipschitz == "gradient_penalty":
        total = total + config.penalty_coef * penalty(model, batch)
    return total


def penalty(model: Discriminator, batch: TraceBatch) -> torch.Tensor:
    """(|dz/dh| - 1)², the gradient taken by autograd, over all completion tokens."""
    head, squares = model.head, []
    for tokens, count in zip(whole_sequences(batch), batch.loss_lengths, strict=True):
        for token in tokens[-count:]:
            if model.config.head != "action":
                slope = head.weight
            elif model.config.action_rank:
                slope = head.down @ head.up.T @ model.backbone.embed_tokens.weight[token]
            else:
                slope = head.weight[token]
            squares.append((slope.norm() - 1) ** 2)
    return torch.stack(squares).mean()


def check_against_formula(model: Discriminator, batch: TraceBatch, atol: float = 1e-5) -> None:
    stats = []
    found = gradients_of(model, lambda optimiser: stats.append(model.update(batch, optimiser)))
    exact = copy.deepcopy(model).double()
    loss = expected_loss(exact, batch)
    loss.backward()
    assert stats[0].loss.item() == pytest.approx(loss.item(), abs=atol)
    wanted = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in exact.named_parameters()}
    assert_close(found, wanted, atol)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in wanted.values()))
    assert stats[0].grad_norm.item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(("head", "loss"), CASES)
def test_loss_and_every_gradient(head, loss):
    model = discriminator(head, **LOSSES[loss])
    batch = batch_of()
    check_against_formula(model, batch)
    found = gradients_of(model, lambda optimiser: model.update(batch, optimiser))
    silent = {name for name, gradient in found.items() if not gradient.any()}
    # Nothing is left out: what shifts both sides of a difference equally has no gradient, and that alone.
    shared_bias = {"head.bias"} if head in ("linear", "logprob") and loss != "bce" else set()
    assert silent - shared_bias == set()


@pytest.mark.parametrize("granularity", ["interval", "sparse", "multiscale"])
@pytest.mark.parametrize("loss", ["bce", "pairwise"])
def test_only_tokens_that_will_carry_a_reward_are_trained_on(granularity, loss):
    reward = RewardConfig(granularity=granularity)
    check_against_formula(discriminator("action", reward=reward, **LOSSES[loss]), batch_of())


@pytest.mark.parametrize(
    "config",
    [
        {"neg_weight": 0.25},
        {"neg_weight": 3.0, "positives": "expert_and_correct"},
        {"label_smoothing": 0.0},
        {"label_smoothing": 0.4, "positives": "expert_and_correct"},
    ],
)
def test_weights_and_targets(config):
    check_against_formula(discriminator("action", **config), batch_of(2))


@pytest.mark.parametrize(("head", "loss"), CASES)
def test_micro_batches_change_nothing(head, loss):
    batch = batch_of(4, groups=5)
    assert batch.segments.num_rows > 256
    whole = None
    for budget in (EVERYTHING, 1024, 256, 64):
        model, stats = discriminator(head, budget=budget, **LOSSES[loss]), []
        found = gradients_of(model, lambda o, m=model, s=stats: s.append(m.update(batch, o)))
        scores = model.score(batch)
        whole = whole or (found, stats[0], scores)
        assert_close(found, whole[0])
        for name in ("loss", "accuracy", "perturbed_accuracy", "reward_gap"):
            assert getattr(stats[0], name).item() == pytest.approx(getattr(whole[1], name).item(), abs=1e-5)
        torch.testing.assert_close(scores, whole[2], atol=1e-5, rtol=1e-5)


def test_weights_by_hand():
    batch = pack(
        [
            trace((1, 2), Kind.EXPERT, correct=True),
            trace((3, 4, 5), correct=True),
            trace((6,), correct=False),
            trace((7, 8), Kind.PERTURBED, pair=0),
        ],
        CPU,
        lambda t: Boundaries(steps=(0,)) if len(t.tokens) == 3 else Boundaries(),
    )

    def weights(reward=None, **config):
        return discriminator(reward=reward, **config).loss_weights(batch).tolist()

    # Half to the expert's two tokens; the other half to three sequences alike.
    sixth = 0.5 / 3
    assert weights() == pytest.approx([0.25] * 2 + [sixth / 3] * 3 + [sixth] + [sixth / 2] * 2)
    # The perturbed one counts half as much as a sample: shares 0.2, 0.2, 0.1.
    assert weights(neg_weight=0.5) == pytest.approx([0.25] * 2 + [0.2 / 3] * 3 + [0.2] + [0.05] * 2)
    assert weights(neg_weight=0.0) == pytest.approx([0.25] * 2 + [0.25 / 3] * 3 + [0.25] + [0.0] * 2)
    # The correct sample joins the expert.
    both = weights(positives="expert_and_correct")
    assert both == pytest.approx([0.125] * 2 + [0.25 / 3] * 3 + [0.25] + [0.125] * 2)
    sparse = weights(reward=RewardConfig(granularity="sparse"))
    assert sparse == pytest.approx([0, 0.5, 0, 0, sixth, sixth, 0, sixth])
    interval = weights(reward=RewardConfig(granularity="interval"))
    assert interval == pytest.approx([0, 0.5, sixth / 2, 0, sixth / 2, sixth, 0, sixth])
    assert discriminator().positives(batch).tolist() == [True, False, False, False]
    correct = discriminator(positives="expert_and_correct").positives(batch).tolist()
    assert correct == [True, True, False, False]


def test_smoothed_targets_are_95_and_5_percent():
    """With ε = 0.1 the loss is least where D says 0.95 of experts and 0.05 of the rest: z = ±log 19."""
    batch = pack([trace((1,), Kind.EXPERT, prompt=(5,)), trace((2,), prompt=(5,))], CPU)
    model = discriminator("action")
    for target, slope in ((math.log(19), 0.0), (math.log(19) + 0.5, 1.0), (math.log(19) - 0.5, -1.0)):
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias[1], model.head.bias[2] = target, -target
        found = gradients_of(model, lambda optimiser: model.update(batch, optimiser))["head.bias"]
        assert found[1].item() == pytest.approx(0.5 * (torch.tensor(target).sigmoid().item() - 0.95), abs=1e-6)
        assert found[2].item() == pytest.approx(-found[1].item(), abs=1e-6)
        assert abs(found[1]) < 1e-6 if slope == 0 else found[1] * slope > 0


def separable(count=6) -> TraceBatch:
    """Experts write low tokens, samples high ones, and a perturbed copy differs from its expert in one token."""
    rng = torch.Generator().manual_seed(0)

    def ids(low, high, n):
        return tuple(torch.randint(low, high, (n,), generator=rng).tolist())

    experts = [trace(ids(1, 10, 6), Kind.EXPERT, group=g, correct=True) for g in range(count)]
    samples = [trace(ids(10, 20, 6), group=g) for g in range(count)]
    broken = [replace(e, kind=Kind.PERTURBED, tokens=(*e.tokens[:5], 25), pair=g) for g, e in enumerate(experts)]
    return pack(experts + samples + broken, CPU, lambda t: Boundaries(steps=(1, 3)))


@pytest.mark.parametrize(("head", "loss"), CASES)
def test_every_loss_falls_on_what_can_be_told_apart(head, loss):
    model, batch = discriminator(head, **LOSSES[loss]), separable()
    optimiser = plain_optimiser(model.parameters(), 1e-2)
    stats = [model.update(batch, optimiser) for _ in range(30)]
    first, last = stats[0], stats[-1]
    assert last.loss < first.loss - 0.2
    scores = model.logits(batch).view(3, 6, 6).mean(2)  # of experts, samples and perturbed copies
    if loss == "pairwise":
        assert (scores[0] > scores[2] + 0.7).all()  # the margin; samples have no part in it
    else:
        assert last.reward_gap > first.reward_gap and (scores[0] > scores[1]).all()
    if loss == "bce":
        assert last.accuracy > 0.75 > first.accuracy


@pytest.mark.parametrize("granularity", ["interval", "sparse", "multiscale"])
def test_bce_falls_where_only_some_tokens_count(granularity):
    model, batch = discriminator("action", reward=RewardConfig(granularity=granularity)), separable()
    optimiser = plain_optimiser(model.parameters(), 1e-2)
    stats = [model.update(batch, optimiser) for _ in range(30)]
    assert stats[-1].loss < stats[0].loss - 0.2
    assert stats[-1].reward_gap > 3
    # A perturbed copy is its expert's equal but for the last token: only there can all be right.
    assert (stats[-1].accuracy == 1) == (granularity == "sparse")


def test_what_the_log_shows_by_hand():
    batch = pack(
        [
            trace((1, 1), Kind.EXPERT, prompt=(5,)),
            trace((2, 3, 3), prompt=(5,), correct=True),
            trace((1,), prompt=(5,)),
            trace((2, 2), Kind.PERTURBED, prompt=(5,), pair=0),
        ],
        CPU,
    )

    def shown(**config):
        model = discriminator("action", **config)
        with torch.no_grad():  # logits by token: 1 -> 2, 2 -> -1, 3 -> 4
            model.head.weight.zero_()
            model.head.bias[1:4] = torch.tensor([2.0, -1.0, 4.0])
        return model.update(batch, plain_optimiser(model.parameters(), 0.0))

    plain = shown()
    assert plain.reward_gap.item() == pytest.approx(2 - (-1 + 4 + 4 + 2) / 4)
    assert plain.perturbed_accuracy.item() == 1
    assert plain.accuracy.item() == pytest.approx((1 + 3 / 6) / 2)  # of six other tokens three are below zero
    # Samples that are right count as positives in the loss, so also in its accuracy: 4 of 5, and 2 of 3.
    assert shown(positives="expert_and_correct").accuracy.item() == pytest.approx((4 / 5 + 2 / 3) / 2)
    without = shown(neg_weight=0.0)
    assert without.perturbed_accuracy.isnan() and without.accuracy.item() == pytest.approx((1 + 1 / 4) / 2)


@pytest.mark.parametrize("head", HEADS)
def test_scores_are_the_formulas_and_change_with_the_update(head):
    batch = batch_of(1)
    model = discriminator(head, reward=RewardConfig(kind="logit", temperature=2.0, clip=0.4))
    exact = copy.deepcopy(model).double()
    z = torch.cat(sequence_logits(exact, batch)).detach()
    torch.testing.assert_close(model.logits(batch).double(), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.score(batch).double(), (z / 2).clamp(-0.4, 0.4), atol=1e-5, rtol=1e-5)
    for kind, expected in (("gail", softplus(z)), ("logd", logsigmoid(z))):
        model.reward = RewardConfig(kind=kind)
        torch.testing.assert_close(model.score(batch).double(), expected, atol=1e-5, rtol=1e-5)
    before = model.score(batch)
    assert torch.equal(before, model.score(batch))
    model.update(batch, plain_optimiser(model.parameters(), 1e-2))
    assert not torch.equal(before, model.score(batch))


def test_a_spectral_norm_bounds_every_row_and_scoring_leaves_it_alone():
    model, batch = discriminator("action", **LOSSES["wgan spectral norm"]), batch_of()
    assert torch.equal(model.score(batch), model.score(batch))
    optimiser = plain_optimiser(model.parameters(), 0.1)
    for _ in range(20):
        model.update(batch, optimiser)
    assert torch.linalg.matrix_norm(model.head.parametrizations.weight.original, 2) > 1.5
    assert torch.linalg.matrix_norm(model.head.weight, 2) < 1.1  # the estimate lags one update behind
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(model.score(batch), model.score(batch))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match=r"discriminator\.lipschitz=spectral_norm .* discriminator\.action_rank=0"):
        discriminator("low-rank action", **LOSSES["wgan spectral norm"])


def test_a_gradient_penalty_pulls_every_slope_to_one():
    for head in ("linear", "action", "low-rank action"):
        model, batch = discriminator(head, loss="wgan", lipschitz="gradient_penalty", penalty_coef=100.0), batch_of()
        optimiser = plain_optimiser(model.parameters(), 0.02)
        with torch.no_grad():
            for name, weight in model.head.named_parameters():
                weight.mul_(1.0 if name == "bias" else 2.0)
        assert penalty(model, batch) > 0.5
        for _ in range(40):
            model.update(batch, optimiser)
        assert penalty(model, batch) < 0.03


@pytest.mark.parametrize("head", HEADS)
def test_over_a_bfloat16_backbone(head):
    batch = batch_of()
    model, exact = discriminator(head, dtype=torch.bfloat16), discriminator(head)
    torch.testing.assert_close(model.logits(batch), exact.logits(batch), atol=0.3, rtol=0.1)
    stats = model.update(batch, plain_optimiser(model.parameters(), 1e-3))
    assert stats.loss.item() == pytest.approx(
        exact.update(batch, plain_optimiser(exact.parameters(), 1e-3)).loss.item(), rel=0.05
    )


def test_batches_that_lack_a_kind():
    experts = pack(random_traces(0)[:1], CPU)
    model = discriminator("action")
    stats = model.update(experts, plain_optimiser(model.parameters(), 1e-3))
    assert stats.loss.isfinite() and stats.grad_norm.isfinite() and stats.reward_gap.isnan()
    lonely = discriminator("action", **LOSSES["pairwise"])  # nothing perturbed: nothing to compare
    stats = lonely.update(experts, plain_optimiser(lonely.parameters(), 1e-3))
    assert stats.loss.item() == 0 and stats.grad_norm.item() == 0
