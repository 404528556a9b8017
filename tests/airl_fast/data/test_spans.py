"""Rewards between tokenisations: by hand, as an identity, and against a plain sum over characters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from airl_fast.data.spans import SpanMap, concat_span_maps, map_rewards, span_map


def spans_of(widths):
    ends = torch.tensor(widths).cumsum(0).tolist()
    return [(end - width, end) for width, end in zip(widths, ends, strict=True)]


def cut(total):
    """Random tokenisations of `total` characters, closed by an end-of-turn token."""
    points = st.sets(st.integers(1, total - 1)) if total > 1 else st.just(set())
    return points.map(lambda p: [*zip([0, *sorted(p)], [*sorted(p), total], strict=True), (total, total)])


def test_worked_by_hand():
    # "ab|cd|e" -> "abc|de": the first takes ab and c (2:1), the second d and e (1:1), end-of-turn its own.
    mapping = span_map([(0, 2), (2, 4), (4, 5), (5, 5)], [(0, 3), (3, 5), (5, 5)])
    rewards = torch.tensor([3.0, 9.0, -1.0, 7.0])
    assert map_rewards(rewards, mapping, 3).tolist() == pytest.approx([5.0, 4.0, 7.0])


@given(st.integers(1, 30).flatmap(cut), st.randoms(use_true_random=False))
def test_equal_tokenisations_are_the_identity_bit_for_bit(spans, rng):
    rewards = torch.tensor([rng.uniform(-30, 30) for _ in spans])
    assert torch.equal(map_rewards(rewards, span_map(spans, spans), len(spans)), rewards)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(cut(n), cut(n))), st.randoms(use_true_random=False))
def test_each_token_gets_the_mean_over_its_characters(both, rng):
    src, dst = both
    rewards = [rng.uniform(-30, 30) for _ in src]
    by_character = [reward for reward, (start, end) in zip(rewards, src, strict=True) for _ in range(start, end)]
    expected = [sum(by_character[a:b]) / (b - a) for a, b in dst[:-1]] + [rewards[-1]]
    mapped = map_rewards(torch.tensor(rewards), span_map(src, dst), len(dst))
    assert mapped.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(cut(n), cut(n))))
def test_a_constant_reward_stays_constant(both):
    src, dst = both
    mapped = map_rewards(torch.full((len(src),), -2.5), span_map(src, dst), len(dst))
    assert mapped.tolist() == pytest.approx([-2.5] * len(dst), rel=1e-6)


def test_end_of_turn_without_a_partner_takes_the_last_token():
    mapping = span_map([(0, 2), (2, 3)], [(0, 3), (3, 3)])
    assert map_rewards(torch.tensor([1.0, 4.0]), mapping, 2).tolist() == pytest.approx([2.0, 4.0])


def test_several_empty_tokens_pair_in_order():
    src, dst = [(0, 1), (1, 1), (1, 1), (1, 2)], [(0, 0), (0, 1), (1, 1), (1, 1), (1, 1), (1, 2)]
    mapped = map_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), span_map(src, dst), 6)
    assert mapped.tolist() == [1.0, 1.0, 2.0, 3.0, 3.0, 4.0]


def test_tokens_that_share_a_character_share_its_reward():
    # One three-byte character as three byte tokens, read as one token.
    mapping = span_map([(0, 1)] * 3 + [(1, 2)], [(0, 1), (1, 2)])
    assert map_rewards(torch.tensor([3.0, 6.0, 9.0, 1.0]), mapping, 2).tolist() == pytest.approx([6.0, 1.0])
    back = span_map([(0, 1), (1, 2)], [(0, 1)] * 3 + [(1, 2)])
    assert map_rewards(torch.tensor([6.0, 1.0]), back, 4).tolist() == [6.0, 6.0, 6.0, 1.0]


def test_packed_sequences_equal_each_alone():
    pairs = [([2, 1, 0], [1, 2, 0]), ([3], [1, 1, 1]), ([1, 4, 0], [5, 0])]
    maps = [span_map(spans_of(a), spans_of(b)) for a, b in pairs]
    rewards = [torch.randn(len(a)) for a, _ in pairs]
    packed = concat_span_maps(maps, [len(a) for a, _ in pairs], [len(b) for _, b in pairs])
    alone = torch.cat([map_rewards(r, m, len(b)) for r, m, (_, b) in zip(rewards, maps, pairs, strict=True)])
    assert torch.equal(map_rewards(torch.cat(rewards), packed, len(alone)), alone)


def test_empty_and_dtypes():
    empty = span_map([], [])
    assert map_rewards(torch.zeros(0), empty, 0).shape == (0,)
    with pytest.raises(ValueError, match="no source tokens"):
        span_map([], [(0, 1)])
    with pytest.raises(ValueError, match="one entry per sequence"):
        concat_span_maps([empty], [0, 0], [0])
    mapping = span_map([(0, 1), (1, 3)], [(0, 2), (2, 3)])
    assert isinstance(mapping, SpanMap)
    assert (mapping.dst.dtype, mapping.src.dtype, mapping.weight.dtype) == (torch.int64, torch.int64, torch.float32)
    assert map_rewards(torch.zeros(2, dtype=torch.bfloat16), mapping, 2).dtype == torch.bfloat16
    assert concat_span_maps([], [], []).dst.dtype == torch.int64
