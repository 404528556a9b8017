"""`airl-fast score RUN FILE`: token, step and trace rewards of anyone's traces, one row out for each row in.

What is computed from a row is a function of `Part`, which holds no label; labels are copied beside the scores when a
row is written.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airl_fast.data.trace_rows import NO_ERROR, TraceLabels
from airl_fast.errors import UserError
from airl_fast.judge.describe import Only, describe, rounded, rounded_list
from airl_fast.judge.judge import Judge, locate_reward, open_judge
from airl_fast.judge.leakage import TrainingPrompts, training_prompts
from airl_fast.judge.naming import NamedTrace, Naming, named, naming
from airl_fast.metrics import peak_rss_gib
from airl_fast.score.line_writer import LineWriter
from airl_fast.score.trace_parts import Part, Tally, part_tokens, read_parts, steps_of_ends

Say = Callable[[str], None]
_TELL_EVERY = 5.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command lines of `score` and `localize` say. rule: None for the run's. threshold: None calibrates one.
    tokens: of a part; None for what the models' passes hold."""

    rule: str | None = None
    threshold: float | None = None
    drop_too_long: bool = False
    allow_training_prompts: bool = False
    trust_remote_code: bool = False
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions(Options):
    """only: None writes all. locate: also name the first wrong step, by `rule` and `threshold`."""

    only: Only | None = None
    locate: bool = False


def score_command(run: Path, file: Path, out: Path | None, options: ScoreOptions, say: Say) -> None:
    """Write one object for each trace of `file` to `out` (None: standard output). UserError, after the rows before it
    were written, for a row that cannot be scored."""
    if not options.locate and (options.rule or options.threshold is not None):
        raise UserError("--rule and --threshold say how a step is named; add --locate.")
    judge = open_judge(run, trust_remote_code=options.trust_remote_code)
    chosen = naming(judge, options.rule, options.threshold) if options.locate else None
    source = identity(run)
    tally = Tally()
    pace = Pace(say)
    with LineWriter(out) as lines:
        try:
            for part, labels in parts_of(judge, file, tally, options):
                for row, known in zip(score_rows(judge, part, chosen, options.only), labels, strict=True):
                    lines.write(row | {"labels": known_labels(known)} | source)
                lines.flush()
                pace.told(len(part.rows))
        except UserError:
            if lines.partial is not None:
                say(f"{lines.rows} rows written before the error; they are in {lines.partial}")
            raise
    pace.ended(tally, "standard output" if out is None else str(out))


def parts_of(
    judge: Judge, file: Path, tally: Tally, options: Options
) -> Iterator[tuple[Part, tuple[TraceLabels, ...]]]:
    trained_on: TrainingPrompts | None = None
    if not options.allow_training_prompts:
        trained_on = training_prompts(judge.config)
    tokens = options.tokens or part_tokens(judge)
    return read_parts(judge, file, tally, trained_on=trained_on, drop_too_long=options.drop_too_long, tokens=tokens)


def score_rows(judge: Judge, part: Part, chosen: Naming | None, only: Only | None) -> Iterator[dict[str, Any]]:
    """One object a trace, in order. Reads no label: there is none in a part."""
    scored = judge.score(part.traces, part.examples, part.step_ends)
    names = [None] * len(part.traces) if chosen is None else named(scored, chosen)
    for i, numbers in enumerate(describe(judge, scored, only)):
        found: dict[str, Any] = {"id": part.rows[i].id, **numbers}
        if names[i] is not None:
            place = steps_of_ends(judge, part.traces[i], part.step_ends[i])
            found["first_wrong_step"] = _prediction(names[i], place, chosen)
        yield found


def _prediction(found: NamedTrace, place: list[int], chosen: Naming) -> dict[str, Any]:
    return {
        "predicted": given_step(found.step, place),
        "below_threshold": found.below_threshold,
        "suspicion": rounded_list(found.suspicion),
        "rule": chosen.rule,
        "threshold": rounded(chosen.threshold),
    }


def given_step(step: int, place: list[int]) -> int:
    """The first step, as the file counts them, that lies in a scored one. place: of `steps_of_ends`."""
    return place.index(step) if step in place else len(place) - 1


def known_labels(labels: TraceLabels) -> dict[str, Any]:
    """What the file says of a trace, as it says it; what it does not say is left out."""
    first = None if labels.first_wrong_step == NO_ERROR else labels.first_wrong_step
    found = {"answer": labels.gold, "correct": labels.correct, "group": labels.group}
    found = {name: value for name, value in found.items() if value is not None}
    return found if labels.first_wrong_step is None else found | {"first_wrong_step": first}


def identity(run: Path) -> dict[str, str]:
    """The run's name and a fingerprint of its reward's files: whose numbers these are."""
    root, directory = locate_reward(run)
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors" or path.name == "head.json":
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"run": root.resolve().name, "reward_sha256": digest.hexdigest()[:16]}


class Pace:
    """Says every few seconds how far a file has been read."""

    def __init__(self, say: Say) -> None:
        self._say, self._began = say, time.monotonic()
        self._last, self.rows = self._began, 0

    def told(self, rows: int) -> None:
        self.rows += rows
        now = time.monotonic()
        if now - self._last >= _TELL_EVERY:
            self._last = now
            self._say(f"{self.rows} traces scored, {self._rate():.0f} a second")

    def ended(self, tally: Tally, target: str | None = None) -> None:
        """target: where the rows went."""
        if tally.too_long:
            self._say(f"{tally.too_long} traces passed over as too long (--too-long drop): the first, {tally.reason}")
        where = "" if target is None else f" to {target}"
        self._say(
            f"{self.rows} traces scored{where}, {self._rate():.0f} a second, peak memory {peak_rss_gib():.2f} GiB"
        )

    def _rate(self) -> float:
        return self.rows / max(time.monotonic() - self._began, 1e-9)
