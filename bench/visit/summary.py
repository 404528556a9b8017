"""The summary of a visit, from its records alone: goals first, then each stage's table."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.goals import UNMEASURED, findings, findings_table
from bench.report import results_table, short, table
from bench.results import Row
from bench.targets import judge, verdict_table
from bench.updates_report import updates_table
from bench.visit.records import of, read

CASE_STAGES = ("smoke", "tests", "headline", "benchmark", "compiled")
MOST_FAILURES = 25
MOST_NAMED = 5  # failed cases of a stage in a line about all of it


def exit_code(path: Path) -> int:
    return int(bool(failing(read(path))))


def failing(records: list[dict]) -> list[str]:
    """Each stage that did not end well or has failed cases, in half a sentence; also when no case ran at all."""
    found = []
    ends = {r["stage"]: r for r in of(records, kind="end")}
    for stage in dict.fromkeys([*_planned(records), *(r["stage"] for r in records)]):
        cases = of(records, stage, "case")
        failed = [f"`{r['name']}`" for r in cases if not r["passed"]]
        more = [f"and {len(failed) - MOST_NAMED} more"] if len(failed) > MOST_NAMED else []
        named = f"{len(failed)} of {len(cases)} cases failed: {', '.join([*failed[:MOST_NAMED], *more])}"
        code = ends.get(stage, {}).get("code", 0)
        words = [] if code == 0 else [_ended(code)]
        words += ["had not ended when the visit did"] if stage in unfinished(records) else []
        words += [named] if failed else []
        found += [f"{stage}: {'; '.join(words)}"] if words else []
    if not any(r["passed"] and not r.get("skipped") for r in of(records, kind="case")):
        found.append("no case passed")
    return found


def unfinished(records: list[dict]) -> list[str]:
    """The stages, planned or begun, of which no end is recorded: the visit was stopped before."""
    ended = {r["stage"] for r in of(records, kind="end")}
    begun = [r["stage"] for r in of(records, kind="begin")]
    return [stage for stage in dict.fromkeys([*_planned(records), *begun]) if stage not in ended]


def _planned(records: list[dict]) -> list[str]:
    return next(iter(of(records, kind="environment")), {}).get("stages", [])


def render(path: Path) -> str:
    """Markdown."""
    records = read(path)
    environment = next(iter(of(records, kind="environment")), {})
    versions = ", ".join(f"{key} {environment.get(key)}" for key in ("commit", "python", "torch", "cuda", "triton"))
    parts = [f"# {environment.get('device', 'no device')}", versions]
    found = findings(rows_of(records), updates_of(records))
    if environment.get("rehearsal"):
        parts.append("A rehearsal on a CPU: no figure here says anything about a GPU.")
        found = [f if f.state == UNMEASURED else replace(f, state="rehearsed") for f in found]
    parts += [
        *("## Goals", findings_table(found)),
        *("## Stages", stages_table(records)),
        *("## What failed", failures(records)),
        *("## Rows with a goal, and others of ours", verdicts(records)),
        *("## Benchmark", benchmark(records)),
        *("## Updates of a step", updates(records)),
        *("## Whole steps", steps(records)),
        *("## Profile", profile(records)),
    ]
    return "\n\n".join(parts) + f"\n\nCheck {'FAILED' if exit_code(path) else 'passed'}.\n"


def rows_of(records: list[dict], *stages: str) -> list[Row]:
    """Of the stages, or of all."""
    return [Row(**r["row"]) for r in of(records, kind="row") if not stages or r["stage"] in stages]


def updates_of(records: list[dict]) -> list[dict]:
    return [r["row"] for r in of(records, kind="update")]


def stages_table(records: list[dict]) -> str:
    lines = []
    for end in of(records, kind="end"):
        name = end["stage"]
        cases = [r for r in of(records, name, "case") if not r.get("skipped")]
        passed = sum(r["passed"] for r in cases)
        count = f"{passed} of {len(cases)}" if cases else ""
        state = f"left out: {end['skipped']}" if "skipped" in end else _ended(end["code"])
        lines.append((name, count, "" if "skipped" in end else f"{end['seconds']:.0f}", state))
    for name in unfinished(records):
        begun = of(records, name, "begin")
        lines.append((name, "", "", "under way when the visit ended" if begun else "not begun when the visit ended"))
    return table(("stage", "passed", "seconds", ""), lines) if lines else "None began."


def _ended(code: int | None) -> str:
    return "stopped at its limit" if code is None else "ended" if code == 0 else f"exit code {code}"


def failures(records: list[dict]) -> str:
    """The last line of each failed case's traceback; results.jsonl has the whole."""
    failed = [r for r in of(records, kind="case") if not r["passed"]]
    lines = [f"- {r['stage']}: {r['name']}: {_last_line(r.get('error'))}" for r in failed[:MOST_FAILURES]]
    if len(failed) > MOST_FAILURES:
        lines.append(f"- and {len(failed) - MOST_FAILURES} more in results.jsonl")
    return "\n".join(lines) if lines else "Nothing."


def _last_line(error: str | None) -> str:
    lines = [line for line in (error or "").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no message"


def verdicts(records: list[dict]) -> str:
    found = judge(rows_of(records))
    return verdict_table(found) if found else "None was measured."


def benchmark(records: list[dict]) -> str:
    """Both benchmark stages' rows, each beside its peers, and what is missing with its reason."""
    parts = [
        f"{stage}:\n\n{results_table(rows)}" for stage in ("headline", "benchmark") if (rows := rows_of(records, stage))
    ]
    reasons: dict[tuple[str, str, str], int] = {}
    for record in of(records, kind="absent"):
        entry = record["absent"]
        key = entry["kind"], entry["backend"], entry["reason"]
        reasons[key] = reasons.get(key, 0) + 1
    parts += [f"{kind}: {backend}: {reason} ({count} times)" for (kind, backend, reason), count in reasons.items()]
    return "\n\n".join(parts) if parts else "Not measured."


def updates(records: list[dict]) -> str:
    header, rows = next(iter(of(records, kind="update-header")), None), updates_of(records)
    if header is None or not rows:
        return "Not measured."
    left_out = [r["reason"] for r in of(records, kind="left-out")]
    return "\n\n".join([updates_table(header | {"rows": rows}), *left_out])


def steps(records: list[dict]) -> str:
    """The steps after the warm ones; tokens/s of a phase are sampled tokens over its seconds."""
    taken = [r for r in of(records, kind="step") if not r["warm"]] or of(records, kind="step")
    if not taken:
        return "Not measured."
    names = list(taken[0]["phase_seconds"])
    lines = [
        (f"{r['step']}{' (warm)' if r['warm'] else ''}", short(r["seconds"]), short(r["tokens_per_s"]),
         *(short(r["phase_tokens_per_s"].get(n, 0.0)) for n in names)) for r in taken
    ]  # fmt: skip
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in taken[0]["scenario"].items())
    backend = [f"{r['backend']}; peak {r['peak_mib']:.0f} MiB" for r in of(records, kind="step-end")]
    header = ("step", "s", "tokens/s", *names)
    return "\n\n".join([f"{sizes}; {taken[0]['dtype']}; tokens/s by phase", table(header, lines), *backend])


def profile(records: list[dict]) -> str:
    parts = []
    for record in of(records, kind="kernels"):
        lines = [(name, f"{ms:.4f}") for name, ms in list(record["ms_by_kernel"].items())[:8]]
        parts += [record["name"], table(("kernel", "ms a call"), lines) if lines else "no kernel was seen"]
    for record in of(records, kind="counters"):
        parts += [f"{record['name']}, by ncu", _counters(record)]
    return "\n\n".join(parts) if parts else "Not measured."


def _counters(record: dict) -> str:
    kernels: dict[str, dict[str, str]] = record["kernels"]
    if not kernels:
        return f"nothing was read: {_last_line(record.get('error'))}"
    labels: Sequence[str] = sorted({label for found in kernels.values() for label in found})
    return table(("kernel", *labels), [(name, *(v.get(k, "") for k in labels)) for name, v in kernels.items()])
