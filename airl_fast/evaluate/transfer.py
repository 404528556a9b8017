"""A frozen reward on another task's, or another model's, traces: is it still right there?

Nothing is fitted to the traces that are judged: thresholds for localisation come from the reward's own training
demonstrations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from airl_fast.errors import UserError
from airl_fast.evaluate.policies import Samples
from airl_fast.evaluate.sources import (
    Say,
    find_policy,
    find_task,
    fit_prompts,
    fit_samples,
    load_prompts,
    sample,
    with_policy,
    with_task,
)
from airl_fast.judge.choose import choices, finite, score_traces
from airl_fast.judge.judge import Judge, Scored, open_judge
from airl_fast.judge.leakage import training_prompts
from airl_fast.judge.locate import Thresholds, calibrate, changed_steps, known_errors, locate, readable
from airl_fast.judge.scoring import score_all
from airl_fast.lab import load_material
from airl_fast.measures.correlate import WithinPromptAuroc, pooled_auroc, within_prompt_auroc
from airl_fast.measures.localise import Localisation
from airl_fast.measures.passk import Estimate, pass_at_k

OWN_ERRORS, PERTURBED = "the policy's own errors", "perturbed demonstrations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says. tasks, policies: words of sources.find_task and find_policy; words: of the one task.
    samples, prompts: None for the numbers of the reward's run."""

    tasks: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    policies: tuple[str, ...] = ("start",)
    split: str = "test"
    prompts: int | None = None
    samples: int | None = None
    max_new_tokens: int | None = None
    too_long: str | None = None
    allow_training_prompts: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The reward on one policy's traces of one task.

    prompts: judged; left_out: too long for a model. start of names: pass_at_1 of the policy, picks: pass@1 of one of
    `samples` by way of picking; gain: by the reward minus at random, paired over prompts. auroc_*: of the reward and of
    the log-probability. localise: by name as in locate.locate; located: traces with a known wrong step, of the kind
    `errors`; all three empty where the task has neither known errors nor demonstrations.
    """

    policy: str
    task: str
    prompts: int
    left_out: int
    samples: int
    pass_at_1: Estimate
    auroc_within: WithinPromptAuroc
    auroc_pooled: Estimate | None
    auroc_logprob: WithinPromptAuroc
    picks: Mapping[str, Estimate]
    gain: Estimate
    gain_over_majority: Estimate
    localise: Mapping[str, Localisation]
    located: int
    errors: str | None


def transfer(run: Path, options: Options, say: Say) -> tuple[Cell, ...]:
    """A cell for every policy on every task, policy by policy. UserError before the work for what cannot be found."""
    own = open_judge(run, trust_remote_code=options.trust_remote_code)
    changes = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    rollout = own.config.rollout.model_copy(update=changes)
    own = Judge(
        config=own.config.model_copy(update={"rollout": rollout}), model=own.model, bridge=own.bridge, policy=own.policy
    )
    if options.words and len(options.tasks) > 1:
        raise UserError(f"{options.words[0]}: with several --task write --task NAME:path=DIR,option=value.")
    tasks = [find_task(words, own.config, options.words) for words in options.tasks or (None,)]
    sources = [find_policy(name, run, own.config) for name in options.policies]
    for labels, option in (([t.label for t in tasks], "--task"), ([s.label for s in sources], "--policy")):
        repeated = [label for label in labels if labels.count(label) > 1]
        if repeated:
            raise UserError(f"{option} {repeated[0]} is given twice; name each once.")
    count = options.prompts or own.config.evaluate.prompts
    examples = [load_prompts(task, options.split, count) for task in tasks]
    if not options.allow_training_prompts:
        known = training_prompts(own.config)
        for task, some in zip(tasks, examples, strict=True):
            known.refuse((f"{task.label}, {options.split} prompt {example.id}", example.prompt) for example in some)
    demonstrations = load_material(own.config).train  # of the reward's own task; vLLM's sentinel probes with them too
    per_prompt = options.samples or own.config.evaluate.samples
    too_long = options.too_long or own.config.data.too_long
    cells = []
    for source in sources:
        judge = with_policy(own, source)
        thresholds = calibrate(judge, demonstrations)
        # Of all tasks first: what is too long is refused before anything is sampled.
        there = [with_task(judge, task.task) for task in tasks]
        fitting = [fit_prompts(each, some, too_long, say) for each, some in zip(there, examples, strict=True)]
        for task, each, some, fit in zip(tasks, there, examples, fitting, strict=True):
            say(f"{source.label} on {task.label}")
            samples = sample(each, source, fit, per_prompt, demonstrations, run, say)
            samples = fit_samples(each, samples, too_long, say)
            left_out = len(some) - len(samples.examples)
            cells.append(measure(each, source.label, task.label, samples, thresholds, left_out=left_out))
    return tuple(cells)


def measure(
    judge: Judge, policy: str, task: str, samples: Samples, thresholds: Thresholds, *, left_out: int = 0
) -> Cell:
    """Score the samples; labels are read only after every score is known."""
    scored = score_all(judge, samples.traces, samples.examples)
    scores = score_traces(scored, judge.config)
    picked = choices(scored, samples.examples, samples.correct, judge.task, judge.config)
    correct, prompts = samples.correct.ravel(), samples.prompts
    localised, located, errors = _localise(judge, samples, scored, thresholds)
    return Cell(
        policy=policy,
        task=task,
        prompts=len(samples.examples),
        left_out=left_out,
        samples=samples.per_prompt,
        pass_at_1=pass_at_k(samples.correct, 1),
        auroc_within=within_prompt_auroc(finite(scores["reward"]), correct, prompts),
        auroc_pooled=pooled_auroc(finite(scores["reward"]), correct, prompts=prompts),
        auroc_logprob=within_prompt_auroc(finite(scores["logprob"]), correct, prompts),
        picks=picked.estimates,
        gain=picked.difference("reward", "random"),
        gain_over_majority=picked.difference("reward", "majority"),
        localise=localised,
        located=located,
        errors=errors,
    )


def _localise(
    judge: Judge, samples: Samples, scored: Scored, thresholds: Thresholds
) -> tuple[dict[str, Localisation], int, str | None]:
    """On the policy's own errors where the task knows them, else on perturbed demonstrations of the same prompts."""
    truth, prompts, errors = (
        known_errors(judge.task, judge.maker, scored, samples.examples),
        samples.prompts,
        OWN_ERRORS,
    )
    if truth is None:
        scored, errors = judge.perturbed(readable(judge, samples.examples)), PERTURBED
        if scored is None:
            return {}, 0, None
        truth, prompts = changed_steps(judge.maker, scored), np.array([trace.group for trace in scored.traces])
    located = int((truth >= 0).sum())
    return locate(scored, truth, judge.config.evaluate, thresholds, prompts=prompts), located, errors
