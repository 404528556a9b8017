"""What the service answers: scored traces as rows, candidates in order, the step that looks wrong first."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, Field

from airl_fast.config import EvaluateConfig
from airl_fast.judge.choose import score_traces
from airl_fast.judge.describe import describe, step_spans
from airl_fast.judge.judge import Judge, Scored
from airl_fast.judge.locate import Thresholds, suspicious_steps
from airl_fast.measures.localise import Rule, StepRule, step_scores
from airl_fast.measures.passk import Floats
from airl_fast.measures.rerank import Scorer, vote_weights
from airl_fast.serve.schema import SignalName
from airl_fast.types import Example


class StepOut(BaseModel):
    """Characters start to end of the completion, and its tokens' rewards and log-probabilities."""

    start: int
    end: int
    text: str
    reward_mean: float
    reward_min: float
    reward_to_go: float = Field(description="discounted sum of rewards from the step's first token on")
    logprob_mean: float


class RewardsOut(BaseModel):
    """One number for the whole trace, by scorer. answer: null where the trace names no answer."""

    mean: float
    answer: float | None
    min_step: float
    last: float


class ScoredTrace(BaseModel):
    """What `airl-fast score` writes of a trace, under the same names."""

    id: str
    scorer: Scorer = Field(description="the run's own")
    rewards: RewardsOut
    logprob: float = Field(description="mean log-probability under the start policy")
    steps: list[StepOut]
    tokens: list[str] = Field(description="as text; the end-of-turn token by its name")
    token_spans: list[tuple[int, int]] = Field(description="characters of the completion")
    token_rewards: list[float] = Field(description="log D - log(1 - D) of each token, in nats")
    token_logprobs: list[float]


class ScoreOut(BaseModel):
    traces: list[ScoredTrace]


class AnswerVotes(BaseModel):
    answer: str
    weight: float = Field(description="sum of the candidates' probabilities of being an expert's")
    candidates: list[int]


class VoteOut(BaseModel):
    answer: str = Field(description="the one with most weight; among equals the one with the best candidate")
    best: int = Field(description="its best candidate")
    answers: list[AnswerVotes] = Field(description="most weight first")


class RankedPrompt(BaseModel):
    id: str
    best: int = Field(description="order[0]")
    order: list[int] = Field(description="candidates, best first; equals in the order they were sent")
    scores: dict[SignalName, list[float | None]] = Field(
        description="by scorer, one a candidate; null where it names no answer. logprob: mean log-probability under "
        "the start policy, to compare with"
    )
    answers: list[str | None] = Field(description="as the task reads them: one spelling for equal answers")
    vote: VoteOut | None = Field(description="weighted vote; null when the task finds no answer in any candidate")


class RerankOut(BaseModel):
    scorer: Scorer
    prompts: list[RankedPrompt]


class SuspectStep(BaseModel):
    start: int
    end: int
    text: str
    score: float = Field(description="the reward of the step, by `step_score`")
    suspicion: float = Field(description="higher is more suspicious; comparable within a trace only")


class LocalizedTrace(BaseModel):
    id: str
    first_wrong_step: int = Field(description="the most suspicious step, from 0; a rule names one in every trace")
    below_threshold: bool | None = Field(
        description="whether any step scores below the threshold: false is the service's way to say that nothing "
        "looks wrong; null for rules without a threshold"
    )
    steps: list[SuspectStep]


class LocalizeOut(BaseModel):
    rule: Rule
    step_score: StepRule = Field(description="how a step's tokens become its score")
    threshold: float | None = Field(description="of rule first_below, from perturbed training demonstrations")
    traces: list[LocalizedTrace]


def score_answer(judge: Judge, scored: Scored, examples: Sequence[Example]) -> ScoreOut:
    """Every trace with the reward of its tokens, its steps and as a whole."""
    rows = zip(examples, describe(judge, scored), strict=True)
    return ScoreOut(traces=[ScoredTrace(id=example.id, **numbers) for example, numbers in rows])


def rerank_answer(
    judge: Judge, scored: Scored, examples: Sequence[Example], ids: Sequence[str], counts: Sequence[int], scorer: Scorer
) -> RerankOut:
    """counts: candidates of each prompt, whose traces follow each other. ids: of the prompts."""
    scores, prompts, start = _by_scorer(judge, scored), [], 0
    for name, count in zip(ids, counts, strict=True):
        part = slice(start, start + count)
        values = scores[scorer][part]
        order = np.argsort(-values, kind="stable").tolist()
        answers = [
            judge.task.canonical_answer(example, trace.text)
            for example, trace in zip(examples[part], scored.traces[part], strict=True)
        ]
        prompts.append(
            RankedPrompt(
                id=name,
                best=order[0],
                order=order,
                scores={signal: [known(value) for value in each[part]] for signal, each in scores.items()},
                answers=answers,
                vote=weighted_vote(answers, vote_weights(values[None])[0], order),
            )
        )
        start += count
    return RerankOut(scorer=scorer, prompts=prompts)


def weighted_vote(answers: Sequence[str | None], weights: Floats, order: Sequence[int]) -> VoteOut | None:
    """The vote of candidates that name an answer. weights: f64 [N]. order: of the candidates, best first."""
    members: dict[str, list[int]] = {}
    for candidate in order:
        if answers[candidate] is not None:
            members.setdefault(answers[candidate], []).append(candidate)
    if not members:
        return None
    # Sums of equal weights in another order differ in the last bits: a tie, which goes to the best candidate's answer.
    totals = {answer: float(weights[own].sum()) for answer, own in members.items()}
    ranked = sorted(totals, key=lambda answer: -round(totals[answer], 12))
    return VoteOut(
        answer=ranked[0],
        best=members[ranked[0]][0],
        answers=[
            AnswerVotes(answer=answer, weight=totals[answer], candidates=sorted(members[answer])) for answer in ranked
        ],
    )


def localize_answer(
    judge: Judge, scored: Scored, examples: Sequence[Example], settings: EvaluateConfig, thresholds: Thresholds
) -> LocalizeOut:
    """settings: their `localise` is the rule; first_below needs a threshold for "reward"."""
    steps, suspects = step_scores(scored.reward, settings.step_score), suspicious_steps(scored, settings, thresholds)
    threshold = thresholds["reward"] if settings.localise == "first_below" else None
    rows = []
    for i, (example, trace) in enumerate(zip(examples, scored.traces, strict=True)):
        own, text = slice(steps.offsets[i], steps.offsets[i + 1]), trace.text
        spans = step_spans(scored.reward, i, judge.maker.chat.token_char_spans(text, trace.tokens))
        values, levels = steps.values[own], suspects.values[own]
        rows.append(
            LocalizedTrace(
                id=example.id,
                first_wrong_step=int(np.argmax(levels)),
                below_threshold=None if threshold is None else bool((values < threshold).any()),
                steps=[
                    SuspectStep(start=a, end=b, text=text[a:b], score=value, suspicion=level)
                    for (a, b), value, level in zip(spans, values, levels, strict=True)
                ],
            )
        )
    return LocalizeOut(rule=settings.localise, step_score=settings.step_score, threshold=threshold, traces=rows)


def known(value: float) -> float | None:
    """JSON has no -inf, the score of a trace that names no answer."""
    return float(value) if np.isfinite(value) else None


def _by_scorer(judge: Judge, scored: Scored) -> dict[SignalName, Floats]:
    """`score_traces` under the scorers' own names: f64 [S] each."""
    own = judge.config.evaluate.scorer
    scores = score_traces(scored, judge.config)
    return {own if name == "reward" else name.removeprefix("reward_"): values for name, values in scores.items()}
