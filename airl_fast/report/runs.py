"""What a report reads of a run directory. Nothing is computed anew: the run and its evaluation wrote all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airl_fast.errors import UserError
from airl_fast.evaluate.plots import Series, read_metrics
from airl_fast.evaluate.record import Record, RecordedTrace, read_record, record_path
from airl_fast.evaluate.summary import Summary, read_summary
from airl_fast.overrides import read_yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run. summary, record: None where the run has none, and then `missing` says in a sentence what to do."""

    name: str
    path: Path
    config: dict[str, Any]
    metrics: dict[str, Series]
    summary: Summary | None
    record: Record | None
    traces: tuple[RecordedTrace, ...]
    missing: tuple[str, ...]


def read_runs(paths: Sequence[Path], split: str) -> list[RunData]:
    """UserError for a directory that is no run's, that is given twice, or that holds a damaged file."""
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise UserError(f"{paths[number]} is given twice; name each run once.")
    return [_read_run(path, name, split) for path, name in zip(paths, run_names(resolved), strict=True)]


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `demo`, or `a/demo` and `b/demo`."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(path: Path, name: str, split: str) -> RunData:
    for file in ("config.yaml", "metrics.jsonl"):
        if not (path / file).is_file():
            raise UserError(f"{path} is no run directory (it has no {file}); give one that `airl-fast train` wrote.")
    try:
        metrics = read_metrics(path / "metrics.jsonl")
    except UnicodeDecodeError:
        raise UserError(f"{path / 'metrics.jsonl'} is not UTF-8 text; restore the file.") from None
    words = "" if split == "test" else f" --split {split}"
    missing = []
    evaluated = path / "eval" / f"{split}.json"
    if split == "test" and (path / "summary.json").is_file():
        evaluated = path / "summary.json"
    summary = read_summary(evaluated) if evaluated.is_file() else None
    if summary is None:
        missing.append(f"{name} has no figures on its {split} prompts yet: run `airl-fast eval {path}{words}`.")
    record, traces = None, []
    if record_path(path, split).is_file():
        record, traces = read_record(record_path(path, split))
    else:
        missing.append(
            f"{name} has no recorded traces, so its pass@k curves, rewards and tokens are not shown: "
            f"run `airl-fast eval {path}{words}`."
        )
    return RunData(
        name=name,
        path=path,
        config=read_yaml(path / "config.yaml"),
        metrics=metrics,
        summary=summary,
        record=record,
        traces=tuple(traces),
        missing=tuple(missing),
    )
