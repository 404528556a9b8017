"""What a frozen reward can be tried on: policies by name, tasks by words, prompts that fit, and their samples."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from airl_fast.artifacts import POLICY, START, load_policy
from airl_fast.batches import draw
from airl_fast.config import Config, ModelConfig
from airl_fast.data.task import Task, make_task
from airl_fast.engines import engine_for
from airl_fast.errors import UserError
from airl_fast.evaluate.policies import Samples
from airl_fast.judge.judge import Judge, bridge_from
from airl_fast.lab import make_maker, sampling_params
from airl_fast.models.adapters import is_adapter_directory
from airl_fast.models.check import verify_packing
from airl_fast.overrides import parse_yaml
from airl_fast.saved import run_config
from airl_fast.types import Example

Say = Callable[[str], None]
POLICY_WORDS = ("start", "airl", "sft", "grpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a policy lies and how its weights are to be loaded. label: for tables. purpose: of its draws; those of a
    run's own policies are the draws of `airl-fast eval`, so that figures repeat."""

    label: str
    directory: Path
    model: ModelConfig
    purpose: str


def find_policy(name: str, run: Path, config: Config) -> Source:
    """`start`, `airl`, `sft` or `grpo` of the run, another run's directory (its final policy), or a model directory.

    What `config` trusts, which is what this call does, holds for all of them.
    """
    if name in POLICY_WORDS:
        own = {"start": run / START, config.algorithm: run / POLICY}
        directory = own.get(name, run / "baselines" / name / POLICY)
        if not directory.is_dir():
            raise UserError(
                f"--policy {name}: {run} has no {directory.relative_to(run)}; it did not train that policy."
            )
        return Source(label=name, directory=directory, model=config.model, purpose=f"final-{name}")
    directory = Path(name).expanduser()
    label = "/".join(directory.resolve().parts[-2:])
    if (directory / "config.yaml").is_file():
        if not (directory / POLICY).is_dir():
            raise UserError(f"--policy {name}: the run has no {POLICY} yet; continue it with --resume auto.")
        theirs = run_config(directory, trust_remote_code=config.model.trust_remote_code)
        return Source(label=label, directory=directory / POLICY, model=theirs.model, purpose="final-transfer")
    if not (directory / "config.json").is_file() and not is_adapter_directory(directory):
        raise UserError(
            f"--policy {name}: neither one of {', '.join(POLICY_WORDS)}, nor a run's directory, nor a model directory."
        )
    plain = config.model.model_copy(update={"lora": None, "quantise": None})
    return Source(label=label, directory=directory, model=plain, purpose="final-transfer")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """A task with its name for tables."""

    label: str
    task: Task


def find_task(words: str | None, config: Config, extra: Sequence[str] = ()) -> TaskSource:
    """From `NAME` or `NAME:key=value,key=value` (keys: path, and the task's options) and further `key=value` words.

    None, and the run's own task by its name, begin with the run's own path and options.
    """
    data = config.data
    name, _, tail = (words or data.task).partition(":")
    pairs = [*(re.split(r",(?=\w+=)", tail) if tail else ()), *extra]
    given: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(
                f"--task {words or name}: {pair!r} is no key=value; write --task NAME:path=DIR,option=value."
            )
        given[key] = value if key == "path" else parse_yaml(value, origin=f"--task {words or name}, {pair!r}")
    options: dict[str, object] = {**data.options, "path": data.path} if name == data.task else {}
    options |= given
    path = options.pop("path", None)
    task = make_task(name, path=path, seed=config.seed, **options)
    shown = [f"{key}={value}" for key, value in given.items() if key != "path"]
    return TaskSource(label=" ".join([name, *shown]), task=task)


def with_policy(own: Judge, source: Source) -> Judge:
    """The frozen reward of `own`, the judge of its run as it is, before another policy's tokens.

    UserError for a policy that does not load, and for another tokenizer under a reward that reads log-probabilities.
    """
    if source.purpose == "final-start":
        return own
    lm = load_policy(source.directory, source.model, own.policy.device)
    verify_packing(lm)
    same = lm.tokenizer.backend_tokenizer.to_str() == own.policy.tokenizer.backend_tokenizer.to_str()
    if not same and own.model.head.needs_reference:
        raise UserError(
            f"--policy {source.label}: its tokenizer is not that of the reward's start policy, whose log-probabilities "
            "discriminator.head=logprob reads; choose a policy of that tokenizer, or a reward with another head."
        )
    bridge = bridge_from(own.model, own.bridge, own.policy.tokenizer, None if same else lm.tokenizer, own.config)
    return replace(own, bridge=replace(bridge, maker=make_maker(own.config, own.task, lm)), policy=lm)


def with_task(judge: Judge, task: Task) -> Judge:
    """The same, cutting steps and reading answers as another task does, under that task's system message."""
    return replace(judge, bridge=replace(judge.bridge, maker=make_maker(judge.config, task, judge.policy)))


def fit_prompts(judge: Judge, examples: Sequence[Example], too_long: str, say: Say) -> list[Example]:
    """The examples whose prompt and sample fit the contexts of policy and discriminator. Others raise UserError, or are
    left out and counted under too_long=drop; UserError when none is left."""
    sample = judge.config.rollout.max_new_tokens
    limits = [("policy", judge.policy.max_length, judge.maker)]
    context = judge.model.backbone.config.get_text_config().max_position_embeddings
    limits.append(("discriminator", context, replace(judge.maker, chat=judge.bridge.chat or judge.maker.chat)))
    fitting, excess = list(examples), ""
    for name, limit, maker in limits:
        needed = [len(maker.prompt_tokens(example)) + sample for example in fitting]
        long = [i for i, tokens in enumerate(needed) if tokens > limit]
        if long and not excess:
            excess = (
                f"the {name}'s context is {limit} tokens, but prompt {fitting[long[0]].id} and "
                f"rollout.max_new_tokens={sample} need {needed[long[0]]}"
            )
        fitting = [example for example, tokens in zip(fitting, needed, strict=True) if tokens <= limit]
    return _kept(examples, fitting, excess, too_long, say)


def fit_samples(judge: Judge, samples: Samples, too_long: str, say: Say) -> Samples:
    """Without the prompts that have a sample which the discriminator cannot read in its own tokens."""
    n, excess = samples.per_prompt, ""
    kept: list[int] = []
    for group in range(len(samples.examples)):
        reason = judge.excess(samples.traces[group * n : (group + 1) * n], samples.examples)
        excess = excess or (f"a sample of {reason}" if reason else "")
        if reason is None:
            kept.append(group)
    _kept(samples.examples, [samples.examples[group] for group in kept], excess, too_long, say)
    traces = [replace(samples.traces[old * n + i], group=new) for new, old in enumerate(kept) for i in range(n)]
    return replace(samples, examples=tuple(samples.examples[group] for group in kept), traces=tuple(traces))


def sample(
    judge: Judge, source: Source, examples: Sequence[Example], per_prompt: int, demonstrations: Sequence[Example],
    run: Path, say: Say,
) -> Samples:  # fmt: skip
    """`per_prompt` samples of the judge's policy on each prompt, by the engine of the reward's run."""
    config = judge.config.model_copy(update={"model": source.model})
    with engine_for(config, judge.policy, judge.maker, examples, demonstrations, run) as engine:
        say(f"sample {per_prompt} of {source.label} on each of {len(examples)} prompts, by {engine.name}")
        params = sampling_params(config, judge.maker.chat, 0, source.purpose)
        traces = draw(engine, judge.maker, examples, per_prompt, params)
    return Samples(examples=tuple(examples), traces=tuple(traces), per_prompt=per_prompt)


def load_prompts(task: TaskSource, split: str, count: int) -> list[Example]:
    examples = task.task.load(split, count)
    if not examples:
        raise UserError(f"task {task.label}: its {split} split holds no prompt; choose another --split or its options.")
    return examples


def _kept(before: Sequence[Example], after: list[Example], excess: str, too_long: str, say: Say) -> list[Example]:
    left_out = len(before) - len(after)
    if left_out and not after:
        raise UserError(
            f"{excess}, and none of the {left_out} prompts fits; ask for more prompts or for shorter "
            "samples, or choose a model with a longer context."
        )
    if left_out and too_long == "error":
        raise UserError(
            f"{excess} ({left_out} of {len(before)} prompts are too long); leave such prompts out with --too-long drop."
        )
    if left_out:
        say(f"{left_out} of {len(before)} prompts left out (--too-long drop): {excess}")
    return after
