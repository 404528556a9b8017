"""A longrope model in the real vLLM: the trainer's numbers while its context allows no long sequence, refused above."""

import dataclasses

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

import torch
from transformers import AutoModelForCausalLM, Phi3Config

from airl_fast.errors import UserError
from airl_fast.models.load import wrap
from airl_fast.rollout import vllm
from airl_fast.rollout.probe import Scored
from tests.vllm.engine_cases import PARAMS, VOCABULARY, furthest, settings, started

CHANGE = 32
PROBES = (Scored(prompt=(5, 9, 1), completion=tuple(range(10, 20))),)
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": CHANGE,
    "short_factor": [1 + 0.02 * i for i in range(16)],
    "long_factor": [1.3 + 0.5 * i for i in range(16)],
}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(4)
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=96, max_position_embeddings=256, original_max_position_embeddings=CHANGE,
        rope_parameters=ROPE, initializer_range=0.25, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", wrap(model, None)


@pytest.mark.parametrize("longest", [CHANGE, CHANGE + 1])
def test_the_context_decides(saved, longest, monkeypatch):
    """Above the change the numbers are others even for short sequences, so the refusal is needed."""
    folder, lm = saved
    if longest > CHANGE:
        with pytest.raises(UserError, match=f"context of {longest} tokens .* only for those above {CHANGE} tokens"):
            started(folder, lm, settings(folder), longest=longest, probes=PROBES)
        monkeypatch.setattr(vllm, "_refuse_other_factors", lambda lm, longest: None)
    engine = started(folder, lm, settings(folder, sync_ceiling=100.0), longest=longest, probes=PROBES)
    try:
        prompts, params = [[5, 9, 1], [7] * 12, [4]], dataclasses.replace(PARAMS, max_new_tokens=20)
        apart = furthest(lm, prompts, engine.sample(prompts, 3, params))
    finally:
        engine.close()
    assert apart < 1e-4 if longest <= CHANGE else apart > 0.1
