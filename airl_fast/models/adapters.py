"""Low-rank adapters (Hu et al. 2021) through PEFT, and 4-bit weights (NF4, Dettmers et al. 2023) by bitsandbytes.

The adapters are injected into the plain transformers model, so that every forward of it is the adapted one and
nothing has to be switched on or off. Policy, start policy and discriminator are module trees of their own over the
*same* frozen parameters: three models cost the memory of one, and may run at the same time.
"""

import copy
import dataclasses
import importlib
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from airl_fast.errors import UserError

if TYPE_CHECKING:
    from airl_fast.config import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
_PREFIX = "base_model.model."  # what PEFT puts before the names of a model's own parameters
_ADAPTER = "default"
# Of what PEFT writes about a LoRA adapter: what is handed back to it, and what changes nothing that is computed.
_HONOURED = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "task_type",
)  # fmt: skip
_INFORMATION = (
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "qalora_group_size",
)  # fmt: skip
_DRAWN = (True, False, "gaussian")  # of init_lora_weights: all give numbers that the saved ones replace


logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it misses a kernel that lies on the Hub


def require(package: str, setting: str) -> ModuleType:
    """Import peft or bitsandbytes, or say in one sentence which setting wants it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{setting} needs the package {package} ({error}); pip install 'airl-fast[lora]', or leave it out."
        ) from None


# ---------------------------------------------------------------------------------------------- 4-bit weights


def nf4(dtype: torch.dtype, setting: str) -> BitsAndBytesConfig:
    """How transformers loads a model in NF4: double quantisation, products in `dtype`, output layer as it is."""
    require("bitsandbytes", setting)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes on the CPU from repacking weights in place at the first forward without gradients.

    Its repacked form has no backward: adapters below such a layer would get no gradient, without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(model: nn.Module) -> bool:
    return any(getattr(p, "quant_state", None) is not None for p in model.parameters())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) numbers of the model, a 4-bit weight counted as one."""
    sizes = [
        (p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel(), p.requires_grad)
        for p in model.parameters()
    ]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


# ---------------------------------------------------------------------------------------------- adapters


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same parameters: adapters put into it are not in the first one."""
    memo: dict[int, object] = {id(p): p for p in model.parameters()}
    memo |= {id(m.quant_state): m.quant_state for m in model.modules() if hasattr(m, "quant_state")}
    return copy.deepcopy(model, memo)


def trainable(
    model: PreTrainedModel,
    lora: "LoraConfig | None",
    *,
    base: str,
    seed: int,
    checkpointing: bool = False,
    own: bool = False,
    key: str = "model",
) -> PreTrainedModel:
    """What an optimiser trains: `model` with adapters drawn from `seed`, or all of it.

    base: the directory of the frozen weights, recorded beside saved adapters. own: the caller has no further use for
    `model`, so it is trained in place; otherwise it stays as it is. key: the section of the configuration.
    """
    if lora is not None:
        model = model if own else share(model)
        _add_adapter(model, lora, base, seed, f"{key}.lora")
    else:
        model = (model if own else copy.deepcopy(model)).requires_grad_(True)
    switched: list[nn.Module] = []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        switched += [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if lora is not None and lora.dropout > 0:
        dropouts = [m.lora_dropout for m in model.modules() if hasattr(m, "lora_dropout")]
        switched += [m for holder in dropouts for m in holder.modules()]
    if switched:
        model.base_model.register_forward_pre_hook(_TrainOnlyWithGradients(switched))
    return model


class _TrainOnlyWithGradients:
    """Puts modules into training mode for the forward passes that record gradients, into evaluation mode for others.

    A model stays in evaluation mode as a whole. LoRA's dropout and a layer's choice to recompute its activations
    (which refuses a KV cache) read their own module's flag, and belong to gradient passes alone: sampling and scoring
    are exact.
    """

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules

    def __call__(self, backbone: nn.Module, arguments: tuple) -> None:
        training = torch.is_grad_enabled()
        for module in self.modules:
            module.training = training


def _add_adapter(model: PreTrainedModel, config: "LoraConfig", base: str, seed: int, key: str) -> None:
    peft = require("peft", key)
    targets = config.targets if config.targets == "all-linear" else list(config.targets)
    if targets != "all-linear":
        _check_targets(model, targets, key)
    task = "CAUSAL_LM" if model.get_output_embeddings() is not None else "FEATURE_EXTRACTION"
    torch.manual_seed(seed)
    model.add_adapter(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            task_type=task,
        )
    )
    _finish(model, base)


def _finish(model: PreTrainedModel, base: str) -> None:
    """Adapters in float32 whatever the base is: a step of lr 1e-5 would vanish in most bfloat16 weights."""
    model.peft_config[_ADAPTER].base_model_name_or_path = base
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    model.eval()


def _check_targets(model: PreTrainedModel, targets: list[str], key: str) -> None:
    names = dict(model.named_modules())
    head = model.get_output_embeddings()
    linear = sorted({n.rpartition(".")[2] for n, m in names.items() if isinstance(m, nn.Linear) and m is not head})
    for target in targets:
        found = [module for name, module in names.items() if name == target or name.endswith(f".{target}")]
        if head is not None and any(module is head for module in found):
            raise UserError(
                f"{key}.targets: {target} is the output layer, which the fused log-probabilities read as it is; "
                f"leave it out (all-linear does)."
            )
        if not found or not all(isinstance(module, nn.Linear) for module in found):
            raise UserError(
                f"{key}.targets: {target} is no linear layer of {type(model).__name__}; choose all-linear or "
                f"some of {', '.join(linear)}."
            )


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model that computes what `model` with its adapters does, made in place."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            layer = module.get_base_layer()
            merged = layer.weight.float() + module.get_delta_weight(_ADAPTER).float()  # rounded once
            layer.weight = nn.Parameter(merged.to(layer.weight.dtype), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    del model.peft_config
    model._hf_peft_config_loaded = False  # transformers' mark of an adapted model, which saves adapters alone
    return model


# ---------------------------------------------------------------------------------------------- files


def is_adapted(model: nn.Module) -> bool:
    return bool(getattr(model, "peft_config", None))


def is_adapter_directory(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors as PEFT writes them, into an existing folder.

    PEFT's `PeftModel.from_pretrained(base, folder)`, transformers and vLLM read it.
    """
    peft = require("peft", "model.lora")
    state = peft.get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def adapter_base(folder: Path, key: str) -> str:
    """The directory of the weights that a saved adapter belongs to."""
    base = _saved_settings(folder, key).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{key}: {folder / CONFIG} names no base_model_name_or_path; add the base model's directory.")
    return base


def _saved_settings(folder: Path, key: str) -> dict[str, object]:
    """What an adapter_config.json says, which may be anyone's: it can make PEFT import a module that it names, read a
    pickle or change the frozen weights. UserError for one that sets more than a plain LoRA adapter does."""
    file = folder / CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {file} does not load ({_reason(error)}); save the adapter again.") from None
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{key}: {file} says peft_type={settings.get('peft_type')!r:.60}, and only LORA is read; "
            "save a LoRA adapter, or merge this one with PEFT."
        )
    fields = dataclasses.fields(require("peft", key).LoraConfig)
    defaults = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}
    for name, value in settings.items():
        if name in _HONOURED or name in _INFORMATION or (name == "init_lora_weights" and value in _DRAWN):
            continue
        # The default of another version's setting is not known here, but nothing is set by what is empty.
        if value != defaults[name] if name in defaults else value:
            raise UserError(
                f"{key}: {file} sets {name[:60]}, which is not read; save a LoRA adapter that leaves it out, "
                "or merge this one with PEFT."
            )
    return settings


def load_adapter(model: PreTrainedModel, folder: Path, base: str, key: str) -> None:
    """Put the saved adapter into `model`, in place and frozen. UserError when it is not of this model."""
    peft = require("peft", key)
    settings = _saved_settings(folder, key)
    try:
        honoured = {name: settings[name] for name in _HONOURED if name in settings}
        model.add_adapter(peft.LoraConfig(**honoured, inference_mode=True))
        if hasattr(model.get_output_embeddings(), "lora_A"):
            raise ValueError("it adapts the output layer, which the log-probabilities read as it is")
        _finish(model, base)
        tensors = {name.removeprefix(_PREFIX): t for name, t in load_file(folder / WEIGHTS).items()}
        own = peft.get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
        if tensors.keys() != own.keys():
            raise ValueError("its layers are not this model's")
        peft.set_peft_model_state_dict(model, tensors, adapter_name=_ADAPTER)
    except Exception as error:  # PEFT raises whatever the values that it is handed raise
        raise UserError(
            f"{key}: the adapter in {folder} does not fit the model in {base} ({_reason(error)})."
        ) from None
    model.requires_grad_(False)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
