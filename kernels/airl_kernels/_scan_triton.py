"""Triton kernels of returns and advantages. The mathematics is in `returns.py`.

All of it is the segmented recurrence y_t = x_t + a_t·y_{t±1}. Two ways to run it:
- one program a sequence, tile after tile with a carry, reading every number once while the next tiles are on their
  way (`_scan_kernel`); group statistics, when asked for, are recomputed by each program from the last tokens, so
  standardising costs no second launch;
- few long sequences do not fill a GPU that way. Their tiles are scanned independently into (product, sum) pairs
  (`_summary_kernel`), the pairs are scanned by one program (`_carry_kernel`), and a second pass over the tiles
  finishes (`_finish_kernel`): 12 bytes a token instead of 8, and every tile in parallel.

A tile is G lanes of eight neighbouring tokens, loaded as two quads [G, 4] of 16 bytes a lane, lanes and quads in the
order of the scan. So the scan runs forwards over lanes whichever way it runs in memory, and within a lane it is eight
steps on registers. (Triton's `reverse=True` exchanges every number with its mirror image, through ten shuffles each;
with fewer tokens a lane the kernel is bound by instructions, not by memory.) Tiles start at multiples of 4 tokens in
memory, so that all loads are whole; only a store at a sequence's ends is masked by token.
Offsets are int64, numbers float32. float64 inputs run the plain formula.
"""

import triton
import triton.language as tl

# What a kernel makes of its inputs; a is 1 on masked tokens, which therefore hand on what they receive.
DISCOUNT = 0  # x = reward, a = gamma
STANDARDISE = 1  # x = (reward - mean) * scale of the sequence's group, a = gamma
GAE = 2  # in: rewards, values; out: advantages, returns. See `_gae_terms`.
GAE_BACKWARD = 3  # in: d advantages, d returns; out: d rewards, d values; x = their sum, a = gamma * lambda


_COUNTS = ["num_tokens", "num_sequences", "num_tiles", "length"]  # change from step to step: compiled once for all


# ---- device functions ------------------------------------------------------------------------------------------


@triton.jit
def _apply(a, b, y):
    """b + a·y. A product that reached 0 forgets, infinities included."""
    return b + tl.where(a != 0.0, a * y, 0.0)


@triton.jit
def _then(a1, b1, a2, b2):
    """(a2, b2) after (a1, b1), as maps y -> b + a·y."""
    return a1 * a2, _apply(a2, b2, b1)


@triton.jit
def _in_order(x, REVERSE: tl.constexpr, G: tl.constexpr):
    """The columns of [G, 4] as the scan meets them, [G] each."""
    even, odd = tl.split(tl.reshape(x, [G, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return (x3, x2, x1, x0) if REVERSE else (x0, x1, x2, x3)


@triton.jit
def _in_place(x, REVERSE: tl.constexpr, G: tl.constexpr):
    """The inverse of `_in_order`."""
    x0, x1, x2, x3 = (x[3], x[2], x[1], x[0]) if REVERSE else x
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [G, 4])


@triton.jit
def _step(a, b, y, FORGETS: tl.constexpr):
    """One token: `_apply`, cheaper where factors of single tokens are known not to be 0."""
    return _apply(a, b, y) if FORGETS else b + a * y


@triton.jit
def _quad_map(a, b, REVERSE: tl.constexpr, G: tl.constexpr, FORGETS: tl.constexpr):
    """The maps of a quad's four tokens as one, [G]."""
    a, b = _in_order(a, REVERSE, G), _in_order(b, REVERSE, G)
    y = _step(a[1], b[1], b[0], FORGETS)
    y = _step(a[2], b[2], y, FORGETS)
    return a[0] * a[1] * a[2] * a[3], _step(a[3], b[3], y, FORGETS)


@triton.jit
def _follow(a, b, entry, REVERSE: tl.constexpr, G: tl.constexpr, FORGETS: tl.constexpr):
    """(y, z, leave) of a quad entered with `entry` [G]; z is the y that a token receives, leave [G] its last y."""
    a, b = _in_order(a, REVERSE, G), _in_order(b, REVERSE, G)
    y0 = _step(a[0], b[0], entry, FORGETS)
    y1 = _step(a[1], b[1], y0, FORGETS)
    y2 = _step(a[2], b[2], y1, FORGETS)
    y3 = _step(a[3], b[3], y2, FORGETS)
    return _in_place((y0, y1, y2, y3), REVERSE, G), _in_place((entry, y0, y1, y2), REVERSE, G), y3


@triton.jit
def _entries(totals, carry, G: tl.constexpr):
    """What each lane is entered with: what the lane before left, `carry` for the first."""
    lanes = tl.arange(0, G)
    return tl.where(lanes == 0, carry, tl.gather(totals, tl.maximum(lanes - 1, 0), 0))


@triton.jit
def _last(numbers, G: tl.constexpr):
    """[G] filled with the last of `numbers` [G]: a read, where a sum would take a reduction."""
    return tl.gather(numbers, tl.full([G], G - 1, tl.int32), 0)


@triton.jit
def _quad(which: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr):
    """[G, 1]: where in the tile the first or second quad of every lane starts, as the scan meets them."""
    lanes = tl.arange(0, G)
    return ((G - 1 - lanes if REVERSE else lanes) * 8 + (1 - which if REVERSE else which) * 4)[:, None]


@triton.jit
def _places(quad, first, stop, left):
    """(at, near, inside, rest) of a quad: its places in the tile, whether its lane has any token of the sequence
    and all of the tensor, whether a token is of the sequence, and whether the tensor ends in this tile."""
    at = quad + tl.arange(0, 4)[None, :]
    near = (quad + 3 >= first) & (quad < stop) & (quad + 3 < left)
    return at, near & (at >= 0), (at >= first) & (at < stop), left < 8 * quad.shape[0]


@triton.jit
def _read(pointer, base, at, near, inside, rest):
    """The quads at `base`, by whole lanes (`near`); at the end of the tensor (`rest`) the last few by themselves.

    The base is added to the pointer, a scalar, so that lanes carry 32-bit offsets.
    """
    found = tl.load(pointer + base + at, mask=near, other=0)
    if rest:
        found = tl.load(pointer + base + at, mask=inside, other=0)
    return found


@triton.jit
def _times(factor, x):
    return tl.where(factor != 0.0, factor * x, 0.0)


@triton.jit
def _terms(
    x, second, mask, base, at, near, inside, rest, mean, scale, gamma, lam, KIND: tl.constexpr
):  # fmt: skip
    """(a, b, valid, first input, second input) of a quad; outside the sequence (`inside` false) the identity (1, 0).

    GAE without a second scan for the value of the next valid token: with Z_t what token t is worth to the valid one
    before it, Z_t = γ·((1-λ)·V_t + λ·(r_t + Z_{t+1})), so b = γλ·r + γ(1-λ)·V and a = γλ. Then the return of t is
    r_t + Z_{t+1} and its advantage that less V_t.
    """
    b = _read(x, base, at, near, inside, rest)
    valid = inside
    if mask is not None:
        valid = inside & (_read(mask, base, at, near, inside, rest) != 0)
    one, two = b, b
    factor = gamma
    if KIND == 1:
        b = tl.where(scale != 0.0, (b - mean) * scale, 0.0)
    elif KIND >= 2:
        two = _read(second, base, at, near, inside, rest)
        factor = gamma * lam
        b = _times(factor, one) + _times(gamma * (1.0 - lam), two) if KIND == 2 else one + two
    return tl.where(valid, factor, 1.0), tl.where(valid, b, 0.0), valid, one, two


@triton.jit
def _store(out, second_out, base, at, inside, whole, y, z, valid, one, two, gamma, KIND: tl.constexpr):
    """What the kind of scan gives from y, the recurrence at the token, and z, that at the one before."""
    if KIND == 2:
        second = one + z
        first = second - two
    else:
        first = y
        second = two - y + _times(gamma, z)
    first, second = tl.where(valid, first, 0.0), tl.where(valid, second, 0.0)
    if whole:
        tl.store(out + base + at, first)
        if KIND >= 2:
            tl.store(second_out + base + at, second)
    else:
        tl.store(out + base + at, first, mask=inside)
        if KIND >= 2:
            tl.store(second_out + base + at, second, mask=inside)


@triton.jit
def _bounds(cu_seqlens, length, sequence):
    if cu_seqlens is None:
        start = sequence.to(tl.int64) * length
        end = start + length
    else:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    return start, end


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


@triton.jit(do_not_specialize=_COUNTS)
def _scan_kernel(
    x, second, mask, moments, cu_seqlens, group, out, second_out, num_tokens, num_sequences, length,
    gamma, lam, eps, min_std,
    KIND: tl.constexpr, REVERSE: tl.constexpr, MEAN_OF: tl.constexpr, FORGETS: tl.constexpr, G: tl.constexpr,
    BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a sequence. Without cu_seqlens all sequences have `length` tokens."""
    sequence = tl.program_id(0)
    start, end = _bounds(cu_seqlens, length, sequence)
    mean, scale = 0.0, 1.0
    if KIND == 1:
        mean, scale = _group_statistics(
            x, moments, cu_seqlens, group, sequence, num_sequences, eps, min_std, MEAN_OF, BLOCK_S
        )
    early, late = _quad(0, REVERSE, G), _quad(1, REVERSE, G)
    origin = start // 4 * 4
    tiles = tl.where(end > start, tl.cdiv(end - origin, 8 * G), 0).to(tl.int32)
    carry = tl.full([G], 0.0, tl.float32)
    for step in tl.range(0, tiles, num_stages=STAGES):
        base = tl.multiple_of(origin + (tiles - 1 - step if REVERSE else step) * (8 * G), 4)
        first, stop, left = (start - base).to(tl.int32), (end - base).to(tl.int32), num_tokens - base
        at0, near0, inside0, rest = _places(early, first, stop, left)
        at1, near1, inside1, rest = _places(late, first, stop, left)
        a0, b0, valid0, one0, two0 = _terms(
            x, second, mask, base, at0, near0, inside0, rest, mean, scale, gamma, lam, KIND
        )
        a1, b1, valid1, one1, two1 = _terms(
            x, second, mask, base, at1, near1, inside1, rest, mean, scale, gamma, lam, KIND
        )
        lane_a, lane_b = _then(*_quad_map(a0, b0, REVERSE, G, FORGETS), *_quad_map(a1, b1, REVERSE, G, FORGETS))
        lane_a, lane_b = tl.associative_scan((lane_a, lane_b), 0, _then)
        totals = _apply(lane_a, lane_b, carry)
        y0, z0, middle = _follow(a0, b0, _entries(totals, carry, G), REVERSE, G, FORGETS)
        y1, z1, _ = _follow(a1, b1, middle, REVERSE, G, FORGETS)
        carry = _last(totals, G)
        whole = (base >= start) & (base + 8 * G <= end)
        _store(out, second_out, base, at0, inside0, whole, y0, z0, valid0, one0, two0, gamma, KIND)
        _store(out, second_out, base, at1, inside1, whole, y1, z1, valid1, one1, two1, gamma, KIND)


@triton.jit(do_not_specialize=_COUNTS)
def _moments_kernel(rewards, cu_seqlens, moments, num_sequences, BLOCK: tl.constexpr):
    """Mean, sum of squared deviations, least and greatest reward of every sequence."""
    sequence = tl.program_id(0)
    start, end = _bounds(cu_seqlens, 0, sequence)
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
def _terms_across(
    x, second, mask, starts, num_tokens, base, quad, gamma, lam, KIND: tl.constexpr, REVERSE: tl.constexpr
):
    """`_terms` of a quad where sequences may meet: nothing is handed on from one to the next.

    Adds `fresh` (whether a token is the first that the scan meets of its sequence), `at` and `inside`.
    """
    at, near, inside, rest = _places(quad, 0, tl.minimum(num_tokens - base, 1 << 30).to(tl.int32), num_tokens - base)
    a, b, valid, one, two = _terms(x, second, mask, base, at, near, inside, rest, 0.0, 1.0, gamma, lam, KIND)
    fresh = inside & (tl.load(starts + base + at + (1 if REVERSE else 0), mask=inside, other=0) != 0)
    return tl.where(fresh, 0.0, a), b, valid, one, two, fresh, at, inside


@triton.jit(do_not_specialize=_COUNTS)
def _summary_kernel(
    x, second, mask, starts, products, sums, num_tokens, gamma, lam,
    KIND: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The whole tile as one map y -> sum + product·y, kept in the order of the scan."""
    tile = tl.program_id(0)
    base = tile.to(tl.int64) * (8 * G)
    a0, b0, _, _, _, _, _, _ = _terms_across(
        x, second, mask, starts, num_tokens, base, _quad(0, REVERSE, G), gamma, lam, KIND, REVERSE
    )
    a1, b1, _, _, _, _, _, _ = _terms_across(
        x, second, mask, starts, num_tokens, base, _quad(1, REVERSE, G), gamma, lam, KIND, REVERSE
    )
    lane_a, lane_b = _then(*_quad_map(a0, b0, REVERSE, G, True), *_quad_map(a1, b1, REVERSE, G, True))
    lane_a, lane_b = tl.associative_scan((lane_a, lane_b), 0, _then)
    place = tl.num_programs(0) - 1 - tile if REVERSE else tile
    last = tl.arange(0, G) == G - 1
    tl.store(products + place, tl.sum(tl.where(last, lane_a, 0.0)))
    tl.store(sums + place, tl.sum(tl.where(last, lane_b, 0.0)))


@triton.jit(do_not_specialize=_COUNTS)
def _carry_kernel(products, sums, carries, num_tiles, BLOCK: tl.constexpr):
    """The recurrence over tiles, by one program: carries[i] is y where the scan leaves its i-th tile."""
    carry = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, num_tiles, BLOCK):
        at = first + tl.arange(0, BLOCK)
        a = tl.load(products + at, mask=at < num_tiles, other=1.0)
        b = tl.load(sums + at, mask=at < num_tiles, other=0.0)
        a, b = tl.associative_scan((a, b), 0, _then)
        y = _apply(a, b, carry)
        tl.store(carries + at, y, mask=at < num_tiles)
        carry = _last(y, BLOCK)


@triton.jit(do_not_specialize=_COUNTS)
def _finish_kernel(
    x, second, mask, starts, carries, out, second_out, num_tokens, gamma, lam,
    KIND: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The second pass over the tiles, last summarised first: what the caches still hold is read first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    base = tile.to(tl.int64) * (8 * G)
    a0, b0, valid0, one0, two0, fresh0, at0, inside0 = _terms_across(
        x, second, mask, starts, num_tokens, base, _quad(0, REVERSE, G), gamma, lam, KIND, REVERSE
    )
    a1, b1, valid1, one1, two1, fresh1, at1, inside1 = _terms_across(
        x, second, mask, starts, num_tokens, base, _quad(1, REVERSE, G), gamma, lam, KIND, REVERSE
    )
    place = tl.program_id(0) if REVERSE else tile
    carry = tl.load(carries + place - 1, mask=place > 0, other=0.0)
    lane_a, lane_b = _then(*_quad_map(a0, b0, REVERSE, G, True), *_quad_map(a1, b1, REVERSE, G, True))
    lane_a, lane_b = tl.associative_scan((lane_a, lane_b), 0, _then)
    entry = _entries(_apply(lane_a, lane_b, carry), carry, G)
    y0, z0, middle = _follow(a0, b0, entry, REVERSE, G, True)
    y1, z1, _ = _follow(a1, b1, middle, REVERSE, G, True)
    z0, z1 = tl.where(fresh0, 0.0, z0), tl.where(fresh1, 0.0, z1)
    whole = base + 8 * G <= num_tokens
    _store(out, second_out, base, at0, inside0, whole, y0, z0, valid0, one0, two0, gamma, KIND)
    _store(out, second_out, base, at1, inside1, whole, y1, z1, valid1, one1, two1, gamma, KIND)
