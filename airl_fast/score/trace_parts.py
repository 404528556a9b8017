"""Traces of a file of any size, a part at a time: what is scored apart from the labels that are not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from airl_fast.data.trace_rows import TraceLabels, TraceRow, read_traces
from airl_fast.errors import UserError
from airl_fast.judge.judge import Judge
from airl_fast.judge.leakage import TrainingPrompts
from airl_fast.types import Example, Trace

STDIN = "-"
PART_PASSES = 4  # forward passes to a part: enough to pack them well, few enough to hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """S consecutive traces, those of one prompt sharing a group. examples: the prompts, indexed by a trace's group;
    they hold no answer, so nothing computed from a part can depend on a label.

    step_ends: where each row's steps end in the trace's own text; None leaves the cut to the task.
    """

    rows: tuple[TraceRow, ...]
    traces: tuple[Trace, ...]
    examples: tuple[Example, ...]
    step_ends: tuple[tuple[int, ...] | None, ...]


@dataclass(slots=True)
class Tally:
    """What was met on the way. too_long: traces passed over, `reason` is why of the first."""

    too_long: int = 0
    reason: str = ""


@dataclass(slots=True)
class _Open:
    """A part that is still being filled."""

    rows: list[TraceRow] = field(default_factory=list)
    labels: list[TraceLabels] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    step_ends: list[tuple[int, ...] | None] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    tokens: int = 0

    def close(self) -> tuple[Part, tuple[TraceLabels, ...]]:
        examples = tuple(Example(id=f"prompt {i}", prompt=prompt, answer="") for prompt, i in self.groups.items())
        part = Part(
            rows=tuple(self.rows), traces=tuple(self.traces), examples=examples, step_ends=tuple(self.step_ends)
        )
        return part, tuple(self.labels)


def part_tokens(judge: Judge) -> int:
    """Prompt and completion tokens that are read before they are scored together."""
    return PART_PASSES * max(judge.config.policy.optim.tokens_per_micro_batch, judge.model.budget.tokens)


def read_parts(
    judge: Judge,
    path: Path,
    tally: Tally,
    *,
    trained_on: TrainingPrompts | None,
    drop_too_long: bool,
    tokens: int,
) -> Iterator[tuple[Part, tuple[TraceLabels, ...]]]:
    """The file's traces in its order, up to `tokens` tokens a part (one trace at least), each part with its labels.

    trained_on: prompts that are refused; None allows all. UserError, after the rows before it were yielded, names the
    line that is bad, trained on, or (unless drop_too_long, which counts it in `tally`) longer than a model's context.
    """
    part = _Open()
    source = read_traces(path)
    while True:
        try:
            found = next(source, None)
            if found is None:
                break
            row, labels = found
            if trained_on is not None:
                trained_on.refuse([(row.place, row.prompt)])
            trace = _trace(judge, row, tally, drop_too_long)
        except UserError:
            if part.traces:
                yield part.close()
            raise
        if trace is None:
            continue
        is_new = row.prompt not in part.groups
        added = len(trace.tokens) + len(trace.prompt_tokens) * is_new
        if part.traces and part.tokens + added > tokens:
            yield part.close()
            part = _Open()
            added = len(trace.tokens) + len(trace.prompt_tokens)
        group = part.groups.setdefault(row.prompt, len(part.groups))
        part.rows.append(row)
        part.labels.append(labels)
        part.traces.append(replace(trace, group=group))
        part.step_ends.append(_own_ends(judge, row, trace))
        part.tokens += added
    if part.traces:
        yield part.close()


def _trace(judge: Judge, row: TraceRow, tally: Tally, drop_too_long: bool) -> Trace | None:
    """None for a row that is passed over."""
    example = Example(id=row.place, prompt=row.prompt, answer="")
    trace = judge.trace(example, 0, row.text)
    reason = judge.excess([trace], [example])
    if reason is None:
        return trace
    if not drop_too_long:
        raise UserError(f"{reason}; leave such traces out with --too-long drop, or shorten this one.")
    tally.too_long += 1
    tally.reason = tally.reason or reason
    return None


def _own_ends(judge: Judge, row: TraceRow, trace: Trace) -> tuple[int, ...] | None:
    """The row's step ends in the text that the tokens spell, which a tokenizer that normalises changes."""
    if row.step_ends is None or trace.text == row.text:
        return row.step_ends
    chat = judge.maker.chat
    return tuple(len(chat.decode(chat.completion_tokens(row.text[:end], False))) for end in row.step_ends)


def steps_of_ends(judge: Judge, trace: Trace, ends: Sequence[int] | None) -> list[int]:
    """For each step as the file (or, without `ends`, the task) counts it, its place among the steps that are scored:
    two steps are one where a token spans both. Ascending, one entry a step."""
    cut = judge.task.step_ends(trace.text) if ends is None else ends
    closing = judge.maker.step_tokens(trace, ends)
    spans = judge.maker.chat.token_char_spans(trace.text, trace.tokens)
    found, token, step = [], 0, 0
    for end in cut:
        while token < len(spans) - 1 and spans[token][1] < end:
            token += 1
        while closing[step] < token:
            step += 1
        found.append(step)
    return found
