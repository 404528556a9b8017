"""What the token view needs, as plain values for JSON: prompts, and traces with their values per token.

Standardised and discounted rewards are computed in the page from the raw ones (static/trace_values.js): two numbers a
prompt, its `mean` and `scale`, are all that takes, r̃ = (r − mean)/scale and A_t = r̃_t + γ·A_{t+1}.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from airl_fast.evaluate.record import RecordedTrace, RewardRecord
from airl_fast.evaluate.summary import LABELS
from airl_fast.report.runs import RunData

DIGITS = 4  # after the point, of what is shown with three


def token_views(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """One entry for each run that recorded traces."""
    return [_view(run) for run in runs if run.record is not None and run.record.reward is not None and run.traces]


def _view(run: RunData) -> dict[str, Any]:
    record = run.record
    reward = record.reward
    last: list[list[float]] = [[] for _ in record.prompts]
    for trace in run.traces:
        if trace.kind == "sample":
            last[trace.prompt].append(trace.reward[-1])
    statistics = [group_statistics(rewards, reward) for rewards in last]
    return {
        "name": run.name,
        "split": record.split,
        "samples": record.samples,
        "promptsTotal": record.prompts_total,
        "gamma": reward.gamma,
        "scorer": reward.scorer,
        "rule": reward.localise,
        "stepScore": reward.step_score,
        "threshold": reward.threshold,
        "endToken": record.end_token,
        "labels": {name: _label(name, reward.scorer) for name in run.traces[0].scores},
        "prompts": [
            {"id": each.id, "prompt": each.prompt, "answer": each.answer, "mean": mean, "scale": scale}
            for each, (mean, scale) in zip(record.prompts, statistics, strict=True)
        ],
        "traces": [_trace(trace) for trace in run.traces],
    }


def group_statistics(last: Sequence[float], reward: RewardRecord) -> tuple[float, float | None]:
    """Mean and scale, max(std, min_std) + eps with ddof 1, of the last tokens' rewards of a prompt's samples, as
    training standardises (arXiv 2510.01857, section 3); here without the demonstration in the group.

    Scale None stands for advantages of 0: a single sample, or equal ones without a min_std, say nothing."""
    values = np.array(last, dtype=np.float64)
    if len(values) < 2 or (values.max() == values.min() and not reward.min_std):
        return float(values.mean()), None
    return float(values.mean()), max(float(values.std(ddof=1)), reward.min_std) + reward.eps


def _label(name: str, scorer: str) -> str:
    own = {"reward": f"reward ({scorer})", "logprob": LABELS["logprob"]}
    return own.get(name, name.replace("_", " "))


def _trace(trace: RecordedTrace) -> dict[str, Any]:
    """p: prompt, n: number, k: kind, s: spans end to end, r: rewards, l: log-probabilities, e: step ends, c: step
    scores, guess: predicted step, truth: first wrong step, -1 for none and null for unknown; endToken where it is not
    the view's."""
    kind = "perturbed" if trace.kind == "perturbed" else "correct" if trace.correct else "wrong"
    end = {} if trace.end_token is None else {"endToken": trace.end_token}
    return end | {
        "p": trace.prompt,
        "n": trace.sample,
        "k": kind,
        "finished": trace.finished,
        "text": trace.text,
        "s": [offset for span in trace.spans for offset in span],
        "r": np.round(trace.reward, DIGITS).tolist(),
        "l": np.round(trace.logprob, DIGITS).tolist(),
        "e": trace.step_ends,
        "c": np.round(trace.step_scores, DIGITS).tolist(),
        "guess": trace.predicted,
        "truth": trace.truth,
        "scores": {name: None if v is None else round(v, DIGITS) for name, v in trace.scores.items()},
    }
