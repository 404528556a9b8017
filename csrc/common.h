// What the CPU kernels share. They override the plain-torch bodies of kernels/airl_kernels; the schemas, and what
// every argument means, are defined there.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>

// Compile a function for several instruction sets and pick at load time: the library may meet another processor
// than the one it was built on.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define AIRL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define AIRL_CLONES
#endif
// A body that takes on the instruction set of the clone it is inlined into.
#define AIRL_INLINE static inline __attribute__((always_inline))

namespace airl_kernels {

// cu_seqlens as int64, after checking that it runs from 0 to the number of tokens and never falls.
inline at::Tensor checked_offsets(const at::Tensor& cu_seqlens, int64_t num_tokens) {
  at::Tensor offsets = cu_seqlens.to(at::kLong).contiguous();
  const int64_t* cu = offsets.const_data_ptr<int64_t>();
  const int64_t last = offsets.numel() - 1;
  TORCH_CHECK_VALUE(
      cu[0] == 0 && cu[last] == num_tokens, "cu_seqlens must run from 0 to the number of tokens ", num_tokens,
      ", got ", cu[0], " to ", cu[last], ".");
  for (int64_t s = 0; s < last; ++s) TORCH_CHECK_VALUE(cu[s] <= cu[s + 1], "cu_seqlens must never decrease.");
  return offsets;
}

}  // namespace airl_kernels
