"""AUROC, Welch and Pearson against pair counting, textbook figures and numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.errors import UserError
from airl_fast.measures.correlate import pearson_matrix, pooled_auroc, welch_t, within_prompt_auroc

TRACES = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.booleans()), min_size=1, max_size=20
)


def by_pairs(scores, correct):
    right, wrong = scores[correct][:, None], scores[~correct][None, :]
    return np.mean((right > wrong) + 0.5 * (right == wrong)) if right.size and wrong.size else None


@given(TRACES)
@settings(max_examples=100, deadline=None)
def test_auroc_equals_counting_pairs(traces):
    prompts, scores, correct = (np.array(column) for column in zip(*traces, strict=True))
    pooled, expected = pooled_auroc(scores, correct, resamples=5), by_pairs(scores, correct)
    assert (pooled is None) == (expected is None)
    if pooled is not None:
        assert pooled.value == pytest.approx(expected, abs=1e-12)
    inside = [by_pairs(scores[prompts == p], correct[prompts == p]) for p in np.unique(prompts)]
    counted = [a for a in inside if a is not None]
    got = within_prompt_auroc(scores, correct, prompts, resamples=5)
    assert (got.prompts, got.prompts_total) == (len(counted), len(inside))
    if counted:
        assert got.estimate.value == pytest.approx(np.mean(counted), abs=1e-12)
    else:
        assert got.estimate is None


def test_within_prompt_sees_what_pooling_hides():
    # The reward only knows which prompts are easy: high pooled, none within.
    prompts = np.repeat(np.arange(40), 10)
    easy = prompts < 20
    correct = np.where(easy, np.arange(400) % 10 < 8, np.arange(400) % 10 < 2)
    scores = easy.astype(float)
    assert pooled_auroc(scores, correct, prompts=prompts, resamples=50).value == pytest.approx(0.8)
    assert within_prompt_auroc(scores, correct, prompts).estimate.value == 0.5


def test_pooled_interval_resamples_prompts_and_matches_a_plain_bootstrap(monkeypatch):
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(30), 6)
    # Both vary mostly between prompts, so an interval that resampled single traces would be far too narrow.
    correct = rng.normal(size=180) + 2 * rng.normal(size=30)[prompts] > 0
    scores = 0.5 * correct + rng.normal(size=180) + 2 * rng.normal(size=30)[prompts]
    got = pooled_auroc(scores, correct, prompts=prompts, resamples=1500)
    draws = []
    for _ in range(1500):
        rows = (6 * rng.integers(0, 30, size=30)[:, None] + np.arange(6)).ravel()
        draws.append(by_pairs(scores[rows], correct[rows]))
    np.testing.assert_allclose([got.low, got.high], np.quantile(draws, [0.025, 0.975]), atol=0.02)
    alone = pooled_auroc(scores, correct, resamples=1500)
    assert alone.high - alone.low < 0.75 * (got.high - got.low)
    monkeypatch.setattr("airl_fast.measures.correlate._CHUNK_ENTRIES", 1000)
    chunked = pooled_auroc(scores, correct, prompts=prompts, resamples=1500)
    assert (chunked.low, chunked.high) == pytest.approx((got.low, got.high), abs=1e-12)


def test_resamples_without_both_classes_are_skipped():
    got = pooled_auroc([1.0, 0.0], [True, False], resamples=200)  # half of them hold one trace twice
    assert (got.value, got.low, got.high) == (1.0, 1.0, 1.0)


def test_welch_by_hand():
    # Prompt means: correct 3, 5, 7 (variance 4), wrong 1, 2 (variance 1/2). t = 3.5 / sqrt(4/3 + 1/4).
    scores = [2.0, 4.0, 5.0, 7.0, 1.0, 0.0, 4.0]
    correct = [True, True, True, True, False, False, False]
    prompts = ["a", "a", "b", "c", "a", "b", "b"]
    got = welch_t(scores, np.array(correct), prompts)
    a, b = 4 / 3, 0.5 / 2
    assert got.t == pytest.approx(3.5 / np.sqrt(a + b))
    assert got.degrees == pytest.approx((a + b) ** 2 / (a**2 / 2 + b**2 / 1))
    assert (got.mean_correct, got.mean_wrong, got.prompts_correct, got.prompts_wrong) == (5.0, 1.5, 3, 2)


def test_welch_textbook_figures():
    # Unequal sizes and variances, worked example 1 of the Wikipedia article: t = -2.46, df = 25.0.
    a1 = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    a2 = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    got = welch_t(a1 + a2, np.array([True] * 15 + [False] * 15), np.arange(30))
    assert got.t == pytest.approx(-2.46, abs=0.005)
    assert got.degrees == pytest.approx(25.0, abs=0.05)


def test_welch_is_undefined_without_spread_or_prompts():
    assert welch_t([1.0, 2.0, 3.0], np.array([True, False, False]), [0, 1, 2]) is None
    assert welch_t([1.0, 1.0, 0.0, 0.0], np.array([True, True, False, False]), [0, 1, 2, 3]) is None


def test_pearson_equals_numpy_and_marks_constants():
    rng = np.random.default_rng(4)
    signals = {"reward": rng.normal(size=50), "correct": rng.random(50) < 0.5, "format": np.ones(50)}
    signals["length"] = 3 * signals["reward"] + 0.1 * rng.normal(size=50)
    got = pearson_matrix(signals)
    assert got.names == ("reward", "correct", "format", "length") and got.traces == 50
    expected = np.corrcoef([signals["reward"], signals["correct"].astype(float), signals["length"]])
    np.testing.assert_allclose(got.values[np.ix_([0, 1, 3], [0, 1, 3])], expected, atol=1e-12)
    assert np.isnan(got.values[2]).all() and np.isnan(got.values[:, 2]).all()
    assert got.between("reward", "length") > 0.99
    with pytest.raises(UserError, match="no signal 'xml'; choose from reward, correct, format, length"):
        got.between("reward", "xml")


def test_bad_input_is_named():
    with pytest.raises(UserError, match="scores holds 1 NaN"):
        pooled_auroc([np.nan, 0.0], np.array([True, False]))
    with pytest.raises(UserError, match="correct must be bool"):
        within_prompt_auroc([1.0, 0.0], [1, 0], [0, 0])
    with pytest.raises(UserError, match="one prompt label for each of 2"):
        within_prompt_auroc([1.0, 0.0], [True, False], [0])
    with pytest.raises(UserError, match="signal 'format' holds 1 NaN"):
        pearson_matrix({"reward": [1.0, 2.0], "format": [1.0, np.nan]})
    with pytest.raises(UserError, match="lengths differ: reward 2, format 1"):
        pearson_matrix({"reward": [1.0, 2.0], "format": [1.0]})
    with pytest.raises(UserError, match="at least two signals"):
        pearson_matrix({"reward": [1.0]})
