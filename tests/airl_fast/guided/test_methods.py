"""The methods on a real run: what each must be equal to, what it may cost, and what it must never do."""

import dataclasses

import numpy as np
import pytest

from airl_fast.errors import UserError
from airl_fast.guided import session as session_module
from airl_fast.guided.best_of import BestOf
from airl_fast.guided.records import Problem
from airl_fast.guided.reject import Reject, floor_that_keeps, lowest_running
from airl_fast.guided.revise import Revise
from airl_fast.guided.session import Session
from airl_fast.guided.steps import Beam
from airl_fast.guided.tokens import Reweigh, check_guidable
from airl_fast.judge.judge import Judge, open_judge
from airl_fast.lab import sampling_params
from airl_fast.measures.localise import TokenValues
from tests.airl_fast.data.test_chat import FORMATS
from tests.airl_fast.model_cases import language_model
from tests.airl_fast.run_cases import small_run

NEVER = -float("inf")
METHODS = [
    BestOf(n=3),
    Beam(beam=2, expand=3),
    Reweigh(n=2, beta=1.0, top_k=10),
    Reject(n=4, floor=0.0),
    Revise(n=1, rounds=3, threshold=0.5),
]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return open_judge(small_run())


def open_session(judge: Judge, count: int = 8, **options) -> Session:
    examples = judge.task.load("test", count)
    problems = [Problem(id=e.id, place=f"test:{i}", prompt=e.prompt) for i, e in enumerate(examples)]
    params = dataclasses.replace(sampling_params(judge.config, judge.maker.chat, 0, "final-guided"), seed=5)
    return Session(judge, params, problems, **options)


def plain(judge: Judge, slots: int = 1):
    session = open_session(judge)
    return session.to_end([session.fresh(p, s) for p in range(8) for s in range(slots)])


def tokens_of(outcomes):
    return [outcome.tokens for outcome in outcomes]


# ---- what each is equal to ----


@pytest.mark.parametrize(
    "method",
    [
        BestOf(n=1),
        Beam(beam=1, expand=1),
        Reweigh(n=1, beta=0.0, top_k=20),
        Reject(n=1, floor=NEVER),
        Revise(n=1, rounds=3, threshold=NEVER),
    ],
    ids=lambda method: type(method).__name__,
)
def test_without_a_choice_every_method_is_plain_sampling(judge, method):
    session = open_session(judge)
    outcomes = method.solve(session)
    drafts = plain(judge)
    assert tokens_of(outcomes) == [draft.tokens for draft in drafts]
    assert [o.finished for o in outcomes] == [d.finished for d in drafts]
    assert [o.generated for o in outcomes] == [len(draft.tokens) for draft in drafts]
    assert [o.text for o in outcomes] == [judge.maker.chat.decode(draft.tokens) for draft in drafts]


def test_the_session_is_what_ties_draws_to_places(judge):
    whole = tokens_of(BestOf(n=2).solve(open_session(judge)))
    examples = judge.task.load("test", 8)[4:]
    problems = [Problem(id=e.id, place="", prompt=e.prompt) for e in examples]
    rest = Session(judge, open_session(judge).params, problems, first=4)
    assert tokens_of(BestOf(n=2).solve(rest)) == whole[4:]
    assert tokens_of(BestOf(n=2).solve(open_session(judge, repeat=1))) != whole


def test_nothing_rejected_is_best_of_n_and_so_is_beta_zero(judge):
    session = open_session(judge)
    best = BestOf(n=4).solve(session)
    for method in (Reject(n=4, floor=NEVER), Reweigh(n=4, beta=0.0, top_k=20), Revise(n=4, rounds=2, threshold=NEVER)):
        other = method.solve(open_session(judge))
        assert tokens_of(other) == tokens_of(best)
        assert [o.generated for o in other] == [o.generated for o in best]
        np.testing.assert_allclose([o.score for o in other], [o.score for o in best], atol=1e-5)
    drafts = plain(judge, 4)
    scores = open_session(judge).score(drafts).reshape(8, 4)
    np.testing.assert_allclose([o.score for o in best], scores.max(axis=1), atol=1e-5)


# ---- scores of prefixes ----


def test_a_prefix_has_the_scores_it_has_in_the_whole(judge):
    session = open_session(judge)
    paused = session.to_step([session.fresh(p, 0) for p in range(8)])
    whole = plain(judge)
    full = session.read(whole)
    steps_checked = 0
    while any(not draft.done for draft in paused):
        values = session.read(paused)
        for i, draft in enumerate(paused):
            own = values.values[values.offsets[i] : values.offsets[i + 1]]
            assert len(own) == draft.closed and draft.tokens == whole[i].tokens[: len(draft.tokens)]
            start = full.offsets[i]
            np.testing.assert_allclose(own, full.values[start : start + draft.closed], atol=1e-5)
            if not draft.done:  # its closed part ends where the whole has a step end
                assert full.step_ends[start + draft.closed - 1]
                steps_checked += 1
        paused = session.to_step(paused)
    assert steps_checked > 8 and [d.tokens for d in paused] == [d.tokens for d in whole]


def test_equal_drafts_are_read_once(judge):
    session = open_session(judge)
    drafts = plain(judge)
    scores = session.score([*drafts, *drafts[::-1]])
    np.testing.assert_array_equal(scores[:8], scores[8:][::-1])
    assert session.scored.tolist() == [len(draft.tokens) for draft in drafts]


# ---- what it costs ----


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_sampled_and_every_read_token_is_counted(judge, method, monkeypatch):
    sampled, read = np.zeros(8, dtype=int), np.zeros(8, dtype=int)
    session = open_session(judge)
    place = {session.prompt(session.fresh(p, 0)): p for p in range(8)}
    real = session_module.extend

    def recording(lm, starts, *arguments, **options):
        samples = real(lm, starts, *arguments, **options)
        for start, one in zip(starts, samples, strict=True):
            sampled[start.stream[0]] += len(one.tokens)
            if isinstance(method, Reweigh):
                read[start.stream[0]] += len(one.tokens) - 1  # the last one drawn is never read
        return samples

    real_pack = type(judge.bridge).pack

    def packing(bridge, traces, examples):
        for trace in traces:
            read[place[trace.prompt_tokens]] += len(trace.tokens)
        return real_pack(bridge, traces, examples)

    monkeypatch.setattr(session_module, "extend", recording)
    monkeypatch.setattr(type(judge.bridge), "pack", packing)
    outcomes = method.solve(session)
    assert [o.generated for o in outcomes] == sampled.tolist()
    assert [o.scored for o in outcomes] == read.tolist()
    assert all(o.generated >= len(o.tokens) > 0 for o in outcomes)


# ---- each method's own ----


def test_a_beam_finds_higher_rewards_than_one_sample_and_obeys_the_budget(judge):
    alone = BestOf(n=1).solve(open_session(judge))
    searched = Beam(beam=2, expand=3).solve(open_session(judge))
    assert np.mean([o.score for o in searched]) > np.mean([o.score for o in alone])
    limit = judge.config.rollout.max_new_tokens
    for outcome in searched:
        assert len(outcome.tokens) <= limit and outcome.details["ended_traces"] >= 1
        assert outcome.generated <= 6 * limit


def test_guidance_raises_the_reward_of_one_trace(judge):
    rewards = [
        np.mean([o.score for o in Reweigh(n=2, beta=beta, top_k=20).solve(open_session(judge))]) for beta in (0.0, 1.0)
    ]
    assert rewards[1] > rewards[0]


def test_rejection_spends_less_and_still_answers_when_all_are_rejected(judge):
    full = BestOf(n=4).solve(open_session(judge))
    harsh = Reject(n=4, floor=1e9).solve(open_session(judge))
    for all_of, one in zip(full, harsh, strict=True):
        assert one.generated < all_of.generated
        assert one.details["revived"] == (one.details["stopped"] == 4)
    assert any(o.details["revived"] for o in harsh)
    limit = judge.config.rollout.max_new_tokens
    assert all(o.finished or len(o.tokens) == limit for o in harsh)  # the revived one is written to its end


def test_the_floor_by_hand():
    values = TokenValues(
        values=np.array([1.0, 3.0, -2.0, 4.0, 5.0, 7.0]),
        offsets=np.array([0, 4, 6]),
        step_ends=np.array([False, True, False, True, False, True]),
    )
    assert lowest_running(values, "min").tolist() == [1.0, 6.0]  # steps: (1+3)/2, (-2+4)/2; (5+7)/2
    assert lowest_running(values, "mean").tolist() == [1.5, 6.0]  # running: 2, 6/4; 6
    lowest = np.arange(100, dtype=float)
    assert floor_that_keeps(lowest, 0.95) == 5.0  # 0..4 lie below it
    assert floor_that_keeps(lowest, 1.0) == 0.0
    assert floor_that_keeps(lowest[::-1], 0.5) == 50.0


def test_a_revision_keeps_what_came_before_the_suspicious_step(judge):
    session = open_session(judge)
    outcomes = Revise(n=1, rounds=3, threshold=1e9).solve(session)
    drafts = plain(judge)
    scores = open_session(judge).score(drafts)
    for outcome, draft, score in zip(outcomes, drafts, scores, strict=True):
        revisions = outcome.details["revisions"]
        assert len(revisions) == 3  # every step lies below such a threshold
        kept = [r["score"] for r in revisions if r["kept"]]
        assert outcome.score == pytest.approx(max([score, *kept]), abs=1e-5)
        assert outcome.score >= score - 1e-6
        assert kept == sorted(set(kept))
        if not kept:
            assert outcome.tokens == draft.tokens


# ---- other tokenizers, contexts ----


def test_another_tokenizer_is_bridged_by_steps_and_refused_by_tokens():
    tokenizer = FORMATS["chatml"].tokenizer
    policy = dataclasses.replace(
        language_model("qwen2", vocab_size=len(tokenizer), tokenizer=tokenizer), num_tokens=len(tokenizer)
    )
    judge = open_judge(small_run(), policy=policy)
    with pytest.raises(UserError, match="another tokenizer; use --guided steps"):
        check_guidable(judge)
    session = open_session(judge, 2)
    session.params = dataclasses.replace(session.params, max_new_tokens=6)
    outcomes = Beam(beam=1, expand=2).solve(session)
    assert [len(outcome.tokens) for outcome in outcomes] == [6, 6]
    assert all(np.isfinite(outcome.score) for outcome in outcomes)


def test_a_prompt_that_does_not_fit_is_named(judge):
    session = open_session(judge, 1)
    params = dataclasses.replace(session.params, max_new_tokens=4000)
    with pytest.raises(UserError, match=r"test:0: the prompt's \d+ tokens and 4000 new ones exceed the policy's"):
        Session(judge, params, session.problems)


def test_steps_that_sentences_end_are_cut_where_no_word_can_move_the_cut(judge):
    ends = open_session(judge, 1)._ends
    assert ends("<think>\n1 + 2 = 3") == ()
    assert ends("<think>\n1 + 2 = 3\n") == (18,)
    assert ends("<think>\nIt is 3.") == ends("<think>\nIt is 3. ") == ()  # "3. of" would go on
    assert ends("<think>\nIt is 3. S") == (16,)
    assert ends("<think>\n1 + 2 = 3\n</think>\n") == (18,)  # tags alone are no step
