"""The engine a run samples with, for as long as it needs one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from airl_fast.lab import Lab, held_out
from airl_fast.rollout.probe import Scored

SCRATCH = ".adapters"  # in the run's directory, while an engine runs
_PROBES, _PROBE_TOKENS = 4, 64


@contextmanager
def engine_of(lab: Lab, run: Path, split: str | None) -> Iterator[Lab]:
    """The lab with the engine that `rollout.engine` names, which is closed however the block ends.

    split: held-out prompts that will be sampled besides the lab's own; the longest prompt decides the engine's
    context. A vLLM engine starts from the frozen weights of the start policy; from then on its sentinel knows how near
    the two are when they hold the same.
    """
    config = lab.config
    samples = config.algorithm != "sft" or config.evaluate.every > 0 or split is not None
    if config.rollout.engine == "builtin" or not samples:
        yield lab
        return
    from airl_fast.rollout.vllm import Needs, VllmEngine

    probes = _probes(lab)
    prompts = [*lab.material.train, *lab.material.dev, *(held_out(lab, split) if split else ())]
    rollout = config.rollout
    longest = max(len(lab.maker.prompt_tokens(example)) for example in prompts) + rollout.max_new_tokens
    needs = Needs(
        longest=max(longest, *(len(probe.prompt) + len(probe.completion) + 1 for probe in probes)),
        sequences=min(rollout.batch_size, rollout.prompts_per_step * rollout.samples_per_prompt),
        probes=probes,
        scratch=run / SCRATCH,
    )
    engine = VllmEngine(config, lab.start, Path(lab.start.model.name_or_path), needs)
    try:
        engine.push(lab.start, "start")
        engine.check(lab.start, "start")
        yield replace(lab, engine=engine)
    finally:
        engine.close()


def _probes(lab: Lab) -> tuple[Scored, ...]:
    """The beginnings of a few demonstrations: text the policy should find likely, the same throughout a run."""
    found = []
    for example in lab.material.train[:_PROBES]:
        trace = lab.maker.expert(example, 0)
        found.append(Scored(prompt=trace.prompt_tokens, completion=trace.tokens[:_PROBE_TOKENS]))
    return tuple(found)
