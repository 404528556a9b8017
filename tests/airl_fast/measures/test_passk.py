"""pass@k and the bootstrap against enumeration, closed forms and a plain re-implementation."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.errors import UserError
from airl_fast.measures.passk import (
    Estimate,
    interval,
    mean_estimate,
    mean_estimates,
    paired_difference,
    pass_at_k,
    pass_at_k_per_prompt,
    pass_at_ks,
)


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
@settings(max_examples=80, deadline=None)
def test_equals_the_share_of_k_subsets_with_a_correct_sample(verdicts, data):
    k = data.draw(st.integers(1, len(verdicts)))
    subsets = [any(verdicts[i] for i in s) for s in combinations(range(len(verdicts)), k)]
    expected = sum(subsets) / len(subsets)
    assert pass_at_k_per_prompt([verdicts], k)[0] == pytest.approx(expected, abs=1e-13)


def test_equals_the_binomial_formula_where_enumeration_is_too_large():
    n, right, k = 1000, 37, 100
    correct = np.zeros((1, n), dtype=bool)
    correct[0, :right] = True
    expected = 1 - math.comb(n - right, k) / math.comb(n, k)
    assert pass_at_k_per_prompt(correct, k)[0] == pytest.approx(expected, rel=1e-12)


def test_values_by_hand():
    correct = [[True, False, False, False], [False] * 4, [True] * 4, [True, True, False, False]]
    assert pass_at_k_per_prompt(correct, 1) == pytest.approx([0.25, 0, 1, 0.5])
    assert pass_at_k_per_prompt(correct, 2) == pytest.approx([0.5, 0, 1, 5 / 6])
    assert pass_at_k(correct, 2).value == pytest.approx((0.5 + 0 + 1 + 5 / 6) / 4)


@pytest.mark.parametrize("verdict", [True, False])
def test_all_alike_has_that_value_and_no_width(verdict):
    assert pass_at_k(np.full((5, 3), verdict), 2) == Estimate(float(verdict), float(verdict), float(verdict))


def test_one_sample_and_one_prompt():
    assert pass_at_k([[True]], 1) == Estimate(1.0, 1.0, 1.0)
    assert pass_at_k([[True, False]], 1) == Estimate(0.5, 0.5, 0.5)


def test_interval_matches_the_normal_one_for_many_prompts():
    correct = np.random.default_rng(3).random((2000, 1)) < 0.3
    got = pass_at_k(correct, 1, resamples=4000)
    half = 1.96 * math.sqrt(got.value * (1 - got.value) / 2000)
    assert got.high - got.value == pytest.approx(half, rel=0.08)
    assert got.value - got.low == pytest.approx(half, rel=0.08)


def test_resampling_in_chunks_equals_resampling_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=11)
    whole = mean_estimate(values, resamples=50, seed=4)
    monkeypatch.setattr("airl_fast.measures.passk._CHUNK_ENTRIES", 30)
    assert mean_estimate(values, resamples=50, seed=4) == whole


def test_two_items_have_the_exact_quantiles_of_their_bootstrap():
    # The mean of two draws from {0, 1} is 0, 1/2 or 1 with chance 1/4, 1/2, 1/4: the tails reach both ends.
    assert mean_estimate([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0)


def test_seed_decides_the_interval():
    values = np.random.default_rng(1).normal(size=20)
    assert mean_estimate(values, seed=1) == mean_estimate(values, seed=1)
    assert mean_estimate(values, seed=1) != mean_estimate(values, seed=2)


def test_clusters_resample_together_with_the_mean_over_items():
    values = np.repeat(np.random.default_rng(5).normal(size=40), 10)  # ten copies carry no further information
    clusters = np.repeat([f"q{i}" for i in range(40)], 10)
    together, apart = mean_estimate(values, clusters=clusters), mean_estimate(values)
    assert together.value == apart.value
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.15)
    unequal = mean_estimate([1.0, 1.0, 1.0, 0.0], clusters=[0, 0, 0, 1])
    assert unequal == Estimate(0.75, 0.0, 1.0)  # items weigh the same, and a resample can hold one cluster alone


def test_paired_difference_leaves_out_what_both_share():
    rng = np.random.default_rng(6)
    hardness = rng.normal(size=200)
    first, second = hardness + 0.1, hardness + 0.01 * rng.normal(size=200)
    paired = paired_difference(first, second)
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired.low > 0.09 and paired.high < 0.11
    single = mean_estimate(first)
    assert single.high - single.low > 0.2


def test_interval_skips_undefined_resamples():
    assert interval(0.5, np.array([np.nan, 0.2, np.nan, 0.2])) == Estimate(0.5, 0.2, 0.2)


def test_several_k_are_the_single_ones():
    correct = np.random.default_rng(0).random((30, 10)) < 0.4
    assert pass_at_ks(correct, (1, 5)) == {1: pass_at_k(correct, 1), 5: pass_at_k(correct, 5)}


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_outside_the_samples_is_refused(k):
    with pytest.raises(UserError, match=f"k={k} must lie between 1 and the number of samples a prompt, 3"):
        pass_at_k(np.ones((2, 3), dtype=bool), k)


def test_bad_input_is_named():
    with pytest.raises(UserError, match="only true/false"):
        pass_at_k([[1.0, float("nan")]], 1)
    with pytest.raises(UserError, match="only true/false"):
        pass_at_k([[0, 2]], 1)
    with pytest.raises(UserError, match="at least one of each"):
        pass_at_k(np.ones((0, 3), dtype=bool), 1)
    with pytest.raises(UserError, match="holds 1 NaN"):
        mean_estimate([1.0, float("nan")])
    with pytest.raises(UserError, match="same items twice, but got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="resamples=0"):
        mean_estimate([1.0], resamples=0)
    with pytest.raises(UserError, match="one prompt label for each of 2"):
        mean_estimate([1.0, 2.0], clusters=[1])


def test_zero_and_one_pass_as_verdicts():
    assert pass_at_k_per_prompt([[0, 1], [1, 1]], 1) == pytest.approx([0.5, 1.0])


def test_columns_share_their_resamples_with_single_estimates() -> None:
    rng = np.random.default_rng(4)
    columns, clusters = rng.random((40, 3)), np.arange(40) // 4
    for column, found in zip(columns.T, mean_estimates(columns, clusters=clusters), strict=True):
        expected = mean_estimate(column, clusters=clusters)
        assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
