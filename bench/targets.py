"""What the ops are meant to reach on a data-centre GPU, and how a run's rows compare.

Fractions are of the floor measured in the same run: products at the rate of a matrix product, memory at that of a
copy. Beside that, every row of ours should be faster than each peer at the same problem and need no more memory.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import short, table
from bench.results import Row

OURS = "airl"
SAME_MEMORY = 0.99  # peaks within 1%, the allocator's granularity, count as equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """percent: of the floor, at shapes for which `where` is true; `says` names those shapes."""

    op: str
    mode: str
    percent: float
    says: str = "all shapes"
    where: Callable[[tuple[int, ...]], bool] = lambda sizes: True


TARGETS = (
    Target(op="linear_logprob", mode="frozen f+b", percent=80, says="H >= 3584", where=lambda s: s[1] >= 3584),
    Target(op="linear_ppo_loss", mode="trainable f+b", percent=75),
    Target(op="discriminator_loss", mode="f+b", percent=80),
    Target(op="discounted_returns", mode="forward", percent=70, says="1024x8192", where=lambda s: s == (1024, 8192)),
    Target(op="selective_log_softmax", mode="f+b in place", percent=85),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One row of ours. percent: wanted, None where there is no target. *_peer: the closest one, None without peers."""

    row: Row
    percent: float | None
    fastest_peer: str | None
    leanest_peer: str | None

    @property
    def reached(self) -> bool | None:
        return None if self.percent is None else self.row.percent_of_floor >= self.percent

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


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for every row of ours, those with a target first."""
    verdicts = []
    for row in rows:
        if row.backend != OURS:
            continue
        wanted = [t.percent for t in TARGETS if (t.op, t.mode) == (row.op, row.mode) and t.where(sizes_of(row.shape))]
        time, memory = row.ratio_to_peer, row.memory_ratio_to_peer
        verdicts.append(
            Verdict(
                row=row,
                percent=wanted[0] if wanted else None,
                fastest_peer=min(time, key=time.get) if time else None,
                leanest_peer=min(memory, key=memory.get) if memory else None,
            )
        )
    return sorted(verdicts, key=lambda verdict: verdict.percent is None)


def missing(rows: Sequence[Row]) -> list[Target]:
    """Targets that no row was measured for."""
    mine = [(row.op, row.mode, sizes_of(row.shape)) for row in rows if row.backend == OURS]
    return [t for t in TARGETS if not any((t.op, t.mode) == (op, mode) and t.where(s) for op, mode, s in mine)]


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
                "" if verdict.percent is None else f"{verdict.percent:.0f}%",
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


def read_document(path: Path) -> tuple[dict[str, object], list[Row]]:
    """(header and absences, rows) of a `python -m bench.ops --json` file. Raises OSError, ValueError, TypeError."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or "rows" not in value:
        raise ValueError("it holds no rows")
    return value, [Row(**row) for row in value["rows"]]
