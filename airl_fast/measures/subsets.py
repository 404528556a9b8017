"""How well would a choice among fewer samples do? Expectations over subsets of the N samples of each prompt.

Notation: P prompts, N samples a prompt, m of them in a subset.
"""

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import ArrayLike

from airl_fast.errors import UserError
from airl_fast.measures.passk import Floats, as_correct
from airl_fast.measures.rerank import choose_by_vote

_MOST_VOTES = 250_000  # subsets of all prompts that a vote is counted in
_DRAWN = 500  # subsets, the same for every prompt, where these would be more


def best_of_subset(scores: ArrayLike, correct: ArrayLike, m: int) -> Floats:
    """Chance per prompt, f64 [P], that the highest-scored of m random samples out of the N is right; exact.

    The sample of rank i (0-based, from the top) is the best of a subset with chance C(N-1-i, m-1) / C(N, m). Equal
    scores share their ranks, so each of them stands for their mean. scores: [P, N], finite or -inf.
    """
    verdicts = as_correct(correct).astype(np.float64)
    values = np.asarray(scores, dtype=np.float64)
    prompts, n = verdicts.shape
    _check(m, n)
    order = np.argsort(-values, axis=1, kind="stable")
    values, verdicts = np.take_along_axis(values, order, 1), np.take_along_axis(verdicts, order, 1)
    new = np.ones((prompts, n), dtype=bool)
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    block = np.cumsum(new.ravel()) - 1
    mean = np.bincount(block, weights=verdicts.ravel()) / np.bincount(block)
    chance = np.array([comb(n - 1 - rank, m - 1) for rank in range(n)], dtype=np.float64) / comb(n, m)
    return mean[block].reshape(prompts, n) @ chance


def vote_of_subset(
    classes: ArrayLike, correct: ArrayLike, m: int, weights: ArrayLike | None = None
) -> tuple[Floats, bool]:
    """Chance per prompt, f64 [P], that the answer with most votes among m random samples is right; and whether it is
    exact over all subsets. Where these are too many it is the mean over 500 drawn at random, always the same.

    classes: int [P, N]; weights: [P, N] >= 0 or None, as in `choose_by_vote`.
    """
    classes, verdicts = np.asarray(classes), as_correct(correct)
    prompts, n = verdicts.shape
    _check(m, n)
    weights = np.ones(verdicts.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    exact = comb(n, m) <= _DRAWN or comb(n, m) * prompts <= _MOST_VOTES
    rng = np.random.default_rng(0)
    chosen = list(combinations(range(n), m)) if exact else [rng.permutation(n)[:m] for _ in range(_DRAWN)]

    def of_subsets(table: np.ndarray) -> np.ndarray:
        return table[:, np.array(chosen)].reshape(-1, m)

    picked = choose_by_vote(of_subsets(classes), of_subsets(verdicts), of_subsets(weights))
    return picked.reshape(prompts, len(chosen)).mean(axis=1), exact


def sizes(n: int, most: int = 5) -> tuple[int, ...]:
    """1, 2, 4, … and n; every second power of two, or fewer, where they are more than `most`."""
    factor = 2
    while len(found := _powers(factor, n)) > most:
        factor *= 2
    return found


def _powers(factor: int, n: int) -> tuple[int, ...]:
    found = [1]
    while found[-1] * factor < n:
        found.append(found[-1] * factor)
    return tuple(dict.fromkeys([*found, n]))


def _check(m: int, n: int) -> None:
    if not 1 <= m <= n:
        raise UserError(f"a subset of {m} samples cannot be taken from {n}; give a size from 1 to {n}.")
