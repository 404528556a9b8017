"""Make a small Hugging Face model directory from nothing but text: `airl-fast make-model PRESET -o DIR`.

The embedded presets train on it, so that nothing has to be downloaded. It is an ordinary directory: config.json,
model.safetensors and a fast tokenizer with a chat template.
"""

from collections.abc import Iterable

import torch
from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
)

from airl_fast.config import BuildConfig

PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(texts: Iterable[str], config: BuildConfig) -> PreTrainedTokenizerBase:
    """Byte-level BPE over `texts` with Qwen2's rules: it encodes any string, and every digit is a token.

    The rules are Qwen2's because AutoTokenizer imposes them on a directory whose model is a Qwen2. The reasoning tags
    are single tokens that survive decoding.
    """
    core = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(TAGS),
        special_tokens=[PAD, END, USER, ASSISTANT, SYSTEM],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,  # or a reloaded Qwen2 tokenizer adds its own, which the model has no embedding for
        model_max_length=config.max_length,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(config: BuildConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> torch.nn.Module:
    """A causal LM with random weights drawn from `seed`, embeddings tied, in float32."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "initializer_range": config.hidden_size**-0.5,  # the default 0.02 learns many times slower at this width
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    architecture = Qwen2Config if config.architecture == "qwen2" else LlamaConfig
    return AutoModelForCausalLM.from_config(architecture(**shape), attn_implementation="sdpa")
