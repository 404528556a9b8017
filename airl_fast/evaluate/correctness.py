"""Does a reward go with correctness? AUROC of every score, Welch's t, and correlations with format and length."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airl_fast.data.verify import format_signals
from airl_fast.evaluate.summary import ABSENT
from airl_fast.evaluate.tables import Grid, as_text, plain
from airl_fast.judge.choose import finite
from airl_fast.measures.correlate import (
    PearsonMatrix,
    WelchT,
    WithinPromptAuroc,
    pearson_matrix,
    pooled_auroc,
    welch_t,
    within_prompt_auroc,
)
from airl_fast.measures.passk import Estimate, Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of one score with correctness. None where a class is missing."""

    within: WithinPromptAuroc
    pooled: Estimate | None
    welch: WelchT | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Correctness:
    """agreement: by name of the score. pearson: of reward and log-probability with correctness, the format checks and
    the length in tokens; None with fewer than two traces."""

    agreement: Mapping[str, Agreement]
    pearson: PearsonMatrix | None
    traces: int
    correct: int


def measure(
    scores: Mapping[str, Floats], correct: ArrayLike, prompts: ArrayLike, texts: Sequence[str], lengths: ArrayLike
) -> Correctness:
    """scores: f64 [S] each, -inf for a trace that names no answer, which counts as less than all others. correct: bool
    [S]. prompts: labels [S]. texts: the S completions. lengths: [S], in tokens."""
    verdicts: NDArray[np.bool_] = np.asarray(correct, dtype=bool)
    known = {name: finite(values) for name, values in scores.items()}
    agreement = {
        name: Agreement(
            within=within_prompt_auroc(values, verdicts, prompts),
            pooled=pooled_auroc(values, verdicts, prompts=prompts),
            welch=welch_t(values, verdicts, prompts),
        )
        for name, values in known.items()
    }
    checks = [format_signals(text) for text in texts]
    signals = {
        "reward": known["reward"],
        "logprob": known["logprob"],
        "correct": verdicts,
        "strict": [check.strict for check in checks],
        "soft": [check.soft for check in checks],
        "xml": [check.xml for check in checks],
        "integer": [check.integer for check in checks],
        "length": lengths,
    }
    pearson = pearson_matrix(signals) if len(verdicts) > 1 else None
    return Correctness(
        agreement=agreement, pearson=pearson, traces=len(verdicts), correct=int(np.count_nonzero(verdicts))
    )


def render(found: Correctness) -> str:
    rows = []
    for name, each in found.agreement.items():
        t = each.welch
        rows.append((
            name.replace("_", " "),
            plain(each.within.estimate),
            plain(each.pooled),
            ABSENT if t is None else f"{t.t:.1f} ({t.degrees:.0f})",
        ))  # fmt: skip
    tables = [as_text(Grid(
        headings=("score against correctness", "AUROC within prompts", "AUROC pooled", "Welch t (df)"), rows=tuple(rows)
    ))]  # fmt: skip
    if found.pearson is not None:
        names = found.pearson.names
        tables.append(as_text(Grid(
            headings=("Pearson", *names),
            rows=tuple(
                (name, *(ABSENT if math.isnan(value) else f"{value:.2f}" for value in row))
                for name, row in zip(names, found.pearson.values, strict=True)
            ),
        )))  # fmt: skip
    return "\n".join(tables)


def as_document(found: Correctness) -> dict[str, Any]:
    return {
        "traces": found.traces,
        "correct": found.correct,
        "scores": {name: _agreement(each) for name, each in found.agreement.items()},
        "pearson": found.pearson and {
            "names": list(found.pearson.names),
            "values": [[None if math.isnan(x) else x for x in row] for row in found.pearson.values.tolist()],
        },
    }  # fmt: skip


def estimate_document(estimate: Estimate | None) -> dict[str, float] | None:
    return estimate and {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _agreement(each: Agreement) -> dict[str, Any]:
    t = each.welch
    return {
        "auroc_within_prompt": estimate_document(each.within.estimate),
        "prompts_with_both": each.within.prompts,
        "prompts": each.within.prompts_total,
        "auroc_pooled": estimate_document(each.pooled),
        "welch": t and {
            "t": t.t,
            "degrees": t.degrees,
            "mean_correct": t.mean_correct,
            "mean_wrong": t.mean_wrong,
            "prompts_correct": t.prompts_correct,
            "prompts_wrong": t.prompts_wrong,
        },
    }  # fmt: skip
