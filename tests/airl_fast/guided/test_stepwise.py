"""Decoding from anywhere: a row's draws are its own, and a pause changes nothing."""

import dataclasses

import pytest
import torch

from airl_fast.models.forward import token_logprobs
from airl_fast.pack import pack
from airl_fast.rollout.stepwise import Start, Streams, extend
from tests.airl_fast.model_cases import CPU, language_model, trace
from tests.airl_fast.test_rollout import END, PARAMS, PROMPTS

LIMIT = PARAMS.max_new_tokens


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def lm(request):
    return language_model(request.param, seed=4, spread=0.25)


def starts_of(prompts=PROMPTS, per_prompt=4, limit=LIMIT):
    return [
        Start(tokens=tuple(prompt), limit=limit, stream=(i, slot))
        for i, prompt in enumerate(prompts)
        for slot in range(per_prompt)
    ]


def test_kept_log_probabilities_are_the_models(lm):
    starts = starts_of()
    samples = extend(lm, starts, PARAMS, Streams(3))
    assert len({len(one.tokens) for one in samples}) > 1
    traces = [
        trace(one.tokens, prompt=start.tokens, group=i, logprobs=one.logprobs)
        for i, (start, one) in enumerate(zip(starts, samples, strict=True))
    ]
    batch = pack(traces, CPU)
    torch.testing.assert_close(batch.behaviour_logprobs, token_logprobs(lm, batch).detach(), atol=1e-5, rtol=0)
    assert {one.finished for one in samples} == {True, False}
    assert all(one.finished == (one.tokens[-1] == END) for one in samples)


@pytest.mark.parametrize("batch_size", [100, 5, 1])
def test_a_rows_draws_do_not_depend_on_its_batch(lm, batch_size):
    whole = [one.tokens for one in extend(lm, starts_of(), PARAMS, Streams(3))]
    params = dataclasses.replace(PARAMS, batch_size=batch_size)
    assert [one.tokens for one in extend(lm, starts_of(), params, Streams(3))] == whole
    backwards = extend(lm, starts_of()[::-1], PARAMS, Streams(3))
    assert [one.tokens for one in backwards][::-1] == whole
    assert [one.tokens for one in extend(lm, starts_of(), PARAMS, Streams(4))] != whole
    assert len(set(whole[:4])) > 1  # streams of one prompt differ


def test_a_row_that_pauses_goes_on_with_its_own_draws(lm):
    starts = starts_of()
    whole = [one.tokens for one in extend(lm, starts, PARAMS, Streams(3))]
    streams, written, done = Streams(3), [() for _ in starts], [False] * len(starts)
    rounds = 0
    while not all(done):
        opened = [i for i, over in enumerate(done) if not over]
        asked = [
            Start(tokens=starts[i].tokens + written[i], limit=LIMIT - len(written[i]), stream=starts[i].stream)
            for i in opened
        ]
        more = extend(lm, asked, PARAMS, streams, stop=lambda row, token: token % 3 == 0)
        for i, one in zip(opened, more, strict=True):
            assert all(token % 3 for token in one.tokens[:-1])  # it stopped where it was told to
            written[i] += one.tokens
            done[i] = one.finished or len(written[i]) == LIMIT
        rounds += 1
    assert rounds > 2 and written == whole


def test_each_row_has_a_limit_of_its_own(lm):
    starts = [dataclasses.replace(start, limit=1 + i) for i, start in enumerate(starts_of())]
    for start, one in zip(starts, extend(lm, starts, PARAMS, Streams(3)), strict=True):
        assert len(one.tokens) == start.limit or (one.finished and len(one.tokens) < start.limit)


def test_greedy_draws_nothing(lm):
    params = dataclasses.replace(PARAMS, temperature=0.0)
    first, second = (extend(lm, starts_of(), params, Streams(seed)) for seed in (1, 2))
    assert first == second
    streams = Streams(0)
    assert streams.next([(0, 0)]) == Streams(0).next([(0, 0)])
    assert streams.next([(0, 0)]) != streams.next([(0, 0)])
