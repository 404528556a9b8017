"""How rows are cut into chunks: all of them once, in order, as few and as equal as can be, none needlessly small."""

import math

import pytest
import torch
from airl_kernels import _chunking, linear_logprob
from airl_kernels._chunking import chunk_slices
from airl_kernels.testing import products
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.airl_kernels.cases import INTERPRETED


def sizes_of(num_rows: int, most: int, vocab: int = 7) -> list[int]:
    hidden, weight = torch.empty(num_rows, 1, device="meta"), torch.empty(vocab, 1, device="meta")
    parts = chunk_slices(hidden, weight, most, hidden.dtype.itemsize)
    assert [p.start for p in parts] == [0, *(p.stop for p in parts)][: len(parts)]
    assert (parts[-1].stop if parts else 0) == num_rows
    return [p.stop - p.start for p in parts]


def can_avoid_small_ones(num_rows: int, most: int) -> bool:
    """Some number of chunks has room for all rows, at least 4 and at most `most` in each."""
    return any(4 * count <= num_rows <= most * count for count in range(1, num_rows + 1))


@settings(max_examples=500, deadline=None)
@given(num_rows=st.integers(1, 5000), most=st.integers(1, 6000))
@example(num_rows=257, most=256)  # 256 and 1, if sizes were rounded up to whole tiles
@example(num_rows=5, most=4)
@example(num_rows=8, most=7)
@example(num_rows=400, most=200)
@example(num_rows=4097, most=1024)
@example(num_rows=129, most=128)
def test_any_rows_are_cut_well(num_rows, most):
    sizes = sizes_of(num_rows, most)
    assert len(sizes) == math.ceil(num_rows / most)
    assert most >= sizes[0] == max(sizes)  # the buffer of logits has the first one's size
    assert sizes[0] - sizes[-1] <= max(1, sizes[0] / 4)
    if min(sizes) < 4:
        assert not can_avoid_small_ones(num_rows, most)
        assert sizes[0] - sizes[-1] <= 1


@settings(max_examples=200, deadline=None)
@given(num_rows=st.integers(1024, 50_000), most=st.integers(1024, 9000))
def test_large_chunks_are_whole_tiles_and_near_equal(num_rows, most):
    sizes = sizes_of(num_rows, most)
    average = num_rows / len(sizes)
    assume(512 < average <= most - 128)
    assert all(abs(size - average) <= 128 for size in sizes)
    assert sum(size % 128 != 0 for size in sizes) <= 1


def test_no_rows_and_the_budget_of_the_device():
    assert sizes_of(0, 5) == []
    vocab = 151936
    most = _chunking.logits_budget(torch.device("cpu")) // (vocab * 4)
    hidden, weight = torch.empty(most + 1, 1), torch.empty(1, 1).expand(vocab, 1)
    parts = chunk_slices(hidden, weight, 0, hidden.dtype.itemsize)
    assert [p.stop - p.start for p in parts] == [(most + 2) // 2, (most + 1) // 2]  # not most and 1


@pytest.mark.skipif(INTERPRETED, reason="looks at the products of the torch loop, which is the same")
def test_the_products_have_these_rows():
    hidden, weight = torch.randn(9, 3), torch.randn(11, 3)
    seen = products(lambda: linear_logprob(hidden, weight, torch.zeros(9, dtype=torch.int64), chunk_rows=8))
    assert [shape[0] for shape in seen] == [5, 4]
