"""Pick one of a prompt's scored samples: every scorer of the reward beside what it has to beat."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike

from airl_fast.config import Config
from airl_fast.data.task import Task
from airl_fast.judge.judge import Scored
from airl_fast.measures.passk import Floats
from airl_fast.measures.rerank import Reranking, Scorer, answer_classes, rerank, trace_scores, vote_weights
from airl_fast.types import Example


def score_traces(scored: Scored, config: Config) -> dict[str, Floats]:
    """One number a trace, f64 [S], by name: `reward` by the run's own scorer (`evaluate.scorer`), `reward_SCORER` by
    the others, and `logprob`, the mean log-probability."""
    own, gamma = config.evaluate.scorer, config.advantage.gamma
    ordered = [own, *(scorer for scorer in get_args(Scorer) if scorer != own)]
    scores = {
        "reward" if scorer == own else f"reward_{scorer}": trace_scores(scored.reward, scorer, gamma=gamma)
        for scorer in ordered
    }
    return scores | {"logprob": trace_scores(scored.logprob, "mean")}


def choices(
    scored: Scored, examples: Sequence[Example], correct: ArrayLike, task: Task, config: Config, *, k: int = 1
) -> Reranking:
    """pass@k|N of every way to choose. correct: bool [P, N], which the scores did not see; scored: P * N traces,
    prompt after prompt."""
    correct = np.asarray(correct)
    scores = {name: values.reshape(correct.shape) for name, values in score_traces(scored, config).items()}
    answers = [task.canonical_answer(examples[trace.group], trace.text) for trace in scored.traces]
    classes = answer_classes([answers[i : i + correct.shape[1]] for i in range(0, len(answers), correct.shape[1])])
    votes = {"weighted_vote": vote_weights(scores["reward"])}
    return rerank(correct, scores, k=k, classes=classes, votes=votes)


def finite(scores: Floats) -> Floats:
    """The same order without -inf (a trace that names no answer), which becomes less than every other score."""
    known = scores[np.isfinite(scores)]
    return np.where(np.isneginf(scores), known.min(initial=0.0) - 1.0, scores)
