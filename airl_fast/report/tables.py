"""The tables of a report: the figures of every run side by side, and the settings in which runs differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from airl_fast.evaluate.passk import Estimate
from airl_fast.evaluate.summary import ABSENT, LABELS, LOCALISERS, POLICIES, RERANKERS, Summary
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
    """label, and one cell a run. heading: a row that names what follows and has no cells."""

    label: str
    cells: tuple[Cell, ...] = ()
    heading: bool = False


def summary_rows(runs: Sequence[RunData]) -> list[Row]:
    """What `airl-fast train` prints at its end, one column a run; parts that no run has are left out."""
    summaries = [run.summary for run in runs]
    if not any(summaries):
        return []
    n = {s.rerank_n for s in summaries if s is not None and s.rerank_n is not None}
    picks = "Start policy's samples picked by, pass@1|" + "/".join(map(str, sorted(n)))
    rows: list[Row] = []
    for heading, group, names, labels in (
        ("pass@1", "pass_at_1", POLICIES, LABELS),
        ("pass@5", "pass_at_5", POLICIES, LABELS),
        (picks, "rerank_pass_at_1", RERANKERS, LABELS),
        ("", "rerank_other_pass_at_1", None, LABELS),
        ("First wrong step named by, Hit@1", "localise_hit_at_1", LOCALISERS, _LOCALISER_LABELS),
        ("", "localise_other_hit_at_1", None, _LOCALISER_LABELS),
    ):
        rows += _group(summaries, heading, group, names, labels)
    control = [None if s is None else s.control_random_reward for s in summaries]
    if any(control):
        rows.insert(_end_of(rows, "pass@1"), Row("control: untrained reward", tuple(map(_percent, control))))
    rows.append(Row("The run", heading=True))
    auroc = [None if s is None else s.auroc_within_prompt for s in summaries]
    if any(auroc):
        rows.append(Row("AUROC within a prompt", tuple(map(_fraction, auroc))))
    rows.append(Row("seconds", tuple(Cell(ABSENT if s is None else f"{s.seconds:.0f}") for s in summaries)))
    rows.append(
        Row("peak memory, GiB", tuple(Cell(ABSENT if s is None else f"{s.peak_rss_gib:.2f}") for s in summaries))
    )
    rows.append(Row("seed", tuple(Cell(ABSENT if s is None else str(s.seed)) for s in summaries)))
    for name in dict.fromkeys(name for s in summaries if s is not None for name in s.counts):
        counts = tuple(Cell(ABSENT if s is None else str(s.counts.get(name, ABSENT))) for s in summaries)
        rows.append(Row(name.replace("_", " "), counts))
    return rows


_LOCALISER_LABELS = {**LABELS, "logprob": "log-probability, same rule"}


def _group(
    summaries: Sequence[Summary | None],
    heading: str,
    group: str,
    names: Sequence[str] | None,
    labels: Mapping[str, str],
) -> Iterator[Row]:
    tables = [{} if s is None else getattr(s, group) for s in summaries]
    present = [
        name for name in names or dict.fromkeys(n for t in tables for n in t) if any(t.get(name) for t in tables)
    ]
    if heading and present:
        yield Row(heading, heading=True)
    for name in present:
        yield Row(labels.get(name, name.replace("_", " ")), tuple(_percent(table.get(name)) for table in tables))


def _end_of(rows: Sequence[Row], heading: str) -> int:
    """Where the rows under a heading end."""
    start = next((i for i, row in enumerate(rows) if row.label == heading), -1)
    return next((i for i in range(start + 1, len(rows)) if rows[i].heading), len(rows))


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
