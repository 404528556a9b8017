"""What a reward is worth on traces it did not train on: reranking, correctness and the first wrong step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from airl_fast.evaluate.policies import Samples
from airl_fast.judge.choose import choices, finite, score_traces
from airl_fast.judge.judge import Judge, Scored
from airl_fast.judge.locate import Thresholds, calibrate, changed_steps, known_errors, locate
from airl_fast.measures.correlate import within_prompt_auroc
from airl_fast.measures.localise import Ints, Localisation
from airl_fast.measures.passk import Estimate
from airl_fast.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the figures were computed from. samples: the scored samples, as they were given.

    truth: int64 [S], each sample's first wrong step (-1: none), or None for a task that cannot tell. perturbed: then
    the perturbed demonstrations that stood in, whose groups index `with_expert`, the prompts they were made from.
    """

    samples: Scored
    truth: Ints | None
    perturbed: Scored | None
    with_expert: tuple[Example, ...]
    thresholds: Thresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """rerank: pass@1 after picking one of the samples, by scorer. localise: by rule and baseline.

    located: how many traces with a known first wrong step stand behind it. evidence: what to record of them.
    """

    rerank: Mapping[str, Estimate]
    auroc_within_prompt: Estimate | None
    localise: Mapping[str, Localisation]
    located: int
    evidence: Evidence = field(compare=False)


def evaluate_reward(judge: Judge, samples: Samples, demonstrations: Sequence[Example]) -> RewardReport:
    """Score the samples of one policy; labels are read only after every score is known.

    demonstrations: training prompts whose perturbed demonstrations calibrate the localisation.
    """
    scored = judge.score(samples.traces, samples.examples)
    picked = choices(scored, samples.examples, samples.correct, judge.task, judge.config)
    scores = finite(score_traces(scored, judge.config)["reward"])
    auroc = within_prompt_auroc(scores, samples.correct.ravel(), samples.prompts)
    evidence = _gather(judge, samples, scored, demonstrations)
    localised, located = _localise(judge, samples, evidence)
    return RewardReport(
        rerank=picked.estimates,
        auroc_within_prompt=auroc.estimate,
        localise=localised,
        located=located,
        evidence=evidence,
    )


def _gather(judge: Judge, samples: Samples, scored: Scored, demonstrations: Sequence[Example]) -> Evidence:
    """The policy's own errors where the task knows them, else perturbed demonstrations of the prompts."""
    truth = known_errors(judge.task, judge.maker, scored, samples.examples)
    with_expert = tuple(example for example in samples.examples if example.expert is not None)
    return Evidence(
        samples=scored,
        truth=truth,
        perturbed=judge.perturbed(with_expert) if truth is None else None,
        with_expert=with_expert,
        thresholds=calibrate(judge, demonstrations),
    )


def _localise(judge: Judge, samples: Samples, evidence: Evidence) -> tuple[dict[str, Localisation], int]:
    scored, truth, prompts = evidence.samples, evidence.truth, samples.prompts
    if truth is None:
        scored = evidence.perturbed
        if scored is None:
            return {}, 0
        truth, prompts = changed_steps(judge.maker, scored), np.array([t.group for t in scored.traces])
    located = int((truth >= 0).sum())
    if not located:
        return {}, 0
    return locate(scored, truth, judge.config.evaluate, evidence.thresholds, prompts=prompts), located
