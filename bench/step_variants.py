"""The ways to make one step that `bench.step` times, each in a process of its own: ours, padded, and TRL's.

`python -m bench.step_variants NAME MODEL_FOLDER SCENARIO_JSON STEPS DEVICE` prints one JSON object.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from airl_fast.batches import Replay, expert_traces, pack_for_policy, perturbed_traces
from airl_fast.device import ops_backend
from airl_fast.lab import Lab
from airl_fast.metrics import Metrics, peak_rss_gib
from airl_fast.models.forward import attention_kernel
from airl_fast.train import airl_step, learn
from airl_fast.types import Kind, Trace
from bench.padded import padded
from bench.step_flops import Work, update_work
from bench.step_setup import Scenario, lab_of

WARM = 2
PHASES = ("sample", "perturb", "pack", "discriminator", "score", "policy", "sync")
UPDATES = ("discriminator", "score", "policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """seconds: of each timed step. phases: of each timed step, by name. peak_mib: the process's (on CUDA the
    allocator's). start_mib: what it held before the first step. work: of the update phases, in 10^12 operations."""

    name: str
    backend: str
    seconds: list[float]
    phases: list[dict[str, float]]
    peak_mib: float
    start_mib: float
    work: dict[str, float]


def ours(
    scenario: Scenario, model: Path, device: torch.device, steps: int, *, plain: bool,
    on_step: Callable[[int, float, dict[str, float]], None] = lambda step, seconds, phases: None,
) -> Measured:  # fmt: skip
    """on_step: called after every step, the warm ones too, with its number, seconds and seconds by phase."""
    lab = lab_of(scenario, model, device)
    replay, phases, seconds = Replay(0), [], []
    start = _held_mib(device)
    with (
        tempfile.TemporaryDirectory() as folder,
        padded() if plain else nullcontext(),
        Metrics(Path(folder) / "m.jsonl", total_steps=WARM + steps, device=device) as meter,
    ):
        for step in range(1, WARM + steps + 1):
            began = time.perf_counter()
            result = airl_step(lab, step, meter, replay)
            values = meter.log(step, tokens=result.tokens, **result.records)
            _wait(device)
            seconds.append(time.perf_counter() - began)
            phases.append({name: values.get(f"seconds/{name}", 0.0) for name in PHASES})
            on_step(step, seconds[-1], phases[-1])
    kernel = attention_kernel(lab.policy.lm.backbone, device)
    attention = "padded, transformers' SDPA" if plain else f"packed, shared prompts, {kernel.name}"
    return Measured(
        name="padded" if plain else "airl-fast",
        backend=f"{attention}; ops {ops_backend(device)}",
        seconds=seconds[WARM:],
        phases=phases[WARM:],
        peak_mib=_peak_mib(device),
        start_mib=start,
        work=asdict(_work(lab)),
    )


def trl(scenario: Scenario, model: Path, device: torch.device, steps: int) -> Measured:
    """TRL's GRPOTrainer on the same model and prompts. Its reward function is our discriminator: the same updates
    and scores of the same number of traces, so that sampling and the policy's update are what differs."""
    from bench.peers.trl_grpo import train

    lab = lab_of(scenario, model, device)
    spent: list[float] = []

    def reward(completions: list[list[int]], indices: list[int]) -> list[float]:
        began = time.perf_counter()
        values = _judge(lab, completions, indices)
        _wait(device)
        spent.append(time.perf_counter() - began)
        return values

    start = _held_mib(device)
    seconds, version = train(scenario, model, lab, WARM + steps, reward)
    phases = [{"discriminator": s} for s in spent]
    return Measured(
        name="trl",
        backend=f"TRL {version} GRPOTrainer, padded, transformers' generate",
        seconds=seconds[WARM:],
        phases=phases[WARM:],
        peak_mib=_peak_mib(device),
        start_mib=start,
        work={},
    )


def _judge(lab: Lab, completions: list[list[int]], indices: list[int]) -> list[float]:
    """Update and score as an AIRL step does, on these completions; a trace's mean reward each."""
    distinct = list(dict.fromkeys(indices))
    prompts = [lab.material.train[i] for i in distinct]
    experts = expert_traces(lab, prompts)
    groups = [distinct.index(i) for i in indices]
    samples = [_sample(group, experts, tokens) for group, tokens in zip(groups, completions, strict=True)]
    known = experts + samples
    broken = perturbed_traces(lab, prompts, known, Kind.EXPERT, 1)
    learn(lab.reward, pack_for_policy(lab, known + broken), lab.config)
    batch = pack_for_policy(lab, known)
    rewards = lab.reward.model.score(batch).split(batch.loss_lengths)
    return [r.mean().item() for r in rewards[len(experts) :]]


def _sample(group: int, experts: list[Trace], tokens: list[int]) -> Trace:
    prompt = experts[group].prompt_tokens
    return Trace(group=group, kind=Kind.POLICY, prompt_tokens=prompt, tokens=tuple(tokens), text="", finished=False)


def _work(lab: Lab) -> Work:
    prompts = lab.prompts(1)
    experts = expert_traces(lab, prompts)
    tokens = [1] * lab.config.rollout.max_new_tokens
    samples = [
        _sample(group, experts, tokens)
        for group in range(len(experts))
        for _ in range(lab.config.rollout.samples_per_prompt)
    ]
    broken = perturbed_traces(lab, prompts, experts, Kind.EXPERT, 1)
    return update_work(lab, pack_for_policy(lab, experts + samples), pack_for_policy(lab, experts + samples + broken))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_gib() * 1024


def _held_mib(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_gib() * 1024


VARIANTS: dict[str, Callable[..., Measured]] = {
    "airl-fast": lambda *a: ours(*a, plain=False),
    "padded": lambda *a: ours(*a, plain=True),
    "trl": trl,
}


def main(arguments: list[str]) -> None:
    name, folder, scenario, steps, device = arguments
    found = VARIANTS[name](Scenario(**json.loads(scenario)), Path(folder), torch.device(device), int(steps))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
