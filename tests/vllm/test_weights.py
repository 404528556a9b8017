"""The real vLLM holds the trainer's weights after every push, and an engine that does not is found out."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

import torch

from airl_fast.errors import UserError
from airl_fast.rollout import builtin
from tests.vllm.engine_cases import (
    PARAMS,
    PROMPTS,
    furthest,
    policy_of,
    saved_model,
    settings,
    started,
    updated,
)

GREEDY = dataclasses.replace(PARAMS, temperature=0.0)


@pytest.fixture(params=["full", "lora"])
def lora(request) -> bool:
    return request.param == "lora"


def opened(folder: Path, lora: bool, architecture: str = "qwen2", tied: bool = True, dtype: str = "float32", **rollout):
    """(engine, policy): as a run begins, with the start policy checked."""
    start = saved_model(folder, architecture, tied=tied, dtype=getattr(torch, dtype))
    config = settings(folder, lora=lora, dtype=dtype, **rollout)
    policy = policy_of(start, folder, config.model.lora)
    engine = started(folder, start, config)
    try:
        engine.push(start, "start")
        engine.check(start, "start")
    except BaseException:
        engine.close()
        raise
    return engine, policy


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_after_every_update_the_engine_is_the_trainers_model(tmp_path, architecture, tied, lora):
    engine, policy = opened(tmp_path, lora, architecture, tied)
    try:
        answers = []
        for update in range(3):
            assert update == 0 or updated(policy) > 1e-3
            engine.push(policy, f"step {update}")
            stats = engine.check(policy, f"step {update}")
            assert stats.difference < 1e-4 and (stats.moved > 0.01) == (update > 0)
            theirs = engine.sample(PROMPTS, 1, GREEDY)
            assert theirs == builtin.sample(policy, PROMPTS, 1, GREEDY)
            answers.append(theirs)
            groups = engine.sample(PROMPTS, 4, dataclasses.replace(PARAMS, temperature=0.7))
            assert furthest(policy, PROMPTS, groups, 0.7) < 1e-3
        assert answers[0] != answers[1] != answers[2]
        if lora:  # one version is kept, and the start policy is the weights without it
            assert [folder.name for folder in (tmp_path / "scratch").iterdir()] == ["v3"]
    finally:
        engine.close()
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("learning_rate", [1e-2, 1e-4])
def test_a_missed_push_is_found(tmp_path, lora, learning_rate):
    """After one update of the trainer; nothing but the weights' movement gives it away when the update is small."""
    engine, policy = opened(tmp_path, lora)
    try:
        updated(policy)
        engine.push(policy, "step 1")
        engine.check(policy, "step 1")
        updated(policy, learning_rate, steps=1)
        with pytest.raises(UserError, match=r"^the sampler is (stale|out of step).* at step 2: .*--resume auto\.$"):
            engine.check(policy, "step 2")
        engine.push(policy, "step 2")
        assert engine.check(policy, "step 2").difference < 1e-4
    finally:
        engine.close()


def test_a_missed_push_is_found_in_bfloat16_and_rounding_is_not_taken_for_one(tmp_path):
    """bfloat16 rounds log-probabilities far more than such a step moves them."""
    engine, policy = opened(tmp_path, False, dtype="bfloat16")
    try:
        for step in range(6):
            updated(policy, 1e-3, steps=1)
            engine.push(policy, f"step {step}")
            stats = engine.check(policy, f"step {step}")
            assert 1e-3 < stats.difference < 0.2
        updated(policy, 1e-3, steps=1)
        with pytest.raises(UserError, match="is stale at step 7"):
            engine.check(policy, "step 7")
    finally:
        engine.close()


def test_a_tied_output_layer_left_behind_is_found(tmp_path, monkeypatch):
    """Everything but the embedding is pushed: what a reload that forgets tied weights does."""
    engine, policy = opened(tmp_path, False)
    try:
        updated(policy, 1e-4, steps=1)
        names = dict(policy.model.named_parameters())
        names.pop("model.embed_tokens.weight")
        monkeypatch.setattr(policy.model, "named_parameters", lambda *_, **__: iter(names.items()))
        with pytest.raises(UserError, match=r"model\.embed_tokens\.weight did not reach the sampler at step 1"):
            engine.push(policy, "step 1")
        with pytest.raises(UserError, match="is stale at step 1"):
            engine.check(policy, "step 1")
    finally:
        engine.close()


def test_a_sampler_beyond_the_ceiling_stops(tmp_path):
    engine, policy = opened(tmp_path, False, sync_ceiling=0.05)
    try:
        updated(policy, 3e-2, steps=4)
        with pytest.raises(UserError, match=r"nats a token, more than rollout\.sync_ceiling=0\.05; continue"):
            engine.check(policy, "step 1")
    finally:
        engine.close()


def test_weights_without_adapters_need_none(tmp_path):
    """An engine for adapters samples the start policy too, whatever it sampled before."""
    engine, policy = opened(tmp_path, True)
    try:
        start = engine.sample(PROMPTS, 2, PARAMS)
        updated(policy)
        engine.push(policy, "step 1")
        assert engine.sample(PROMPTS, 2, PARAMS) != start
        engine.push(saved_model(tmp_path), "start")
        assert engine.sample(PROMPTS, 2, PARAMS) == start
    finally:
        engine.close()


def test_an_engine_of_full_weights_refuses_adapters(tmp_path):
    engine, _ = opened(tmp_path, False)
    try:
        adapted = policy_of(saved_model(tmp_path / "other"), tmp_path, settings(tmp_path, lora=True).model.lora)
        with pytest.raises(TypeError, match="has no full weights to push"):
            engine.push(adapted, "step 1")
    finally:
        engine.close()
