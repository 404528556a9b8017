"""The tokens that a model says end what it writes: `eos_token_id` of its generation_config.json and its config.json.

Llama 3, Qwen and Gemma list several. transformers stops at any that the first of the two files lists; a model without
that file has it made from the second.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import GenerationConfig

GENERATION_CONFIG = "generation_config.json"


def listed_ends(model: torch.nn.Module, num_tokens: int) -> tuple[int, ...]:
    """Ascending and distinct. An id outside 0..num_tokens - 1 is left out: no sample can hold it."""
    configs = (getattr(model, "generation_config", None), model.config, model.config.get_text_config())
    found = {token for config in configs for token in _ids(getattr(config, "eos_token_id", None))}
    return tuple(sorted(token for token in found if 0 <= token < num_tokens))


def write_ends(model: torch.nn.Module, ends: Iterable[int], folder: Path) -> None:
    """The model's generation_config.json with these ends, in their order, so that whoever loads the folder stops where
    the samples of training did."""
    config = copy.deepcopy(getattr(model, "generation_config", None) or GenerationConfig())
    listed = list(dict.fromkeys(ends))
    config.eos_token_id = listed[0] if len(listed) == 1 else listed
    config.to_json_file(folder / GENERATION_CONFIG)


def _ids(value: object) -> list[int]:
    """None, a number or a list of numbers; whatever else stands there is no token."""
    values = value if isinstance(value, list | tuple) else [value]
    return [token for token in values if type(token) is int]
