"""A trace's numbers are its own: the same beside any neighbours, longer, shorter or equal, for models of every kind of
attention, position and routing that can be packed."""

import copy
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from airl_fast.models.check import verify_packing
from airl_fast.models.forward import token_logprobs
from airl_fast.models.load import wrap
from airl_fast.pack import pack
from airl_fast.rollout.builtin import sample
from airl_fast.rollout.engine import SamplingParams
from tests.airl_fast.model_cases import CPU, trace

_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
KINDS: dict[str, dict] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},  # absolute positions, its own attention
    "mistral": {"sliding_window": 12},
    "gemma3_text": {
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
    },
    "gemma2": {"sliding_window": 12, "head_dim": 8},  # caps its scores: its own attention
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 1, **_EXPERTS},
    "ministral3": {  # queries scaled by their position
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    },
}
LENGTHS = [(3, 4), (20, 60), (3, 70), (5, 1), (20, 2), (90, 9)]  # of prompt and completion; windows are 12


def plain_model(kind: str):
    torch.manual_seed(1)
    shape = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.25,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if kind == "gpt2":
        shape = {k: v for k, v in shape.items() if k.endswith("token_id") or k in ("vocab_size", "initializer_range")}
    config = AutoConfig.for_model(kind, **shape | KINDS[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    plain = plain_model(request.param)
    lm = wrap(copy.deepcopy(plain), None)
    verify_packing(lm)
    return plain, lm


def traces_of(seed: int):
    rng = random.Random(seed)
    prompts = {n: tuple(rng.randrange(40) for _ in range(n)) for n, _ in LENGTHS}
    made = [trace([rng.randrange(40) for _ in range(m)], prompt=prompts[n], group=n) for n, m in LENGTHS]
    rng.shuffle(made)
    return made


@torch.no_grad()
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_log_probabilities(models, seed, share):
    plain, lm = models
    traces = traces_of(seed)
    found = token_logprobs(lm, pack(traces, CPU, share=share)).split([len(t.tokens) for t in traces])
    for t, ours in zip(traces, found, strict=True):
        whole = torch.tensor([t.prompt_tokens + t.tokens])
        logits = plain(input_ids=whole, use_cache=False).logits[0, len(t.prompt_tokens) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, whole[0, len(t.prompt_tokens) :, None])[:, 0]
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_samples(models):
    """Their log-probabilities are those of a plain forward over each prompt and sample."""
    plain, lm = models
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=20, end_token=99, seed=1, batch_size=100)
    prompts = [t.prompt_tokens for t in traces_of(2)]
    for prompt, (one,) in zip(prompts, sample(lm, prompts, 1, params), strict=True):
        whole = torch.tensor([prompt + one.tokens])
        logits = plain(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=2e-5, rtol=1e-5)
