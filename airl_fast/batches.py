"""What goes into a step's batch: samples of the policy, demonstrations, perturbed traces and replayed samples."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from airl_fast.lab import Lab
from airl_fast.models.attention import shares_prompts
from airl_fast.pack import pack
from airl_fast.rollout.engine import Engine, SamplingParams, SyncStats
from airl_fast.traces import TraceMaker
from airl_fast.types import Example, Kind, Trace, TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """Means over a step's samples. sample_pass_at_1: share with a correct answer, for the log only under AIRL.

    mean_length: tokens. truncated: share that never ended their turn.
    """

    sample_pass_at_1: float
    mean_length: float
    truncated: float


def sample_traces(lab: Lab, prompts: Sequence[Example], per_prompt: int, step: int, purpose: str) -> list[Trace]:
    """`per_prompt` traces of each prompt, prompt after prompt, drawn with the weights that the engine was given last;
    a trace's group is its prompt's place."""
    return draw(lab.engine, lab.maker, prompts, per_prompt, lab.sampling(step, purpose))


def draw(
    engine: Engine, maker: TraceMaker, prompts: Sequence[Example], per_prompt: int, params: SamplingParams
) -> list[Trace]:
    """`per_prompt` traces of each prompt, prompt after prompt; a trace's group is its prompt's place."""
    tokens = [maker.prompt_tokens(example) for example in prompts]
    groups = engine.sample(tokens, per_prompt, params)
    return [
        maker.sampled(example, group, drawn)
        for group, (example, samples) in enumerate(zip(prompts, groups, strict=True))
        for drawn in samples
    ]


def synchronise(lab: Lab, version: str) -> dict[str, SyncStats]:
    """Give the engine the policy as it stands, and make sure that it took it. Returns what there is to log."""
    lab.engine.push(lab.policy.lm, version)
    stats = lab.engine.check(lab.policy.lm, version)
    return {} if stats is None else {"sync": stats}


def rollout_stats(traces: Sequence[Trace]) -> RolloutStats:
    count = len(traces)
    return RolloutStats(
        sample_pass_at_1=sum(bool(trace.correct) for trace in traces) / count,
        mean_length=sum(len(trace.tokens) for trace in traces) / count,
        truncated=sum(not trace.finished for trace in traces) / count,
    )


def expert_traces(lab: Lab, prompts: Sequence[Example]) -> list[Trace]:
    return [lab.maker.expert(example, group) for group, example in enumerate(prompts)]


def pack_for_policy(lab: Lab, traces: Sequence[Trace]) -> TraceBatch:
    lm, share = lab.policy.lm, lab.config.model.share_prompts and shares_prompts(lab.policy.lm.backbone)
    return pack(traces, lm.device, lab.maker.training_boundaries, share=share, regimes=lm.regimes)


def perturbed_traces(
    lab: Lab, prompts: Sequence[Example], traces: Sequence[Trace], kind: Kind, step: int
) -> list[Trace]:
    """Broken copies of the traces of a kind, to follow `traces` in the batch: `pair` indexes that list.

    Each demonstration is broken discriminator.perturbed_per_expert times, samples of a prompt perturbed_per_prompt
    times in all. A source nothing can be changed in is passed over and another of its prompt is drawn.
    """
    settings = lab.config.discriminator
    copies = settings.perturbed_per_expert if kind == Kind.EXPERT else settings.perturbed_per_prompt
    return broken_copies(
        lab.maker, prompts, traces, kind, copies, settings.propagate, lab.rng(step, f"perturb-{kind.name}")
    )


def broken_copies(
    maker: TraceMaker,
    prompts: Sequence[Example],
    traces: Sequence[Trace],
    kind: Kind,
    copies: int,
    propagate: float,
    rng: random.Random,
) -> list[Trace]:
    """As `perturbed_traces`: `copies` of each demonstration, or of the samples of a prompt in all."""
    made: list[Trace] = []
    for group, example in enumerate(prompts):
        sources = [i for i, t in enumerate(traces) if t.group == group and t.kind == kind and t.finished]
        wanted = copies
        for i in rng.sample(sources, len(sources)) * (copies if kind == Kind.EXPERT else 1):
            if wanted == 0:
                break
            trace = maker.perturbed(example, traces[i], i, rng, propagate)
            if trace is not None:
                made.append(trace)
                wanted -= 1
    return made


@dataclass(slots=True)
class Replay:
    """Samples of earlier policies, kept as negatives; the oldest leave first."""

    size: int
    kept: list[tuple[Example, Trace]] = field(default_factory=list)

    def draw(self, lab: Lab, step: int, count: int, first_group: int) -> tuple[list[Example], list[Trace]]:
        """`count` of the kept, each as a group of its own numbered from `first_group`."""
        chosen = lab.rng(step, "replay").sample(self.kept, min(count, len(self.kept)))
        return [e for e, _ in chosen], [replace(t, group=first_group + i) for i, (_, t) in enumerate(chosen)]

    def add(self, lab: Lab, step: int, prompts: Sequence[Example], traces: Sequence[Trace], per_prompt: int) -> None:
        if not self.size:
            return
        rng = lab.rng(step, "replay-add")
        for group, example in enumerate(prompts):
            own = [trace for trace in traces if trace.group == group]
            self.kept += [(example, trace) for trace in rng.sample(own, min(per_prompt, len(own)))]
        del self.kept[: -self.size]
