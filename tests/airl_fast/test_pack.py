"""Packing: who predicts whom, by hand; a part of a batch is the batch of that part."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.pack import Boundaries, pack, select
from airl_fast.types import Kind, Segments, Trace, TraceBatch
from tests.airl_fast.model_cases import CPU, random_traces, trace


def boundaries(trace: Trace) -> Boundaries:
    """Any rule that depends on the trace alone."""
    return Boundaries(
        steps=tuple(i for i, token in enumerate(trace.tokens) if token % 3 == 0),
        blocks=tuple(i for i, token in enumerate(trace.tokens) if token % 7 == 0),
    )


def assert_same(one: TraceBatch, other: TraceBatch) -> None:
    for field in fields(TraceBatch):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)), field.name
        else:
            assert ours == theirs, field.name


def without_absent_pairs(traces: list[Trace], chosen: list[int]) -> list[Trace]:
    """The chosen traces as a list of their own: a pair points into it, or nowhere."""
    moved = []
    for s in chosen:
        pair = traces[s].pair
        fresh = {"pair": chosen.index(pair) if pair in chosen else None}
        moved.append(Trace(**{field.name: getattr(traces[s], field.name) for field in fields(Trace)} | fresh))
    return moved


def test_worked_by_hand():
    batch = pack(
        [
            trace((11, 12, 13), Kind.EXPERT, prompt=(1, 2), group=0, correct=True),
            trace((14,), prompt=(3,), group=1, logprobs=(-0.5,), correct=False),
            trace((15, 16), Kind.PERTURBED, prompt=(1, 2), group=0, pair=0),
        ],
        CPU,
        lambda t: Boundaries(steps=(0,), blocks=()) if len(t.tokens) == 3 else Boundaries(),
    )
    # Two prompts, then the completions of the first, then those of the second.
    assert batch.tokens.tolist() == [1, 2, 3, 11, 12, 13, 15, 16, 14]
    assert batch.positions.tolist() == [0, 1, 0, 2, 3, 4, 2, 3, 1]
    assert batch.segments == Segments(prompts=(2, 1), completions=(3, 2, 1), counts=(2, 1))
    assert batch.prompt_of == (0, 1, 0)
    # The state at row 1 (token 2, the first prompt's last) predicts both 11 and 15; that at row 2 (token 3) 14.
    assert batch.loss_rows.tolist() == [1, 3, 4, 2, 1, 6]
    assert batch.label_rows.tolist() == [3, 4, 5, 8, 6, 7]
    assert batch.labels.tolist() == [11, 12, 13, 14, 15, 16]
    assert batch.loss_cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.step_ends.tolist() == [True, False, True, True, False, True]
    assert batch.block_ends.tolist() == [False, False, True, True, False, True]
    assert batch.group.tolist() == [0, 1, 0]
    assert batch.kind.tolist() == [Kind.EXPERT, Kind.POLICY, Kind.PERTURBED]
    assert batch.pair.tolist() == [-1, -1, 0]
    assert batch.correct.tolist() == [True, False, False]
    assert batch.kinds == (Kind.EXPERT, Kind.POLICY, Kind.PERTURBED) and batch.pairs == (-1, -1, 0)
    assert batch.loss_lengths == (3, 1, 2)
    assert (batch.segments.num_rows, batch.num_sequences, batch.num_loss_tokens) == (9, 3, 6)
    sampled = batch.behaviour_logprobs.tolist()
    assert sampled[3] == -0.5 and all(math.isnan(value) for i, value in enumerate(sampled) if i != 3)
    assert batch.per_token(torch.tensor([7, 8, 9])).tolist() == [7, 7, 7, 8, 9, 9]


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_row_holds_the_token_of_its_place(seed, share):
    traces = random_traces(seed)
    batch = pack(traces, CPU, boundaries, share=share)
    distinct = len({t.prompt_tokens for t in traces}) if share else len(traces)
    assert len(batch.segments.prompts) == distinct
    assert batch.segments.num_rows == len(batch.tokens) == len(batch.positions)
    before, at = batch.loss_rows.split(batch.loss_lengths), batch.label_rows.split(batch.loss_lengths)
    for t, predicting, reading in zip(traces, before, at, strict=True):
        whole = torch.tensor(t.prompt_tokens + t.tokens)
        start = len(t.prompt_tokens)
        assert torch.equal(batch.tokens[reading], whole[start:])
        assert torch.equal(batch.tokens[predicting], whole[start - 1 : -1])
        assert torch.equal(batch.positions[reading], torch.arange(start, len(whole)))
        assert torch.equal(batch.positions[predicting], torch.arange(start - 1, len(whole) - 1))
    last = batch.loss_cu_seqlens[1:].long() - 1
    assert batch.step_ends[last].all() and batch.block_ends[last].all()


@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_a_selection_is_the_batch_of_those_traces_alone(seed, rng):
    traces = random_traces(seed)
    chosen = rng.sample(range(len(traces)), rng.randint(1, len(traces)))
    whole = pack(traces, CPU, boundaries)
    part, index = select(whole, chosen)
    assert_same(part, pack(without_absent_pairs(traces, chosen), CPU, boundaries))
    assert torch.equal(whole.labels[index], part.labels)
    owners = whole.per_token(torch.arange(len(traces)))[index]
    assert torch.unique_consecutive(owners).tolist() == chosen


def test_pairs_follow_their_sources_or_are_forgotten():
    traces = random_traces(3, groups=2, samples=1)  # expert 0, sample 1, expert 2, sample 3, copies 4 and 5
    batch = pack(traces, CPU)
    assert batch.pair.tolist() == [-1, -1, -1, -1, 0, 2]
    assert select(batch, [5, 3, 2])[0].pair.tolist() == [2, -1, -1]
    assert select(batch, [4, 1])[0].pair.tolist() == [-1, -1]


def test_traces_that_cannot_be_packed():
    for tokens, prompt in (((), (1,)), ((2,), ())):
        with pytest.raises(ValueError, match="at least one prompt token and one completion token"):
            pack([trace(tokens, prompt=prompt)], CPU)
    with pytest.raises(ValueError, match="2 log-probabilities for 3 tokens"):
        pack([trace((1, 2, 3), logprobs=(-1.0, -2.0))], CPU)
