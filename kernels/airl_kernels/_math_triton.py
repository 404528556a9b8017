"""From a logit to rewards, losses and their slopes, accurate where the obvious formula overflows or cancels."""

import triton
import triton.language as tl

# What a kernel makes of a logit: the losses first, then the kinds of reward.
BCE, WGAN = tl.constexpr(0), tl.constexpr(1)
REWARD_LOGIT, REWARD_GAIL, REWARD_LOGD = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
MODES = {"bce": 0, "wgan": 1, "logit": 2, "gail": 3, "logd": 4}


@triton.jit
def log1p(x):
    """log(1 + x) for x within 0 and 1: twice the series of atanh(x / (2 + x)), to fp32, in fewer steps than a log."""
    s = x / (2.0 + x)
    q = s * s
    series = q * 0.06666667 + 0.07692308  # Σ q^k / (2k + 1)
    series = series * q + 0.09090909
    series = series * q + 0.11111111
    series = series * q + 0.14285714
    series = series * q + 0.2
    series = series * q + 0.33333333
    return 2.0 * (s + s * q * series)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def reward_and_slope(z, temperature, clip, MODE: tl.constexpr):
    """(reward, d reward / d z)."""
    x = z / temperature
    if MODE == REWARD_LOGIT:
        reward, slope = x, x * 0.0 + 1.0
    elif MODE == REWARD_GAIL:
        reward, slope = softplus(x), sigmoid(x)
    else:
        reward, slope = -softplus(-x), sigmoid(-x)
    if clip is not None:
        slope = tl.where(tl.abs(reward) <= clip, slope, 0.0)
        reward = tl.minimum(tl.maximum(reward, -clip), clip)
    return reward, slope / temperature


@triton.jit
def loss_and_slope(z, target, smoothing, MODE: tl.constexpr):
    """(loss, d loss / d z) of one token before its weight."""
    if MODE == BCE:
        y = target * (1.0 - smoothing) + 0.5 * smoothing
        # One exponential and one logarithm serve softplus(-z), softplus(z) and the sigmoid: every thread of a row's
        # program computes all of this, so that it weighs as much as the row's own numbers.
        e = tl.exp(-tl.abs(z))
        tail = log1p(e)
        # An infinite logit with a certain label costs 0, not 0 * inf.
        positive = tl.where(y > 0.0, y * (tl.maximum(-z, 0.0) + tail), 0.0)
        value = positive + tl.where(y < 1.0, (1.0 - y) * (tl.maximum(z, 0.0) + tail), 0.0)
        slope = tl.where(z >= 0.0, 1.0, e) / (1.0 + e) - y
    else:
        slope = 1.0 - 2.0 * target
        value = slope * z
    return value, slope
