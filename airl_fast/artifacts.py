"""The directories a run leaves behind: its start policy, its final policy and its reward model.

A policy is an ordinary Hugging Face directory that `AutoModelForCausalLM.from_pretrained` loads. A reward model is
the backbone's directory (`AutoModel` loads it) with head.safetensors and head.json beside the weights.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from airl_fast.bridge import Bridge
from airl_fast.config import Config, ModelConfig
from airl_fast.data.chat import ChatFormat
from airl_fast.discriminator import Discriminator
from airl_fast.errors import UserError
from airl_fast.models.heads import make_head
from airl_fast.models.load import LanguageModel, check_directory, load_language_model, load_model, load_tokenizer
from airl_fast.traces import TraceMaker

transformers_logging.disable_progress_bar()

START, POLICY, REWARD = "start", "final/policy", "final/discriminator"
_HEAD_SETTINGS = ("head", "action_rank", "lipschitz")


def save_policy(lm: LanguageModel, directory: Path) -> None:
    def write(folder: Path) -> None:
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)

    _write_whole(directory, write)


def load_policy(directory: Path, config: ModelConfig, device: torch.device) -> LanguageModel:
    settings = config.model_copy(update={"path": str(directory), "build": None})
    return load_language_model(settings, device, key=str(directory))


def save_reward(model: Discriminator, tokenizer, directory: Path) -> None:
    def write(folder: Path) -> None:
        model.backbone.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.head.state_dict().items()}, folder / "head.safetensors"
        )
        settings = {name: getattr(model.config, name) for name in _HEAD_SETTINGS}
        (folder / "head.json").write_text(json.dumps(settings, indent=1) + "\n")

    _write_whole(directory, write)


def load_reward(
    directory: Path, config: Config, maker: TraceMaker, start: LanguageModel, device: torch.device
) -> tuple[Discriminator, Bridge]:
    """The reward model of a run, with its way to and from the tokens of `maker`'s policy."""
    folder = check_directory(str(directory), "reward model")
    head_file, settings_file = folder / "head.safetensors", folder / "head.json"
    if not head_file.is_file() or not settings_file.is_file():
        raise UserError(
            f"{directory} has no head.safetensors and head.json; give the final/discriminator of an AIRL run."
        )
    trust = config.model.trust_remote_code
    dtype = getattr(torch, config.model.dtype)
    backbone = load_model(folder, "reward model", dtype, trust_remote_code=trust, auto=AutoModel).eval()
    try:
        settings = json.loads(settings_file.read_text())
        head = make_head(settings["head"], backbone, settings["action_rank"])
        discriminator = config.discriminator.model_copy(update=settings)
        model = Discriminator(backbone, head, discriminator, config.reward, start)
        head.load_state_dict(load_file(head_file))
    except (ValueError, KeyError, RuntimeError, SafetensorError):  # not JSON, no such key, other shapes, damaged
        raise UserError(
            f"reward model: head.json and head.safetensors in {directory} are damaged or not of this backbone; "
            "give the final/discriminator of an AIRL run."
        ) from None
    tokenizer = load_tokenizer(folder, "reward model", trust_remote_code=trust)
    same = tokenizer.backend_tokenizer.to_str() == start.tokenizer.backend_tokenizer.to_str()
    chat = None if same else ChatFormat.from_tokenizer(tokenizer)
    return model.to(device).requires_grad_(False), Bridge(maker=maker, chat=chat, device=device)


def _write_whole(directory: Path, write: Callable[[Path], None]) -> None:
    """Write into a sibling directory and rename, so that a directory that exists is complete."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{directory} could not be written ({reason}); check the directory and its space.") from None
