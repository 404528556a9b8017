"""Scored traces in numbers that can be written down: what `airl-fast score` writes and the service answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from airl_fast.judge.choose import score_traces
from airl_fast.judge.judge import Judge, Scored
from airl_fast.measures.localise import TokenValues, step_scores
from airl_fast.measures.passk import Floats
from airl_fast.measures.rerank import discounted_to_go
from airl_fast.types import Trace

Only = Literal["trace", "steps", "tokens"]
DIGITS = 6  # after the point: about what a float32 reward holds


def describe(judge: Judge, scored: Scored, only: Only | None = None) -> Iterator[dict[str, Any]]:
    """One object a trace, in order: `scorer`, `rewards` by scorer and `logprob`; `steps`, and `tokens`, `token_spans`,
    `token_rewards` and `token_logprobs`. only: the trace's numbers alone, or those with its steps or its tokens."""
    own, gamma = judge.config.evaluate.scorer, judge.config.advantage.gamma
    found = score_traces(scored, judge.config)
    scores = {own if name == "reward" else name.removeprefix("reward_"): v for name, v in found.items()}
    logprob = scores.pop("logprob")
    steps = _StepTable.of(scored, gamma) if only in (None, "steps") else None
    for i, trace in enumerate(scored.traces):
        inside = slice(*scored.reward.offsets[i : i + 2])
        spans = judge.maker.chat.token_char_spans(trace.text, trace.tokens)
        numbers: dict[str, Any] = {
            "scorer": own,
            "rewards": {name: rounded(values[i]) for name, values in scores.items()},
            "logprob": rounded(logprob[i]),
        }
        if steps is not None:
            numbers["steps"] = steps.rows(i, trace.text, step_spans(scored.reward, i, spans))
        if only in (None, "tokens"):
            numbers["tokens"] = token_texts(judge, trace, spans)
            numbers["token_spans"] = spans
            numbers["token_rewards"] = rounded_list(scored.reward.values[inside])
            numbers["token_logprobs"] = rounded_list(scored.logprob.values[inside])
        yield numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepTable:
    """Numbers per step, f64 [K] each; offsets int64 [S+1]."""

    columns: dict[str, Floats]
    offsets: np.ndarray

    @staticmethod
    def of(scored: Scored, gamma: float) -> "_StepTable":
        means, reward = step_scores(scored.reward, "mean"), scored.reward
        first = np.concatenate(([0], np.flatnonzero(reward.step_ends)[:-1] + 1))
        return _StepTable(
            columns={
                "reward_mean": means.values,
                "reward_min": step_scores(reward, "min").values,
                "reward_to_go": discounted_to_go(reward, gamma)[first],
                "logprob_mean": step_scores(scored.logprob, "mean").values,
            },
            offsets=means.offsets,
        )

    def rows(self, trace: int, text: str, spans: list[tuple[int, int]]) -> list[dict[str, Any]]:
        own = slice(*self.offsets[trace : trace + 2])
        columns = {name: rounded_list(values[own]) for name, values in self.columns.items()}
        return [
            {"start": a, "end": b, "text": text[a:b]} | {name: values[k] for name, values in columns.items()}
            for k, (a, b) in enumerate(spans)
        ]


def step_spans(values: TokenValues, trace: int, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The characters of each step of a trace, from one closing token's end to the next. spans: of its tokens."""
    closing = np.flatnonzero(values.step_ends[slice(*values.offsets[trace : trace + 2])])
    return list(pairwise([0, *(spans[token][1] for token in closing)]))


def token_texts(judge: Judge, trace: Trace, spans: list[tuple[int, int]]) -> list[str]:
    """What each token stands for; the token that ends the trace by its name. A token that holds a part of a character
    shows the whole of it."""
    chat = judge.maker.chat
    return [
        chat.name(token) if token in chat.ends else trace.text[a:b]
        for token, (a, b) in zip(trace.tokens, spans, strict=True)
    ]


def rounded(value: float | None) -> float | None:
    """None for -inf, the score of a trace that names no answer."""
    return None if value is None or not np.isfinite(value) else round(float(value), DIGITS)


def rounded_list(values: Floats) -> list[float]:
    return np.round(values, DIGITS).tolist()
