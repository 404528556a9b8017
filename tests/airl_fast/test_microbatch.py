"""Micro-batches lose no token, keep to their budget, share the work evenly, and survive a device that is too small."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.errors import UserError
from airl_fast.microbatch import TokenBudget, micro_batches, over_micro_batches, over_tokens, plan
from airl_fast.pack import pack
from tests.airl_fast.model_cases import CPU, random_traces, trace
from tests.airl_fast.test_pack import assert_same, boundaries, without_absent_pairs


@given(st.integers(0, 10**6), st.integers(1, 600))
@settings(max_examples=40, deadline=None)
def test_every_token_goes_into_one_micro_batch_within_the_budget(seed, budget):
    traces = random_traces(seed)
    whole = pack(traces, CPU, boundaries)
    parts = list(micro_batches(whole, budget))
    assert sorted(torch.cat([part.index for part in parts]).tolist()) == list(range(whole.num_loss_tokens))
    for part in parts:
        owners = torch.unique_consecutive(whole.per_token(torch.arange(len(traces)))[part.index]).tolist()
        assert_same(part.batch, pack(without_absent_pairs(traces, owners), CPU, boundaries))
        families = {s if traces[s].pair is None else traces[s].pair for s in owners}
        assert part.batch.segments.num_rows <= budget or len(families) == 1
        assert all(traces[s].pair is None or traces[s].pair in owners for s in owners)


def test_a_batch_that_fits_is_not_cut():
    whole = pack(random_traces(1), CPU)
    (part,) = micro_batches(whole, whole.segments.num_rows)
    assert part.batch is whole and part.index.tolist() == list(range(whole.num_loss_tokens))
    assert len(list(micro_batches(whole, whole.segments.num_rows - 1))) == 2


def test_prompts_stay_whole_and_the_work_is_even():
    """Eight groups of one prompt and sixteen completions, in four micro-batches: two groups each, prompts computed
    once, the dearest first."""
    lengths = [100, 90, 80, 70, 40, 30, 20, 10]
    traces = [trace((7,) * n, prompt=(g, 1, 2), group=g) for g, n in enumerate(lengths) for _ in range(16)]
    batch = pack(traces, CPU)
    parts = plan(batch, 2000)
    groups = [sorted({traces[s].group for s in part}) for part in parts]
    rows = [sum(len(traces[s].tokens) for s in part) + 3 * len(g) for part, g in zip(parts, groups, strict=True)]
    assert sorted(map(tuple, groups)) == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert max(rows) <= 1.05 * min(rows)
    cost = [sum(len(traces[s].tokens) ** 2 for s in part) for part in parts]
    assert cost == sorted(cost, reverse=True)


def test_a_group_larger_than_the_budget_is_cut_with_its_prompt():
    traces = [trace(tuple(range(1, 11)), prompt=(1, 2, 3, 4)) for _ in range(10)]
    parts = list(micro_batches(pack(traces, CPU), 4 + 30))
    assert [part.batch.segments.num_rows for part in parts] == [34, 34, 34, 14]


def test_out_of_memory_halves_the_budget_and_begins_again():
    batch = pack(random_traces(2, groups=6), CPU)
    budget, done, restarts = TokenBudget(512, "x"), [], []
    rows = batch.segments.num_rows
    assert rows > 256

    def work(part):
        if part.batch.segments.num_rows > 150:
            raise torch.OutOfMemoryError("no room")
        done.append(part.index)

    over_micro_batches(batch, budget, work, lambda: (restarts.append(1), done.clear()))
    assert budget.tokens == 128 and len(restarts) == 2
    assert sorted(torch.cat(done).tolist()) == list(range(batch.num_loss_tokens))


def test_a_model_that_fits_nowhere_ends_with_a_sentence():
    batch = pack(random_traces(2), CPU)

    def work(part):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(UserError, match="out of memory with micro-batches of 64 tokens"):
        over_micro_batches(batch, TokenBudget(512, "policy.optim.tokens_per_micro_batch"), work)


def test_an_error_on_the_way_is_not_swallowed():
    batch = pack(random_traces(2), CPU)
    with pytest.raises(ZeroDivisionError):
        over_micro_batches(batch, TokenBudget(100, "x"), lambda part: 1 / 0)


def test_values_come_back_in_the_batchs_order():
    batch = pack(random_traces(5), CPU)
    for tokens in (1, 40, 10**6):
        found = over_tokens(batch, TokenBudget(tokens, "x"), lambda part: part.labels.float() + part.step_ends)
        assert torch.equal(found, batch.labels.float() + batch.step_ends)
