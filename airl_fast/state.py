"""What a checkpoint holds: all that training changes. Random draws depend on seed and step alone, so none are saved."""

from dataclasses import asdict
from pathlib import Path

from airl_fast import checkpoint
from airl_fast.batches import Replay
from airl_fast.lab import Lab
from airl_fast.types import Example, Kind, Trace


def save_state(directory: Path, step: int, lab: Lab, replay: Replay) -> Path:
    parts = {
        "policy": lab.policy.lm.model.state_dict(),
        "policy_optimiser": lab.policy.optimiser.state_dict(),
        "replay": [[asdict(example), asdict(trace) | {"kind": int(trace.kind)}] for example, trace in replay.kept],
    }
    if lab.reward is not None:
        parts["discriminator"] = lab.reward.model.state_dict()
        parts["discriminator_optimiser"] = lab.reward.optimiser.state_dict()
    return checkpoint.save(directory, step, parts, keep=lab.config.keep_checkpoints)


def load_state(path: Path, lab: Lab, replay: Replay) -> None:
    """Put a checkpoint's state into a lab built from the same configuration."""
    lab.policy.lm.model.load_state_dict(checkpoint.load(path, "policy"))
    lab.policy.optimiser.load_state_dict(checkpoint.load(path, "policy_optimiser"))
    if lab.reward is not None:
        lab.reward.model.load_state_dict(checkpoint.load(path, "discriminator"))
        lab.reward.optimiser.load_state_dict(checkpoint.load(path, "discriminator_optimiser"))
    replay.kept = [
        (Example(**example), Trace(**(trace | {"kind": Kind(trace["kind"])})))
        for example, trace in checkpoint.load(path, "replay")
    ]
