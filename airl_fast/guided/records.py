"""What every method of guided generation is: problems in, one chosen trace for each out, and what it took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from airl_fast.guided.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A prompt to answer. place: file:line, for messages. There is no answer here, so no method can see one."""

    id: str
    place: str
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A trace as far as it is written. problem: its place among the session's. slot: names the stream of uniform
    numbers it draws from. done: its turn is over (`finished`) or it has its limit of tokens.

    closed: how many tokens lie in steps that have certainly ended, all of them when done. A sentence's end is only
    known from what follows it, so a draft that paused after a step may hold the beginning of the next.
    """

    problem: int
    slot: int
    tokens: tuple[int, ...] = ()
    finished: bool = False
    done: bool = False
    closed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The trace chosen for a problem. score: by the run's own scorer, -inf where that one names no answer.

    generated: tokens sampled for this problem, those of discarded traces too. scored: tokens of this problem's
    completions that the discriminator read, as often as it read them. details: what the method did, for the record.
    """

    problem: Problem
    tokens: tuple[int, ...]
    text: str
    finished: bool
    score: float
    generated: int
    scored: int
    details: Mapping[str, object] = field(default_factory=dict)


class Method(Protocol):
    """One way to spend tokens on a problem; a frozen dataclass of its settings."""

    @property
    def label(self) -> str:
        """The method and its settings, for tables."""

    def solve(self, session: "Session") -> Sequence[Outcome]:
        """One outcome for each of the session's problems, in their order."""
