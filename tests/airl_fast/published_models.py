"""Directories of random weights under the published config.json of the models that the paper trains.

Everything that shapes a layer or the vocabulary is the published value; only the number of layers is cut.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase, Qwen2Config

from airl_fast.config import BuildConfig
from airl_fast.models.build import build_tokenizer

_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e6, "num_key_value_heads": 2}
_LLAMA = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "vocab_size": 128256}


def _rope(factor: float) -> dict:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


CONFIGS = {
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_attention_heads=14, vocab_size=151936,
        tie_word_embeddings=True, **_QWEN,
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_attention_heads=12, vocab_size=151936,
        tie_word_embeddings=True, **_QWEN,
    ),
    "Qwen/Qwen2.5-3B-Instruct": Qwen2Config(
        hidden_size=2048, intermediate_size=11008, num_attention_heads=16, vocab_size=151936,
        tie_word_embeddings=True, **_QWEN,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, vocab_size=152064,
        tie_word_embeddings=False, **_QWEN | {"num_key_value_heads": 4},
    ),
    "meta-llama/Llama-3.2-1B-Instruct": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, head_dim=64,
        tie_word_embeddings=True, rope_parameters=_rope(32.0), **_LLAMA,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_attention_heads=24, head_dim=128,
        tie_word_embeddings=True, rope_parameters=_rope(32.0), **_LLAMA,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, head_dim=128,
        tie_word_embeddings=False, rope_parameters=_rope(8.0), **_LLAMA,
    ),
}  # fmt: skip


def published_tokenizer() -> PreTrainedTokenizerBase:
    """A stand-in that encodes any text: the published ones cannot be made up. Far fewer ids than the models have."""
    return build_tokenizer(["Let's think step by step. 12 + 30 = 42 #### 42"], BuildConfig(vocab_size=300))


def write_model(name: str, directory: Path, *, layers: int, narrow: bool, tokenizer: PreTrainedTokenizerBase) -> Path:
    """bfloat16 weights of `layers` layers. narrow: eight numbers a head, all head counts and the vocabulary kept."""
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())
    config.num_hidden_layers = layers
    config.layer_types = None if not hasattr(config, "layer_types") else ["full_attention"] * layers
    if narrow:
        config.hidden_size = config.num_attention_heads * 8
        config.intermediate_size = config.hidden_size * 2
        config.head_dim = 8
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
