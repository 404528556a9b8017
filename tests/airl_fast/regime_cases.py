"""Models whose rotary factors change at `END` tokens, and what transformers makes of one sequence alone."""

import copy
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from airl_fast.models.load import LanguageModel, wrap
from tests.airl_fast.model_cases import trace

END = 24  # tokens up to which the first factors hold
_SHORT, _LONG = [1.0, 1.0, 1.1, 1.2], [1.3, 2.0, 5.0, 9.0]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": _SHORT,
    "long_factor": _LONG,
    "original_max_position_embeddings": END,
    "factor": 8.0,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_LAYERS = ["sliding_attention", "full_attention"]
# architecture and what its configuration has besides the shape
MODELS: dict[str, tuple[str, dict]] = {
    "longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": END}),
    "longrope llama": ("llama", {"rope_parameters": _LONGROPE}),
    "longrope mscale": (
        "phimoe",
        {
            "rope_parameters": _LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.6},
            "num_local_experts": 4,
            "head_dim": 8,
        },
    ),
    "longrope in some layers": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": _LONGROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "layer_types": _LAYERS,
            "sliding_window": 11,
            "head_dim": 8,
        },
    ),
    "dynamic": ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": END}),
    "dynamic in some layers": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": _DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "layer_types": _LAYERS,
            "sliding_window": 11,
            "head_dim": 8,
            "max_position_embeddings": END,
        },
    ),
}


def plain_model(name: str, seed: int = 0) -> PreTrainedModel:
    """As transformers makes it: no packing, nothing hooked."""
    architecture, own = MODELS[name]
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 8 * END,
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **shape | own)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def model_of(name: str, seed: int = 0) -> LanguageModel:
    return wrap(plain_model(name, seed), None)


def fresh(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that has read nothing yet; its parameters are the model's own, so that gradients meet there."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def alone(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """log π of every completion token, by a fresh model that reads this sequence and no other."""
    whole = torch.tensor([[*prompt, *tokens]])
    logits = fresh(model)(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, whole[0, len(prompt) :, None])[:, 0]


def crossing_traces(lengths: Sequence[tuple[int, int]], seed: int = 0):
    """A trace for each (prompt length, whole length); equal prompt lengths have equal prompts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(40, (2, 400), generator=generator).tolist()
    made = []
    for i, (prompt, whole) in enumerate(lengths):
        completion = [(token + i) % 40 for token in ids[1][: whole - prompt]]
        made.append(trace(completion, prompt=ids[0][:prompt], group=prompt))
    return made


# (prompt, whole): below, at and above the end of the first regime, far above, prompts that cross it by themselves
LENGTHS = [(5, END - 1), (5, END), (5, END + 1), (7, 12), (5, 60), (30, 31), (30, END * 3), (9, 12), (9, 60)]
