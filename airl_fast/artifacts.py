"""The directories a run leaves behind: its start policy, its final policy and its reward model.

A policy is an ordinary Hugging Face directory that `AutoModelForCausalLM.from_pretrained` loads. A reward model is
the backbone's directory (`AutoModel` loads it) with head.safetensors and head.json beside the weights. Where adapters
were trained, both are PEFT's directories, which record where the frozen weights lie; the start policy is then a
symbolic link to the user's model directory, unless a warm start changed it.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from airl_fast import manifest
from airl_fast.bridge import Bridge
from airl_fast.config import Config, ModelConfig
from airl_fast.data.chat import ChatFormat
from airl_fast.discriminator import Discriminator
from airl_fast.errors import UserError
from airl_fast.models.adapters import (
    adapter_base,
    is_adapted,
    is_adapter_directory,
    is_quantised,
    load_adapter,
    save_adapter,
    share,
)
from airl_fast.models.check import verify_model
from airl_fast.models.ends import write_ends
from airl_fast.models.heads import make_head
from airl_fast.models.load import LanguageModel, check_directory, load_language_model, load_model, load_tokenizer
from airl_fast.traces import TraceMaker

transformers_logging.disable_progress_bar()

START, POLICY, REWARD = "start", "final/policy", "final/discriminator"
_READER = f"discriminator.{manifest.MODEL}"  # of a run: the user's weights under its discriminator's adapters
_HEAD_SETTINGS = ("head", "action_rank", "lipschitz")


def save_policy(lm: LanguageModel, directory: Path, *, listed: bool = False) -> None:
    """listed: with the list of its files by which they are checked when they are read, as a part of a run has it."""

    def write(folder: Path) -> None:
        _save_model(lm.model, folder)
        lm.tokenizer.save_pretrained(folder)
        if lm.tokenizer.chat_template is not None:
            end_of_turn = ChatFormat.from_tokenizer(lm.tokenizer, lm.ends).end_of_turn
            write_ends(lm.model, (end_of_turn, *lm.ends), folder)

    write_whole(directory, write, listed=listed)


def load_policy(directory: Path, config: ModelConfig, device: torch.device) -> LanguageModel:
    """A saved policy, frozen weights quantised as `config` says."""
    base = base_directory(directory)
    if base is not None:
        check_base(directory, base)
    settings = config.model_copy(update={"path": str(base or directory), "build": None})
    lm = load_language_model(settings, device, key=str(directory))
    if base is not None:
        load_adapter(lm.model, directory, str(base), str(directory))
    return lm


def keep_start(lm: LanguageModel, config: Config, directory: Path) -> LanguageModel:
    """Make the start policy a part of the run, so that a resumed run finds it. Returns it as a resumed run loads it."""
    if config.model.lora is not None and config.model.path is not None and not config.warm_start.updates:
        try:
            target = Path(lm.model.name_or_path)
            directory.parent.mkdir(parents=True, exist_ok=True)
            manifest.keep_list(manifest.beside(directory), target)  # first: no link without its list
            if directory.is_symlink():  # of a start that was cut short
                directory.unlink()
            directory.symlink_to(target, target_is_directory=True)
        except OSError as error:
            raise UserError(f"{directory} could not be written ({error.strerror}); check the directory.") from None
        return lm
    save_policy(lm, directory, listed=True)
    return load_policy(directory, config.model, lm.device)


def base_directory(directory: Path) -> Path | None:
    """Where the frozen weights of a saved adapter lie; None for a whole model. A run that was moved finds its own.

    UserError for an adapter whose files are not as they were written, too.
    """
    if not is_adapter_directory(directory):
        return None
    manifest.check_model(directory)
    base = Path(adapter_base(directory, str(directory)))
    for run in directory.resolve().parents[:3]:
        if not base.is_dir() and base.name == START and (run / START).is_dir():
            base = (run / START).resolve()
    if not base.is_dir():
        raise UserError(
            f"{directory}: the frozen weights under this adapter are not at {base} any more; put them back, or correct "
            f"base_model_name_or_path in its adapter_config.json and delete its {manifest.MODEL}."
        )
    return base


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    if is_adapted(model):
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)


def keep_reader(config: Config, run: Path, *, continued: bool) -> None:
    """List the user's files that a discriminator's adapters lie over, where they are not the start policy's, or check
    them by the list that is there. UserError for what has changed, and for what cannot be written.

    continued: from a checkpoint, so that a list that is gone stays so: of these files as they were nobody knows.
    """
    discriminator = config.discriminator
    if not config.learns_reward or discriminator.lora is None or discriminator.path == "policy":
        return
    if continued and not (run / _READER).is_file():
        return
    try:
        manifest.keep_list(run / _READER, Path(discriminator.path).expanduser().resolve())
    except OSError as error:
        raise UserError(f"{run / _READER} could not be written ({error.strerror}); check the directory.") from None


def check_base(directory: Path, base: Path) -> None:
    """UserError where the frozen weights under the adapter in `directory` are not those that its run began with: of a
    directory of the user's only the run has a list."""
    for run in directory.resolve().parents[:3]:
        start = run / START
        if start.is_dir() and start.resolve() == base.resolve():
            manifest.check_model(start)
        elif directory.resolve() == run / REWARD:
            manifest.check_list(run / _READER, base)


def save_reward(model: Discriminator, tokenizer, directory: Path) -> None:
    def write(folder: Path) -> None:
        _save_model(model.backbone, folder)
        tokenizer.save_pretrained(folder)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.head.state_dict().items()}, folder / "head.safetensors"
        )
        settings = {name: getattr(model.config, name) for name in _HEAD_SETTINGS}
        (folder / "head.json").write_text(json.dumps(settings, indent=1) + "\n")

    write_whole(directory, write, listed=True)


def load_reward(
    directory: Path, config: Config, maker: TraceMaker, start: LanguageModel, device: torch.device
) -> tuple[Discriminator, Bridge]:
    """The reward model of a run, with its way to and from the tokens of `maker`'s policy.

    Its backbone is compared over packed rows as in training: it may be loaded where another kernel runs, or by another
    version of its code.
    """
    base = base_directory(directory)
    folder = directory if base is not None else check_directory(str(directory), "reward model")
    head_file, settings_file = folder / "head.safetensors", folder / "head.json"
    if not head_file.is_file() or not settings_file.is_file():
        raise UserError(
            f"{directory} has no head.safetensors and head.json; give the final/discriminator of an AIRL run."
        )
    backbone = _load_backbone(folder, base, config, start, device)
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
    tokenizer = load_tokenizer(folder, "reward model", trust_remote_code=config.model.trust_remote_code)
    same = tokenizer.backend_tokenizer.to_str() == start.tokenizer.backend_tokenizer.to_str()
    chat = None if same else ChatFormat.from_tokenizer(tokenizer)
    model = model.to(device).requires_grad_(False)
    verify_model(model.backbone, str(directory))
    return model, Bridge(maker=maker, chat=chat, device=device, regimes=model.regimes)


def _load_backbone(
    folder: Path, base: Path | None, config: Config, start: LanguageModel, device: torch.device
) -> PreTrainedModel:
    """base: of the adapter in `folder`. A base that is the start policy's is shared with it, not loaded again."""
    dtype, trust = getattr(torch, config.model.dtype), config.model.trust_remote_code
    if base is None:
        return load_model(folder, "reward model", dtype, trust_remote_code=trust, auto=AutoModel).eval()
    quantise = config.discriminator.quantise
    if Path(start.model.name_or_path) == base.resolve() and is_quantised(start.model) == (quantise is not None):
        backbone = share(start.backbone)
    else:  # with its output layer, as in training: what is quantised must be the same
        check_base(folder, base)
        whole = load_model(
            check_directory(str(base), "reward model"),
            "reward model",
            dtype,
            trust_remote_code=trust,
            auto=AutoModelForCausalLM,
            quantise=quantise,
            device=device,
        )
        backbone = whole.base_model
    load_adapter(backbone, folder, str(base), "reward model")
    return backbone.eval()


def write_whole(directory: Path, write: Callable[[Path], None], *, listed: bool = False) -> None:
    """Write into a sibling directory and rename, so that a directory that exists is complete. listed: see
    `save_policy`."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        if listed:
            manifest.write(temporary, manifest.MODEL)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{directory} could not be written ({reason}); check the directory and its space.") from None
