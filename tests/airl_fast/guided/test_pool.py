"""Best-of-N from a pool: against the enumeration of every subset, and by hand."""

from itertools import combinations

import numpy as np
import pytest

from airl_fast.errors import UserError
from airl_fast.guided.pool import Pool, copies_of

SIZE = 6


def pool_of(seed: int, prompts: int = 4) -> Pool:
    rng = np.random.default_rng(seed)
    copies = rng.integers(0, 4, size=(prompts, SIZE))
    lengths = np.take_along_axis(rng.integers(3, 30, size=(prompts, 4)), copies, axis=1)  # equal samples, equal lengths
    scores = rng.integers(0, 3, size=(prompts, SIZE)).astype(np.float64)  # with ties
    scores[scores == 0] = -np.inf  # traces that name no answer
    return Pool(
        scores=scores,
        correct=rng.random((prompts, SIZE)) < 0.5,
        classes=rng.integers(-1, 3, size=(prompts, SIZE)),
        lengths=lengths,
        copies=copies,
        seconds=0.5,
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_best_of_is_the_mean_over_all_subsets(n):
    pool = pool_of(n)
    expected = []
    for scores, correct in zip(pool.scores, pool.correct, strict=True):
        successes = []
        for subset in map(list, combinations(range(SIZE), n)):
            top = scores[subset] == scores[subset].max()
            successes.append(correct[subset][top].mean())
        expected.append(np.mean(successes))
    np.testing.assert_allclose(pool.best_of(n), expected, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_scored_tokens_are_those_of_distinct_samples(n):
    pool = pool_of(10 + n)
    expected = []
    for copies, lengths in zip(pool.copies, pool.lengths, strict=True):
        read = [sum({copies[i]: lengths[i] for i in subset}.values()) for subset in combinations(range(SIZE), n)]
        expected.append(np.mean(read))
    np.testing.assert_allclose(pool.scored(n), expected, atol=1e-9)


def test_a_fraction_is_the_mixture_with_the_same_tokens():
    pool = pool_of(1)
    n = pool.samples_for(2.25 * pool.lengths.mean())
    assert n == pytest.approx(2.25)
    np.testing.assert_allclose(pool.between(n, pool.best_of), 0.75 * pool.best_of(2) + 0.25 * pool.best_of(3))
    np.testing.assert_array_equal(pool.between(3.0, pool.best_of), pool.best_of(3))
    assert pool.samples_for(0.2 * pool.lengths.mean()) == 1.0  # less than one sample cannot be drawn
    with pytest.raises(UserError, match=r"7\.5 samples a prompt were asked of a pool of 6"):
        pool.between(7.5, pool.best_of)


def test_vote_of_one_of_all_and_of_some():
    pool = pool_of(2)
    answered = pool.classes >= 0
    everything = []
    for classes, correct in zip(pool.classes, pool.correct, strict=True):
        votes = {c: (classes == c).sum() for c in set(classes) - {-1}}
        most = [c for c, count in votes.items() if count == max(votes.values())]
        everything.append(np.mean([correct[classes == c].mean() for c in most]))
    np.testing.assert_allclose(pool.vote(SIZE), everything, atol=1e-12)
    alone = (pool.correct & answered).mean(axis=1)  # without an answer there is no vote
    np.testing.assert_allclose(pool.vote(1), alone, atol=0.12)
    np.testing.assert_array_equal(pool.vote(3), pool.vote(3))
    np.testing.assert_array_equal(pool.random(), pool.correct.mean(axis=1))


def test_the_highest_score_wins_by_hand():
    pool = Pool(
        scores=np.array([[3.0, 2.0, 1.0]]),
        correct=np.array([[True, False, False]]),
        classes=np.zeros((1, 3), dtype=np.int64),
        lengths=np.full((1, 3), 10),
        copies=np.arange(3)[None],
        seconds=0.0,
    )
    assert pool.best_of(1)[0] == pytest.approx(1 / 3)
    assert pool.best_of(2)[0] == pytest.approx(2 / 3)  # the best is among two of three
    assert pool.best_of(3)[0] == pytest.approx(1.0)


def test_copies_are_numbered_within_a_prompt():
    found = copies_of([[(1, 2), (3,), (1, 2)], [(3,), (3,), (3,)]])
    assert found.tolist() == [[0, 1, 0], [0, 0, 0]]
