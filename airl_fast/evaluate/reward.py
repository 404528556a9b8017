"""What a reward is worth on traces it did not train on: reranking, correctness and the first wrong step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from airl_fast.evaluate.choose import choices, finite, score_traces
from airl_fast.evaluate.correlate import within_prompt_auroc
from airl_fast.evaluate.judge import Judge, Scored
from airl_fast.evaluate.localise import Localisation
from airl_fast.evaluate.locate import calibrate, changed_steps, known_errors, locate
from airl_fast.evaluate.passk import Estimate
from airl_fast.evaluate.policies import Samples
from airl_fast.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """rerank: pass@1 after picking one of the samples, by scorer. localise: by rule and baseline.

    located: how many traces with a known first wrong step stand behind it.
    """

    rerank: Mapping[str, Estimate]
    auroc_within_prompt: Estimate | None
    localise: Mapping[str, Localisation]
    located: int


def evaluate_reward(judge: Judge, samples: Samples, demonstrations: Sequence[Example]) -> RewardReport:
    """Score the samples of one policy; labels are read only after every score is known.

    demonstrations: training prompts whose perturbed demonstrations calibrate the localisation.
    """
    scored = judge.score(samples.traces, samples.examples)
    picked = choices(scored, samples.examples, samples.correct, judge.task, judge.config)
    scores = finite(score_traces(scored, judge.config)["reward"])
    auroc = within_prompt_auroc(scores, samples.correct.ravel(), samples.prompts)
    localised, located = _localise(judge, samples, scored, demonstrations)
    return RewardReport(
        rerank=picked.estimates, auroc_within_prompt=auroc.estimate, localise=localised, located=located
    )


def _localise(
    judge: Judge, samples: Samples, scored: Scored, demonstrations: Sequence[Example]
) -> tuple[dict[str, Localisation], int]:
    """On the policy's own errors where the task knows them, else on perturbed demonstrations of the prompts."""
    settings = judge.config.evaluate
    truth, prompts = known_errors(judge.task, judge.maker, scored, samples.examples), samples.prompts
    if truth is None:
        with_expert = [example for example in samples.examples if example.expert is not None]
        scored = judge.perturbed(with_expert)
        if scored is None:
            return {}, 0
        truth, prompts = changed_steps(judge.maker, scored), np.array([t.group for t in scored.traces])
    located = int((truth >= 0).sum())
    if not located:
        return {}, 0
    thresholds = calibrate(judge, demonstrations[: settings.prompts])
    return locate(scored, truth, settings, thresholds, prompts=prompts), located
