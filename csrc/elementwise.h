// What follows from a row's logit: rewards, losses and their slopes. The formulas are those of
// kernels/airl_kernels/token_head.py; float runs vectorised, double (for gradient checks) through libm.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace airl_kernels {

// exp(-|z|), within two units in the last place: 2^n·p(r), where p is the Taylor polynomial on |r| <= ln(2)/2.
AIRL_INLINE float exp_of_minus_abs(float z) {
  const float x = std::max(-std::abs(z), -87.0f);  // below, the result is denormal: 1.6e-38 for 0
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9841270e-4f;
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  static_assert(sizeof(power) == sizeof(exponent));
  __builtin_memcpy(&power, &exponent, sizeof(power));
  return z != z ? z : p * power;
}

AIRL_INLINE double exp_of_minus_abs(double z) { return std::exp(-std::abs(z)); }

// log(1 + e) for 0 <= e <= 1, by 2·atanh(e / (2 + e)), whose series in a square <= 1/9 ends after nine terms.
AIRL_INLINE float log1p_of(float e) {
  const float s = e / (2.0f + e), q = s * s;
  float p = 1.0f / 17;
  p = p * q + 1.0f / 15;
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  p = p * q + 1.0f;
  return 2.0f * s * p;
}

AIRL_INLINE double log1p_of(double e) { return std::log1p(e); }

// ---- bodies, for float and double ----

template <typename T>
AIRL_INLINE double bce_body(const T* z, const T* target, const T* weight, T* slope, int64_t n, T smoothing) {
  double loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t t = 0; t < n; ++t) {
    const T logit = z[t], w = weight[t], y = target[t] * (1 - smoothing) + smoothing / 2;
    const T e = exp_of_minus_abs(logit), small = log1p_of(e);
    // Everything is computed and then chosen, so that the loop has no branches. Products with a factor of 0 are
    // dropped: 0 · inf costs nothing.
    const T positive = y * (std::max(-logit, T(0)) + small), negative = (1 - y) * (std::max(logit, T(0)) + small);
    const T value = w * ((y > 0 ? positive : T(0)) + (y < 1 ? negative : T(0)));
    const T change = w * ((logit >= 0 ? T(1) : e) / (1 + e) - y);
    loss += static_cast<double>(w == 0 ? T(0) : value);
    slope[t] = w == 0 ? T(0) : change;
  }
  return loss;
}

template <typename T>
AIRL_INLINE double wgan_body(const T* z, const T* target, const T* weight, T* slope, int64_t n) {
  double loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t t = 0; t < n; ++t) {
    const T change = weight[t] * (1 - 2 * target[t]), value = change * z[t];
    slope[t] = change;
    loss += static_cast<double>(weight[t] == 0 ? T(0) : value);
  }
  return loss;
}

// sign = 1: softplus(x); sign = -1: -softplus(-x), the logarithm of the sigmoid.
template <typename T>
AIRL_INLINE void softplus_body(const T* z, T* to, int64_t n, T temperature, T sign) {
#pragma omp simd
  for (int64_t t = 0; t < n; ++t) {
    const T x = sign * (z[t] / temperature);
    to[t] = sign * (std::max(x, T(0)) + log1p_of(exp_of_minus_abs(x)));
  }
}

// Its slope: sigmoid(sign·x) / temperature, times the incoming gradient, 0 where the reward is clipped.
template <typename T>
AIRL_INLINE void softplus_slope_body(const T* z, const T* grad, T* to, int64_t n, T temperature, T sign, T bound) {
#pragma omp simd
  for (int64_t t = 0; t < n; ++t) {
    const T x = sign * (z[t] / temperature);
    const T e = exp_of_minus_abs(x);
    const T reward = std::max(x, T(0)) + log1p_of(e);
    const T sigmoid = (x >= 0 ? T(1) : e) / (1 + e);
    const T slope = grad[t] * (sigmoid / temperature);
    to[t] = reward <= bound ? slope : T(0);
  }
}

#define AIRL_CLONED(T)                                                                                              \
  AIRL_CLONES static double bce_of(const T* z, const T* y, const T* w, T* s, int64_t n, T eps) {                    \
    return bce_body(z, y, w, s, n, eps);                                                                            \
  }                                                                                                                 \
  AIRL_CLONES static double wgan_of(const T* z, const T* y, const T* w, T* s, int64_t n) {                          \
    return wgan_body(z, y, w, s, n);                                                                                \
  }                                                                                                                 \
  AIRL_CLONES static void softplus(const T* z, T* to, int64_t n, T temperature, T sign) {                           \
    softplus_body(z, to, n, temperature, sign);                                                                     \
  }                                                                                                                 \
  AIRL_CLONES static void softplus_slope(const T* z, const T* g, T* to, int64_t n, T temperature, T sign, T bound) { \
    softplus_slope_body(z, g, to, n, temperature, sign, bound);                                                     \
  }
AIRL_CLONED(float)
AIRL_CLONED(double)
#undef AIRL_CLONED

// ---- by name; the names are checked in Python ----

// Rewards of n logits; `to` may be `z`.
template <typename T>
void rewards_of(
    std::string_view kind, const T* z, T* to, int64_t n, double temperature, const std::optional<double>& clip) {
  if (kind == "logit") {
    for (int64_t t = 0; t < n; ++t) to[t] = z[t] / static_cast<T>(temperature);
  } else {
    softplus(z, to, n, static_cast<T>(temperature), T(kind == "gail" ? 1 : -1));
  }
  if (clip.has_value()) {
    const T bound = static_cast<T>(*clip);
    for (int64_t t = 0; t < n; ++t) to[t] = std::min(std::max(to[t], -bound), bound);
  }
}

// d reward / d z times the incoming gradient; `to` may be `z`.
template <typename T>
void reward_slopes(
    std::string_view kind, const T* z, const T* grad, T* to, int64_t n, double temperature,
    const std::optional<double>& clip) {
  const T scale = static_cast<T>(temperature);
  const T bound = clip.has_value() ? static_cast<T>(*clip) : std::numeric_limits<T>::infinity();
  if (kind == "logit") {
    for (int64_t t = 0; t < n; ++t) to[t] = std::abs(z[t] / scale) <= bound ? grad[t] / scale : T(0);
  } else {
    softplus_slope(z, grad, to, n, scale, T(kind == "gail" ? 1 : -1), bound);
  }
}

// Mean over pairs of softplus(margin - (s_expert - s_perturbed)), s a sequence's weighted mean logit, and its slope.
template <typename T>
double pairwise_of(
    const T* z, const T* weight, const int64_t* cu, const int64_t* pair, T* slope, int64_t sequences, double margin) {
  std::vector<double> score(sequences, 0), mass(sequences, 0), pull(sequences, 0);
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t t = cu[s]; t < cu[s + 1]; ++t) {
      mass[s] += weight[t];
      score[s] += double(weight[t]) * z[t];
    }
    if (mass[s] > 0) score[s] /= mass[s];
  }
  const auto counts = [&](int64_t s) { return pair[s] >= 0 && mass[s] > 0 && mass[pair[s]] > 0; };
  int64_t pairs = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    TORCH_CHECK_INDEX(pair[s] < sequences, "pairs must name one of the ", sequences, " sequences, got ", pair[s], ".");
    pairs += counts(s);
  }
  double loss = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    if (!counts(s)) continue;
    const double shortfall = margin - (score[pair[s]] - score[s]);
    loss += (std::max(shortfall, 0.0) + std::log1p(std::exp(-std::abs(shortfall)))) / pairs;
    const double strength = 1 / (1 + std::exp(-shortfall)) / pairs;
    pull[s] += strength;
    pull[pair[s]] -= strength;
  }
  for (int64_t s = 0; s < sequences; ++s) {
    const double share = mass[s] > 0 ? pull[s] / mass[s] : 0;
    for (int64_t t = cu[s]; t < cu[s + 1]; ++t) slope[t] = static_cast<T>(share * weight[t]);
  }
  return loss;
}

}  // namespace airl_kernels
