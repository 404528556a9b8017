"""What a checkpoint holds: all that training changes, and nothing that it does not, such as the weights under adapters.

Draws of a step depend on seed and step alone, but for LoRA's dropout, which draws from torch's global generator.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from airl_fast import checkpoint
from airl_fast.batches import Replay
from airl_fast.errors import UserError
from airl_fast.lab import Lab
from airl_fast.types import Example, Kind, Trace


def save_state(directory: Path, step: int, lab: Lab, replay: Replay) -> Path:
    if lab.reward is not None:
        lab.reward.learning.wait()
    parts = {
        "replay": [[asdict(example), asdict(trace) | {"kind": int(trace.kind)}] for example, trace in replay.kept],
        "generators": checkpoint.rng_state(),
    }
    if lab.policy is not None:
        parts["policy"] = trained_state(lab.policy.lm.model)
        parts["policy_optimiser"] = lab.policy.optimiser.state_dict()
    if lab.reward is not None:
        parts["discriminator"] = trained_state(lab.reward.model)
        parts["discriminator_optimiser"] = lab.reward.optimiser.state_dict()
    return checkpoint.save(directory, step, parts, keep=lab.config.keep_checkpoints)


def load_state(path: Path, lab: Lab, replay: Replay) -> None:
    """Put a checkpoint's state into a lab built from the same configuration."""
    if lab.policy is not None:
        _load_trained(lab.policy.lm.model, path, "policy")
        lab.policy.optimiser.load_state_dict(checkpoint.load(path, "policy_optimiser"))
    if lab.reward is not None:
        _load_trained(lab.reward.model, path, "discriminator")
        lab.reward.optimiser.load_state_dict(checkpoint.load(path, "discriminator_optimiser"))
    replay.kept = [
        (Example(**example), Trace(**(trace | {"kind": Kind(trace["kind"])})))
        for example, trace in checkpoint.load(path, "replay")
    ]
    checkpoint.set_rng_state(checkpoint.load(path, "generators"))


def trained_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's state without its frozen parameters and what belongs to them (4-bit weights have constants)."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def is_frozen(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[:count]) in frozen for count in range(1, len(parts) + 1))

    return {key: tensor for key, tensor in module.state_dict().items() if not is_frozen(key)}


@torch.no_grad()
def _load_trained(module: torch.nn.Module, path: Path, part: str) -> None:
    own, saved = trained_state(module), checkpoint.load(path, part)
    if own.keys() != saved.keys() or any(own[key].shape != saved[key].shape for key in own):
        raise UserError(f"{path}: its {part} has other trained weights than this configuration's; start a new run.")
    for key, tensor in own.items():  # the module's own memory
        tensor.copy_(saved[key])
