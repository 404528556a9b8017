// One row of a matrix at a time: dot products and scaled sums in the accumulation type.
#pragma once

#include <cstring>
#include <type_traits>

#include "common.h"

namespace airl_kernels {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A number of a row in the accumulation type; bfloat16 is the upper half of a float.
AIRL_INLINE float widened(float x) { return x; }
AIRL_INLINE double widened(double x) { return x; }
AIRL_INLINE float widened(c10::BFloat16 x) {
  const uint32_t wide = uint32_t(x.x) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Sums run in 32 lanes that are joined at the end: fast, and rounding errors stay small.
template <typename T, typename Acc>
AIRL_INLINE Acc dot_body(const T* a, const Acc* b, int64_t n) {
  constexpr int64_t kLanes = 32;
  Acc lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += widened(a[i + j]) * b[i + j];
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += widened(a[i + j]) * b[i + j];
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

template <typename T, typename Acc>
AIRL_INLINE void add_scaled_body(Acc s, const T* a, Acc* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += s * widened(a[i]);
}

#define AIRL_CLONED(T, Acc)                                                                            \
  AIRL_CLONES static Acc dot(const T* a, const Acc* b, int64_t n) { return dot_body(a, b, n); }        \
  AIRL_CLONES static void add_scaled(Acc s, const T* a, Acc* to, int64_t n) { add_scaled_body(s, a, to, n); }
AIRL_CLONED(float, float)
AIRL_CLONED(double, double)
AIRL_CLONED(c10::BFloat16, float)
#undef AIRL_CLONED

AIRL_CLONES static void scale(float s, const float* a, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = s * a[i];
}

AIRL_CLONES static void scale(double s, const double* a, double* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = s * a[i];
}

AIRL_CLONES static void widen(const c10::BFloat16* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = widened(from[i]);
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
    widen(from, buffer, width);
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
