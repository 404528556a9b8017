"""Sampling from models that read long sequences with other rotary factors: every token is drawn as if its row were
alone, also where rows cross the change while they are decoded beside others."""

import dataclasses

import pytest
import torch

from airl_fast.errors import UserError
from airl_fast.guided.cursor import Cursor
from airl_fast.models.regimes import Regimes
from airl_fast.rollout.builtin import decode, sample
from airl_fast.rollout.engine import SamplingParams
from airl_fast.rollout.prefill import read_prompts
from airl_fast.rollout.probe import Scored, trainer_logprobs
from airl_fast.rollout.stepwise import Start, Streams, extend
from airl_fast.rollout.vllm import _refuse_other_factors
from airl_fast.types import Kind
from tests.airl_fast.model_cases import language_model
from tests.airl_fast.regime_cases import END, MODELS, alone, crossing_traces, fresh, model_of, plain_model

STOP = 3
PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=20, end_token=STOP, seed=1, batch_size=100)
# Rows that stay below the change, that come to it, that reach it with the prompt, that begin above it.
PROMPT_LENGTHS = [2, END - 12, END - 1, END, END + 1, END + 9, 9]


def prompts_of():
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(4, 40, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def step_by_step(model, prompt, tokens) -> torch.Tensor:
    """log π of each token, by a fresh model that reads what stood before it, without a cache."""
    found = []
    for i, token in enumerate(tokens):
        logits = fresh(model)(input_ids=torch.tensor([[*prompt, *tokens[:i]]]), use_cache=False).logits[0, -1]
        found.append(logits.float().log_softmax(-1)[token])
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [100, 4, 1])
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_each_row_alone(name, batch_size):
    plain, lm, prompts = plain_model(name), model_of(name), prompts_of()
    groups = sample(lm, prompts, 2, dataclasses.replace(PARAMS, batch_size=batch_size))
    crossed = 0
    for prompt, samples in zip(prompts, groups, strict=True):
        for one in samples:
            assert len(one.tokens) == len(one.logprobs) <= 20
            assert one.finished == (one.tokens[-1] == STOP) and STOP not in one.tokens[:-1]
            assert one.finished or len(one.tokens) == 20
            expected = step_by_step(plain, prompt, one.tokens)
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=2e-5, rtol=1e-5)
            crossed += len(prompt) <= END < len(prompt) + len(one.tokens)
    assert crossed > 3


@torch.no_grad()
def test_without_the_cut_neighbours_would_be_felt(monkeypatch):
    """The comparison above can fail."""
    plain, lm, prompts = plain_model("longrope"), model_of("longrope"), prompts_of()
    monkeypatch.setattr("airl_fast.models.load.regimes_of", lambda model: Regimes())
    groups = sample(lm, prompts, 1, PARAMS)
    furthest = max(
        (torch.tensor(one.logprobs) - step_by_step(plain, prompt, one.tokens)).abs().max().item()
        for prompt, (one,) in zip(prompts, groups, strict=True)
    )
    assert furthest > 0.05


@torch.no_grad()
def test_greedy_tokens_are_those_of_generate():
    """Without a cache: with one, transformers 5.17 loses what came before when a Phi-3 row comes to the change."""
    plain, lm, prompts = plain_model("longrope"), model_of("longrope"), prompts_of()
    params = dataclasses.replace(PARAMS, temperature=0.0, end_token=99)
    for prompt, (one,) in zip(prompts, sample(lm, prompts, 1, params), strict=True):
        tokens = fresh(plain).generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None,
            use_cache=False,
        )  # fmt: skip
        assert list(one.tokens) == tokens[0, len(prompt) :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_rows_of_their_own_streams_draw_the_same_in_any_company(name):
    lm, prompts = model_of(name), prompts_of()

    def starts(limit=20):
        return [Start(tokens=tuple(p), limit=limit - i, stream=(i,)) for i, p in enumerate(prompts)]

    together = extend(lm, starts(), PARAMS, Streams(3))
    for i, start in enumerate(starts()):
        (single,) = extend(lm, [start], PARAMS, Streams(3))
        assert single.tokens == together[i].tokens
        assert len(single.tokens) <= start.limit
    stops = extend(lm, starts(), PARAMS, Streams(3), stop=lambda row, token: token % 4 == row % 4)
    for i, (stopped, whole) in enumerate(zip(stops, together, strict=True)):
        place = next((k for k, token in enumerate(whole.tokens) if token % 4 == i % 4), len(whole.tokens) - 1)
        assert stopped.tokens == whole.tokens[: place + 1]


def test_prompts_of_different_regimes_are_not_read_together():
    lm = model_of("longrope")
    with pytest.raises(RuntimeError, match="different regimes"):
        read_prompts(lm, [[1] * END, [1] * (END + 1)])


def test_a_model_of_one_regime_is_decoded_as_before():
    """The wrapper is not even entered: `decode` is given the very prompts and draws."""
    lm, seen = language_model(), []

    def only_once(lm, prompts, limits, ends, draw, stop):
        seen.append((prompts, draw))
        return decode(lm, prompts, limits, ends, draw, stop)

    from airl_fast.rollout.crossing import decode_by_regime

    prompts, draw = [[1, 2], [3]], lambda rows, logits: (logits.argmax(-1), logits[:, 0])
    decode_by_regime(only_once, lm, prompts, [2, 2], {STOP}, draw)
    assert seen == [(prompts, draw)]


# ---- the sentinel, vLLM, the guided cursor ----


@torch.no_grad()
def test_the_sentinel_reads_each_probe_alone():
    lm = model_of("dynamic")
    traces = crossing_traces([(5, 60), (5, END), (30, 40)])
    probes = [Scored(prompt=t.prompt_tokens, completion=t.tokens) for t in traces]
    expected = torch.cat([alone(plain_model("dynamic"), t.prompt_tokens, t.tokens) for t in traces])
    torch.testing.assert_close(trainer_logprobs(lm, probes), expected, atol=2e-5, rtol=1e-5)


def test_vllm_is_refused_where_its_factors_are_others():
    _refuse_other_factors(language_model(), 10**6)
    _refuse_other_factors(model_of("longrope"), END)  # all short, in both
    with pytest.raises(UserError, match=rf"context of {END + 1} tokens .*above {END} tokens; lower rollout.max_new"):
        _refuse_other_factors(model_of("longrope"), END + 1)
    with pytest.raises(UserError, match=r"\(dynamic\) for every sequence.*rollout.engine=builtin"):
        _refuse_other_factors(model_of("dynamic"), 5)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "action"])
def test_the_cursor_refuses_rows_that_leave_their_regime(head):
    from tests.airl_fast.test_regimes import _discriminator

    model = _discriminator("longrope", head)
    with pytest.raises(RuntimeError, match="different regimes"):
        Cursor(model, [[1] * END, [1] * (END + 1)])
    cursor = Cursor(model, [[1] * (END - 2), [2, 5]])
    everything, candidates = torch.tensor([0, 1]), torch.tensor([[4], [5]])
    for place in range(2):
        cursor.rewards(candidates, torch.zeros(2, 1))
        cursor.read(torch.tensor([6, 7]), everything)
        assert place < 2
    with pytest.raises(RuntimeError, match="grown out of its regime"):
        cursor.rewards(candidates, torch.zeros(2, 1)) if head == "linear" else None
        cursor.read(torch.tensor([6, 7]), everything)


@torch.no_grad()
def test_the_cursor_reads_rows_above_the_change_as_the_whole_discriminator_does():
    from airl_fast.pack import pack
    from tests.airl_fast.model_cases import CPU, trace
    from tests.airl_fast.test_regimes import _discriminator

    model = _discriminator("longrope", "action")
    tokens = [(4, 9, 2), (7, 1, 30)]
    prompts = [tuple(range(END + 1)), tuple(range(END + 6))]
    traces = [trace(t, Kind.POLICY, prompt=p, group=i) for i, (p, t) in enumerate(zip(prompts, tokens, strict=True))]
    batch = pack(traces, CPU, regimes=model.regimes)
    whole = torch.stack(model.logits(batch).split(batch.loss_lengths))
    cursor = Cursor(model, prompts)
    for place in range(3):
        taken = torch.tensor([t[place] for t in tokens])
        found = cursor.rewards(taken[:, None], torch.zeros(2, 1))
        torch.testing.assert_close(found[:, 0], whole[:, place], atol=2e-5, rtol=1e-5)
        if place < 2:
            cursor.read(taken, torch.tensor([0, 1]))
