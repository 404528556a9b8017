"""Pack traces of any lengths into one TraceBatch, without a padded token and every prompt once.

Layout happens here and nowhere else: which row predicts which token is decided by `_rows`, from lengths alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from airl_fast.models.regimes import ONE, Regimes
from airl_fast.types import Segments, Trace, TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundaries:
    """Completion-relative indices of the tokens that end a step, and of those that end the think or answer block."""

    steps: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Where everything lies. order: sequences in the order of their rows. prompt_starts [P], completion_starts [S]:
    first rows. positions [N], loss_rows and label_rows [M] as in TraceBatch."""

    order: np.ndarray
    prompt_starts: np.ndarray
    completion_starts: np.ndarray
    positions: np.ndarray
    loss_rows: np.ndarray
    label_rows: np.ndarray


def _rows(prompts: Sequence[int], prompt_of: Sequence[int], completions: Sequence[int]) -> _Rows:
    prompts, prompt_of, completions = (np.asarray(x, dtype=np.int64) for x in (prompts, prompt_of, completions))
    order = np.argsort(prompt_of, kind="stable")
    prompt_starts = _starts(prompts)
    starts = np.empty_like(completions)
    starts[order] = prompts.sum() + _starts(completions[order])
    within = _ranges(completions)
    label_rows = np.repeat(starts, completions) + within
    last_of_prompt = (prompt_starts + prompts - 1)[prompt_of]
    loss_rows = np.where(within == 0, np.repeat(last_of_prompt, completions), label_rows - 1)
    continued = np.repeat(prompts[prompt_of[order]], completions[order]) + _ranges(completions[order])
    return _Rows(
        order=order,
        prompt_starts=prompt_starts,
        completion_starts=starts,
        positions=np.concatenate([_ranges(prompts), continued]),
        loss_rows=loss_rows,
        label_rows=label_rows,
    )


def pack(
    traces: Sequence[Trace],
    device: torch.device,
    boundaries: Callable[[Trace], Boundaries] | None = None,
    *,
    share: bool = True,
    regimes: Regimes = ONE,
) -> TraceBatch:
    """`boundaries(trace)` says where a trace's steps and blocks end; without it, nowhere.

    share: traces with equal prompt tokens share one copy of them; otherwise each trace has its own. regimes: of the
    models that will read the batch; a copy is shared within one regime.
    """
    distinct: dict[object, int] = {}
    prompts, prompt_of, logprobs, steps, blocks = [], [], [], [], []
    for i, trace in enumerate(traces):
        if not trace.prompt_tokens or not trace.tokens:
            raise ValueError("a trace needs at least one prompt token and one completion token")
        if trace.logprobs is not None and len(trace.logprobs) != len(trace.tokens):
            raise ValueError(f"a trace has {len(trace.logprobs)} log-probabilities for {len(trace.tokens)} tokens")
        regime = regimes.of(len(trace.prompt_tokens) + len(trace.tokens))
        place = distinct.setdefault((trace.prompt_tokens, regime) if share else i, len(prompts))
        if place == len(prompts):
            prompts.append(trace.prompt_tokens)
        prompt_of.append(place)
        logprobs += trace.logprobs if trace.logprobs is not None else [float("nan")] * len(trace.tokens)
        ends = boundaries(trace) if boundaries is not None else Boundaries()
        steps.append(_flags(ends.steps, len(trace.tokens)))
        blocks.append(_flags(ends.blocks, len(trace.tokens)))
    lengths = tuple(len(trace.tokens) for trace in traces)
    rows = _rows([len(prompt) for prompt in prompts], prompt_of, lengths)
    completions = [traces[s].tokens for s in rows.order]
    tokens = np.fromiter((token for part in (*prompts, *completions) for token in part), dtype=np.int64)
    pairs = tuple(-1 if trace.pair is None else trace.pair for trace in traces)
    move = partial(on_device, device=device)
    return TraceBatch(
        tokens=move(tokens),
        positions=move(rows.positions),
        loss_rows=move(rows.loss_rows),
        label_rows=move(rows.label_rows),
        labels=move(tokens[rows.label_rows]),
        loss_cu_seqlens=move(_cumulative(lengths)),
        behaviour_logprobs=move(np.asarray(logprobs, dtype=np.float32)),
        step_ends=move(np.concatenate(steps) if steps else np.zeros(0, dtype=bool)),
        block_ends=move(np.concatenate(blocks) if blocks else np.zeros(0, dtype=bool)),
        group=move(np.asarray([trace.group for trace in traces], dtype=np.int64)),
        kind=move(np.asarray([int(trace.kind) for trace in traces], dtype=np.int64)),
        pair=move(np.asarray(pairs, dtype=np.int64)),
        correct=move(np.asarray([bool(trace.correct) for trace in traces], dtype=bool)),
        segments=_segments([len(prompt) for prompt in prompts], prompt_of, lengths, rows),
        prompt_of=tuple(prompt_of),
        kinds=tuple(trace.kind for trace in traces),
        pairs=pairs,
        loss_lengths=lengths,
    )


def select(batch: TraceBatch, sequences: Sequence[int]) -> tuple[TraceBatch, torch.Tensor]:
    """The batch of these sequences alone, and the indices [M'] of its tokens among the whole batch's M.

    A pair whose source was left behind is forgotten (-1). Prompts keep the order of their first use.
    """
    chosen = np.asarray(sequences, dtype=np.int64)
    old_prompts = list(dict.fromkeys(batch.prompt_of[s] for s in sequences))
    new_place = {old: new for new, old in enumerate(old_prompts)}
    prompt_of = tuple(new_place[batch.prompt_of[s]] for s in sequences)
    prompts = tuple(batch.segments.prompts[p] for p in old_prompts)
    lengths = tuple(batch.loss_lengths[s] for s in sequences)
    rows = _rows(prompts, prompt_of, lengths)
    row_index = rows_of(batch, sequences)
    token_index = _spans(_starts(batch.loss_lengths)[chosen], lengths)
    place = {old: new for new, old in enumerate(sequences)}
    pairs = tuple(place.get(batch.pairs[s], -1) for s in sequences)
    move = partial(on_device, device=batch.tokens.device)
    kept, kept_rows, kept_tokens = move(chosen), move(row_index), move(token_index)
    part = TraceBatch(
        tokens=batch.tokens[kept_rows],
        positions=move(rows.positions),
        loss_rows=move(rows.loss_rows),
        label_rows=move(rows.label_rows),
        labels=batch.labels[kept_tokens],
        loss_cu_seqlens=move(_cumulative(lengths)),
        behaviour_logprobs=batch.behaviour_logprobs[kept_tokens],
        step_ends=batch.step_ends[kept_tokens],
        block_ends=batch.block_ends[kept_tokens],
        group=batch.group[kept],
        kind=batch.kind[kept],
        pair=move(np.asarray(pairs, dtype=np.int64)),
        correct=batch.correct[kept],
        segments=_segments(prompts, prompt_of, lengths, rows),
        prompt_of=prompt_of,
        kinds=tuple(batch.kinds[s] for s in sequences),
        pairs=pairs,
        loss_lengths=lengths,
    )
    return part, kept_tokens


def rows_of(batch: TraceBatch, sequences: Sequence[int]) -> np.ndarray:
    """Where the rows of `select`'s batch are among the whole batch's, int64."""
    old = _rows(batch.segments.prompts, batch.prompt_of, batch.loss_lengths)
    prompts = list(dict.fromkeys(batch.prompt_of[s] for s in sequences))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    order = sorted(sequences, key=lambda s: place[batch.prompt_of[s]])
    return np.concatenate(
        [
            _spans(old.prompt_starts[prompts], [batch.segments.prompts[p] for p in prompts]),
            _spans(old.completion_starts[order], [batch.loss_lengths[s] for s in order]),
        ]
    )


def _segments(prompts: Sequence[int], prompt_of: Sequence[int], lengths: Sequence[int], rows: _Rows) -> Segments:
    return Segments(
        prompts=tuple(prompts),
        completions=tuple(lengths[s] for s in rows.order),
        counts=tuple(np.bincount(np.asarray(prompt_of, dtype=np.int64), minlength=len(prompts)).tolist()),
    )


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Host array to device tensor; on CUDA from pinned memory, so that the host does not wait for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _flags(indices: Sequence[int], length: int) -> np.ndarray:
    flags = np.zeros(length, dtype=bool)
    flags[[*indices, length - 1]] = True
    return flags


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.cumsum(lengths) - lengths


def _cumulative(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each length n, end to end."""
    return np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)


def _spans(starts: np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """start..start+n-1 for each span, end to end."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.repeat(starts, lengths) + _ranges(lengths)
