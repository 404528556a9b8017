"""From a logit to rewards, losses and their slopes, accurate where the obvious formula overflows or cancels."""

import triton
import triton.language as tl

# What a kernel makes of a logit: the losses first, then the kinds of reward.
BCE, WGAN = tl.constexpr(0), tl.constexpr(1)
REWARD_LOGIT, REWARD_GAIL, REWARD_LOGD = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
MODES = {"bce": 0, "wgan": 1, "logit": 2, "gail": 3, "logd": 4}


@triton.jit
def log1p(x):
    """log(1 + x) without the rounding of 1 + x (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


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
        # An infinite logit with a certain label costs 0, not 0 * inf.
        value = tl.where(y > 0.0, y * softplus(-z), 0.0) + tl.where(y < 1.0, (1.0 - y) * softplus(z), 0.0)
        slope = sigmoid(z) - y
    else:
        slope = 1.0 - 2.0 * target
        value = slope * z
    return value, slope
