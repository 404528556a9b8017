"""Pack traces of any lengths into one TraceBatch, and cut a batch into micro-batches of whole sequences."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from airl_fast.types import Trace, TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundaries:
    """Completion-relative indices of the tokens that end a step, and of those that end the think or answer block."""

    steps: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()


def pack(
    traces: Sequence[Trace], device: torch.device, boundaries: Callable[[Trace], Boundaries] | None = None
) -> TraceBatch:
    """Lay the traces end to end. `boundaries(trace)` says where its steps and blocks end; without it, nowhere.

    Shifting happens here and nowhere else: the row before a token predicts it.
    """
    tokens, positions, rows, labels, logprobs = [], [], [], [], []
    steps, blocks = [], []
    starts, loss_starts = [0], [0]
    for trace in traces:
        prompt, completion = trace.prompt_tokens, trace.tokens
        if not prompt or not completion:
            raise ValueError("a trace needs at least one prompt token and one completion token")
        if trace.logprobs is not None and len(trace.logprobs) != len(completion):
            raise ValueError(f"a trace has {len(trace.logprobs)} log-probabilities for {len(completion)} tokens")
        start = starts[-1]
        tokens += prompt
        tokens += completion
        positions += range(len(prompt) + len(completion))
        rows += range(start + len(prompt) - 1, start + len(prompt) + len(completion) - 1)
        labels += completion
        logprobs += trace.logprobs if trace.logprobs is not None else [float("nan")] * len(completion)
        ends = boundaries(trace) if boundaries is not None else Boundaries()
        steps += _flags(ends.steps, len(completion))
        blocks += _flags(ends.blocks, len(completion))
        starts.append(start + len(prompt) + len(completion))
        loss_starts.append(loss_starts[-1] + len(completion))

    def int64(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(device)

    return TraceBatch(
        tokens=int64(tokens),
        positions=int64(positions),
        cu_seqlens=int32(starts),
        loss_rows=int64(rows),
        labels=int64(labels),
        loss_cu_seqlens=int32(loss_starts),
        behaviour_logprobs=torch.tensor(logprobs, dtype=torch.float32).to(device),
        step_ends=torch.tensor(steps, dtype=torch.bool).to(device),
        block_ends=torch.tensor(blocks, dtype=torch.bool).to(device),
        group=int64([trace.group for trace in traces]),
        kind=int64([int(trace.kind) for trace in traces]),
        pair=int64([-1 if trace.pair is None else trace.pair for trace in traces]),
        correct=torch.tensor([bool(trace.correct) for trace in traces], dtype=torch.bool).to(device),
        lengths=tuple(len(trace.prompt_tokens) + len(trace.tokens) for trace in traces),
        loss_lengths=tuple(len(trace.tokens) for trace in traces),
    )


def select(batch: TraceBatch, sequences: Sequence[int]) -> tuple[TraceBatch, torch.Tensor]:
    """The batch of these sequences alone, and the indices [M'] of its loss rows among the whole batch's M.

    A pair whose source was left behind is forgotten (-1).
    """
    device = batch.tokens.device
    starts, loss_starts = _offsets(batch.lengths), _offsets(batch.loss_lengths)
    lengths = tuple(batch.lengths[s] for s in sequences)
    loss_lengths = tuple(batch.loss_lengths[s] for s in sequences)
    token_index = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in sequences]).to(device)
    loss_index = torch.cat([torch.arange(loss_starts[s], loss_starts[s + 1]) for s in sequences]).to(device)
    new_starts, new_loss_starts = _offsets(lengths), _offsets(loss_lengths)
    # How far each kept sequence moved, applied to all of its loss rows.
    moved = torch.tensor([new_starts[i] - starts[s] for i, s in enumerate(sequences)])
    shift = torch.repeat_interleave(moved, torch.tensor(loss_lengths), output_size=sum(loss_lengths)).to(device)
    kept = torch.tensor(list(sequences), dtype=torch.int64)
    place = torch.full((batch.num_sequences + 1,), -1, dtype=torch.int64)
    place[kept] = torch.arange(len(kept))
    kept, place = kept.to(device), place.to(device)
    chosen = TraceBatch(
        tokens=batch.tokens[token_index],
        positions=batch.positions[token_index],
        cu_seqlens=torch.tensor(new_starts, dtype=torch.int32).to(device),
        loss_rows=batch.loss_rows[loss_index] + shift,
        labels=batch.labels[loss_index],
        loss_cu_seqlens=torch.tensor(new_loss_starts, dtype=torch.int32).to(device),
        behaviour_logprobs=batch.behaviour_logprobs[loss_index],
        step_ends=batch.step_ends[loss_index],
        block_ends=batch.block_ends[loss_index],
        group=batch.group[kept],
        kind=batch.kind[kept],
        pair=place[batch.pair[kept]],  # index -1 reads the last place, which stays -1
        correct=batch.correct[kept],
        lengths=lengths,
        loss_lengths=loss_lengths,
    )
    return chosen, loss_index


def micro_batches(batch: TraceBatch, padded_tokens: int) -> Iterator[tuple[TraceBatch, torch.Tensor]]:
    """Cut into batches whose padded size stays under `padded_tokens`, longest sequences first.

    A perturbed sequence stays with its source (the pairwise loss compares them), so such a family, or one sequence
    longer than the budget, may make a batch that exceeds it.
    """
    if batch.max_seqlen * batch.num_sequences <= padded_tokens:
        yield batch, torch.arange(batch.num_loss_tokens, device=batch.tokens.device)
        return
    families: dict[int, list[int]] = {}
    for s, pair in enumerate(batch.pair.tolist()):
        families.setdefault(s if pair < 0 else pair, []).append(s)
    ordered = sorted(families.values(), key=lambda family: -max(batch.lengths[s] for s in family))
    current: list[int] = []
    width = 0
    for family in ordered:
        if current and width * (len(current) + len(family)) > padded_tokens:
            yield select(batch, current)
            current = []
        if not current:  # the first family holds the longest sequence of its micro-batch
            width = max(batch.lengths[s] for s in family)
        current += family
    yield select(batch, current)


def _flags(indices: Sequence[int], length: int) -> list[bool]:
    flags = [False] * length
    for index in indices:
        flags[index] = True
    flags[-1] = True
    return flags


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]
