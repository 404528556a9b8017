"""Plain best-of-N, vote and random pick for every N at once, from one pool of samples a prompt.

What N samples would have given is the exact expectation over all N-subsets of the pool (for the vote: over drawn
subsets), so a guided method meets best-of-N at exactly its own number of tokens, without the luck of one draw.
Notation: P prompts, M samples of each in the pool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from airl_fast.errors import UserError
from airl_fast.measures.passk import Floats
from airl_fast.measures.rerank import choose_by_vote

VOTE_SUBSETS = 200
_CHUNK = 2_000_000  # comparisons between a subset's samples held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """scores: f64 [P, M], finite or -inf. correct: bool [P, M]. classes: int64 [P, M], see `answer_classes`. lengths:
    int64 [P, M], tokens. copies: int64 [P, M], equal numbers for equal samples of a prompt. seconds: of one sample of
    every prompt, scoring included."""

    scores: Floats
    correct: NDArray[np.bool_]
    classes: NDArray[np.int64]
    lengths: NDArray[np.int64]
    copies: NDArray[np.int64]
    seconds: float

    @property
    def size(self) -> int:
        return self.scores.shape[1]

    def samples_for(self, tokens: float) -> float:
        """The N, at least one and not whole, whose N samples a prompt cost `tokens` on average."""
        return max(tokens / float(self.lengths.mean()), 1.0)

    def between(self, n: float, figure: Callable[[int], Floats]) -> Floats:
        """`figure` at an N that is not whole, f64 [P]: the two neighbours, mixed so that the tokens are those of n.

        It is what a sampler gets that draws one sample more for that share of the time. UserError for more samples
        than there are.
        """
        below = int(n)
        if n > self.size:
            raise UserError(f"{n:.1f} samples a prompt were asked of a pool of {self.size}; draw a larger one.")
        share = n - below
        return figure(below) if share == 0 else (1 - share) * figure(below) + share * figure(below + 1)

    def best_of(self, n: int) -> Floats:
        """Chance that the highest-scored of n samples is right, f64 [P]; ties are drawn from with equal chance."""
        order = np.argsort(self.scores, axis=1)
        scores, correct = (np.take_along_axis(each, order, axis=1) for each in (self.scores, self.correct))
        reach = self._within(n)  # [M + 1]: chance that all n lie among given ones
        out = np.zeros(len(scores))
        for prompt, row in enumerate(scores):
            firsts = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]]))  # of each group of equal scores
            ends = np.append(firsts[1:], self.size)
            right = np.add.reduceat(correct[prompt].astype(np.float64), firsts) / (ends - firsts)
            out[prompt] = ((reach[ends] - reach[firsts]) * right).sum()
        return out

    def random(self) -> Floats:
        """Chance that a sample is right, f64 [P]."""
        return self.correct.mean(axis=1)

    def vote(self, n: int, seed: int = 0) -> Floats:
        """Chance that the most frequent answer of n samples is right, f64 [P]: the mean over VOTE_SUBSETS subsets,
        and the whole pool when n is all of it."""
        subsets = 1 if n == self.size else VOTE_SUBSETS
        rng = np.random.default_rng([seed, n])
        chosen = rng.random((len(self.scores), subsets, self.size)).argsort(axis=2)[:, :, :n].reshape(-1, n)
        prompts = np.repeat(np.arange(len(self.scores)), subsets)[:, None]
        classes, correct = self.classes[prompts, chosen], self.correct[prompts, chosen]
        rows = max(1, _CHUNK // (n * n))
        parts = [choose_by_vote(classes[i : i + rows], correct[i : i + rows]) for i in range(0, len(classes), rows)]
        return np.concatenate(parts).reshape(-1, subsets).mean(axis=1)

    def scored(self, n: int) -> Floats:
        """Tokens that the discriminator reads to choose among n, f64 [P]: of equal samples it reads one."""
        reach, out = self._within(n), np.zeros(len(self.scores))
        for prompt, (copies, lengths) in enumerate(zip(self.copies, self.lengths, strict=True)):
            _, firsts, counts = np.unique(copies, return_index=True, return_counts=True)
            out[prompt] = ((1.0 - reach[self.size - counts]) * lengths[firsts]).sum()
        return out

    def _within(self, n: int) -> Floats:
        """C(a, n) / C(M, n) for a = 0..M: the chance that n samples all lie among a given ones."""
        if not 1 <= n <= self.size:
            raise UserError(f"n={n} samples were asked of a pool of {self.size}.")
        a = np.arange(self.size + 1, dtype=np.float64)
        chance = np.ones_like(a)
        for drawn in range(n):
            chance *= np.maximum(a - drawn, 0.0) / (self.size - drawn)
        return chance


def copies_of(tokens: Sequence[Sequence[tuple[int, ...]]]) -> NDArray[np.int64]:
    """Samples [P][M] as numbers that are equal where a prompt's samples are."""
    rows = []
    for samples in tokens:
        seen: dict[tuple[int, ...], int] = {}
        rows.append([seen.setdefault(sample, len(seen)) for sample in samples])
    return np.array(rows, dtype=np.int64)
