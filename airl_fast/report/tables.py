"""The tables of a report: the figures of every run side by side, and the settings in which runs differ."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from airl_fast.evaluate.summary import ABSENT, LABELS, LOCALISERS, POLICIES, RERANKERS, Summary
from airl_fast.measures.passk import Estimate
from airl_fast.report.runs import RunData

UNSET = "unset"
SAME_FOR_ALL = ("output_dir",)  # where a run lies says nothing about what it computes


@dataclass(frozen=True, slots=True)
class Cell:
    """text: the figure. interval: its 95% interval, or nothing. strip: value, low and high in 0..100 to draw."""

    text: str
    interval: str = ""
    strip: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """label, and one cell a run."""

    label: str
    cells: tuple[Cell, ...]


Group = tuple[str, list[Row]]
_LOCALISER_LABELS = {**LABELS, "logprob": "log-probability, same rule"}


def summary_groups(runs: Sequence[RunData]) -> list[Group]:
    """(heading, rows) of what `airl-fast train` prints at its end, one column a run; what no run has is left out."""
    summaries = [run.summary for run in runs]
    if not any(summaries):
        return []
    n = sorted({s.rerank_n for s in summaries if s is not None and s.rerank_n is not None})
    passed = [*_rows(summaries, "pass_at_1", POLICIES, LABELS)]
    control = [None if s is None else s.control_random_reward for s in summaries]
    if any(control):
        passed.append(Row("control: untrained reward", tuple(map(_percent, control))))
    auroc = [None if s is None else s.auroc_within_prompt for s in summaries]
    groups = [
        ("Policy, pass@1", passed),
        ("Policy, pass@5", [*_rows(summaries, "pass_at_5", POLICIES, LABELS)]),
        (
            f"Start policy's samples picked by, pass@1|{'/'.join(map(str, n))}",
            [
                *_rows(summaries, "rerank_pass_at_1", RERANKERS, LABELS),
                *_rows(summaries, "rerank_other_pass_at_1", (), LABELS),
            ],
        ),
        (
            "First wrong step named by, Hit@1",
            [
                *_rows(summaries, "localise_hit_at_1", LOCALISERS, _LOCALISER_LABELS),
                *_rows(summaries, "localise_other_hit_at_1", (), _LOCALISER_LABELS),
            ],
        ),
        ("Reward and correctness", [Row("AUROC within a prompt", tuple(map(_fraction, auroc)))] if any(auroc) else []),
        ("The run", _facts(summaries)),
    ]
    return [(heading, rows) for heading, rows in groups if rows]


def _rows(
    summaries: Sequence[Summary | None], group: str, names: Sequence[str], labels: Mapping[str, str]
) -> Iterator[Row]:
    """names: in which order; empty for the order they come in."""
    tables = [{} if s is None else getattr(s, group) for s in summaries]
    for name in names or dict.fromkeys(name for table in tables for name in table):
        estimates = [table.get(name) for table in tables]
        if any(estimates):
            yield Row(labels.get(name, name.replace("_", " ")), tuple(map(_percent, estimates)))


def _facts(summaries: Sequence[Summary | None]) -> list[Row]:
    def row(label: str, read: Callable[[Summary], str]) -> Row:
        return Row(label, tuple(Cell(ABSENT if s is None else read(s)) for s in summaries))

    names = dict.fromkeys(name for s in summaries if s is not None for name in s.counts)
    return [
        row("seconds", lambda s: f"{s.seconds:.0f}"),
        row("peak memory, GiB", lambda s: f"{s.peak_rss_gib:.2f}"),
        row("seed", lambda s: str(s.seed)),
        *(row(name.replace("_", " "), lambda s, name=name: str(s.counts.get(name, ABSENT))) for name in names),
    ]


def _percent(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(ABSENT)
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return Cell(f"{value:.1f}%", f"[{low:.1f}, {high:.1f}]", (value, low, high))


def _fraction(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(ABSENT)
    strip = (100 * estimate.value, 100 * estimate.low, 100 * estimate.high)
    return Cell(f"{estimate.value:.3f}", f"[{estimate.low:.3f}, {estimate.high:.3f}]", strip)


def differing_settings(runs: Sequence[RunData]) -> list[tuple[str, tuple[str, ...]]]:
    """(dotted key, its value in every run) for each setting that is not the same in all; values as JSON."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in SAME_FOR_ALL)
    rows = [(key, tuple(settings.get(key, UNSET) for settings in flat)) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)
