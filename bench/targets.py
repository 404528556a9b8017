"""What the ops are meant to reach on a data-centre GPU, and how a run's rows compare.

Fractions are of the floor measured in the same run: products at the rate of a matrix product, memory at that of a
copy. Beside that, every row of ours should be faster than each peer at the same problem and need no more memory.
`bench/goals.py` says which goals a whole visit proved.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.report import short, table
from bench.results import Row

OURS = "airl"
SAME_MEMORY = 0.99  # peaks within 1%, the allocator's granularity, count as equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """percent: of the floor, at shapes for which `where` is true; `says` names those shapes. hoped: beyond it.

    predicted: before any GPU ran it, in percent on an H100 and on an H200, reasoned from bytes and operations.
    """

    op: str
    mode: str
    percent: float
    says: str = "all shapes"
    where: Callable[[tuple[int, ...]], bool] = lambda sizes: True
    hoped: float | None = None
    predicted: str = ""


def _wide(sizes: tuple[int, ...]) -> bool:
    return sizes[1] >= 3584


TARGETS = (
    Target(
        op="linear_logprob", mode="frozen f+b", percent=80, says="H >= 3584", where=_wide,
        predicted="84-88, 86-90",
    ),
    Target(op="linear_logprob", mode="no_grad", percent=90, says="H >= 3584", where=_wide, predicted="at most 92, 95"),
    Target(
        op="linear_ppo_loss", mode="trainable f+b", percent=75, hoped=90,
        predicted="H >= 3584: 78-83, 80-85; H 1536: 74-80, 77-82; H 896: 68-76, 72-79",
    ),
    Target(
        op="discriminator_loss", mode="f+b", percent=80,
        predicted="H >= 3584: 87, 81; H 1536: 80, 74; H 896: 67, 63",
    ),
    Target(
        op="discounted_returns", mode="forward", percent=70, says="1024x8192", where=lambda s: s == (1024, 8192),
        predicted="45-60",
    ),
    Target(op="selective_log_softmax", mode="f+b in place", percent=85, predicted="88-92, 85-88"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One row of ours. target: None where there is none. *_peer: the closest one, None without peers."""

    row: Row
    target: Target | None
    fastest_peer: str | None
    leanest_peer: str | None

    @property
    def share(self) -> float | None:
        """Of the target, 1 where it is reached."""
        return None if self.target is None else self.row.percent_of_floor / self.target.percent

    @property
    def reached(self) -> bool | None:
        return None if self.target is None else self.row.percent_of_floor >= self.target.percent

    @property
    def faster(self) -> bool | None:
        return None if self.fastest_peer is None else self.row.ratio_to_peer[self.fastest_peer] > 1.0

    @property
    def leaner(self) -> bool | None:
        if self.leanest_peer is None:
            return None
        return self.row.memory_ratio_to_peer[self.leanest_peer] >= SAME_MEMORY


def sizes_of(shape: str) -> tuple[int, ...]:
    """The numbers of a shape's name, such as `linear:4096x896x151936`."""
    return tuple(int(number) for number in re.findall(r"\d+", shape.partition(":")[2]))


def target_of(row: Row) -> Target | None:
    found = (t for t in TARGETS if (t.op, t.mode) == (row.op, row.mode) and t.where(sizes_of(row.shape)))
    return next(found, None)


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for every row of ours, those with a target first."""
    verdicts = []
    for row in rows:
        if row.backend != OURS:
            continue
        time, memory = row.ratio_to_peer, row.memory_ratio_to_peer
        verdicts.append(
            Verdict(
                row=row,
                target=target_of(row),
                fastest_peer=min(time, key=time.get) if time else None,
                leanest_peer=min(memory, key=memory.get) if memory else None,
            )
        )
    return sorted(verdicts, key=lambda verdict: verdict.target is None)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    lines = []
    for verdict in verdicts:
        row = verdict.row
        lines.append(
            (
                row.op,
                row.mode,
                row.shape,
                short(row.ms),
                f"{row.percent_of_floor:.0f}%",
                "" if verdict.target is None else f"{verdict.target.percent:.0f}%",
                _word(verdict.reached),
                _against(verdict.fastest_peer, row.ratio_to_peer),
                _word(verdict.faster),
                _against(verdict.leanest_peer, row.memory_ratio_to_peer),
                _word(verdict.leaner),
            )
        )
    header = ("op", "mode", "shape", "ms", "of floor", "target", "", "peer's time", "", "peer's memory", "")
    return table(header, lines)


def _word(reached: bool | None) -> str:
    return "" if reached is None else "pass" if reached else "MISS"


def _against(peer: str | None, ratios: dict[str, float]) -> str:
    """The closest peer and its share of ours."""
    return "" if peer is None else f"{ratios[peer]:.2f}x {peer}"
