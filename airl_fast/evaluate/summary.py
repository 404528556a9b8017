"""The figures a run ends with: `summary.json` for programs and a table for people, from one frozen record."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from airl_fast.errors import UserError
from airl_fast.measures.passk import Estimate

POLICIES = ("start", "sft", "grpo", "airl")
RERANKERS = ("reward", "random", "majority", "logprob")
LOCALISERS = ("reward", "chance", "logprob")
ABSENT = "–"
WIDTH = 100

Estimates = Mapping[str, Estimate | None]
_GROUPS = {
    "pass_at_1": POLICIES,
    "pass_at_5": POLICIES,
    "rerank_pass_at_1": RERANKERS,
    "localise_hit_at_1": LOCALISERS,
    "rerank_other_pass_at_1": (),
    "localise_other_hit_at_1": (),
}
_SINGLE = ("auroc_within_prompt", "control_random_reward")
LABELS = {
    "start": "start policy",
    "sft": "SFT continued",
    "grpo": "GRPO, verifiable reward",
    "airl": "AIRL",
    "reward": "learned reward",
    "random": "random (exact)",
    "majority": "majority vote",
    "logprob": "mean log-probability",
    "chance": "chance (exact)",
    "oracle": "oracle",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything measured after a run. A part that was not run is None, or missing from its mapping.

    pass_at_1, pass_at_5: by policy (POLICIES). rerank_pass_at_1: pass@1 after picking one of `rerank_n` start-policy
    samples (RERANKERS). localise_hit_at_1: first wrong step found (LOCALISERS). *_other_*: further scorers and
    baselines under names of their own (oracle, weighted vote, majority position …).
    auroc_within_prompt: reward against correctness. control_random_reward: pass@1 after training on an untrained
    reward. seconds: wall clock of the run. peak_rss_gib: highest resident memory in GiB. counts: how many prompts,
    samples or traces stand behind the figures. references: lines of text shown below the table.
    """

    pass_at_1: Estimates
    seconds: float
    peak_rss_gib: float
    seed: int
    pass_at_5: Estimates = field(default_factory=dict)
    rerank_pass_at_1: Estimates = field(default_factory=dict)
    rerank_n: int | None = None
    rerank_other_pass_at_1: Estimates = field(default_factory=dict)
    localise_hit_at_1: Estimates = field(default_factory=dict)
    localise_other_hit_at_1: Estimates = field(default_factory=dict)
    auroc_within_prompt: Estimate | None = None
    control_random_reward: Estimate | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject names that summary.json has no place for, which would otherwise vanish from the table."""
        for group, names in _GROUPS.items():
            unknown = sorted(set(getattr(self, group)) - set(names)) if names else []
            if unknown:
                raise UserError(f"{group} has no entry {unknown[0]!r}; use {', '.join(names)}.")


def write_summary(path: Path, summary: Summary) -> None:
    """Write summary.json through a temporary file, so that a reader never sees half of it.

    Figures are plain numbers (null when absent); their 95% intervals lie under `intervals` with the same keys.
    """
    document: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for group, names in _GROUPS.items():
        estimates = getattr(summary, group)
        keys = names or tuple(estimates)
        document[group] = {name: _value(estimates.get(name)) for name in keys}
        intervals[group] = {name: _bounds(estimates.get(name)) for name in keys}
    for name in _SINGLE:
        document[name] = _value(getattr(summary, name))
        intervals[name] = _bounds(getattr(summary, name))
    document |= {
        "seconds": summary.seconds,
        "peak_rss_gib": summary.peak_rss_gib,
        "seed": summary.seed,
        "rerank_n": summary.rerank_n,
        "counts": dict(summary.counts),
        "references": list(summary.references),
        "intervals": intervals,
    }
    try:
        text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError:
        raise UserError(f"a figure for {path} is NaN or infinite; an absent figure must be None.") from None
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}); check the directory and its space.") from None


def read_summary(path: Path) -> Summary:
    """Read what `write_summary` wrote. UserError names the file, and the key that is missing or wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the evaluation of this run first.") from None
    except (ValueError, OSError):
        raise UserError(f"{path} is not readable JSON; run the evaluation of this run again.") from None
    try:
        intervals = document["intervals"]
        groups = {
            group: {name: _estimate(value, intervals[group][name]) for name, value in document[group].items()}
            for group in _GROUPS
        }
        single = {name: _estimate(document[name], intervals[name]) for name in _SINGLE}
        plain = {name: document[name] for name in ("seconds", "peak_rss_gib", "seed", "rerank_n", "counts")}
        return Summary(**groups, **single, **plain, references=tuple(document["references"]))
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error}; run the evaluation of this run again.") from None
    except (TypeError, AttributeError, ValueError):
        raise UserError(f"{path} has a key of the wrong type; run the evaluation of this run again.") from None


def render_table(summary: Summary) -> str:
    """The summary as plain text of at most 100 columns. Pass rates and hits in per cent, absent parts as “–”."""
    console = Console(file=StringIO(), width=WIDTH, color_system=None, force_terminal=False, highlight=False)
    policies = _table("policy", "pass@1 [95%]", "pass@5 [95%]")
    for name in POLICIES:
        row = (summary.pass_at_1.get(name), summary.pass_at_5.get(name))
        policies.add_row(LABELS[name], *(_percent(e) for e in row))
    if summary.control_random_reward is not None:
        policies.add_row("control: untrained reward", _percent(summary.control_random_reward), ABSENT)
    console.print(policies, "")
    n = ABSENT if summary.rerank_n is None else str(summary.rerank_n)
    picks = _table("start policy's samples picked by", f"pass@1|{n} [95%]")
    _add_rows(picks, RERANKERS, summary.rerank_pass_at_1, summary.rerank_other_pass_at_1, LABELS)
    console.print(picks, "")
    steps = _table("first wrong step named by", "Hit@1 [95%]")
    labels = {**LABELS, "logprob": "log-probability, same rule"}
    _add_rows(steps, LOCALISERS, summary.localise_hit_at_1, summary.localise_other_hit_at_1, labels)
    console.print(steps, "")
    console.print(f" AUROC within a prompt  {_plain(summary.auroc_within_prompt)}")
    console.print(f" {summary.seconds:.0f} s, peak {summary.peak_rss_gib:.2f} GiB, seed {summary.seed}")
    if summary.counts:
        console.print(" " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in summary.counts.items()))
    for line in summary.references:
        console.print(f" {line}", markup=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(headings[0], min_width=34, max_width=40)
    for heading in headings[1:]:
        # The brackets of an interval are text, not markup.
        table.add_column(heading.replace("[", r"\["), justify="right", min_width=20)
    return table


def _add_rows(
    table: Table, names: tuple[str, ...], estimates: Estimates, others: Estimates, labels: Mapping[str, str]
) -> None:
    for name in names:
        table.add_row(labels[name], _percent(estimates.get(name)))
    for name, estimate in others.items():
        table.add_row(labels.get(name, name.replace("_", " ")).replace("[", r"\["), _percent(estimate))


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ABSENT
    return rf"{100 * estimate.value:.1f} \[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _plain(estimate: Estimate | None) -> str:
    return ABSENT if estimate is None else rf"{estimate.value:.3f} \[{estimate.low:.3f}, {estimate.high:.3f}]"


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _bounds(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else [estimate.low, estimate.high]


def _estimate(value: float | None, bounds: list[float] | None) -> Estimate | None:
    if value is None or bounds is None:
        return None
    low, high = (float(b) for b in bounds)
    if not all(math.isfinite(x) for x in (value, low, high)):
        raise ValueError("not finite")
    return Estimate(float(value), low, high)
