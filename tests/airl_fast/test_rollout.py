"""The sampler: its log-probabilities are the trainer's, its choices follow the distribution, and it stops."""

import dataclasses

import pytest
import torch

from airl_fast.models.forward import token_logprobs
from airl_fast.pack import pack
from airl_fast.rollout.builtin import Builtin, sample
from airl_fast.rollout.engine import SamplingParams
from airl_fast.rollout.pick import pick
from airl_fast.rollout.prefill import read_prompts
from tests.airl_fast.model_cases import CPU, language_model, trace

END = 3
PROMPTS = [[5, 9, 1, 22, 7], [4], [8, 8, 30, 2, 1, 1, 6, 17, 11, 4, 19], [31, 12]]
PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=24, end_token=END, seed=1, batch_size=100)


@pytest.fixture(scope="module", params=["qwen2", "llama", "gpt2"])  # rotary positions, and GPT-2's absolute ones
def lm(request):
    """Ends a turn about one time in fifteen, so that rows leave the cache at different steps."""
    return language_model(request.param, seed=4, spread=0.25)


def drawn(lm, prompts=PROMPTS, per_prompt=3, **changes):
    return sample(lm, prompts, per_prompt, dataclasses.replace(PARAMS, **changes))


def packed(groups, prompts=PROMPTS):
    traces = [
        trace(one.tokens, prompt=prompts[i], group=i, logprobs=one.logprobs)
        for i, samples in enumerate(groups)
        for one in samples
    ]
    return pack(traces, CPU)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [100, 5, 1])
def test_kept_log_probabilities_are_the_trainers(lm, temperature, batch_size):
    groups = drawn(lm, temperature=temperature, batch_size=batch_size, per_prompt=4)
    lengths = {len(one.tokens) for samples in groups for one in samples}
    assert len(lengths) > 2  # rows finished at different steps
    batch = packed(groups)
    ours = token_logprobs(lm, batch, temperature=temperature).detach()
    torch.testing.assert_close(batch.behaviour_logprobs, ours, atol=1e-5, rtol=0)
    assert batch.behaviour_logprobs.std() > 0.5
    other = token_logprobs(lm, batch, temperature=1.3).detach()
    assert (other - batch.behaviour_logprobs).abs().max() > 0.1  # the comparison can fail


def test_samples_end_at_the_end_token_or_at_the_limit(lm):
    samples = [one for group in drawn(lm, per_prompt=8) for one in group]
    for one in samples:
        assert len(one.tokens) == len(one.logprobs)
        assert one.finished == (one.tokens[-1] == END)
        assert END not in one.tokens[:-1]
        assert one.finished or len(one.tokens) == PARAMS.max_new_tokens
    assert {one.finished for one in samples} == {True, False}
    (((only,),),) = (drawn(lm, PROMPTS[:1], 1, max_new_tokens=1),)
    assert len(only.tokens) == 1 and only.finished == (only.tokens[0] == END)


def test_an_end_on_the_last_step_counts_as_finished(lm):
    whole = [one for group in drawn(lm, per_prompt=8) for one in group]
    length = next(len(one.tokens) for one in whole if one.finished and len(one.tokens) > 2)
    cut = [one for group in drawn(lm, per_prompt=8, max_new_tokens=length) for one in group]
    same = [(a, b) for a, b in zip(whole, cut, strict=True) if len(a.tokens) == length and a.finished]
    assert same and all(b.finished and b.tokens == a.tokens for a, b in same)


def test_samples_come_back_in_the_order_of_their_prompts(lm):
    """Rows are sorted by length inside; a greedy answer says whose it is."""
    alone = [drawn(lm, [prompt], 1, temperature=0.0)[0][0].tokens for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    for batch_size in (100, 3):
        groups = drawn(lm, per_prompt=2, temperature=0.0, batch_size=batch_size)
        assert [[one.tokens for one in group] for group in groups] == [[tokens] * 2 for tokens in alone]


def test_the_seed_decides(lm):
    first, again, other = drawn(lm), drawn(lm), drawn(lm, seed=2)
    assert first == again != other
    assert len({one.tokens for one in first[0]}) > 1  # samples of one prompt differ


def test_greedy_is_what_generate_does(lm):
    greedy = drawn(lm, per_prompt=1, temperature=0.0)
    for prompt, (one,) in zip(PROMPTS, greedy, strict=True):
        theirs = lm.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=PARAMS.max_new_tokens,
            eos_token_id=END,
            pad_token_id=0,
        )
        assert list(one.tokens) == theirs[0, len(prompt) :].tolist()
        assert one.logprobs == (0.0,) * len(one.tokens)  # the only choice there was


def test_frequencies_follow_the_models_distribution(lm):
    draws = 4000
    (samples,) = drawn(lm, PROMPTS[:1], draws, max_new_tokens=1, temperature=0.7)
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in samples]), minlength=40)
    p = (lm.model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1)
    spread = (p * (1 - p) / draws).sqrt() + 1e-4
    assert ((counts / draws - p) / spread).abs().max() < 4.5


# ---- one choice ----


def numbers(count):
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(0))


def tally(logits, count=6000, **options):
    ids, logprobs = pick(torch.tensor([logits]).repeat(count, 1), uniform=numbers(count), **options)
    return torch.bincount(ids, minlength=len(logits)) / count, ids, logprobs


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    kept, ids, logprobs = tally(p.log().tolist(), temperature=1.0, top_p=0.7)
    expected = torch.tensor([0.0, 0.5, 0.0, 0.3]) / 0.8  # 0.5 alone falls short of 0.7
    assert kept[0] == kept[2] == 0
    torch.testing.assert_close(kept, expected, atol=0.03, rtol=0)
    torch.testing.assert_close(logprobs.exp(), expected[ids])  # renormalised over what was kept
    alone, _, sure = tally(p.log().tolist(), temperature=1.0, top_p=0.4)
    assert alone.tolist() == [0, 1, 0, 0] and sure.abs().max() == 0
    everything, ids, logprobs = tally(p.log().tolist(), temperature=1.0, top_p=1.0)
    torch.testing.assert_close(everything, p, atol=0.03, rtol=0)
    torch.testing.assert_close(logprobs.exp(), p[ids])


def test_temperature_comes_before_the_nucleus():
    logits = [2.0, 1.0, 0.0]
    tempered = (torch.tensor(logits) / 0.5).softmax(0)  # 0.867, 0.117, 0.016
    assert torch.tensor(logits).softmax(0)[0] < 0.7 < tempered[0]
    alone, _, _ = tally(logits, temperature=0.5, top_p=0.7)
    assert alone.tolist() == [1, 0, 0]


def test_rows_with_their_own_nucleus_do_not_mix():
    logits = torch.tensor([[5.0, 0.0, 0.0, 4.9], [0.0, 6.0, 0.0, 0.0]]).repeat(500, 1)
    ids, _ = pick(logits, 1.0, 0.9, numbers(1000))
    assert set(ids[::2].tolist()) == {0, 3} and set(ids[1::2].tolist()) == {1}


def test_greedy_takes_the_first_of_equal_logits():
    ids, logprobs = pick(torch.tensor([[1.0, 3.0, 3.0], [9.0, 0.0, 1.0]]), 0.0, 0.5, None)
    assert ids.tolist() == [1, 0] and logprobs.tolist() == [0.0, 0.0]


# ---- ids without a token ----


def test_rows_that_pad_the_vocabulary_are_never_drawn():
    """The model has 40 ids, its tokenizer 33: the padded rows' logits at minus infinity."""
    lm = language_model(seed=4, spread=0.25)
    free = [t for group in drawn(lm, per_prompt=8) for one in group for t in one.tokens]
    assert max(free) >= 33  # they would be drawn
    lm = dataclasses.replace(lm, num_tokens=33)
    groups = drawn(lm, per_prompt=8)
    assert max(t for group in groups for one in group for t in one.tokens) == 32
    masked = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            ids = torch.tensor([[*prompt, *one.tokens]])
            logits = lm.model(ids).logits[0, len(prompt) - 1 : -1, :33]
            masked += logits.log_softmax(-1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0].tolist()
    kept = [p for group in groups for one in group for p in one.logprobs]
    torch.testing.assert_close(torch.tensor(kept), torch.tensor(masked), atol=1e-5, rtol=0)


def test_the_engine_samples_the_model_that_was_pushed(lm):
    other = language_model("llama", seed=9, spread=0.25)
    engine = Builtin(lm)
    assert engine.sample(PROMPTS, 3, PARAMS) == drawn(lm)
    engine.push(other, "other")
    assert engine.check(other, "other") is None
    assert engine.sample(PROMPTS, 3, PARAMS) == drawn(other) != drawn(lm)


def test_every_prompt_is_read_once_without_a_padded_token(lm):
    read = []
    hook = lm.model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    drawn(lm, per_prompt=4, max_new_tokens=1)
    hook.remove()
    assert len({len(prompt) for prompt in PROMPTS}) > 1
    assert len(read) == 1 and sorted(read[0].flatten().tolist()) == sorted(t for prompt in PROMPTS for t in prompt)


def test_what_the_cache_shows_of_prompts_of_any_length_is_each_prompts_own(lm):
    together = read_prompts(lm, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = read_prompts(lm, [prompt])
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-5, rtol=1e-5)
        assert together.mask[i].sum() == len(prompt) and together.mask[i, -len(prompt) :].all()
        for ours, theirs in zip(together.cache.layers, alone.cache.layers, strict=True):
            torch.testing.assert_close(ours.keys[i, :, -len(prompt) :], theirs.keys[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.values[i, :, -len(prompt) :], theirs.values[0], atol=1e-5, rtol=1e-5)
