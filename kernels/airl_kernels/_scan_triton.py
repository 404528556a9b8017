"""Triton kernels of returns and advantages. The mathematics is in `returns.py`.

All of it is the segmented recurrence y_t = x_t + a_t·y_{t±1}, scanned by `tl.associative_scan` a block at a time with
a carry between blocks. Two ways to run it:
- one program a sequence, block after block, reading every reward once (`_scan_kernel`); group statistics, when
  asked for, are recomputed by each program from the last tokens, so standardising costs no second launch;
- few long sequences do not fill a GPU that way. Their blocks are scanned independently into (product, sum) pairs
  (`_summary_kernel`), the pairs are scanned by one program (`_carry_kernel`), and a second pass over the blocks
  finishes (`_finish_kernel`): 12 bytes a token instead of 8, and every block in parallel.
Blocks lie at multiples of their size in memory, so that a block inside a sequence moves in 16-byte loads; only the
blocks at a sequence's ends are masked. Offsets are int64, numbers float32. float64 inputs run the plain formula.
"""

import triton
import triton.language as tl

# What a kernel takes for x_t and a_t.
DISCOUNT = 0  # x = reward, a = gamma on valid tokens, 1 on masked ones
HOLD = 1  # x = value on valid tokens, a = 0 there and 1 on masked ones: the value of the nearest valid token
STANDARDISE = 2  # x = (reward - mean) * scale of the sequence's group, a = gamma
TD_ERROR = 3  # x = reward + gamma * following - value, a = gamma * lambda; also writes y + value


# ---- device functions ------------------------------------------------------------------------------------------


@triton.jit
def _then(a1, b1, a2, b2):
    """(a2, b2) after (a1, b1), as maps y -> b + a·y. A product that reached 0 forgets, infinities included."""
    return a1 * a2, b2 + tl.where(a2 != 0.0, a2 * b1, 0.0)


@triton.jit
def _terms(
    x, values, following, mask, base, lane, inside, has_next, mean, scale, gamma, lam,
    KIND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(a, b, valid) at positions base + lane; outside the sequence (`inside` false) the identity (1, 0).

    has_next: whether the next position belongs to the same sequence. The base is added to the pointers, a scalar,
    so that lanes carry 32-bit offsets.
    """
    b = tl.load(x + base + lane, mask=inside, other=0.0) if MASKED else tl.load(x + base + lane)
    valid = inside
    if mask is not None:
        if MASKED:
            valid = inside & (tl.load(mask + base + lane, mask=inside, other=0) != 0)
        else:
            valid = tl.load(mask + base + lane) != 0
    factor = gamma
    if KIND == 1:
        factor = 0.0
    elif KIND == 2:
        b = tl.where(scale != 0.0, (b - mean) * scale, 0.0)
    elif KIND == 3:
        next_value = tl.load(following + base + 1 + lane, mask=inside & has_next, other=0.0)
        b = b + gamma * next_value - tl.load(values + base + lane, mask=inside, other=0.0)
        factor = gamma * lam
    return tl.where(valid, factor, 1.0), tl.where(valid, b, 0.0), valid


@triton.jit
def _store(y, valid, values, mask, out, out_returns, base, lane, inside, KIND: tl.constexpr, MASKED: tl.constexpr):
    result = y
    if mask is not None and KIND != 1:  # HOLD is read at masked positions
        result = tl.where(valid, y, 0.0)
    if MASKED:
        tl.store(out + base + lane, result, mask=inside)
    else:
        tl.store(out + base + lane, result)
    if KIND == 3:
        value = tl.load(values + base + lane, mask=inside, other=0.0)
        tl.store(out_returns + base + lane, tl.where(valid, y + value, 0.0), mask=inside)


@triton.jit
def _scan_block(
    x, values, following, mask, out, out_returns, base, start, end, carry, mean, scale, gamma, lam,
    KIND: tl.constexpr, REVERSE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scan [base, base + BLOCK) within [start, end), store, and return the carry for the block that comes after."""
    lane = tl.arange(0, BLOCK)
    first, stop = (start - base).to(tl.int32), (end - base).to(tl.int32)
    inside = (lane >= first) & (lane < stop)
    a, b, valid = _terms(
        x, values, following, mask, base, lane, inside, lane + 1 < stop, mean, scale, gamma, lam, KIND, MASKED
    )
    a, b = tl.associative_scan((a, b), 0, _then, reverse=REVERSE)
    y = b + tl.where(a != 0.0, a * carry, 0.0)
    _store(y, valid, values, mask, out, out_returns, base, lane, inside, KIND, MASKED)
    return tl.sum(tl.where(lane == (0 if REVERSE else BLOCK - 1), y, 0.0))


@triton.jit
def _sequence(cu_seqlens, sequence):
    return tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)


@triton.jit
def _samples(rewards, moments, cu_seqlens, group, me, mine, others, num_sequences, MEAN_OF: tl.constexpr):
    """What sequences `others` hold of my group's samples: (count, mean, squares, low, high), nothing elsewhere."""
    ok = others < num_sequences
    begin = tl.load(cu_seqlens + others, mask=ok, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + others + 1, mask=ok, other=0).to(tl.int64)
    counts = ok & (end > begin) & (tl.load(group + others, mask=ok, other=0) == mine)
    if MEAN_OF == 2:
        counts = counts & (others != me)
    if MEAN_OF == 1:
        middle = tl.load(moments + others, mask=counts, other=0.0)
        squares = tl.load(moments + num_sequences + others, mask=counts, other=0.0)
        low = tl.load(moments + 2 * num_sequences + others, mask=counts, other=float("inf"))
        high = tl.load(moments + 3 * num_sequences + others, mask=counts, other=float("-inf"))
        return tl.where(counts, (end - begin).to(tl.float32), 0.0), middle, squares, low, high
    last = tl.load(rewards + end - 1, mask=counts, other=0.0)
    low = tl.where(counts, last, float("inf"))
    high = tl.where(counts, last, float("-inf"))
    return tl.where(counts, 1.0, 0.0), last, last * 0.0, low, high


@triton.jit
def _group_statistics(
    rewards, moments, cu_seqlens, group, me, num_sequences, eps, min_std, MEAN_OF: tl.constexpr, BLOCK_S: tl.constexpr
):
    """(mean, scale) of my group. Two passes, mean then squares: one pass would cancel for rewards far from 0."""
    mine = tl.load(group + me)
    lanes = tl.arange(0, BLOCK_S)
    count_parts = tl.zeros([BLOCK_S], dtype=tl.float32)
    sum_parts = tl.zeros([BLOCK_S], dtype=tl.float32)
    lows = tl.full([BLOCK_S], float("inf"), tl.float32)
    highs = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for first in range(0, num_sequences, BLOCK_S):
        n, middle, _, low, high = _samples(
            rewards, moments, cu_seqlens, group, me, mine, first + lanes, num_sequences, MEAN_OF
        )
        count_parts += n
        sum_parts += n * middle
        lows = tl.minimum(lows, low)
        highs = tl.maximum(highs, high)
    count = tl.sum(count_parts)
    mean = tl.sum(sum_parts) / tl.maximum(count, 1.0)
    if MEAN_OF == 2:
        return mean, tl.where(count > 0.0, 1.0, 0.0)
    square_parts = tl.zeros([BLOCK_S], dtype=tl.float32)
    for first in range(0, num_sequences, BLOCK_S):
        n, middle, squares, _, _ = _samples(
            rewards, moments, cu_seqlens, group, me, mine, first + lanes, num_sequences, MEAN_OF
        )
        square_parts += tl.where(n > 0.0, squares + n * (middle - mean) * (middle - mean), 0.0)
    std = tl.sqrt(tl.sum(square_parts) / tl.maximum(count - 1.0, 1.0))
    differ = (tl.min(lows) != tl.max(highs)) | (min_std > 0.0)
    return mean, tl.where((count > 1.0) & differ, 1.0 / (tl.maximum(std, min_std) + eps), 0.0)


# ---- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _scan_kernel(
    x, values, following, mask, moments, cu_seqlens, group, out, out_returns, num_sequences, gamma, lam, eps, min_std,
    KIND: tl.constexpr, REVERSE: tl.constexpr, MEAN_OF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program a sequence."""
    sequence = tl.program_id(0)
    start, end = _sequence(cu_seqlens, sequence)
    mean, scale = 0.0, 1.0
    if KIND == 2:
        mean, scale = _group_statistics(
            x, moments, cu_seqlens, group, sequence, num_sequences, eps, min_std, MEAN_OF, BLOCK_S
        )
    first = start // BLOCK
    blocks = tl.where(end > start, (end - 1) // BLOCK - first + 1, 0)
    carry = 0.0
    for step in range(blocks):
        base = (first + (blocks - 1 - step if REVERSE else step)) * BLOCK
        if (base >= start) & (base + BLOCK <= end):
            carry = _scan_block(
                x, values, following, mask, out, out_returns, base, start, end, carry, mean, scale, gamma, lam,
                KIND, REVERSE, False, BLOCK,
            )  # fmt: skip
        else:
            carry = _scan_block(
                x, values, following, mask, out, out_returns, base, start, end, carry, mean, scale, gamma, lam,
                KIND, REVERSE, True, BLOCK,
            )  # fmt: skip


@triton.jit
def _moments_kernel(rewards, cu_seqlens, moments, num_sequences, BLOCK: tl.constexpr):
    """Mean, sum of squared deviations, least and greatest reward of every sequence."""
    sequence = tl.program_id(0)
    start, end = _sequence(cu_seqlens, sequence)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    lows = tl.full([BLOCK], float("inf"), tl.float32)
    highs = tl.full([BLOCK], float("-inf"), tl.float32)
    for base in range(start, end, BLOCK):
        inside = base + lane < end
        r = tl.load(rewards + base + lane, mask=inside, other=0.0)
        sums += r
        lows = tl.minimum(lows, tl.where(inside, r, float("inf")))
        highs = tl.maximum(highs, tl.where(inside, r, float("-inf")))
    mean = tl.sum(sums) / tl.maximum(end - start, 1).to(tl.float32)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for base in range(start, end, BLOCK):
        inside = base + lane < end
        deviation = tl.load(rewards + base + lane, mask=inside, other=0.0) - mean
        squares += tl.where(inside, deviation * deviation, 0.0)
    tl.store(moments + sequence, mean)
    tl.store(moments + num_sequences + sequence, tl.sum(squares))
    tl.store(moments + 2 * num_sequences + sequence, tl.min(lows))
    tl.store(moments + 3 * num_sequences + sequence, tl.max(highs))


@triton.jit
def _scan_across(
    x, values, following, mask, starts, base, lane, inside, gamma, lam,
    KIND: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Scan a block that may hold several sequences: the factor is 0 where the scan enters a sequence."""
    has_next = tl.load(starts + base + 1 + lane, mask=inside, other=1) == 0
    a, b, valid = _terms(x, values, following, mask, base, lane, inside, has_next, 0.0, 1.0, gamma, lam, KIND, True)
    if REVERSE:
        a = tl.where(inside & (has_next == 0), 0.0, a)
    else:
        a = tl.where(tl.load(starts + base + lane, mask=inside, other=0) != 0, 0.0, a)
    a, b = tl.associative_scan((a, b), 0, _then, reverse=REVERSE)
    return a, b, valid


@triton.jit
def _summary_kernel(
    x, values, following, mask, starts, products, sums, num_tokens, gamma, lam,
    KIND: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole block as one map y -> sum + product·y."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    base = block.to(tl.int64) * BLOCK
    inside = lane < num_tokens - base
    a, b, _ = _scan_across(x, values, following, mask, starts, base, lane, inside, gamma, lam, KIND, REVERSE)
    last = lane == (0 if REVERSE else BLOCK - 1)
    tl.store(products + block, tl.sum(tl.where(last, a, 0.0)))
    tl.store(sums + block, tl.sum(tl.where(last, b, 0.0)))


@triton.jit
def _carry_kernel(products, sums, carries, num_blocks, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """The recurrence over blocks, by one program: carries[block] is y where the scan leaves the block."""
    lane = tl.arange(0, BLOCK)
    rounds = tl.cdiv(num_blocks, BLOCK)
    carry = 0.0
    for step in range(rounds):
        at = (rounds - 1 - step if REVERSE else step) * BLOCK + lane
        inside = at < num_blocks
        a = tl.load(products + at, mask=inside, other=1.0)
        b = tl.load(sums + at, mask=inside, other=0.0)
        a, b = tl.associative_scan((a, b), 0, _then, reverse=REVERSE)
        y = b + tl.where(a != 0.0, a * carry, 0.0)
        tl.store(carries + at, y, mask=inside)
        carry = tl.sum(tl.where(lane == (0 if REVERSE else BLOCK - 1), y, 0.0))


@triton.jit
def _finish_kernel(
    x, values, following, mask, starts, carries, out, out_returns, num_tokens, num_blocks, gamma, lam,
    KIND: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second pass over the blocks, last summarised first: what the caches still hold is read first."""
    block = num_blocks - 1 - tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    base = block.to(tl.int64) * BLOCK
    inside = lane < num_tokens - base
    a, b, valid = _scan_across(x, values, following, mask, starts, base, lane, inside, gamma, lam, KIND, REVERSE)
    before = block + 1 if REVERSE else block - 1
    carry = tl.load(carries + before, mask=(before >= 0) & (before < num_blocks), other=0.0)
    y = b + tl.where(a != 0.0, a * carry, 0.0)
    _store(y, valid, values, mask, out, out_returns, base, lane, inside, KIND, True)


@triton.jit
def _value_gradient_kernel(d_errors, held, d_returns, mask, starts, d_values, num_tokens, gamma, BLOCK: tl.constexpr):
    """d V_t = d returns_t - e_t + gamma * e of the previous valid token."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_tokens
    inner = inside & (tl.load(starts + at, mask=inside, other=1) == 0)
    previous = tl.load(held + at - 1, mask=inner, other=0.0)
    error = tl.load(d_errors + at, mask=inside, other=0.0)
    gradient = tl.load(d_returns + at, mask=inside, other=0.0) - error + gamma * previous
    if mask is not None:
        gradient = tl.where(tl.load(mask + at, mask=inside, other=0) != 0, gradient, 0.0)
    tl.store(d_values + at, gradient, mask=inside)
