"""`airl-fast localize RUN FILE`: the first wrong step of anyone's traces, and how often that is right.

A part's steps are scored and named before its labels are looked at. Of a trace only the scores of its steps and its
labels are kept, so that a file of any size passes through.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from airl_fast.data.trace_rows import NO_ERROR, TraceLabels, TraceRow
from airl_fast.errors import UserError
from airl_fast.evaluate.outputs import write_json
from airl_fast.judge.describe import rounded, step_spans
from airl_fast.judge.judge import Judge, Scored, open_judge
from airl_fast.judge.locate import SIGNALS
from airl_fast.judge.naming import NamedTrace, Naming, calibrated, named, naming
from airl_fast.measures.localise import StepScores, step_scores
from airl_fast.measures.passk import Floats
from airl_fast.score.line_writer import LineWriter
from airl_fast.score.located import UNKNOWN, Labelled, Section, measure
from airl_fast.score.located_view import as_document, render
from airl_fast.score.score_command import Options, Pace, given_step, identity, known_labels, parts_of
from airl_fast.score.trace_parts import Part, Tally, steps_of_ends
from airl_fast.types import Example

Say = Callable[[str], None]
NO_GROUP = "(no group)"


def localise_command(run: Path, file: Path, out: Path | None, document: Path | None, options: Options, say: Say) -> str:
    """Write the predictions to `out` and the figures to `document`, where asked for; returns the tables, "" for a file
    without labels. UserError for a row that cannot be scored, and when there is nothing to write or to measure."""
    judge = open_judge(run, trust_remote_code=options.trust_remote_code)
    chosen = naming(judge, options.rule, options.threshold)
    source, tally, kept = identity(run), Tally(), _Kept()
    pace = Pace(say)
    with nullcontext() if out is None else LineWriter(out) as lines:
        try:
            for part, labels in parts_of(judge, file, tally, options):
                scored = judge.score(part.traces, part.examples, part.step_ends)
                names = named(scored, chosen)
                places = [steps_of_ends(judge, t, ends) for t, ends in zip(part.traces, part.step_ends, strict=True)]
                if lines is not None:
                    for row, known in zip(_rows(judge, part, scored, names, places, chosen), labels, strict=True):
                        lines.write(row | {"labels": known_labels(known)} | source)
                    lines.flush()
                kept.add(judge, part, scored, places, labels)
                pace.told(len(part.rows))
                if lines is None and not kept.traces:
                    raise UserError(
                        f"{file}: its first {pace.rows} traces have no label to compare with; write the predictions "
                        "to a file with -o."
                    )
        except UserError:
            if lines is not None:
                say(f"{lines.rows} rows written before the error; they are in {lines.partial}")
            raise
    pace.ended(tally, None if out is None else str(out))
    if not pace.rows:
        raise UserError(f"{file} holds no trace that can be scored{_why(tally)}; give one a line.")
    if not kept.traces:
        say(f"{file} has no labels, so there is nothing to compare the predictions with")
        return ""
    sections, notes = _measured(judge, kept.labelled(), chosen, tally)
    if document is not None:
        write_json(document, _document(sections, chosen, tally, pace.rows, file, source))
    return render(sections, chosen, notes)


def _why(tally: Tally) -> str:
    return f" ({tally.too_long} are too long: {tally.reason})" if tally.too_long else ""


def _measured(judge: Judge, given: Labelled, chosen: Naming, tally: Tally) -> tuple[tuple[Section, ...], list[str]]:
    """The figures, and what to say beside them. A rule without a threshold calibrates one for the table alone."""
    thresholds, notes = chosen.thresholds, []
    if not thresholds:
        try:
            thresholds = calibrated(judge)
        except UserError as error:
            notes.append(f"Without first below: {error}.")
    if tally.too_long:
        notes.append(f"{tally.too_long} traces were too long and are not in these figures: {tally.reason}.")
    return measure(given, chosen.settings, thresholds), notes


def _rows(
    judge: Judge,
    part: Part,
    scored: Scored,
    names: Sequence[NamedTrace],
    places: Sequence[Sequence[int]],
    chosen: Naming,
) -> Iterator[dict[str, Any]]:
    """One object a trace, from what was scored alone."""
    for i, (row, trace, found, place) in enumerate(zip(part.rows, part.traces, names, places, strict=True)):
        spans = step_spans(scored.reward, i, judge.maker.chat.token_char_spans(trace.text, trace.tokens))
        steps = [
            {
                "step": given_step(k, place),
                "start": start,
                "end": end,
                "text": trace.text[start:end],
                "reward": rounded(found.score[k]),
                "suspicion": rounded(found.suspicion[k]),
                "rank": int(found.rank[k]),
            }
            for k, (start, end) in enumerate(spans)
        ]
        yield {
            "id": row.id,
            "predicted": steps[found.step]["step"],
            "text": steps[found.step]["text"],
            "below_threshold": found.below_threshold,
            "rule": chosen.rule,
            "threshold": rounded(chosen.threshold),
            "threshold_from": chosen.origin,
            "steps": steps,
        }


@dataclass(slots=True)
class _Kept:
    """What the tables need of the labelled traces: the scores of their steps, and their labels."""

    values: dict[str, list[Floats]] = field(default_factory=lambda: {name: [] for name in SIGNALS})
    lengths: list[int] = field(default_factory=list)
    truth: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    prompts: dict[bytes, int] = field(default_factory=dict)
    prompt: list[int] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    group: list[int] = field(default_factory=list)

    @property
    def traces(self) -> int:
        return len(self.truth)

    def add(
        self,
        judge: Judge,
        part: Part,
        scored: Scored,
        places: Sequence[Sequence[int]],
        labels: Sequence[TraceLabels],
    ) -> None:
        """The part's traces that have a label. UserError for a wrong step that the trace does not have."""
        rule = judge.config.evaluate.step_score
        steps = {name: step_scores(getattr(scored, name), rule) for name in SIGNALS}
        offsets = steps["reward"].offsets
        for i, (row, label) in enumerate(zip(part.rows, labels, strict=True)):
            truth, right = _true_step(row, label, places[i]), _verdict(judge, row, label)
            if truth == right == UNKNOWN:
                continue
            own = slice(*offsets[i : i + 2])
            for name in SIGNALS:
                self.values[name].append(steps[name].values[own].copy())
            self.lengths.append(own.stop - own.start)
            self.truth.append(truth)
            self.right.append(right)
            key = blake2b(row.prompt.encode(), digest_size=16).digest()
            self.prompt.append(self.prompts.setdefault(key, len(self.prompts)))
            self.group.append(self.names.setdefault(label.group or NO_GROUP, len(self.names)))

    def labelled(self) -> Labelled:
        offsets = np.concatenate(([0], np.cumsum(self.lengths)))
        return Labelled(
            steps={n: StepScores(values=np.concatenate(v), offsets=offsets) for n, v in self.values.items()},
            truth=np.array(self.truth, dtype=np.int64),
            right=np.array(self.right, dtype=np.int64),
            prompts=np.array(self.prompt, dtype=np.int64),
            groups=np.array(self.group, dtype=np.int64),
            names=tuple(self.names),
        )


def _true_step(row: TraceRow, label: TraceLabels, place: Sequence[int]) -> int:
    """The labelled step among the scored ones."""
    if label.first_wrong_step is None:
        return UNKNOWN
    if label.first_wrong_step == NO_ERROR:
        return NO_ERROR
    if label.first_wrong_step >= len(place):
        raise UserError(
            f"{row.place}: 'first_wrong_step' is {label.first_wrong_step}, but the task cuts the trace into "
            f"{len(place)} steps; give the trace as 'steps', or with 'step_ends', so that both count alike."
        )
    return place[label.first_wrong_step]


def _verdict(judge: Judge, row: TraceRow, label: TraceLabels) -> int:
    if label.correct is not None:
        return int(label.correct)
    if label.gold is None:
        return UNKNOWN
    return int(judge.task.verify(Example(id=row.id, prompt=row.prompt, answer=label.gold), row.text))


def _document(
    sections: Sequence[Section], chosen: Naming, tally: Tally, traces: int, file: Path, source: dict[str, str]
) -> dict[str, Any]:
    return source | {
        "file": str(file),
        "traces": traces,
        "too_long": tally.too_long,
        "rule": chosen.rule,
        "step_score": chosen.settings.step_score,
        "threshold": chosen.threshold,
        "threshold_from": chosen.origin,
        "sections": as_document(sections),
    }
