"""Sizes and numbers at the edge: infinities, masks, single and empty segments, offsets beyond 32 bits."""

import math

import pytest
import torch
from airl_kernels import (
    discounted_returns,
    discriminator_loss,
    gae,
    group_advantages,
    linear_logprob,
    linear_ppo_loss,
    ppo_loss,
    selective_log_softmax,
    token_rewards,
)
from airl_kernels.testing import expected_returns, make_vocabulary_head, normal, offsets

from tests.gpu.device import DEVICE, DTYPES, INTERPRETED, ON_GPU, gpu_only, needs_device, pick

pytestmark = needs_device
inf, nan = math.inf, math.nan


def on_device(values: list, **options) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE, **options)


# ---- infinities and large numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [5, 9001])
def test_minus_infinity_is_a_token_that_cannot_occur(vocab):
    logits = torch.full((1, vocab), -inf, device=DEVICE)
    logits[0, vocab - 3 :] = on_device([1.0, 2.0, 0.5])
    expected = torch.log_softmax(on_device([1.0, 2.0, 0.5]).double(), 0)
    logits.requires_grad_()
    found = selective_log_softmax(logits, on_device([vocab - 2]))
    assert found.item() == pytest.approx(expected[1].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert not gradient[0, : vocab - 3].any()
    assert gradient[0, vocab - 2].item() == pytest.approx(1 - math.exp(expected[1]), rel=1e-5)
    bias = logits.detach()[0]
    hidden, weight = torch.zeros(1, 4, device=DEVICE), torch.zeros(vocab, 4, device=DEVICE)
    logprob, entropy = linear_logprob(hidden, weight, on_device([vocab - 2]), bias=bias, entropy=True)
    assert logprob.item() == pytest.approx(expected[1].item(), rel=1e-5)
    assert entropy.item() == pytest.approx(-(expected.exp() * expected).sum().item(), rel=1e-5)


@pytest.mark.parametrize("bad", [inf, nan])
def test_infinity_and_nan_stay_in_their_row(bad):
    head = make_vocabulary_head(4, 8, 31, device=DEVICE, frozen=True)
    with torch.no_grad():
        head.hidden[2] = bad
    logprob = linear_logprob(head.hidden, head.weight, head.targets)
    assert logprob.isfinite().tolist() == [True, True, False, True]
    (gradient,) = torch.autograd.grad(logprob, head.hidden, on_device([1.0, 1.0, 0.0, 1.0]))
    assert gradient.isfinite().all()
    assert not gradient[2].any()


@pytest.mark.parametrize("level", [1e4, 1e30])
def test_large_logits_lose_nothing(level):
    steps = on_device([[0.0, -1.0, 2.0, 0.5]], dtype=torch.float64) * max(1.0, level * 2.0**-20)
    logits = (level + steps).float()
    found = selective_log_softmax(logits, on_device([0]))
    assert found.item() == pytest.approx(torch.log_softmax(logits.double(), -1)[0, 0].item(), rel=1e-5)


@pytest.mark.parametrize("size", [50.0, 1e4, 2.0**100, inf])
def test_the_discriminator_is_sure(size):
    offset = on_device([size, -size, size, -size]).requires_grad_()
    hidden, weight = torch.ones(4, 3, device=DEVICE), torch.zeros(3, device=DEVICE)
    targets, weights = on_device([1.0, 0.0, 0.0, 1.0]), torch.full((4,), 0.25, device=DEVICE)
    wrong, logits = discriminator_loss(hidden, weight, None, targets, weights, offset=offset)
    assert wrong.item() == pytest.approx(size / 2)
    assert torch.equal(logits, offset)
    assert torch.autograd.grad(wrong, offset)[0].tolist() == pytest.approx([0.0, 0.0, 0.25, -0.25], abs=1e-20)
    assert token_rewards(hidden, weight, offset=offset, clip=2.0).tolist() == [2.0, -2.0, 2.0, -2.0]
    assert token_rewards(hidden, weight, offset=offset, kind="logd").tolist() == pytest.approx(
        [0.0, -size, 0.0, -size], abs=1e-20
    )


def test_rows_of_weight_zero_are_not_read():
    hidden = torch.randn(50, 33, device=DEVICE)
    hidden[7] = nan
    hidden.requires_grad_()
    weight, ones = torch.randn(33, device=DEVICE).requires_grad_(), torch.ones(50, device=DEVICE)
    weights = ones / 49
    weights[7] = 0.0
    loss, logits = discriminator_loss(hidden, weight, None, ones, weights)
    assert loss.isfinite()
    assert logits[7] == 0
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    assert not d_hidden[7].any()
    assert d_weight.isfinite().all()


def test_infinities_stay_in_their_sequence():
    rewards = on_device([1.0, inf, 2.0, 3.0, nan, 4.0, 5.0])
    ours = discounted_returns(rewards, 0.5, offsets([3, 1, 2, 1], DEVICE)).tolist()
    assert ours[:4] == [inf, inf, 2.0, 3.0]
    assert math.isnan(ours[4])
    assert ours[5:] == [4.0, 5.0]


def test_an_infinite_ratio_is_clipped_without_nan():
    old, logprobs = torch.full((3,), -500.0, device=DEVICE), torch.zeros(3, device=DEVICE).requires_grad_()
    loss, stats = ppo_loss(logprobs, old, on_device([1.0, 0.0, -1.0]), dual_clip=3.0)
    torch.testing.assert_close(stats.token_surrogate.cpu(), torch.tensor([-1.2, 0.0, 3.0]))
    assert not torch.autograd.grad(loss, logprobs)[0].any()


@gpu_only
def test_a_target_outside_the_vocabulary_gives_nan():
    head = make_vocabulary_head(3, 4, 11, device=DEVICE)
    found = linear_logprob(head.hidden, head.weight, on_device([3, -1, 11]))
    assert found.isnan().tolist() == [False, True, True]


# ---- masks, groups, segments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
def test_all_rows_masked(compact):
    head = make_vocabulary_head(6, 8, 50, device=DEVICE)
    bad, none = torch.full((6,), nan, device=DEVICE), torch.zeros(6, dtype=torch.bool, device=DEVICE)
    unknown = torch.full((6,), -100, device=DEVICE)
    loss, stats = linear_ppo_loss(head.hidden, head.weight, unknown, bad, bad, none, compact=compact)
    assert loss.item() == 0
    assert stats.num_tokens.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, head.leaves()))
    assert not discounted_returns(bad.view(2, 3), 0.9, mask=none.view(2, 3)).any()
    advantages, returns = gae(bad, bad, 0.9, 0.9, offsets([4, 2], DEVICE), mask=none)
    assert not advantages.any()
    assert not returns.any()


def test_groups_without_variance_and_groups_of_one():
    rewards = torch.full((10,), 0.1, device=DEVICE)
    rewards[9] = 4.0  # alone in its group
    group = on_device([0, 0, 0, 1])
    for baseline in ("last_token", "all_tokens"):
        found = group_advantages(rewards, offsets([3, 3, 3, 1], DEVICE), group, 0.9, baseline=baseline)
        assert not found.any()


def test_nothing_at_all():
    empty, none = torch.zeros(0, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    hidden, weight = torch.zeros(0, 8, device=DEVICE).requires_grad_(), torch.randn(50, 8, device=DEVICE)
    weight.requires_grad_()
    losses = (
        linear_logprob(hidden, weight, none).sum(),
        linear_ppo_loss(hidden, weight, none, empty, empty)[0],
        discriminator_loss(hidden, weight[0], None, empty, empty)[0],
        token_rewards(hidden, weight[0]).sum(),
    )
    for loss in losses:
        assert loss.item() == 0
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
        assert d_hidden.shape == (0, 8)
        assert not d_weight.any()
    assert discounted_returns(empty, 0.9, offsets([0, 0], DEVICE)).shape == (0,)
    assert group_advantages(empty, offsets([0], DEVICE), on_device([3]), 0.9).shape == (0,)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [0, 1, 0, 2, 0], [pick(1 << 20, 5000)]], ids=str)
def test_segments_of_any_length(lengths):
    rewards = normal(sum(lengths), 0, DEVICE)
    exact = expected_returns(rewards, lengths, 0.9)
    found = discounted_returns(rewards, 0.9, offsets(lengths, DEVICE)).cpu()
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6
    single = gae(rewards, rewards, 0.9, 0.0, offsets(lengths, DEVICE))[1].cpu()
    following = torch.cat((rewards[1:], rewards[:1])).cpu()
    ends = offsets(lengths)[1:][offsets(lengths).diff() > 0].long() - 1
    following[ends] = 0.0
    torch.testing.assert_close(single, rewards.cpu() + 0.9 * following, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", [17, 50257, 128256, 151936])
def test_every_vocabulary_is_a_distribution(vocab):
    head = make_vocabulary_head(3, 16, vocab, dtype=DTYPES[-1], device=DEVICE)
    logits = (head.hidden.detach().float() @ head.weight.detach().float().T).to(DTYPES[-1])
    with torch.no_grad():
        at = on_device([0, vocab // 2, vocab - 1])
        found = selective_log_softmax(logits, at)
        expected = torch.log_softmax(logits.double(), -1).gather(1, at[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strided", ["columns", "rows"])
def test_strided_inputs(strided):
    base = make_vocabulary_head(10, 12, 40, device=DEVICE)
    hidden = base.hidden.detach()[:, ::2] if strided == "columns" else base.hidden.detach().T.contiguous().T[:, :6]
    weight = base.weight.detach()[:, 1::2]
    assert not hidden.is_contiguous()
    found = linear_logprob(hidden, weight, base.targets)
    assert torch.allclose(found, linear_logprob(hidden.contiguous(), weight.contiguous(), base.targets), atol=1e-5)
    head = torch.randn(6, device=DEVICE)
    assert torch.allclose(token_rewards(hidden, head), token_rewards(hidden.contiguous(), head), atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="float64 runs the formula")
def test_float64_runs_the_formula():
    head = make_vocabulary_head(3, 4, 7, dtype=torch.float64, device=DEVICE)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, head.targets), head.leaves())


# ---- offsets beyond 32 bits ------------------------------------------------------------------------------------


def _room(gigabytes: float) -> bool:
    return ON_GPU and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gigabytes * 2**30


@pytest.mark.skipif(not _room(16), reason="needs 16 GiB of free GPU memory")
def test_logits_beyond_two_to_the_31_elements():
    rows, vocab = 14200, 151936
    assert rows * vocab > 2**31
    logits = torch.zeros((rows, vocab), dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 77] = 3.0
    targets = torch.full((rows,), 77, device=DEVICE)
    logits.requires_grad_()
    found = selective_log_softmax(logits * 1, targets, inplace_backward=True)
    assert found[0].item() == pytest.approx(-math.log(vocab), rel=1e-5)
    top = 3.0 - math.log(vocab - 1 + math.exp(3.0))
    assert found[-1].item() == pytest.approx(top, rel=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient[-1, 77].item() == pytest.approx(1 - math.exp(top), rel=1e-2)
    assert gradient[-1, -1].item() == pytest.approx(-math.exp(-math.log(vocab - 1 + math.exp(3.0))), rel=1e-2)


@pytest.mark.skipif(not _room(16), reason="needs 16 GiB of free GPU memory")
def test_hidden_states_beyond_two_to_the_31_elements():
    rows, width = 530_000, 4096
    assert rows * width > 2**31
    hidden = torch.zeros((rows, width), dtype=torch.bfloat16, device=DEVICE)
    hidden[-1] = 1.0
    hidden.requires_grad_()
    weight = torch.full((width,), 2.0**-12, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    ones = torch.ones(rows, device=DEVICE)
    loss, logits = discriminator_loss(hidden, weight, None, ones, ones)
    assert logits[-1].item() == 1.0
    assert logits[-2].item() == 0.0
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    slope = -1 / (1 + math.exp(1.0))
    assert d_hidden[-1, -1].item() == pytest.approx(slope * 2.0**-12, rel=1e-2)
    assert d_hidden[-2, 0].item() == pytest.approx(-0.5 * 2.0**-12, rel=1e-2)
    assert d_weight[5].item() == pytest.approx(slope, rel=1e-2)
    assert token_rewards(hidden, weight)[-1].item() == 1.0
