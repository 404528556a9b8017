"""Samples of the real vLLM: their distribution, their seeds, what it refuses, and what it leaves behind."""

import dataclasses
import os
import random
import signal

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

import torch

from airl_fast.errors import UserError
from airl_fast.models.load import wrap
from airl_fast.rollout import builtin, vllm
from airl_fast.rollout.vllm import require
from tests.vllm.engine_cases import END, PARAMS, PROMPTS, furthest, saved_model, settings, started, trainers_logprobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def lm(folder):
    return saved_model(folder)


@pytest.fixture(scope="module")
def engine(folder, lm):
    running = started(folder, lm, settings(folder))
    yield running
    running.close()


def drawn(engine, prompts=PROMPTS, per_prompt=4, **changes):
    return engine.sample(prompts, per_prompt, dataclasses.replace(PARAMS, **changes))


def test_samples_are_grouped_by_prompt_and_end_as_they_should(engine, lm):
    groups = drawn(engine, per_prompt=8)
    assert [len(group) for group in groups] == [8] * len(PROMPTS)
    samples = [one for group in groups for one in group]
    for one in samples:
        assert one.finished == (one.tokens[-1] == END) and END not in one.tokens[:-1]
        assert one.finished or len(one.tokens) == PARAMS.max_new_tokens
    assert {one.finished for one in samples} == {True, False}
    assert len({one.tokens for one in groups[0]}) == 8
    assert furthest(lm, PROMPTS, groups) < 1e-4  # a sample in another prompt's group would be far off
    assert drawn(engine, temperature=0.0) == builtin.sample(lm, PROMPTS, 4, dataclasses.replace(PARAMS, temperature=0))


def test_any_listed_end_ends_a_sample_and_none_in_a_prompt_does(engine, lm):
    others = (8, 31, 60)  # prompts hold the first two
    groups = drawn(engine, per_prompt=16, other_ends=others)
    ends = {END, *others}
    for one in (one for group in groups for one in group):
        assert one.finished == (one.tokens[-1] in ends) and not set(one.tokens[:-1]) & ends
        assert one.finished or len(one.tokens) == PARAMS.max_new_tokens
    assert {one.tokens[-1] for group in groups for one in group} >= ends
    assert furthest(lm, PROMPTS, groups) < 1e-4
    greedy = dataclasses.replace(PARAMS, temperature=0.0, other_ends=others)
    assert engine.sample(PROMPTS, 1, greedy) == builtin.sample(lm, PROMPTS, 1, greedy)


def test_the_seed_decides_and_nothing_else(engine):
    first, other = drawn(engine), drawn(engine, seed=2)
    drawn(engine, [[1, 2, 3]], 30)
    torch.manual_seed(5)
    assert drawn(engine) == first != other
    twice = drawn(engine, [PROMPTS[0], PROMPTS[0]])
    assert twice[0] == first[0] and not {a.tokens for a in twice[0]} & {b.tokens for b in twice[1]}


def test_frequencies_follow_the_models_distribution(engine, lm):
    draws = 1500
    (samples,) = drawn(engine, PROMPTS[:1], draws, max_new_tokens=1, temperature=0.7)
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in samples]), minlength=96)
    with torch.no_grad():
        p = (lm.model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1)
    spread = (p * (1 - p) / draws).sqrt() + 1e-3
    assert ((counts / draws - p) / spread).abs().max() < 4.5


def test_log_probabilities_are_those_of_the_nucleus(engine, lm):
    """Renormalised over what top-p keeps, after the temperature: those of the distribution that was drawn from."""
    groups = drawn(engine, top_p=0.6, temperature=0.8)
    inside = 0.0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            with torch.no_grad():
                logits = lm.model(torch.tensor([[*prompt, *one.tokens]])).logits[0, len(prompt) - 1 : -1] / 0.8
            ordered = logits.softmax(-1).sort(-1, descending=True).values
            kept = (ordered.cumsum(-1) - ordered < 0.6) * ordered
            mass = kept.sum(-1).log()
            expected = trainers_logprobs(lm, prompt, one, 0.8) - mass
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-4, rtol=0)
            inside = min(inside, mass.min().item())
    assert inside < -0.1  # the nucleus left something out


def test_a_bad_prompt_is_named_and_the_engine_goes_on(engine):
    good = drawn(engine)
    for bad, problem in (
        ([], "is empty"),
        ([5, 96], r"holds the id 96, which no token of the vocabulary has \(0 to 95\)"),
        ([-1], "holds the id -1"),
        ([5] * 80, "has 80 tokens and asks for 24 more, but the sampler was started for 96 in all"),
    ):
        with pytest.raises(UserError, match=rf"^prompt 1 of 3 {problem}.*; correct it or leave it out\.$"):
            drawn(engine, [[4], bad, [7]])
    assert drawn(engine) == good


def test_rows_that_pad_the_vocabulary_are_never_drawn(engine, folder, lm):
    assert max(t for group in drawn(engine, per_prompt=8) for one in group for t in one.tokens) >= 60
    engine.close()
    padded = dataclasses.replace(lm, num_tokens=60)
    second = started(folder, padded, settings(folder), probes=())
    try:
        groups = drawn(second, per_prompt=8)
        assert max(t for group in groups for one in group for t in one.tokens) == 59
        assert furthest(padded, PROMPTS, groups) < 1e-4
    finally:
        second.close()


# ---- the process around it; the engine of the tests above is closed by now ----


def test_it_leaves_the_process_as_it_was_and_starts_again(folder, lm):
    def state():
        return (
            dict(os.environ), torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype(),
            random.getstate(), torch.get_rng_state().tolist(), os.sched_getaffinity(0),
            signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), torch.distributed.is_initialized(),
        )  # fmt: skip

    before, answers = state(), []
    for _ in range(2):
        engine = started(folder, lm, settings(folder))
        try:
            assert state()[:-1] == before[:-1]  # it does open a process group, of one
            answers.append(drawn(engine))
            assert state()[:-1] == before[:-1]
        finally:
            engine.close()
        assert state() == before
        assert not (folder / "scratch").exists()
    assert answers[0] == answers[1]


def test_memory_that_cannot_hold_it_is_one_sentence(folder, lm, monkeypatch):
    with pytest.raises(UserError, match=r"^rollout\.gpu_memory=1e-06: .* needs 0\.\d+ MiB for the weights and .*\.$"):
        started(folder, lm, settings(folder, gpu_memory=1e-6))
    for size in (1 << 60, 4096):  # what vLLM itself finds too much, or too little, when our arithmetic lets it through
        monkeypatch.setattr(vllm, "_memory", lambda *_, size=size: {"kv_cache_memory_bytes": size})
        with pytest.raises(UserError, match=r"^rollout\.gpu_memory=0\.4: vLLM does not fit into the memory \(.*; free"):
            started(folder, lm, settings(folder))


def test_a_directory_it_cannot_load_is_one_sentence(folder, lm, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^rollout\.engine=vllm: vLLM does not start with .*; set rollout\.engine="):
        started(tmp_path, lm, settings(tmp_path))


def test_what_vllm_cannot_run_is_refused(folder, lm):
    require(settings(folder), lm)
    with pytest.raises(UserError, match=r"holds adapters of rank 512 at most, not model\.lora\.rank=600; lower it\.$"):
        config = settings(folder, lora=True)
        lora = config.model.lora.model_copy(update={"rank": 600})
        require(config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})}), lm)
    small = wrap(type(lm.model)(type(lm.model.config)(**(lm.model.config.to_dict() | {"head_dim": 16}))), None)
    with pytest.raises(UserError, match=r"on the CPU vllm has no attention for heads of 16, only for 32, 64, "):
        require(settings(folder), small)
    elsewhere = dataclasses.replace(lm, model=lm.model.to("meta"))
    with pytest.raises(UserError, match=r"this vllm runs on cpu and the policy on meta; install vllm for meta"):
        require(settings(folder), elsewhere)
