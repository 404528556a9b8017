"""Guided methods against best-of-N, a vote and a random pick by the same reward, at equal generated tokens.

Everything is generated and scored first; `grade` reads the answers afterwards.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from airl_fast.data.task import Task
from airl_fast.guided.options import Setting
from airl_fast.guided.pool import Pool, copies_of
from airl_fast.guided.records import Draft, Method, Outcome, Problem
from airl_fast.guided.session import Session
from airl_fast.measures.passk import Estimate, Floats, mean_estimate, paired_difference
from airl_fast.measures.rerank import answer_classes
from airl_fast.types import Example

Open = Callable[[int, int, int], Session]  # (first problem, one past the last, repeat)
Say = Callable[[str], None]
MAX_POOL, _FIRST = 256, 8
_PART = 256  # problems worked on at once
_BASELINES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What one method did. outcomes: R repeats of P. seconds: of one repeat over all problems."""

    setting: Setting
    label: str
    outcomes: tuple[tuple[Outcome, ...], ...]
    seconds: float

    @property
    def tokens(self) -> float:
        """Generated tokens a prompt, on average."""
        return float(np.mean([outcome.generated for run in self.outcomes for outcome in run]))

    @property
    def scored(self) -> float:
        return float(np.mean([outcome.scored for run in self.outcomes for outcome in run]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A pool before its answers are read: P lists of M drafts with their texts, scores f64 [P, M]."""

    drafts: tuple[tuple[Draft, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    scores: Floats
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A method beside the baselines that spend as many tokens. tokens, scored: a prompt. seconds: for all prompts.

    equal_n: how many plain samples cost the same. difference: accuracy less best-of-N's there, paired by prompt.
    full_n, saved, loss: for early rejection, how many samples it began, the share of their tokens that it saved, and
    best-of-full_n's accuracy less its own; None for others, and where the pool is smaller.
    """

    kind: str
    label: str
    accuracy: Estimate
    tokens: float
    scored: float
    seconds: float
    equal_n: float
    best_of: Estimate
    vote: Estimate
    difference: Estimate
    full_n: int | None = None
    saved: float | None = None
    loss: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Best of n plain samples and their vote; exact expectations over a pool's subsets."""

    n: int
    best_of: Estimate
    vote: Estimate
    tokens: float
    scored: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    rows: tuple[Row, ...]
    baselines: tuple[Baseline, ...]
    random: Estimate
    prompts: int
    repeats: int
    pool: int


def solve(method: Method, open_session: Open, total: int, repeat: int = 0) -> tuple[Outcome, ...]:
    """The outcomes of all problems, worked on in parts."""
    return tuple(
        outcome
        for first in range(0, total, _PART)
        for outcome in method.solve(open_session(first, min(first + _PART, total), repeat))
    )


def run_methods(
    methods: Sequence[tuple[Setting, Method]], open_session: Open, total: int, repeats: int, say: Say
) -> list[Solved]:
    """Every method on every problem, `repeats` times with different draws."""
    found = []
    for setting, method in methods:
        began = time.monotonic()
        outcomes = tuple(solve(method, open_session, total, repeat) for repeat in range(repeats))
        seconds = (time.monotonic() - began) / repeats
        done = Solved(setting=setting, label=method.label, outcomes=outcomes, seconds=seconds)
        say(f"{method.label}: {done.tokens:.0f} tokens a prompt, {done.seconds:.1f} s")
        found.append(done)
    return found


def draw_pool(open_session: Open, total: int, tokens: float, say: Say) -> Drawn:
    """Plain samples of every prompt, twice as many as `tokens` a prompt would pay for (at most MAX_POOL, unless one
    method spends more): fewer would leave an expectation over subsets little to average."""
    began = time.monotonic()
    parts = [_draw(open_session, total, range(_FIRST))]
    length = np.mean([len(draft.tokens) for row in parts[0][0] for draft in row])
    size = max(min(int(2 * tokens / length) + 1, MAX_POOL), int(tokens / length) + 2, 2 * _FIRST)
    parts.append(_draw(open_session, total, range(_FIRST, size)))
    seconds = (time.monotonic() - began) / size
    say(f"pool of {size} plain samples: {length:.0f} tokens each, {seconds * size:.1f} s")
    (drafts, texts, scores), (more, more_texts, more_scores) = parts
    return Drawn(
        drafts=tuple(a + b for a, b in zip(drafts, more, strict=True)),
        texts=tuple(a + b for a, b in zip(texts, more_texts, strict=True)),
        scores=np.concatenate([scores, more_scores], axis=1),
        seconds=seconds,
    )


def _draw(open_session: Open, total: int, slots: range):
    drafts, texts, scores = [], [], []
    for first in range(0, total, _PART):
        session = open_session(first, min(first + _PART, total), 0)
        made = session.to_end([session.fresh(p, slot) for p in range(len(session.problems)) for slot in slots])
        scores.append(session.score(made).reshape(-1, len(slots)))
        written = [session.text(draft) for draft in made]
        drafts += [tuple(made[i : i + len(slots)]) for i in range(0, len(made), len(slots))]
        texts += [tuple(written[i : i + len(slots)]) for i in range(0, len(made), len(slots))]
    return tuple(drafts), tuple(texts), np.concatenate(scores)


def grade(
    solved: Sequence[Solved], drawn: Drawn, problems: Sequence[Problem], answers: Sequence[str], task: Task
) -> Comparison:
    """The first and only place where answers are read. An unfinished trace is wrong."""
    examples = [Example(id=p.id, prompt=p.prompt, answer=a) for p, a in zip(problems, answers, strict=True)]
    pool = _pool(drawn, examples, task)
    rows = []
    for each in solved:
        right = np.array(
            [
                [o.finished and task.verify(e, o.text) for o, e in zip(run, examples, strict=True)]
                for run in each.outcomes
            ]
        )
        rows.append(_row(each, right.mean(axis=0), pool))
    largest = max([row.equal_n for row in rows], default=1.0)
    # Beyond half of the pool its subsets are nearly the same, and their mean little better than one draw.
    sizes = [n for n in _BASELINES if n <= pool.size // 2 and (n <= 2 * largest or n <= 2 * _FIRST)]
    return Comparison(
        rows=tuple(rows),
        baselines=tuple(_baseline(pool, n) for n in sizes),
        random=mean_estimate(pool.random()),
        prompts=len(problems),
        repeats=len(solved[0].outcomes) if solved else 1,
        pool=pool.size,
    )


def _pool(drawn: Drawn, examples: Sequence[Example], task: Task) -> Pool:
    answers, correct = [], []
    for example, drafts, texts in zip(examples, drawn.drafts, drawn.texts, strict=True):
        answers.append([task.canonical_answer(example, text) for text in texts])
        correct.append([d.finished and task.verify(example, text) for d, text in zip(drafts, texts, strict=True)])
    return Pool(
        scores=drawn.scores,
        correct=np.array(correct),
        classes=answer_classes(answers),
        lengths=np.array([[len(draft.tokens) for draft in drafts] for drafts in drawn.drafts]),
        copies=copies_of([[draft.tokens for draft in drafts] for drafts in drawn.drafts]),
        seconds=drawn.seconds,
    )


def _row(solved: Solved, right: Floats, pool: Pool) -> Row:
    n = pool.samples_for(solved.tokens)
    equal = pool.between(n, pool.best_of)
    full, saved, loss = None, None, None
    if solved.setting.kind == "reject" and solved.setting.values["n"] <= pool.size:
        full = int(solved.setting.values["n"])
        saved = 1.0 - solved.tokens / (full * float(pool.lengths.mean()))
        loss = paired_difference(pool.best_of(full), right)
    return Row(
        kind=solved.setting.kind,
        label=solved.label,
        accuracy=mean_estimate(right),
        tokens=solved.tokens,
        scored=solved.scored,
        seconds=solved.seconds,
        equal_n=n,
        best_of=mean_estimate(equal),
        vote=mean_estimate(pool.between(n, pool.vote)),
        difference=paired_difference(right, equal),
        full_n=full,
        saved=saved,
        loss=loss,
    )


def _baseline(pool: Pool, n: int) -> Baseline:
    return Baseline(
        n=n,
        best_of=mean_estimate(pool.best_of(n)),
        vote=mean_estimate(pool.vote(n)),
        tokens=n * float(pool.lengths.mean()),
        scored=float(pool.scored(n).mean()),
        seconds=n * pool.seconds,
    )
