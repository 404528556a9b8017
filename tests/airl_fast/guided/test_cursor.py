"""The discriminator token by token is the discriminator of the whole; and what the shift of the logits does."""

import pytest
import torch

from airl_fast.guided.cursor import Cursor
from airl_fast.guided.tokens import reweighed
from airl_fast.models.forward import token_logprobs
from airl_fast.pack import pack
from tests.airl_fast.model_cases import CPU, trace
from tests.airl_fast.test_discriminator import HEADS, discriminator

PROMPTS = [(5, 9, 1, 22, 7), (4,), (8, 8, 30, 2, 1, 1, 6), (31, 12)]
TOKENS = [(3, 7, 1, 30, 2), (9, 9), (11, 4, 0, 6), (2, 25, 13)]


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("prompts", [PROMPTS, [prompt[:1] for prompt in PROMPTS]], ids=["ragged", "even"])
def test_rewards_of_candidates_are_those_of_the_whole_trace(head, prompts):
    model = discriminator(head)
    traces = [trace(t, prompt=p, group=i) for i, (p, t) in enumerate(zip(prompts, TOKENS, strict=True))]
    batch = pack(traces, CPU)
    whole = model.logits(batch).split(batch.loss_lengths)
    reference = token_logprobs(model.reference[0], batch).split(batch.loss_lengths)
    cursor, rows = Cursor(model, prompts), list(range(len(prompts)))
    assert cursor.tries == (head in ("linear", "logprob"))
    for place in range(max(map(len, TOKENS))):
        taken = torch.tensor([TOKENS[row][place] for row in rows])
        candidates = torch.stack([taken, (taken + 1) % 40, taken], 1)
        logprobs = torch.stack([reference[row][place] for row in rows])[:, None].expand(-1, 3)
        found = cursor.rewards(candidates, logprobs)
        expected = torch.stack([whole[row][place] for row in rows])
        torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[:, 2], expected, atol=1e-5, rtol=1e-5)
        assert (found[:, 1] - found[:, 0]).abs().max() > 1e-3
        keep = [i for i, row in enumerate(rows) if len(TOKENS[row]) > place + 1]
        if keep:
            cursor.read(taken, torch.tensor(keep))
        rows = [rows[i] for i in keep]


def shifted(logits, rewards, *, beta, top_k, temperature=1.0):
    """rewards: of every token, [R, V]."""
    candidates = logits.topk(top_k, dim=-1).indices
    return reweighed(logits, candidates, rewards.gather(-1, candidates), beta, temperature)


def test_beta_one_turns_the_policy_into_the_expert():
    """r = log π_E - log π + a constant of the state, the logit of an optimal discriminator."""
    torch.manual_seed(0)
    policy, expert = torch.randn(3, 40).log_softmax(-1), torch.randn(3, 40).log_softmax(-1)
    rewards = expert - policy + torch.tensor([[1.0], [-2.0], [5.0]])
    found = shifted(policy, rewards, beta=1.0, top_k=40)
    torch.testing.assert_close(found.log_softmax(-1), expert)
    half = shifted(policy, rewards, beta=0.5, top_k=40)
    torch.testing.assert_close(half.log_softmax(-1), ((policy + expert) / 2).log_softmax(-1))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_shift_is_of_the_distribution_after_temperature(temperature):
    torch.manual_seed(1)
    logits, rewards = torch.randn(2, 40), torch.randn(2, 40)
    found = shifted(logits, rewards, beta=1.5, top_k=40, temperature=temperature)
    expected = (logits / temperature).log_softmax(-1) + 1.5 * rewards
    torch.testing.assert_close((found / temperature).log_softmax(-1), expected.log_softmax(-1))


def test_beta_zero_leaves_the_logits_as_they_are_to_the_bit():
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(shifted(logits, torch.randn(2, 40), beta=0.0, top_k=7), logits)


def test_tokens_without_a_reward_never_gain():
    torch.manual_seed(3)
    logits, rewards = torch.randn(50, 40), 4 * torch.randn(50, 40)
    before = logits.softmax(-1)
    after = shifted(logits, rewards, beta=1.0, top_k=8).softmax(-1)
    outside = torch.ones(50, 40, dtype=torch.bool).scatter(-1, logits.topk(8).indices, False)
    share_before, share_after = (torch.where(outside, p, 0.0).sum(-1) for p in (before, after))
    assert (share_after <= share_before + 1e-6).all() and (share_after < 0.5 * share_before).any()
    relative = after[outside].view(50, -1) / before[outside].view(50, -1)
    torch.testing.assert_close(relative, relative[:, :1].expand_as(relative))  # among themselves nothing moves


def test_greedy_takes_the_most_likely_under_the_reweighed_policy():
    logits, rewards = torch.tensor([[2.0, 1.5, 0.0]]), torch.tensor([[0.0, 1.0, 1.2]])
    assert shifted(logits, rewards, beta=0.4, top_k=3, temperature=0.0).argmax().item() == 0  # 2.0 against 1.9
    assert shifted(logits, rewards, beta=0.6, top_k=3, temperature=0.0).argmax().item() == 1  # 2.0 against 2.1
