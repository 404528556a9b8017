"""Cut a batch into micro-batches by a budget of rows, balanced by cost, and run a pass over them.

A loss is a sum over tokens with a denominator of the whole batch, so neither it nor its gradient depends on the cut.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from airl_fast.errors import UserError
from airl_fast.pack import select
from airl_fast.types import TraceBatch

log = logging.getLogger(__name__)

# A row costs its linear layers; a pair of rows that attend to each other costs this much of a row (4·H operations of
# attention against 24·H² and more of linear layers, at H near 1500). It only steers the balance.
_PAIR_COST = 1 / 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """batch: some whole sequences. index: int64 [M'], where their tokens are among the M of the whole batch."""

    batch: TraceBatch
    index: torch.Tensor


@dataclass(slots=True)
class TokenBudget:
    """The most rows of one forward pass. It halves when a pass runs out of memory, and stays halved."""

    tokens: int
    key: str

    def halve(self, error: BaseException) -> None:
        if self.tokens <= 64:
            raise UserError(
                f"out of memory with micro-batches of {self.tokens} tokens ({self.key}); "
                "use a smaller model, adapters (lora), quantise=nf4 or gradient_checkpointing."
            ) from error
        self.tokens //= 2


def over_micro_batches(
    batch: TraceBatch,
    budget: TokenBudget,
    work: Callable[[MicroBatch], None],
    restart: Callable[[], None] = lambda: None,
    times: int = 1,
) -> None:
    """Call `work` on every micro-batch of `times` the budget.

    Out of memory, `restart` undoes what was done, the budget halves and all begins again.
    """
    while True:
        try:
            for part in prefetched(micro_batches(batch, times * budget.tokens), batch.tokens.device):
                work(part)
            return
        except torch.OutOfMemoryError as error:
            budget.halve(error)
            restart()
            torch.cuda.empty_cache()
        log.warning("out of memory: %s is %d from here on, with the same gradients", budget.key, budget.tokens)


@torch.no_grad()
def over_tokens(batch: TraceBatch, budget: TokenBudget, values: Callable[[TraceBatch], torch.Tensor]) -> torch.Tensor:
    """`values` [M'] of every micro-batch put together, f32 [M]. Without gradients twice the rows fit."""
    found = torch.empty(batch.num_loss_tokens, device=batch.tokens.device)

    def work(part: MicroBatch) -> None:
        found[part.index] = values(part.batch)

    over_micro_batches(batch, budget, work, times=2)
    return found


def micro_batches(batch: TraceBatch, tokens: int) -> Iterator[MicroBatch]:
    """Micro-batches of at most `tokens` rows, dearest first, so that one that cannot fit shows at once.

    A perturbed sequence stays with its source (the pairwise loss compares them), so such a family, or one sequence
    longer than the budget, may make a micro-batch that exceeds it.
    """
    if batch.segments.num_rows <= tokens:
        yield MicroBatch(batch=batch, index=torch.arange(batch.num_loss_tokens, device=batch.tokens.device))
        return
    for sequences in plan(batch, tokens):
        part, index = select(batch, sequences)
        yield MicroBatch(batch=part, index=index)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """Sequences of one prompt that go together. rows: what they bring to a model. cost: in rows."""

    sequences: tuple[int, ...]
    rows: int
    cost: float


def plan(batch: TraceBatch, tokens: int) -> list[list[int]]:
    """The sequences of each micro-batch: prompts stay whole where they fit, then go to the least loaded bin that
    has room (longest processing time first, Graham 1969)."""
    units = sorted((unit for group in _prompt_groups(batch) for unit in _cut(batch, group, tokens)), key=_dearest)
    count = -(-sum(unit.rows for unit in units) // tokens)
    bins: list[list[_Unit]] = [[] for _ in range(count)]
    rows, cost = [0] * count, [0.0] * count
    for unit in units:
        room = [b for b in range(len(bins)) if not bins[b] or rows[b] + unit.rows <= tokens]
        if not room:
            bins.append([])
            rows.append(0)
            cost.append(0.0)
            room = [len(bins) - 1]
        best = min(room, key=lambda b: cost[b])
        bins[best].append(unit)
        rows[best] += unit.rows
        cost[best] += unit.cost
    order = sorted((b for b in range(len(bins)) if bins[b]), key=lambda b: -cost[b])
    return [sorted(s for unit in bins[b] for s in unit.sequences) for b in order]


def _dearest(unit: _Unit) -> tuple[float, int]:
    return -unit.cost, unit.sequences[0]


def _prompt_groups(batch: TraceBatch) -> list[list[tuple[int, ...]]]:
    """Per prompt its families: a sequence and what was perturbed from it."""
    families: dict[int, list[int]] = {}
    for s, pair in enumerate(batch.pairs):
        families.setdefault(s if pair < 0 else pair, []).append(s)
    groups: dict[int, list[tuple[int, ...]]] = {}
    for source, family in families.items():
        groups.setdefault(batch.prompt_of[source], []).append(tuple(family))
    return list(groups.values())


def _cut(batch: TraceBatch, families: Sequence[tuple[int, ...]], tokens: int) -> Iterator[_Unit]:
    """One prompt's families in as few units as fit the budget, each with its own copy of the prompt."""
    own = batch.prompt_of[families[0][0]]
    prompt = batch.segments.prompts[own]

    def length(family: tuple[int, ...]) -> int:
        """Its completions, and the prompts of those that have a copy of their own."""
        copies = {batch.prompt_of[s] for s in family} - {own}
        return sum(batch.loss_lengths[s] for s in family) + sum(batch.segments.prompts[p] for p in copies)

    def unit(members: list[tuple[int, ...]]) -> _Unit:
        sequences = tuple(s for family in members for s in family)
        lengths = [batch.loss_lengths[s] for s in sequences]
        pairs = prompt * prompt / 2 + sum(n * (prompt + n / 2) for n in lengths)
        rows = prompt + sum(map(length, members))
        return _Unit(sequences=sequences, rows=rows, cost=rows + _PAIR_COST * pairs)

    members: list[tuple[int, ...]] = []
    used = prompt
    for family in sorted(families, key=length, reverse=True):
        if members and used + length(family) > tokens:
            yield unit(members)
            members, used = [], prompt
        members.append(family)
        used += length(family)
    yield unit(members)


def prefetched(parts: Iterator[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """The same, each prepared on another thread while the one before is worked on.

    What is prepared is queued on the stream of whoever takes it: a thread has a current stream of its own.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def following() -> MicroBatch | None:
        with torch.cuda.stream(stream):  # does nothing without one
            return next(parts, None)

    with ThreadPoolExecutor(1, thread_name_prefix="pack") as pool:
        coming = pool.submit(following)
        while (part := coming.result()) is not None:
            coming = pool.submit(following)
            yield part
