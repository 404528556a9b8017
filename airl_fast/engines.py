"""The engine a run samples with, for as long as it needs one; and one for any other model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from airl_fast.config import Config
from airl_fast.lab import Lab, held_out
from airl_fast.models.load import LanguageModel
from airl_fast.rollout.builtin import Builtin
from airl_fast.rollout.engine import Engine
from airl_fast.rollout.probe import Scored
from airl_fast.traces import TraceMaker
from airl_fast.types import Example

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
        try:
            yield lab
        finally:
            lab.engine.close()
        return
    prompts = [*lab.material.train, *lab.material.dev, *(held_out(lab, split) if split else ())]
    with _vllm(config, lab.start, lab.maker, prompts, lab.material.train, run) as engine:
        yield replace(lab, engine=engine)


@contextmanager
def engine_for(
    config: Config,
    lm: LanguageModel,
    maker: TraceMaker,
    prompts: Sequence[Example],
    demonstrations: Sequence[Example],
    run: Path,
) -> Iterator[Engine]:
    """A sampler of any model, the one that `config.rollout.engine` names, which is closed however the block ends.

    config.model: the settings that `lm` was loaded with. demonstrations: some, for vLLM's sentinel. run: whose
    directory holds the engine's scratch.
    """
    if config.rollout.engine == "builtin":
        engine = Builtin(lm, plain=config.rollout.why_no_graphs)
        try:
            yield engine
        finally:
            engine.close()
        return
    with _vllm(config, lm, maker, prompts, demonstrations, run) as engine:
        yield engine


@contextmanager
def _vllm(
    config: Config,
    lm: LanguageModel,
    maker: TraceMaker,
    prompts: Sequence[Example],
    demonstrations: Sequence[Example],
    run: Path,
) -> Iterator[Engine]:
    from airl_fast.rollout.vllm import Needs, VllmEngine

    probes = _probes(maker, demonstrations)
    rollout = config.rollout
    longest = max(len(maker.prompt_tokens(example)) for example in prompts) + rollout.max_new_tokens
    needs = Needs(
        longest=max(longest, *(len(probe.prompt) + len(probe.completion) + 1 for probe in probes)),
        sequences=min(rollout.batch_size, rollout.prompts_per_step * rollout.samples_per_prompt),
        probes=probes,
        scratch=run / SCRATCH,
    )
    engine = VllmEngine(config, lm, Path(lm.model.name_or_path), needs)
    try:
        engine.push(lm, "start")
        engine.check(lm, "start")
        yield engine
    finally:
        engine.close()


def _probes(maker: TraceMaker, demonstrations: Sequence[Example]) -> tuple[Scored, ...]:
    """The beginnings of a few demonstrations: text the policy should find likely, the same throughout a run."""
    found = []
    for example in demonstrations[:_PROBES]:
        trace = maker.expert(example, 0)
        found.append(Scored(prompt=trace.prompt_tokens, completion=trace.tokens[:_PROBE_TOKENS]))
    return tuple(found)
