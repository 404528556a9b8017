// One row of a matrix at a time: dot products and scaled sums, in the accumulation type.
#pragma once

#include <cstring>
#include <type_traits>

#include "common.h"

namespace airl_kernels {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Sums run in 32 lanes that are joined at the end: fast, and rounding errors stay small.
template <typename T>
AIRL_INLINE T dot_body(const T* a, const T* b, int64_t n) {
  constexpr int64_t kLanes = 32;
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += a[i + j] * b[i + j];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

AIRL_CLONES static float dot(const float* a, const float* b, int64_t n) { return dot_body(a, b, n); }
AIRL_CLONES static double dot(const double* a, const double* b, int64_t n) { return dot_body(a, b, n); }

AIRL_CLONES static void scale(float s, const float* a, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = s * a[i];
}

AIRL_CLONES static void scale(double s, const double* a, double* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = s * a[i];
}

AIRL_CLONES static void add_scaled(float s, const float* a, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += s * a[i];
}

AIRL_CLONES static void add_scaled(double s, const double* a, double* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += s * a[i];
}

// bfloat16 is the upper half of a float.
AIRL_CLONES static void widen(const uint16_t* bits, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t wide = uint32_t(bits[i]) << 16;
    std::memcpy(&to[i], &wide, sizeof(wide));
  }
}

// Rounds to nearest, ties to even; NaN stays NaN.
AIRL_CLONES static void narrow(const float* from, uint16_t* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &from[i], sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

// Row `index` of a [*, width] matrix: where it lies, or widened into `buffer`.
template <typename T, typename Acc>
const Acc* row(const T* matrix, int64_t index, int64_t width, Acc* buffer) {
  const T* from = matrix + index * width;
  if constexpr (std::is_same_v<T, Acc>) {
    return from;
  } else {
    widen(reinterpret_cast<const uint16_t*>(from), buffer, width);
    return buffer;
  }
}

// to = s·a, rounded to T.
template <typename T, typename Acc>
void write_scaled(Acc s, const Acc* a, T* to, Acc* buffer, int64_t width) {
  if constexpr (std::is_same_v<T, Acc>) {
    scale(s, a, to, width);
  } else {
    scale(s, a, buffer, width);
    narrow(buffer, reinterpret_cast<uint16_t*>(to), width);
  }
}

}  // namespace airl_kernels
