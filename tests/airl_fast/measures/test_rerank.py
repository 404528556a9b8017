"""Reranking against enumeration over every way of breaking ties, and token scorers against plain loops."""

from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.errors import UserError
from airl_fast.measures.localise import TokenValues
from airl_fast.measures.passk import mean_estimate, paired_difference, pass_at_k_per_prompt
from airl_fast.measures.rerank import (
    NO_ANSWER,
    answer_classes,
    choose_by_score,
    choose_by_vote,
    discounted_to_go,
    rerank,
    trace_scores,
    vote_weights,
)

SAMPLES = st.lists(st.tuples(st.sampled_from([-1.5, 0.0, 0.5, 2.0, -np.inf]), st.booleans()), min_size=1, max_size=6)


def best_of_all_orders(scores, correct, k):
    """Shuffle in every way, sort stably by score, look at the first k."""
    hits = []
    for order in permutations(range(len(scores))):
        ranked = sorted(order, key=lambda i: -scores[i])
        hits.append(any(correct[i] for i in ranked[:k]))
    return np.mean(hits)


@given(SAMPLES, st.data())
@settings(max_examples=80, deadline=None)
def test_score_choice_is_the_mean_over_all_orders(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    scores, correct = zip(*samples, strict=True)
    assert choose_by_score([scores], [correct], k)[0] == pytest.approx(best_of_all_orders(scores, correct, k), abs=1e-9)


def test_score_choice_by_hand():
    correct = [[True, False, False], [True, False, True], [False, False, True]]
    scores = [[1.0, 3.0, 3.0], [2.0, 2.0, 0.0], [0.0, 1.0, 2.0]]
    assert choose_by_score(scores, correct) == pytest.approx([0.0, 0.5, 1.0])
    assert choose_by_score(scores, correct, 2) == pytest.approx([0.0, 1.0, 1.0])


def test_equal_scores_are_exactly_random():
    correct = np.random.default_rng(0).random((50, 100)) < 0.2
    for k in (1, 5, 40):
        got = choose_by_score(np.zeros((50, 100)), correct, k)
        np.testing.assert_allclose(got, pass_at_k_per_prompt(correct, k), atol=1e-12)


def votes_by_enumeration(classes, correct, weights, k):
    """All tied selections of k answers, and all members that may stand for each."""
    names = sorted({c for c in classes if c != NO_ANSWER})
    if not names:
        return 0.0
    votes = {c: sum(w for w, d in zip(weights, classes, strict=True) if d == c) for c in names}
    k = min(k, len(names))
    best = sorted(votes.values(), reverse=True)[:k]
    chosen = [s for s in combinations(names, k) if sorted((votes[c] for c in s), reverse=True) == best]
    outcomes = []
    for selection in chosen:
        members = [[correct[i] for i, d in enumerate(classes) if d == c] for c in selection]
        outcomes.append(np.mean([any(pick) for pick in product(*members)]))
    return float(np.mean(outcomes))


@given(
    st.lists(
        st.tuples(st.sampled_from([NO_ANSWER, 3, 7, 9, 11]), st.booleans(), st.sampled_from([0.0, 1.0, 0.5, 2.0])),
        min_size=1,
        max_size=6,
    ),
    st.data(),
)
@settings(max_examples=120, deadline=None)
def test_vote_is_the_mean_over_ties_and_members(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    classes, correct, weights = zip(*samples, strict=True)
    expected = votes_by_enumeration(classes, correct, weights, k)
    assert choose_by_vote([classes], [correct], [weights], k)[0] == pytest.approx(expected, abs=1e-12)
    plain = votes_by_enumeration(classes, correct, [1.0] * len(classes), k)
    assert choose_by_vote([classes], [correct], k=k)[0] == pytest.approx(plain, abs=1e-12)


def test_majority_by_hand():
    answers = [["8", "8", "5"], ["8", "5", None], [None, None, "5"], [None, None, None], ["4", "4", "8"]]
    correct = [[True, True, False], [True, False, False], [False, False, False], [False] * 3, [False, False, True]]
    assert choose_by_vote(answer_classes(answers), correct) == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.0])
    assert choose_by_vote(answer_classes(answers), correct, k=2) == pytest.approx([1.0, 1.0, 0.0, 0.0, 1.0])


def test_votes_that_differ_only_by_rounding_tie():
    weights = [[0.1, 0.2, 0.3, 0.3, 0.2, 0.1]]
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    assert choose_by_vote([[0, 0, 0, 1, 1, 1]], [[True] * 3 + [False] * 3], weights)[0] == 0.5


def test_weights_can_overrule_the_majority():
    classes, correct = [[0, 0, 1]], [[False, False, True]]
    assert choose_by_vote(classes, correct)[0] == 0.0
    assert choose_by_vote(classes, correct, vote_weights([[-3.0, -3.0, 2.0]]))[0] == 1.0


def test_vote_weights_are_probabilities():
    got = vote_weights([[0.0, np.log(3.0), -np.inf, -1e9, 1e9]])
    np.testing.assert_allclose(got, [[0.5, 0.75, 0.0, 0.0, 1.0]], atol=1e-15)


def test_answers_are_compared_by_the_callers_key():
    answers = [["72.0", "$72", "71"], ["x", None, "72"]]
    plain = answer_classes(answers)
    assert len(set(plain[0])) == 3

    def number(text):
        try:
            return float(text.strip("$"))
        except ValueError:
            return None

    keyed = answer_classes(answers, number)
    assert keyed[0, 0] == keyed[0, 1] == keyed[1, 2] != keyed[0, 2]
    assert keyed[1, 0] == keyed[1, 1] == NO_ANSWER


def test_rerank_agrees_with_its_parts_and_pairs_them():
    rng = np.random.default_rng(2)
    correct = rng.random((60, 16)) < 0.4
    scores = correct + rng.normal(size=(60, 16))
    classes = np.where(correct, 0, rng.integers(1, 4, size=(60, 16)))
    got = rerank(correct, {"reward": scores}, classes=classes, votes={"weighted": vote_weights(scores)})
    assert set(got.estimates) == {"reward", "random", "oracle", "majority", "weighted"}
    assert got.n == 16 and got.k == 1
    assert got.estimates["reward"].value == pytest.approx(
        np.mean([correct[p, np.argmax(scores[p])] for p in range(60)]), abs=1e-12
    )
    assert got.estimates["random"].value == pytest.approx(correct.mean(), abs=1e-12)
    assert got.estimates["oracle"].value == correct.any(axis=1).mean()
    assert got.estimates["reward"] == mean_estimate(got.per_prompt["reward"])
    gain = got.difference("reward", "random")
    assert gain == paired_difference(got.per_prompt["reward"], got.per_prompt["random"])
    assert gain.value == pytest.approx(got.estimates["reward"].value - got.estimates["random"].value)
    assert got.estimates["oracle"].value >= got.estimates["weighted"].value >= 0


@pytest.mark.parametrize("verdict", [True, False])
def test_all_alike_cannot_be_reranked(verdict):
    correct = np.full((4, 3), verdict)
    got = rerank(correct, {"reward": np.arange(12.0).reshape(4, 3)}, classes=np.zeros((4, 3), dtype=int))
    assert {e.value for e in got.estimates.values()} == {float(verdict)}
    assert got.difference("reward", "majority").low == 0.0


def loops(values, ends, answer, gamma):
    """Every scorer of one trace, spelt out."""
    to_go = [sum(gamma ** (s - t) * values[s] for s in range(t, len(values))) for t in range(len(values))]
    steps, current = [], []
    for value, end in zip(values, ends, strict=True):
        current.append(value)
        if end:
            steps.append(current)
            current = []
    steps += [current] if current else []
    picked = [g for g, a in zip(to_go, answer, strict=True) if a]
    return {
        "answer": np.mean(picked) if picked else -np.inf,
        "mean": np.mean(values),
        "min_step": min(np.mean(s) for s in steps),
        "last": values[-1],
    }, to_go


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-5, 5), st.booleans(), st.booleans()), min_size=1, max_size=7),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_trace_scores_equal_loops(traces, gamma):
    columns = [[[row[c] for row in trace] for trace in traces] for c in range(3)]
    tokens = TokenValues.from_traces(*columns)
    expected = [loops(v, e, a, gamma) for v, e, a in zip(*columns, strict=True)]
    np.testing.assert_allclose(discounted_to_go(tokens, gamma), np.concatenate([g for _, g in expected]), atol=1e-12)
    for scorer in ("answer", "mean", "min_step", "last"):
        got = trace_scores(tokens, scorer, gamma=gamma)
        np.testing.assert_allclose(got, [e[scorer] for e, _ in expected], atol=1e-12)


def test_minimum_within_steps_is_the_lowest_token():
    tokens = TokenValues.from_traces([[1.0, -2.0, 3.0], [4.0]], [[False, True, True], [True]])
    np.testing.assert_array_equal(trace_scores(tokens, "min_step", step_rule="min"), [-2.0, 4.0])
    np.testing.assert_array_equal(trace_scores(tokens, "min_step"), [-0.5, 4.0])


def test_discounting_does_not_overflow_on_long_traces():
    tokens = TokenValues.from_traces([np.ones(5000), np.ones(3)], [np.zeros(5000, bool), np.zeros(3, bool)])
    got = discounted_to_go(tokens, 0.9)
    assert got[0] == pytest.approx(10.0) and got[4999] == 1.0
    np.testing.assert_allclose(got[-3:], [2.71, 1.9, 1.0])


def test_bad_input_is_named():
    correct = np.array([[True, False]])
    with pytest.raises(UserError, match="NaN or"):
        choose_by_score([[np.nan, 0.0]], correct)
    with pytest.raises(UserError, match="NaN or"):
        choose_by_score([[np.inf, 0.0]], correct)
    with pytest.raises(UserError, match="shape"):
        choose_by_score([[0.0]], correct)
    with pytest.raises(UserError, match="k=3"):
        choose_by_score([[0.0, 1.0]], correct, 3)
    with pytest.raises(UserError, match="vote weights must be >= 0"):
        choose_by_vote([[0, 1]], correct, [[1.0, -1.0]])
    with pytest.raises(UserError, match="classes must be whole numbers"):
        choose_by_vote([[0.5, 1.0]], correct)
    with pytest.raises(UserError, match="answer classes"):
        rerank(correct, {}, votes={"w": [[1.0, 1.0]]})
    with pytest.raises(UserError, match="'random' of a score is taken"):
        rerank(correct, {"random": [[0.0, 1.0]]})
    with pytest.raises(UserError, match="'oracle' of a vote is taken"):
        rerank(correct, {}, classes=[[0, 1]], votes={"oracle": [[1.0, 1.0]]})
    with pytest.raises(UserError, match="no reranker 'reward'; choose from random, oracle"):
        rerank(correct, {}).difference("reward", "random")
    with pytest.raises(UserError, match="same number of samples"):
        answer_classes([["1"], ["1", "2"]])
    tokens = TokenValues.from_traces([[1.0]], [[True]])
    with pytest.raises(UserError, match="needs answer_mask"):
        trace_scores(tokens, "answer")
    with pytest.raises(UserError, match="gamma=1.5"):
        discounted_to_go(tokens, 1.5)
    with pytest.raises(UserError, match="scorer 'best' is unknown"):
        trace_scores(tokens, "best")
