"""`airl-fast rerank RUN [FILE]`: pick one of a prompt's samples by a frozen reward, on fresh samples or on a file's.

Every score is computed before any label is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from airl_fast.data.trace_rows import TraceLabels, TraceRow, read_traces
from airl_fast.errors import UserError
from airl_fast.evaluate import correctness, reranking
from airl_fast.evaluate.outputs import write_json
from airl_fast.evaluate.plots import save_figure
from airl_fast.evaluate.sources import (
    TaskSource,
    find_policy,
    fit_prompts,
    fit_samples,
    load_prompts,
    sample,
    with_policy,
)
from airl_fast.evaluate.tables import paragraph
from airl_fast.judge.choose import score_traces
from airl_fast.judge.judge import Judge, open_judge
from airl_fast.judge.leakage import training_prompts
from airl_fast.judge.scoring import score_all
from airl_fast.lab import load_material
from airl_fast.measures.passk import Floats
from airl_fast.measures.rerank import answer_classes
from airl_fast.types import Example, Trace

Say = Callable[[str], None]
Scores = dict[str, Floats]
_USUAL_KS = (1, 3, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says. samples, prompts: None for the run's own numbers (of a file: as many as there are).
    ks: None for 1, 3, 5 as far as the samples allow."""

    policy: str = "start"
    split: str = "test"
    prompts: int | None = None
    samples: int | None = None
    ks: tuple[int, ...] | None = None
    too_long: str | None = None
    allow_training_prompts: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """S traces with what is known of them, scored. groups: int64 [S], the prompt of each. scores: f64 [S] by name.
    correct: bool [S]. answers: the S answers, equal ones spelt alike."""

    traces: tuple[Trace, ...]
    groups: NDArray[np.int64]
    scores: Scores
    correct: NDArray[np.bool_]
    answers: tuple[str | None, ...]


def rerank_command(run: Path, file: Path | None, options: Options, say: Say) -> str:
    """Write RUN/eval/rerank-….json and .png; returns the tables."""
    own = open_judge(run, trust_remote_code=options.trust_remote_code)
    judge = with_policy(own, find_policy(options.policy, run, own.config))
    too_long = options.too_long or own.config.data.too_long
    if file is None:
        given = _sampled(run, judge, options, too_long, say)
        wanted = options.samples or judge.config.evaluate.samples
        origin, name = (
            f"{options.split} prompts, samples of {options.policy}",
            f"{options.split}-{_slug(options.policy)}",
        )
    else:
        given = _from_file(file, judge, options, too_long, say)
        wanted = options.samples or int(np.bincount(given.groups).min())
        origin, name = str(file), _slug(file.name.partition(".")[0])
    pool, notes = _pool(given, wanted, file)
    found = correctness.measure(
        given.scores, given.correct, given.groups, [t.text for t in given.traces], [len(t.tokens) for t in given.traces]
    )
    parts, document = [], {"run": str(run), "source": origin, "policy": options.policy}
    document |= {"prompts": int(given.groups.max()) + 1, "prompts_reranked": 0, "traces": found.traces}
    target = run / "eval" / f"rerank-{name}.json"
    if pool is not None:
        studied = reranking.study(pool, _ks(options.ks, pool.samples))
        parts.append(reranking.render(studied))
        document |= {"prompts_reranked": len(pool.correct), "rerank": reranking.as_document(studied)}
        if pool.samples > 1:
            save_figure(reranking.figure(studied), _folder(target).with_suffix(".png"))
    notes.append(f"Learned reward: scorer {judge.config.evaluate.scorer} of the run's evaluate.scorer.")
    parts += [correctness.render(found), paragraph(notes) + f" {target}\n"]
    document |= {"correctness": correctness.as_document(found), "each": _each(given)}
    write_json(target, document)
    return "\n".join(parts)


def _sampled(run: Path, judge: Judge, options: Options, too_long: str, say: Say) -> Given:
    settings = judge.config.evaluate
    task = TaskSource(label=judge.task.name, task=judge.task)
    examples = load_prompts(task, options.split, options.prompts or settings.prompts)
    if not options.allow_training_prompts:
        training_prompts(judge.config).refuse((f"{options.split} prompt {e.id}", e.prompt) for e in examples)
    examples = fit_prompts(judge, examples, too_long, say)
    source = find_policy(options.policy, run, judge.config)
    demonstrations = load_material(judge.config).train if judge.config.rollout.engine == "vllm" else ()
    per_prompt = options.samples or settings.samples
    _ks(options.ks, per_prompt)  # refused before the work
    samples = sample(judge, source, examples, per_prompt, demonstrations, run, say)
    samples = fit_samples(judge, samples, too_long, say)
    scores = score_traces(score_all(judge, samples.traces, samples.examples, say=say), judge.config)
    return Given(
        traces=samples.traces,
        groups=samples.prompts,
        scores=scores,
        correct=samples.correct.ravel(),
        answers=tuple(judge.task.canonical_answer(samples.examples[t.group], t.text) for t in samples.traces),
    )


def _from_file(file: Path, judge: Judge, options: Options, too_long: str, say: Say) -> Given:
    rows, labels = _read(file, options.prompts)
    if not options.allow_training_prompts:
        training_prompts(judge.config).refuse((row.place, row.prompt) for row in rows)
    order: dict[str, int] = {}
    groups = [order.setdefault(row.prompt, len(order)) for row in rows]
    examples = [Example(id=f"prompt {place}", prompt=prompt, answer="") for place, prompt in enumerate(order, start=1)]
    traces, kept = [], []
    excess = ""
    for place, (row, group) in enumerate(zip(rows, groups, strict=True)):
        trace = judge.trace(replace(examples[group], id=row.place), group, row.text)
        reason = judge.excess([trace], {group: replace(examples[group], id=row.place)})
        excess = excess or reason or ""
        if reason is None:
            traces.append(trace)
            kept.append(place)
    left_out = len(rows) - len(kept)
    if left_out and (not kept or too_long == "error"):
        hint = "leave such traces out with --too-long drop" if kept else "choose a model with a longer context"
        raise UserError(f"{excess} ({left_out} of {len(rows)} traces are too long); {hint}.")
    if left_out:
        say(f"{left_out} of {len(rows)} traces left out (--too-long drop): {excess}")
        present = {trace.group: None for trace in traces}
        number = {group: place for place, group in enumerate(present)}
        examples = [examples[group] for group in present]
        traces = [replace(trace, group=number[trace.group]) for trace in traces]
    ends = [rows[i].step_ends for i in kept]
    scores = score_traces(score_all(judge, traces, examples, ends, say=say), judge.config)
    verdicts = [_verdict(judge, rows[i], labels[i]) for i in kept]
    return Given(
        traces=tuple(traces),
        groups=np.array([trace.group for trace in traces]),
        scores=scores,
        correct=np.array(verdicts, dtype=bool),
        answers=tuple(judge.task.canonical_answer(examples[t.group], t.text) for t in traces),
    )


def _read(file: Path, prompts: int | None) -> tuple[list[TraceRow], list[TraceLabels]]:
    """The rows of the first `prompts` prompts. UserError for a row without any label: whether there is one is all that
    is asked here."""
    rows, labels, seen = [], [], set()
    for row, label in read_traces(file):
        if row.prompt not in seen and len(seen) == prompts:
            continue
        seen.add(row.prompt)
        if label.correct is None and label.gold is None:
            raise UserError(
                f"{row.place}: neither 'correct' nor 'answer' says whether the trace is right; add one of them."
            )
        rows.append(row)
        labels.append(label)
    if not rows:
        raise UserError(f"{file} holds no trace; give a file with one a line.")
    return rows, labels


def _verdict(judge: Judge, row: TraceRow, label: TraceLabels) -> bool:
    if label.correct is not None:
        return label.correct
    return judge.task.verify(Example(id=row.id, prompt=row.prompt, answer=label.gold), row.text)


def _pool(given: Given, n: int, file: Path | None) -> tuple[reranking.Pool | None, list[str]]:
    """The first n traces of every prompt that has as many; None for n = 1, where there is nothing to choose."""
    sizes = np.bincount(given.groups)
    enough = np.flatnonzero(sizes >= n)
    notes = [
        f"{len(sizes)} prompts, {len(given.groups)} traces"
        + (f", {sizes.min()} to {sizes.max()} a prompt" if sizes.min() < sizes.max() else f", {sizes[0]} a prompt")
        + f"; {100 * given.correct.mean():.1f}% right."
    ]
    if not len(enough):
        raise UserError(f"no prompt of {file} has {n} samples, the most is {sizes.max()}; lower --n.")
    if n == 1:
        notes.append("A prompt has one trace only, so there is nothing to pick from; --n 2 reranks those with more.")
        return None, notes
    used = len(enough) * n
    if used < len(given.groups):
        notes.append(
            f"Reranked: the first {n} samples of the {len(enough)} prompts that have as many, {used} of "
            f"{len(given.groups)} traces; the AUROC and correlations are over all of them."
        )
    order = np.argsort(given.groups, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    index = order[starts[enough][:, None] + np.arange(n)]
    answers = [[given.answers[i] for i in row] for row in index]
    scores = {name: values[index] for name, values in given.scores.items()}
    return reranking.Pool(scores=scores, correct=given.correct[index], classes=answer_classes(answers)), notes


def _ks(given: Sequence[int] | None, n: int) -> tuple[int, ...]:
    if given is None:
        return tuple(k for k in _USUAL_KS if k <= n)
    if max(given) > n:
        raise UserError(f"--k {max(given)}: more than the {n} samples per prompt; raise --n.")
    return tuple(given)


def _each(given: Given) -> dict[str, object]:
    """Trace by trace; a score of null: the trace names no answer."""
    return {
        "prompt": given.groups.tolist(),
        "correct": given.correct.tolist(),
        "scores": {
            name: [round(x, 6) if np.isfinite(x) else None for x in values.tolist()]
            for name, values in given.scores.items()
        },
    }


def _folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in "-".join(Path(text).parts[-2:])).strip("-") or "traces"
