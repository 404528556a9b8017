"""What a visit to a GPU is to prove, and what its records say of each goal: proved, refuted, or not measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report import table
from bench.results import Row
from bench.targets import OURS, TARGETS, Target, judge, target_of
from bench.updates_report import MFU_GOAL

PROVED, REFUTED, UNMEASURED = "proved", "refuted", "not measured"
LIGER, TIMES_LIGER = "liger scaled ce", 1.8
# Published by Liger-Kernel for its Hopper kernels, H100, bf16, hidden size 4096; not measured here.
LIGER_PUBLISHED = {"linear:8192x4096x131072": 50.4}
LIGER_PREDICTED = "1.73-1.82x its published time, H100"  # from 84-88% of two products at 720 TFLOP/s
TIMES_TRL, SHARING_PERCENT = 2.0, 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """state: PROVED, REFUTED or UNMEASURED. measured: the figures it rests on. predicted: before any GPU ran it."""

    goal: str
    state: str
    measured: str
    predicted: str = ""


def findings(rows: Sequence[Row], updates: Sequence[dict]) -> list[Finding]:
    """rows: of the benchmark, headline and whole. updates: the rows of `bench.updates`."""
    return [
        _headline(rows),
        *(_floor(target, rows) for target in TARGETS),
        _peers(rows),
        _memory(rows),
        _trl(updates),
        _utilisation(updates),
        _sharing(updates),
    ]


def findings_table(found: Sequence[Finding]) -> str:
    return table(
        ("goal", "verdict", "measured", "predicted"),
        [(f.goal, f.state, f.measured, f.predicted) for f in found],
    )


def _judged(goal: str, values: Sequence[tuple[bool, str]], predicted: str = "") -> Finding:
    """Every value has to reach it."""
    state = UNMEASURED if not values else PROVED if all(reached for reached, _ in values) else REFUTED
    return Finding(goal=goal, state=state, measured="; ".join(text for _, text in values), predicted=predicted)


def _headline(rows: Sequence[Row]) -> Finding:
    """A frozen head under any later gradient: our two products against Liger's four, timed beside it where it ran."""
    goal = f"linear_logprob frozen f+b: {TIMES_LIGER:g}x as fast as Liger's Hopper kernels"
    values = []
    for row in _ours(rows, "linear_logprob", "frozen f+b"):
        ratio, published = row.ratio_to_peer.get(LIGER), LIGER_PUBLISHED.get(row.shape)
        if ratio is not None:
            values.append((ratio >= TIMES_LIGER, f"{ratio:.2f}x at {_short(row)}"))
        elif published is not None and "H100" in row.device:
            ratio = published / row.ms
            values.append((ratio >= TIMES_LIGER, f"{ratio:.2f}x its published {published} ms at {_short(row)}"))
    return _judged(goal, values, LIGER_PREDICTED)


def _floor(target: Target, rows: Sequence[Row]) -> Finding:
    hoped = "" if target.hoped is None else f" (hoped: {target.hoped:.0f}%)"
    goal = f"{target.op} {target.mode} >= {target.percent:.0f}% of the floor{hoped}, {target.says}"
    mine = [row for row in _ours(rows, target.op, target.mode) if target_of(row) is target]
    values = [(row.percent_of_floor >= target.percent, f"{row.percent_of_floor:.0f}% at {_short(row)}") for row in mine]
    return _judged(goal, values, target.predicted)


def _peers(rows: Sequence[Row]) -> Finding:
    """Only what is not ahead is named, when something is not."""
    verdicts = [v for v in judge(rows) if v.faster is not None]
    behind = [v for v in verdicts if not v.faster]
    named = [f"{v.row.op} {v.row.mode} {_short(v.row)}: {v.fastest_peer} takes"
             f" {v.row.ratio_to_peer[v.fastest_peer]:.2f} of our time" for v in behind]  # fmt: skip
    return _all_but("ahead of every peer", len(verdicts), named)


def _memory(rows: Sequence[Row]) -> Finding:
    verdicts = [v for v in judge(rows) if v.leaner is not None]
    worse = [v for v in verdicts if not v.leaner]
    named = [f"{v.row.op} {v.row.mode} {_short(v.row)}: {v.leanest_peer} needs"
             f" {v.row.memory_ratio_to_peer[v.leanest_peer]:.2f} of our memory" for v in worse]  # fmt: skip
    return _all_but("no more memory than any peer", len(verdicts), named)


def _all_but(goal: str, count: int, named: Sequence[str]) -> Finding:
    if not count:
        return Finding(goal=goal, state=UNMEASURED, measured="")
    text = f"{count - len(named)} of {count} rows" + "".join(f"; {name}" for name in named)
    return Finding(goal=goal, state=REFUTED if named else PROVED, measured=text)


def _trl(updates: Sequence[dict]) -> Finding:
    """Tokens a second in the policy's update: TRL's has no discriminator."""
    values = []
    for policy, by_variant in _by_policy(updates).items():
        if {"shared", "trl"} <= by_variant.keys():
            ours, theirs = (u["policy_tokens"] / u["seconds"]["policy"] for u in map(by_variant.get, ("shared", "trl")))
            values.append((ours / theirs >= TIMES_TRL, f"{ours / theirs:.2f}x at {policy}"))
    return _judged(f"policy update >= {TIMES_TRL:g}x TRL's tokens/s", values)


def _utilisation(updates: Sequence[dict]) -> Finding:
    found = [(u["policy"], 100 * u["model_flops_utilisation"]) for u in updates if u["variant"] == "shared"]
    values = [(percent >= MFU_GOAL, f"{percent:.0f}% at {policy}") for policy, percent in found]
    return _judged(f"policy update >= {MFU_GOAL}% model FLOPs utilisation", values)


def _sharing(updates: Sequence[dict]) -> Finding:
    """The speed-up of sharing prompts over the ratio of rows that it saves, over all phases."""
    values = []
    for policy, by_variant in _by_policy(updates).items():
        if {"shared", "packed"} <= by_variant.keys():
            shared, packed = by_variant["shared"], by_variant["packed"]
            gain = sum(packed["seconds"].values()) / sum(shared["seconds"].values())
            rows = packed["rows"] / shared["rows"]
            share = 100 * gain / rows
            values.append((share >= SHARING_PERCENT, f"{share:.0f}% ({gain:.2f}x of {rows:.2f}x) at {policy}"))
    return _judged(f"sharing prompts >= {SHARING_PERCENT}% of its token ratio", values)


def _by_policy(updates: Sequence[dict]) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for row in updates:
        found.setdefault(row["policy"], {})[row["variant"]] = row
    return found


def _ours(rows: Sequence[Row], op: str, mode: str) -> list[Row]:
    return [row for row in rows if (row.backend, row.op, row.mode) == (OURS, op, mode)]


def _short(row: Row) -> str:
    return row.shape.partition(":")[2]
