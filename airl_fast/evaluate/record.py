"""What an evaluation leaves behind to be looked at: RUN/eval/traces-SPLIT.jsonl.gz.

The first line is a `Record`: figures over all samples of the evaluation. Each further line is a `RecordedTrace` with
its values per token: samples of the start policy and perturbed demonstrations, the prompts in their order and each
prompt whole, up to `MAX_TRACES` samples and `MAX_TOKENS` tokens of them (one prompt at least). Everything is computed
from scores that the evaluation has already taken; only perturbed demonstrations of a task that knows its own errors
are scored here. No random draw of the run is touched: bootstraps and perturbations have generators of their own.
"""

import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from airl_fast.data.verify import format_signals
from airl_fast.errors import UserError
from airl_fast.evaluate.policies import Samples
from airl_fast.evaluate.reward import RewardReport
from airl_fast.judge.choose import choices, finite, score_traces
from airl_fast.judge.judge import Judge, Scored
from airl_fast.judge.locate import Thresholds, changed_steps, readable, suspicious_steps
from airl_fast.measures.correlate import WelchT, pearson_matrix, pooled_auroc, welch_t
from airl_fast.measures.localise import Localisation, step_scores
from airl_fast.measures.passk import Estimate, Floats, pass_at_ks
from airl_fast.rundir import write_atomically

MAX_TRACES = 2000
MAX_TOKENS = 300_000
NO_ERROR = -1

Curve = dict[int, Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPrompt:
    """A prompt of which traces were recorded. answer: the gold answer, as the task writes it."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlations:
    """Pearson correlations [K][K] of the named signals over all samples; None where a signal never varies."""

    names: list[str]
    values: list[list[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRecord:
    """A reward over all S samples of the start policy.

    scorer, localise, step_score: the run's own rules (section `evaluate`). threshold: of rule first_below. eps,
    min_std, gamma: how training standardises and discounts. rewards: [S], the own scorer's number of each sample,
    -inf replaced as `choose.finite` does; correct: [S]. rerank: pass@k|N by way of choosing. localisation: by rule.
    """

    scorer: str
    localise: str
    step_score: str
    threshold: float | None
    gamma: float
    eps: float
    min_std: float
    rewards: list[float]
    correct: list[bool]
    rerank: dict[str, Curve]
    localisation: dict[str, Localisation]
    auroc_within_prompt: Estimate | None
    auroc_pooled: Estimate | None
    welch: WelchT | None
    correlations: Correlations


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The first line. samples: how many of the start policy there were a prompt, and prompts_total how many prompts;
    prompts: those whose traces follow. reward: None for a run without one, which records no trace."""

    format: Literal[1] = 1
    split: str
    samples: int
    prompts_total: int
    pass_at_k: dict[str, Curve]
    end_token: str
    reward: RewardRecord | None
    prompts: list[RecordedPrompt]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTrace:
    """One trace of T tokens and K steps. prompt: index into `Record.prompts`; sample: its number within the prompt's
    of the same kind.

    spans: [T], the characters of each token, (start, end) in `text`; empty for the end-of-turn token. reward, logprob:
    [T]. step_ends: [K], the token that closes each step. step_scores: [K], the reward of each step by the run's rule.
    predicted: the most suspicious step, None where the rule could not be calibrated. truth: the first wrong step,
    NO_ERROR where there is none, None where the task cannot tell. scores: by every scorer (`choose.score_traces`),
    None for a trace that it has nothing to read in. end_token: how its last token is written where that is an end, but
    not the record's.
    """

    prompt: int
    sample: int
    kind: Literal["sample", "perturbed"]
    correct: bool
    finished: bool
    text: str
    spans: list[tuple[int, int]]
    reward: list[float]
    logprob: list[float]
    step_ends: list[int]
    step_scores: list[float]
    predicted: int | None
    truth: int | None
    scores: dict[str, float | None]
    end_token: str | None = None


_RECORD, _TRACE = TypeAdapter(Record), TypeAdapter(RecordedTrace)


def record_path(run: Path, split: str) -> Path:
    return run / "eval" / f"traces-{split}.jsonl.gz"


# ---------------------------------------------------------------------------------------------- from an evaluation


def record_evaluation(
    path: Path,
    split: str,
    measured: Mapping[str, Samples],
    end_token: str,
    judge: Judge | None = None,
    report: RewardReport | None = None,
) -> None:
    """Write the record of an evaluation. measured: samples by policy, `start` among them. judge, report: of a run
    that has a reward. UserError when the file cannot be written."""
    start = measured["start"]
    reward, prompts, traces = None, [], []
    if judge is not None and report is not None:
        reward = _reward_record(judge, start, report)
        count = prompts_that_fit(start)
        prompts = [RecordedPrompt(id=e.id, prompt=e.prompt, answer=e.answer) for e in start.examples[:count]]
        traces = _recorded(judge, start, report, count)
    record = Record(
        split=split,
        samples=start.per_prompt,
        prompts_total=len(start.examples),
        pass_at_k={name: pass_at_ks(each.correct, curve_ks(each.per_prompt)) for name, each in measured.items()},
        end_token=end_token,
        reward=reward,
        prompts=prompts,
    )
    write_record(path, record, traces)


def curve_ks(n: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, … up to n, which is always among them: enough of them to draw a curve."""
    steps = {k for power in range(n.bit_length()) for k in (2**power, 3 * 2 ** (power - 1)) if 1 <= k <= n}
    return sorted({int(k) for k in steps if k == int(k)} | {n})


def prompts_that_fit(samples: Samples) -> int:
    """How many of the first prompts, one at least, have samples within MAX_TRACES and MAX_TOKENS."""
    tokens = np.array([len(trace.tokens) for trace in samples.traces]).reshape(-1, samples.per_prompt).sum(axis=1)
    fitting = (np.cumsum(tokens) <= MAX_TOKENS) & (np.arange(1, len(tokens) + 1) * samples.per_prompt <= MAX_TRACES)
    return max(int(fitting.sum()), 1)


def _reward_record(judge: Judge, samples: Samples, report: RewardReport) -> RewardRecord:
    config, scored = judge.config, report.evidence.samples
    scores = {name: finite(values) for name, values in score_traces(scored, config).items()}
    correct = samples.correct.ravel()
    rerank: dict[str, Curve] = {}
    for k in curve_ks(samples.per_prompt):
        picked = choices(scored, samples.examples, samples.correct, judge.task, config, k=k)
        for name, estimate in picked.estimates.items():
            rerank.setdefault(name, {})[k] = estimate
    return RewardRecord(
        scorer=config.evaluate.scorer,
        localise=config.evaluate.localise,
        step_score=config.evaluate.step_score,
        threshold=report.evidence.thresholds.get("reward"),
        gamma=config.advantage.gamma,
        eps=config.advantage.eps,
        min_std=config.advantage.min_std,
        rewards=_rounded(scores["reward"]),
        correct=correct.tolist(),
        rerank=rerank,
        localisation=dict(report.localise),
        auroc_within_prompt=report.auroc_within_prompt,
        auroc_pooled=pooled_auroc(scores["reward"], correct, prompts=samples.prompts),
        welch=welch_t(scores["reward"], correct, samples.prompts),
        correlations=_correlations(samples, scores),
    )


def _correlations(samples: Samples, scores: Mapping[str, Floats]) -> Correlations:
    signals = [format_signals(trace.text) for trace in samples.traces]
    named = {
        **scores,
        "correct": samples.correct.ravel(),
        **{f"format {name}": [getattr(each, name) for each in signals] for name in ("strict", "soft", "xml")},
        "answer is a whole number": [each.integer for each in signals],
        "ended its turn": [trace.finished for trace in samples.traces],
        "length": [len(trace.tokens) for trace in samples.traces],
    }
    matrix = pearson_matrix(named)
    values = [[float(x) if np.isfinite(x) else None for x in row] for row in matrix.values]
    return Correlations(names=list(matrix.names), values=values)


def _recorded(judge: Judge, samples: Samples, report: RewardReport, count: int) -> list[RecordedTrace]:
    """Samples, then perturbed demonstrations, of the first `count` prompts."""
    evidence = report.evidence
    truth = [None] * len(samples.traces) if evidence.truth is None else evidence.truth.tolist()
    chosen = range(count * samples.per_prompt)
    made = _traces(judge, evidence.samples, evidence.thresholds, truth, chosen, lambda group: group)
    broken, sources = evidence.perturbed, evidence.with_expert
    if broken is None and evidence.truth is not None:
        sources = tuple(readable(judge, samples.examples[:count]))
        broken = judge.perturbed(sources)
    if broken is None:
        return made
    place = {example.id: i for i, example in enumerate(samples.examples[:count])}
    wanted = [i for i, trace in enumerate(broken.traces) if sources[trace.group].id in place]
    changed = changed_steps(judge.maker, broken).tolist()
    return made + _traces(
        judge, broken, evidence.thresholds, changed, wanted, lambda group: place[sources[group].id], "perturbed"
    )


def _traces(
    judge: Judge,
    scored: Scored,
    thresholds: Thresholds,
    truth: Sequence[int | None],
    chosen: Sequence[int],
    prompt_of,
    kind: Literal["sample", "perturbed"] = "sample",
) -> list[RecordedTrace]:
    """truth: of all traces of `scored`; chosen: which of them to record; prompt_of: a trace's group -> its prompt."""
    settings = judge.config.evaluate
    steps = step_scores(scored.reward, settings.step_score)
    predicted: list[int | None] = [None] * len(scored.traces)
    if settings.localise != "first_below" or "reward" in thresholds:
        suspicious = suspicious_steps(scored, settings, thresholds)
        predicted = [int(np.argmax(suspicious.values[a:b])) for a, b in pairwise(suspicious.offsets)]
    scores = score_traces(scored, judge.config)
    made, seen, chat = [], {}, judge.maker.chat
    for i in chosen:
        trace = scored.traces[i]
        prompt = prompt_of(trace.group)
        number = seen[prompt] = seen.get(prompt, -1) + 1
        tokens = slice(*scored.reward.offsets[i : i + 2])
        made.append(
            RecordedTrace(
                prompt=prompt,
                sample=number,
                kind=kind,
                correct=bool(trace.correct),
                finished=trace.finished,
                text=trace.text,
                spans=judge.maker.chat.token_char_spans(trace.text, trace.tokens),
                reward=_rounded(scored.reward.values[tokens]),
                logprob=_rounded(scored.logprob.values[tokens]),
                step_ends=np.flatnonzero(scored.reward.step_ends[tokens]).tolist(),
                step_scores=_rounded(steps.values[slice(*steps.offsets[i : i + 2])]),
                predicted=predicted[i],
                truth=truth[i],
                scores={name: float(v[i]) if np.isfinite(v[i]) else None for name, v in scores.items()},
                end_token=chat.name(trace.tokens[-1]) if trace.tokens[-1] in chat.other_ends else None,
            )
        )
    return made


def _rounded(values: Floats) -> list[float]:
    """Six digits after the point: more than a float32 reward holds, and half the bytes."""
    return np.round(values, 6).tolist()


# ---------------------------------------------------------------------------------------------- the file


def write_record(path: Path, record: Record, traces: Sequence[RecordedTrace]) -> None:
    """Equal records give equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=6) as packed:
        packed.write(_RECORD.dump_json(record) + b"\n")
        for trace in traces:
            packed.write(_TRACE.dump_json(trace) + b"\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}); check the directory and its space.") from None


def read_record(path: Path) -> tuple[Record, list[RecordedTrace]]:
    """What `write_record` wrote. UserError names the file, and the line, that is missing or damaged."""
    again = f"run `airl-fast eval {path.parents[1]}` again"
    try:
        with gzip.open(path, "rb") as packed:
            lines = packed.read().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {again}.") from None
    except (OSError, EOFError, ValueError):
        raise UserError(f"{path} is damaged or no gzip file; {again}.") from None
    number = 1
    try:
        record = _RECORD.validate_json(lines[0] if lines else b"")
        traces = []
        for line in lines[1:]:
            number += 1
            traces.append(_TRACE.validate_json(line))
            _check(traces[-1], record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path} line {number}{f' ({where})' if where else ''} is not what an evaluation writes: "
            f"{first['msg']}; {again}."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} line {number} is not what an evaluation writes: {error}; {again}.") from None
    return record, traces


def _check(trace: RecordedTrace, record: Record) -> None:
    """ValueError when the parts of a trace do not fit each other."""
    tokens, steps = len(trace.spans), len(trace.step_ends)
    if not 0 <= trace.prompt < len(record.prompts):
        raise ValueError(f"prompt {trace.prompt} is not among the {len(record.prompts)} recorded")
    if not tokens or tokens != len(trace.reward) or tokens != len(trace.logprob) or steps != len(trace.step_scores):
        raise ValueError("its lists of token values or step scores have different lengths")
    if trace.step_ends != sorted(set(trace.step_ends)) or not steps or trace.step_ends[-1] != tokens - 1:
        raise ValueError("step_ends must rise and end at the last token")
    if any(not 0 <= a <= b <= len(trace.text) for a, b in trace.spans):
        raise ValueError("a token lies outside the text")
