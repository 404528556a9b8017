"""Look before training: what a run refuses, `--dry-run`, and `airl-fast make-model`."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from airl_fast.artifacts import save_policy
from airl_fast.baselines import baseline_config
from airl_fast.config import Config
from airl_fast.device import pick_device
from airl_fast.errors import UserError
from airl_fast.lab import Lab, Material, held_out, load_material, make_lab, make_start_model
from airl_fast.models.adapters import count_parameters, is_adapted, is_quantised, require
from airl_fast.models.load import LanguageModel
from airl_fast.optim import Optimiser
from airl_fast.rollout import vllm


def check(
    config: Config,
    material: Material,
    start: LanguageModel,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> Lab:
    """Everything a run would refuse later, refused now with one sentence: before hours of work, and before a
    directory is made. Returns the lab around the model as it is."""
    for name in config.evaluate.baselines:
        baseline_config(config, name, Path())
    if config.wandb and find_spec("wandb") is None:
        raise UserError("wandb=true, but wandb is not installed; pip install wandb, or set wandb=false.")
    for section, settings in (("model", config.model), ("discriminator", config.discriminator)):
        if settings.quantise is not None:
            require("bitsandbytes", f"{section}.quantise={settings.quantise}")
    if config.rollout.engine == "vllm":
        vllm.require(config, start)
    lab = make_lab(config, material, start, device, say)
    if not config.trains_policy:
        _refuse_unbreakable(lab)
    if config.evaluate.final:
        held_out(lab, "test", say)
    if config.warm_start.updates and not any(e.expert for e in material.task.load("warmstart", 1000)):
        raise UserError(
            f"warm_start.updates={config.warm_start.updates}: task {material.task.name} has no warm-start "
            "demonstrations; give it some (data.path, data.options) or set it to 0."
        )
    return lab


def dry_run(config: Config) -> str:
    """Load the data, build or load the models and check every length, without training. Returns what was found."""
    notes: list[str] = []
    device = pick_device(config)
    material = load_material(config, notes.append)
    lab = check(config, material, make_start_model(config, material.task, device), device, notes.append)
    material = lab.material
    prompt_lengths = [len(lab.maker.prompt_tokens(example)) for example in material.train]
    expert_lengths = [len(lab.maker.expert(example, 0).tokens) for example in material.train]
    per_step = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    trained = what_is_trained(lab)
    policy = lab.start if lab.policy is None else lab.policy.lm
    lines = [
        f"algorithm       {config.algorithm}, {config.steps} steps, seed {config.seed}, device {device}",
        f"task            {material.task.name}: {len(material.train)} demonstrated prompts, {len(material.dev)} dev",
        f"prompt          {_range(prompt_lengths)} tokens",
        f"demonstration   {_range(expert_lengths)} tokens",
        f"policy          {_describe(policy.model)}, context {policy.max_length}",
        f"  trained       {trained.get('policy', 'not at all: it is the baseline of the reward')}",
        *_reward_lines(lab),
        f"samples a step  {per_step} of at most {config.rollout.max_new_tokens} tokens",
        *notes,
        "dry run: configuration, data and models fit together; nothing was written.",
    ]
    return "\n".join(lines)


def make_model(config: Config, directory: Path) -> str:
    """Write the model and tokenizer that a preset would build, untrained, as a Hugging Face directory."""
    if config.model.build is None:
        raise UserError(
            "make-model: this configuration loads model.path and builds nothing; give one with model.build."
        )
    if directory.exists():
        raise UserError(f"make-model: {directory} exists; choose another directory with -o.")
    material = load_material(config)
    lm = make_start_model(config, material.task, pick_device(config))
    save_policy(lm, directory)
    return f"{_describe(lm.model)} and a tokenizer of {len(lm.tokenizer)} tokens written to {directory}"


def _refuse_unbreakable(lab: Lab) -> None:
    """A reward that is trained alone learns from perturbed demonstrations, so there must be one."""
    propagate = lab.config.discriminator.propagate
    for example in lab.material.train:
        if lab.maker.perturbed(example, lab.maker.expert(example, 0), 0, lab.rng(0, "unbreakable"), propagate):
            return
    raise UserError(
        f"algorithm=reward: none of the {len(lab.material.train)} demonstrations holds a number, an operator or an "
        "answer to perturb, so there is nothing to learn from; use algorithm=airl or other data (data.path)."
    )


def _reward_lines(lab: Lab) -> list[str]:
    if lab.reward is None:
        return []
    kind = lab.config.discriminator.head
    shared = "the policy's tokenizer" if lab.reward.bridge.chat is None else "a tokenizer of its own"
    return [
        f"discriminator   {_describe(lab.reward.model.backbone)}, {kind} head, {shared}",
        f"  trained       {what_is_trained(lab)['discriminator']}",
    ]


def _describe(model) -> str:
    return f"{type(model).__name__} of {count_parameters(model)[0] / 1e6:.2f}M parameters"


def what_is_trained(lab: Lab) -> dict[str, str]:
    """By model: what of it is trained, and by what."""
    parts = {} if lab.policy is None else {"policy": (lab.policy.lm.model, lab.policy.optimiser)}
    if lab.reward is not None:
        parts["discriminator"] = (lab.reward.model.backbone, lab.reward.optimiser)
    return {name: _trained(model, optimiser) for name, (model, optimiser) in parts.items()}


def _trained(model, optimiser: Optimiser) -> str:
    if not is_adapted(model):
        return f"all of it, {optimiser.description}"
    over = "4-bit" if is_quantised(model) else str(next(model.parameters()).dtype).removeprefix("torch.")
    adapters = f"adapters of {count_parameters(model)[1] / 1e6:.2f}M parameters over frozen {over} weights"
    return f"{adapters}, {optimiser.description}"


def _range(lengths: list[int]) -> str:
    return f"{min(lengths)} to {max(lengths)}"
