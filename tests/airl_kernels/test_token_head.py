"""token_rewards and discriminator_loss: values and gradients against float64, edges, properties, errors."""

from dataclasses import replace

import pytest
import torch
from airl_kernels import discriminator_loss, token_head, token_rewards
from airl_kernels.testing import (
    INTERPRETED,
    assert_all_as_careful,
    errors,
    expected_loss,
    expected_rewards,
    in_the_worst_order,
    token_logits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad

from tests.airl_kernels.cases import EXAMPLES, SEEDS
from tests.airl_kernels.head import KINDS, LOSSES, ROWS, devices, dtypes, loss_of, make_head, not_a_kernel, shapes

# ---- against float64 -------------------------------------------------------------------------------------------


@devices
@dtypes
@shapes
@pytest.mark.parametrize("kind", KINDS)
def test_rewards_and_their_gradients(kind, shape, dtype, device):
    runs = []
    for seed in SEEDS:
        head = make_head(dtype=dtype, device=device, seed=seed, **shape)
        exact = head.cast(torch.float64)
        incoming = torch.randn(head.hidden.shape[0], generator=torch.Generator().manual_seed(seed)).to(device)
        ours = token_rewards(*head.args, **head.extra, kind=kind, temperature=0.7, clip=3.0)
        assert ours.dtype == torch.float32

        def plain(version, incoming=incoming):
            rewards = expected_rewards(version, kind, 0.7, 3.0)
            return rewards, *grad(rewards, version.leaves, incoming.to(rewards.dtype))

        found = ours, *grad(ours, head.leaves, incoming)
        runs.append([found, in_the_worst_order(lambda head=head: plain(head)), plain(exact)])
        assert [t.dtype for t in found[1:]] == [dtype] * len(head.leaves)
    assert_all_as_careful(runs, terms=0.3 * head.hidden.shape[0])  # mean |incoming · slope|


@devices
@dtypes
@shapes
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "scale", [0.3] if INTERPRETED else [1.0, 0.3]
)  # 1 takes the gradients as the forward pass left them
def test_loss_and_its_gradients(scale, loss, shape, dtype, device):
    runs = []
    for seed in SEEDS:
        head = make_head(dtype=dtype, device=device, seed=seed, **shape)
        exact, live = head.cast(torch.float64), head.weights != 0
        value, z = loss_of(head, loss, label_smoothing=0.1, margin=0.5)
        assert not z.requires_grad
        assert not z[~live].any()

        def plain(version, live=live):
            value = expected_loss(version, loss, 0.1, 0.5)
            return value, token_logits(version)[live], *grad(value * scale, version.leaves)

        found = value, z[live], *grad(value * scale, head.leaves)
        runs.append([found, in_the_worst_order(lambda head=head: plain(head)), plain(exact)])
    assert_all_as_careful(runs)


def plain_bce(head):
    value = expected_loss(head, "bce", 0.0, 1.0)
    return value, *grad(value, head.leaves)


@devices
def test_rows_of_the_weight_that_many_tokens_share(device):
    """Runs of one row over several chunks of the scatter kernel: begun, passed through and ended."""
    head = make_head(rows=150, width=20, vocabulary=6, bias=6, device=device)
    index = torch.tensor([4] * 5 + [2] * 100 + [5] * 31 + [0] * 13 + [3], device=device)
    head = replace(head, index=index[torch.randperm(150, generator=torch.Generator().manual_seed(2)).to(device)])
    gradients = grad(loss_of(head)[0], head.leaves)
    careful = in_the_worst_order(lambda: plain_bce(head)[1:])
    assert_all_as_careful([[gradients, careful, plain_bce(head.cast(torch.float64))[1:]]])
    assert not gradients[1][1].any()  # no token uses row 1


@devices
def test_a_whole_batch_in_every_program(device):
    """More tiles than programs, so that every program walks over several and keeps its part of d weight."""
    runs = []
    for seed in SEEDS:
        head = make_head(rows=20000 if device == "cuda" else 700, width=64, device=device, seed=seed)
        value = loss_of(head)[0]
        found, careful = (value, *grad(value, head.leaves)), in_the_worst_order(lambda head=head: plain_bce(head))
        runs.append([found, careful, plain_bce(head.cast(torch.float64))])
    assert_all_as_careful(runs)


# ---- edges -----------------------------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("vocabulary", [None, 5])
def test_rows_of_weight_zero_are_not_read(vocabulary, loss, device):
    clean = make_head(vocabulary=vocabulary, device=device)
    dead = clean.weights == 0
    poisoned = replace(clean, hidden=clean.hidden.detach().masked_fill(dead[:, None], torch.nan).requires_grad_())
    gradients = []
    for head in (clean, poisoned):
        value, z = loss_of(head, loss)
        gradients.append((value, z, *grad(value, head.leaves)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert bool((gradients[0][2][dead] == 0).all())


@devices
@pytest.mark.parametrize("vocabulary", [None, 5])
def test_a_row_without_slope_adds_nothing_whatever_it_holds(vocabulary, device):
    """A clipped reward has no slope; its row's infinity must not become NaN as 0 · inf."""
    head = make_head(vocabulary=vocabulary, device=device)
    overflowing = head.hidden.detach().clone()
    overflowing[3] = torch.where(overflowing[3] > 0, torch.inf, 0.0)
    head = replace(head, hidden=overflowing.requires_grad_(), weight=head.weight.detach().abs().requires_grad_())
    rewards = token_rewards(*head.args, **head.extra, clip=4.0)
    assert rewards[3] == 4.0
    d_hidden, d_weight, d_bias = grad(rewards.sum(), head.leaves)
    assert not d_hidden[3].any()
    live = rewards.detach().abs() < 4.0
    assert d_bias.item() == pytest.approx(float(live.sum()))
    kept = replace(head, hidden=overflowing.detach().masked_fill(~live[:, None], 0.0))
    expected = grad(token_rewards(*kept.args, **kept.extra)[live].sum(), kept.weight)[0]
    assert torch.allclose(d_weight, expected, rtol=1e-5, atol=1e-6)


@devices
@pytest.mark.parametrize("loss", LOSSES)
def test_all_rows_masked(loss, device):
    head = make_head(device=device)
    head = replace(head, weights=torch.zeros_like(head.weights))
    value, z = loss_of(head, loss)
    assert value.item() == 0
    assert not z.any()
    assert not any(g.any() for g in grad(value, head.leaves))


@devices
@pytest.mark.parametrize("vocabulary", [None, 5])
def test_no_rows(vocabulary, device):
    head = make_head(rows=0, vocabulary=vocabulary, device=device)
    head = replace(head, cu_seqlens=head.cu_seqlens.new_zeros(8))
    rewards = token_rewards(*head.args, **head.extra)
    assert rewards.shape == (0,)
    for loss in LOSSES:
        value, z = loss_of(head, loss)
        assert value.item() == 0
        assert z.shape == (0,)
        assert [tuple(g.shape) for g in grad(value, head.leaves)] == [tuple(t.shape) for t in head.leaves]


@devices
@pytest.mark.parametrize("size", [50.0, 1e4, 2.0**100, torch.inf])
def test_very_large_and_infinite_logits(size, device):
    offset = torch.tensor([size, -size, size, -size], device=device, requires_grad=True)
    hidden, weight = torch.ones(4, 3, device=device), torch.zeros(3, device=device)
    targets, weights = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device), torch.full((4,), 0.25, device=device)
    sure, _ = discriminator_loss(hidden[:2], weight, None, targets[:2], weights[:2], offset=offset[:2])
    assert sure.item() == pytest.approx(0.0, abs=1e-20)  # right and certain costs nothing
    wrong, z = discriminator_loss(hidden, weight, None, targets, weights, offset=offset)
    assert wrong.item() == pytest.approx(size / 2)
    assert torch.equal(z, offset)
    assert grad(wrong, offset)[0].tolist() == pytest.approx([0.0, 0.0, 0.25, -0.25], abs=1e-20)
    smoothed, _ = discriminator_loss(hidden, weight, None, targets, weights, offset=offset, label_smoothing=0.1)
    assert grad(smoothed, offset)[0].tolist() == pytest.approx([0.0125, -0.0125, 0.2375, -0.2375])
    rewards = {kind: token_rewards(hidden, weight, offset=offset, kind=kind).tolist() for kind in KINDS}
    assert rewards["logit"] == [size, -size, size, -size]
    assert rewards["gail"] == pytest.approx([size, 0.0, size, 0.0], abs=1e-20)
    assert rewards["logd"] == pytest.approx([0.0, -size, 0.0, -size], abs=1e-20)
    assert token_rewards(hidden, weight, offset=offset, clip=2.0).tolist() == [2.0, -2.0, 2.0, -2.0]


@devices
def test_small_probabilities_keep_their_digits(device):
    """log D near 0 is -exp(-z): log(1 + exp(-z)) rounded through 1 would give 0 beyond z = 17."""
    z = torch.tensor([5.0, 12.0, 20.0, 40.0], device=device)
    rewards = token_rewards(torch.zeros(4, 2, device=device), torch.zeros(2, device=device), offset=z, kind="logd")
    exact = torch.nn.functional.logsigmoid(z.double())
    assert float(((rewards - exact) / exact).abs().max()) < 1e-6


@devices
def test_non_contiguous_inputs(device):
    head = make_head(device=device)
    straight = loss_of(head)[0]
    wide = torch.zeros(head.hidden.shape[0], 2 * head.hidden.shape[1], device=device)
    wide[:, ::2] = head.hidden.detach()
    padded = torch.zeros(head.hidden.shape[0], head.hidden.shape[1] + 3, device=device)
    padded[:, 3:] = head.hidden.detach()
    for hidden in (wide[:, ::2], padded[:, 3:], head.hidden.detach().t().contiguous().t()):
        other = replace(
            head, hidden=hidden.detach().requires_grad_(), weight=head.weight.detach().repeat(2, 1).t()[:, 0],
            targets=head.targets.repeat(2, 1).t()[:, 0], weights=head.weights.repeat(2, 1).t()[:, 0],
        )  # fmt: skip
        value = loss_of(other)[0]
        assert torch.allclose(value, straight, rtol=1e-6)
        mine, theirs = grad(value, other.hidden)[0], grad(loss_of(head)[0], head.hidden)[0]
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-9)
        assert torch.allclose(token_rewards(*other.args), token_rewards(*head.args), rtol=1e-5, atol=1e-5)


# ---- properties ------------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(0, 70), width=st.integers(1, 90), vocabulary=st.none() | st.integers(1, 9),
    loss=st.sampled_from(LOSSES), smoothing=st.floats(0, 1), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_loss_of_any_shape(rows, width, vocabulary, loss, smoothing, seed):
    head = make_head(rows, width, vocabulary=vocabulary, seed=seed)
    exact = head.cast(torch.float64)
    value, _ = loss_of(head, loss, label_smoothing=smoothing)
    truth = expected_loss(exact, loss, smoothing, 1.0)
    assert value.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-5)
    for mine, theirs in zip(grad(value, head.leaves), grad(truth, exact.leaves, allow_unused=True), strict=True):
        if theirs is not None and theirs.numel():
            assert errors(mine, theirs)[1] < 1e-4


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from(("bce", "wgan")))
def test_loss_does_not_depend_on_the_order_of_rows(seed, loss):
    head = make_head(rows=60, vocabulary=4, seed=seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    shuffled = replace(
        head,
        hidden=head.hidden[order],
        index=head.index[order],
        targets=head.targets[order],
        weights=head.weights[order],
    )
    assert torch.allclose(loss_of(head, loss)[0], loss_of(shuffled, loss)[0], rtol=1e-5, atol=1e-7)
    mine, theirs = grad(loss_of(head, loss)[0], head.weight)[0], grad(loss_of(shuffled, loss)[0], head.weight)[0]
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(0, 70), width=st.integers(1, 90), vocabulary=st.none() | st.integers(1, 9),
    kind=st.sampled_from(KINDS), temperature=st.floats(0.1, 10), clip=st.none() | st.floats(0.1, 5),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_rewards_of_any_shape(rows, width, vocabulary, kind, temperature, clip, seed):
    head = make_head(rows, width, vocabulary=vocabulary, seed=seed)
    exact = head.cast(torch.float64)
    ours = token_rewards(*head.args, **head.extra, kind=kind, temperature=temperature, clip=clip)
    truth = expected_rewards(exact, kind, temperature, clip)
    assert errors(ours, truth)[1] < 1e-4
    if clip is not None:
        assert not bool((ours.abs() > clip * (1 + 1e-6)).any())
        # Beside the bound rounding decides whether there is a slope.
        at_the_bound = bool(((truth.abs() - clip).abs() < 1e-4).any())
        if at_the_bound:
            return
    for mine, theirs in zip(grad(ours.sum(), head.leaves), grad(truth.sum(), exact.leaves), strict=True):
        assert errors(mine, theirs)[1] < 1e-3


# ---- errors ----------------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    weight = torch.zeros(40)


def bad_calls() -> dict:
    h, w, b = make_head().args
    y = torch.ones(h.shape[0])
    return {
        "shape [N, H]": (ValueError, lambda: token_rewards(h[None], w, b)),
        "weight must have shape [40]": (ValueError, lambda: token_rewards(h, w[:3], b)),
        "weight must have shape [V, 40]": (ValueError, lambda: token_rewards(h, w, b, index=y.long())),
        "index must be torch.int64": (TypeError, lambda: token_rewards(h, w.expand(3, 40), b, index=y.int())),
        "bias must hold one value": (ValueError, lambda: token_rewards(h, w, y)),
        "must be a torch.Tensor, got Wrapped": (TypeError, lambda: token_rewards(h, Wrapped(), b)),
        "quantised weights": (TypeError, lambda: token_rewards(h, w.to(torch.int8), b)),
        "one of logit, gail, logd; got 'reward'": (ValueError, lambda: token_rewards(h, w, b, kind="reward")),
        "temperature must be above 0": (ValueError, lambda: token_rewards(h, w, b, temperature=0)),
        "clip must be above 0": (ValueError, lambda: token_rewards(h, w, b, clip=-1.0)),
        "one of bce, wgan, pairwise": (ValueError, lambda: discriminator_loss(h, w, b, y, y, loss="hinge")),
        "needs cu_seqlens and pairs": (ValueError, lambda: discriminator_loss(h, w, b, y, y, loss="pairwise")),
        "targets must have a floating dtype": (TypeError, lambda: discriminator_loss(h, w, b, y.long(), y)),
        f"weights must have shape [{ROWS}]": (ValueError, lambda: discriminator_loss(h, w, b, y, y[:2])),
        "label_smoothing must be within": (ValueError, lambda: discriminator_loss(h, w, b, y, y, label_smoothing=2.0)),
        f"offset must have shape [{ROWS}]": (ValueError, lambda: token_rewards(h, w, b, offset=y[:1])),
    }


@not_a_kernel
@pytest.mark.parametrize("message", bad_calls())
def test_bad_input_is_one_sentence(message):
    error, call = bad_calls()[message]
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert message in text
    assert text.endswith(".")
    assert "\n" not in text


@not_a_kernel
def test_an_unlike_weight_subclass_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    weight = TwoTensor(torch.zeros(40), torch.zeros(40))
    with pytest.raises(TypeError, match="weight is a TwoTensor; pass a plain tensor"):
        token_rewards(make_head().hidden, weight)


def test_reference_and_op_agree_on_what_is_empty():
    """What is not needed comes back empty, so that nothing of the size of hidden is written for nobody."""
    head = make_head()
    outputs = token_head._discriminator_loss(
        *(t.detach() for t in head.args),
        head.targets,
        head.weights,
        None,
        None,
        None,
        None,
        "bce",
        0.1,
        1.0,
        False,
        False,
    )
    assert [t.numel() for t in outputs] == [1, ROWS, 0, 0, 0, ROWS]
