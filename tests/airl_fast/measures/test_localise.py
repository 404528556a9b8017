"""Localisation against plain loops, enumeration of tie orders, and the real spread of labelled mistakes."""

import json
import os
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.errors import UserError
from airl_fast.measures.localise import (
    StepScores,
    TokenValues,
    calibrate_threshold,
    chance_hits,
    position_suspicion,
    step_of_token,
    step_scores,
    summarise_hits,
    suspicion,
    trace_hits,
)

DATA = Path(os.environ.get("AIRL_DATA", Path(__file__).parents[4] / "shared" / "data"))


def steps_of(*traces):
    return StepScores(values=np.concatenate(traces), offsets=np.cumsum([0, *map(len, traces)]))


def test_steps_from_tokens_by_hand():
    tokens = TokenValues.from_traces(
        [[1.0, 3.0, -2.0, 4.0, 0.0], [5.0], [1.0, 2.0]],
        [[False, True, True, False, False], [True], [False, False]],  # the last trace was cut off
    )
    mean = step_scores(tokens)
    np.testing.assert_array_equal(mean.values, [2.0, -2.0, 2.0, 5.0, 1.5])
    np.testing.assert_array_equal(mean.offsets, [0, 3, 4, 5])
    np.testing.assert_array_equal(step_scores(tokens, "min").values, [1.0, -2.0, 0.0, 5.0, 1.0])
    for token, step in enumerate([0, 0, 1, 2, 2]):
        np.testing.assert_array_equal(step_of_token(tokens, [token, 0, -1]), [step, 0, -1])


def test_rules_by_hand():
    steps = steps_of([2.0, 1.0, -3.0, -4.0], [0.0, 5.0])
    drop = suspicion(steps, "largest_drop")
    np.testing.assert_allclose(drop, [-1.0 - 2.0, 1.0, 4.0, 1.0, 2.5, -5.0])
    assert trace_hits(steps, drop, [2, 0]).hit_at_1 == pytest.approx([1.0, 1.0])
    assert trace_hits(steps, suspicion(steps, "argmin"), [3, 0]).hit_at_1 == pytest.approx([1.0, 1.0])
    below = suspicion(steps, "first_below", threshold=1.5)
    assert trace_hits(steps, below, [1, 0]).hit_at_1 == pytest.approx([1.0, 1.0])
    at = suspicion(steps, "first_below", threshold=1.0)  # the step at the threshold itself is not below it
    assert trace_hits(steps, at, [2, 0]).hit_at_1 == pytest.approx([1.0, 1.0])
    # Nothing below -5: the lowest is named. The ranking puts steps below in order, then the rest by score.
    assert trace_hits(steps, suspicion(steps, "first_below", threshold=-5.0), [3, 0]).hit_at_1.tolist() == [1.0, 1.0]
    assert trace_hits(steps, below, [0, 1]).reciprocal_rank == pytest.approx([1 / 4, 1 / 2])
    assert trace_hits(steps, below, [3, 1]).reciprocal_rank == pytest.approx([1 / 3, 1 / 2])


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=6), st.data())
@settings(max_examples=80, deadline=None)
def test_ties_equal_the_mean_over_all_orders(level, data):
    truth = data.draw(st.integers(0, len(level) - 1))
    hit, near, rank = [], [], []
    for order in permutations(range(len(level))):
        ranked = sorted(order, key=lambda i: -level[i])
        hit.append(ranked[0] == truth)
        near.append(abs(ranked[0] - truth) <= 1)
        rank.append(1 / (1 + ranked.index(truth)))
    got = trace_hits(steps_of(level), level, [truth])
    expected = [np.mean(hit), np.mean(near), np.mean(rank)]
    assert [got.hit_at_1[0], got.hit_within_1[0], got.reciprocal_rank[0]] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_chance_is_what_equal_suspicion_scores(length):
    for truth in range(length):
        steps = steps_of(np.arange(float(length)))
        exact, tied = chance_hits(steps, [truth]), trace_hits(steps, np.zeros(length), [truth])
        assert exact.hit_at_1[0] == pytest.approx(1 / length)
        assert exact.hit_at_1 == pytest.approx(tied.hit_at_1)
        assert exact.hit_within_1 == pytest.approx(tied.hit_within_1)
        assert exact.reciprocal_rank == pytest.approx(tied.reciprocal_rank)


def test_chance_is_what_random_guesses_reach():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, size=20_000)
    steps = StepScores(values=rng.normal(size=lengths.sum()), offsets=np.concatenate(([0], np.cumsum(lengths))))
    truth = rng.integers(0, lengths)
    chance, guess = chance_hits(steps, truth), trace_hits(steps, -steps.values, truth)
    for name in ("hit_at_1", "hit_within_1", "reciprocal_rank"):
        assert getattr(guess, name).mean() == pytest.approx(getattr(chance, name).mean(), abs=0.01)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_calibrated_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    traces = [rng.integers(-3, 4, size=rng.integers(1, 6)).astype(float) for _ in range(rng.integers(1, 8))]
    truth = np.array([rng.integers(-1, len(t)) for t in traces])
    truth[0] = 0
    steps = steps_of(*traces)

    def hit(threshold):
        return trace_hits(steps, suspicion(steps, "first_below", threshold), truth).hit_at_1.sum()

    best = max(hit(t) for t in np.arange(-4.5, 5.0, 0.5))
    assert hit(calibrate_threshold(steps, truth)) == pytest.approx(best, abs=1e-9)


def test_threshold_lies_between_right_and_wrong_steps():
    rng = np.random.default_rng(1)
    traces, truth = [], []
    for _ in range(300):
        wrong = int(rng.integers(0, 5))
        level = np.where(np.arange(5) < wrong, 2.0, -1.0) + 0.3 * rng.normal(size=5)
        traces.append(level)
        truth.append(wrong)
    threshold = calibrate_threshold(steps_of(*traces[:150]), truth[:150])
    assert -0.2 < threshold < 1.3
    held_out = steps_of(*traces[150:])
    hits = trace_hits(held_out, suspicion(held_out, "first_below", threshold), truth[150:])
    assert hits.hit_at_1.mean() > 0.97


def test_position_baseline_names_the_commonest_position_within_reach():
    steps = steps_of(np.zeros(4), np.zeros(4), np.zeros(2), np.zeros(1))
    level = position_suspicion(steps, [2, 2, 2, 2, 1, 1, 1, 0, 0, -1, 9])
    np.testing.assert_array_equal(level[:4], [2, 3, 4, 0])
    got = trace_hits(steps, level, [2, 1, 1, 0])
    assert got.hit_at_1 == pytest.approx([1.0, 0.0, 1.0, 1.0])
    assert got.reciprocal_rank == pytest.approx([1.0, 0.5, 1.0, 1.0])


def test_traces_without_error_do_not_count():
    steps = steps_of([0.0, -1.0], [0.0, -1.0], [0.0, -1.0])
    hits = trace_hits(steps, suspicion(steps, "argmin"), [-1, 1, 0])
    np.testing.assert_array_equal(hits.rows, [1, 2])
    got = summarise_hits(hits, prompts=["a", "b", "b"])
    assert got.traces == 2
    assert (got.hit_at_1.value, got.hit_at_1.low, got.hit_at_1.high) == (0.5, 0.5, 0.5)  # one prompt: one cluster
    assert (got.hit_within_1.value, got.mrr.value) == (1.0, 0.75)
    apart = summarise_hits(hits)
    assert (apart.hit_at_1.low, apart.hit_at_1.high) == (0.0, 1.0)


def test_adding_a_constant_changes_no_prediction():
    # Log-probabilities are all negative; a rule that read the sign would not be a fair baseline.
    values = np.random.default_rng(3).normal(size=12)
    for rule in ("largest_drop", "argmin"):
        low, high = (suspicion(steps_of(values[:5] + c, values[5:] + c), rule) for c in (-100.0, 100.0))
        assert np.argmax(low[:5]) == np.argmax(high[:5]) and np.argmax(low[5:]) == np.argmax(high[5:])


def test_bad_input_is_named():
    steps = steps_of([0.0, -1.0], [1.0])
    with pytest.raises(UserError, match="trace 1 has 1 steps, so its first wrong step cannot be 1"):
        trace_hits(steps, steps.values, [0, 1])
    with pytest.raises(UserError, match="no trace has a wrong step"):
        chance_hits(steps, [-1, -1])
    with pytest.raises(UserError, match="needs a finite threshold"):
        suspicion(steps, "first_below")
    with pytest.raises(UserError, match="rule 'max' is unknown"):
        suspicion(steps, "max")
    with pytest.raises(UserError, match="suspicion holds 1 NaN"):
        trace_hits(steps, [0.0, np.nan, 1.0], [0, 0])
    with pytest.raises(UserError, match="one value for each of 3 steps"):
        trace_hits(steps, [0.0], [0, 0])
    with pytest.raises(UserError, match="token values holds 1 NaN"):
        TokenValues.from_traces([[np.nan]], [[True]])
    with pytest.raises(UserError, match="every trace at least one token"):
        TokenValues.from_traces([[1.0], []], [[True], []])
    with pytest.raises(UserError, match="rise strictly from 0 to 2"):
        StepScores(values=np.zeros(2), offsets=np.array([0, 2, 2]))
    with pytest.raises(UserError, match="step_ends must be bool"):
        TokenValues(values=np.zeros(2), offsets=np.array([0, 2]), step_ends=np.zeros(2))
    with pytest.raises(UserError, match="step rule 'sum' is unknown"):
        step_scores(TokenValues.from_traces([[1.0]], [[True]]), "sum")
    with pytest.raises(UserError, match="index within its tokens"):
        step_of_token(TokenValues.from_traces([[1.0]], [[True]]), [1])


def test_baselines_on_real_labelled_mistakes():
    """On real traces, guessing one position beats chance by far: the baseline has to be shown."""
    path = DATA / "localisation" / "bigbench_mistake.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent; set AIRL_DATA to the directory with the real data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["first_error"] is not None and row["task"] == rows[0]["task"]]
    truth = np.array([row["first_error"] for row in rows])
    lengths = np.array([len(row["steps"]) for row in rows])
    steps = StepScores(values=np.zeros(lengths.sum()), offsets=np.concatenate(([0], np.cumsum(lengths))))
    chance = summarise_hits(chance_hits(steps, truth), resamples=200)
    assert chance.hit_at_1.value == pytest.approx(np.mean(1 / lengths))
    position = trace_hits(steps, position_suspicion(steps, truth), truth)
    common = np.bincount(truth).argmax()
    reachable = lengths > common
    np.testing.assert_allclose(position.hit_at_1[reachable], truth[reachable] == common)
    assert position.hit_at_1.mean() > chance.hit_at_1.high
