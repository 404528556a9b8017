// CPU kernels of returns and advantages: the recurrences of kernels/airl_kernels/returns.py, one pass a sequence.
// The running value is kept in double, whatever the tensors hold.

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>
#include <vector>

#include "common.h"

namespace airl_kernels {
namespace {

// Calls body(begin, end) for every sequence; sequences are spread over threads by tokens.
template <typename Body>
void for_each_sequence(const at::Tensor& offsets, const Body& body) {
  const int64_t* cu = offsets.const_data_ptr<int64_t>();
  const int64_t sequences = offsets.numel() - 1;
  const int64_t average = cu[sequences] / std::max<int64_t>(sequences, 1);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(average, 1));
  at::parallel_for(0, sequences, grain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) body(cu[s], cu[s + 1]);
  });
}

// Offsets of the sequences: given and checked, or those of the rows of [B, T].
at::Tensor offsets_of(const at::Tensor& tokens, const std::optional<at::Tensor>& cu_seqlens) {
  if (cu_seqlens.has_value()) return checked_offsets(*cu_seqlens, tokens.numel());
  return at::arange(tokens.size(0) + 1, at::kLong) * tokens.size(1);
}

const bool* mask_pointer(const std::optional<at::Tensor>& mask) {
  return mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional<at::Tensor>(tensor->contiguous()) : std::nullopt;
}

// y_t = x_t + gamma·y of the next valid token; masked tokens give 0 and are skipped. Forwards for the adjoint.
template <typename T>
void scan(const T* x, const bool* mask, T* y, int64_t begin, int64_t end, double gamma, bool forwards) {
  double carry = 0;
  const int64_t step = forwards ? 1 : -1;
  for (int64_t t = forwards ? begin : end - 1, left = end - begin; left > 0; --left, t += step) {
    if (mask && !mask[t]) {
      y[t] = 0;
      continue;
    }
    // gamma = 0 forgets the past even when it was infinite.
    carry = gamma == 0 ? double(x[t]) : double(x[t]) + gamma * carry;
    y[t] = static_cast<T>(carry);
  }
}

at::Tensor discounted_returns(
    const at::Tensor& rewards, const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& mask,
    double gamma, bool adjoint) {
  const at::Tensor offsets = offsets_of(rewards, cu_seqlens);
  const at::Tensor x = rewards.contiguous();
  const auto valid = contiguous(mask);
  at::Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "discounted_returns", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    const bool* keep = mask_pointer(valid);
    for_each_sequence(offsets, [&](int64_t begin, int64_t end) { scan(from, keep, to, begin, end, gamma, adjoint); });
  });
  return y;
}

// What one group's samples add up to. Two passes: a sum of squares would cancel for rewards far from 0.
struct Group {
  double count = 0, sum = 0, squares = 0;
  double low = std::numeric_limits<double>::infinity(), high = -std::numeric_limits<double>::infinity();

  double mean() const { return sum / std::max(count, 1.0); }
  void add(double value) {
    count += 1;
    sum += value;
    low = std::min(low, value);
    high = std::max(high, value);
  }
};

template <typename T>
void standardised_returns(
    const T* r, const int64_t* cu, const int64_t* labels, int64_t sequences, double gamma, std::string_view baseline,
    double eps, double min_std, T* y) {
  const bool all_tokens = baseline == "all_tokens";
  const bool leave_one_out = baseline == "leave_one_out";
  std::unordered_map<int64_t, int64_t> slots;
  std::vector<int64_t> slot(sequences);
  std::vector<Group> groups;
  for (int64_t s = 0; s < sequences; ++s) {
    slot[s] = slots.try_emplace(labels[s], static_cast<int64_t>(slots.size())).first->second;
  }
  groups.resize(slots.size());
  const auto for_each_sample = [&](const auto& body) {
    for (int64_t s = 0; s < sequences; ++s) {
      if (cu[s] == cu[s + 1]) continue;
      for (int64_t t = all_tokens ? cu[s] : cu[s + 1] - 1; t < cu[s + 1]; ++t) body(groups[slot[s]], double(r[t]));
    }
  };
  for_each_sample([](Group& group, double value) { group.add(value); });
  for_each_sample([](Group& group, double value) {
    const double deviation = value - group.mean();
    group.squares += deviation * deviation;
  });
  for (int64_t s = 0; s < sequences; ++s) {
    const Group& group = groups[slot[s]];
    if (cu[s] == cu[s + 1]) continue;
    double mean = group.mean(), scale = 0;
    if (group.count > 1 && leave_one_out) {
      // Summed anew without the sequence itself: subtracting it from the sum would lose digits.
      mean = 0;
      for (int64_t o = 0; o < sequences; ++o) {
        if (o != s && slot[o] == slot[s] && cu[o] < cu[o + 1]) mean += r[cu[o + 1] - 1];
      }
      mean /= group.count - 1;
      scale = 1;
    } else if (group.count > 1 && (group.low != group.high || min_std > 0)) {
      scale = 1 / (std::max(std::sqrt(group.squares / (group.count - 1)), min_std) + eps);
    }
    double carry = 0;
    for (int64_t t = cu[s + 1] - 1; t >= cu[s]; --t) {
      const double x = scale == 0 ? 0 : (r[t] - mean) * scale;
      carry = gamma == 0 ? x : x + gamma * carry;
      y[t] = static_cast<T>(carry);
    }
  }
}

at::Tensor group_advantages(
    const at::Tensor& rewards, const at::Tensor& cu_seqlens, const at::Tensor& group, double gamma,
    std::string_view baseline, double eps, double min_std) {
  const at::Tensor offsets = checked_offsets(cu_seqlens, rewards.numel());
  const at::Tensor r = rewards.contiguous(), labels = group.contiguous();
  TORCH_CHECK(labels.numel() == offsets.numel() - 1, "group must have one entry a sequence");
  at::Tensor y = at::empty_like(r);
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "group_advantages", [&] {
    standardised_returns(
        r.const_data_ptr<scalar_t>(), offsets.const_data_ptr<int64_t>(), labels.const_data_ptr<int64_t>(),
        labels.numel(), gamma, baseline, eps, min_std, y.mutable_data_ptr<scalar_t>());
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> gae(
    const at::Tensor& rewards, const at::Tensor& values, const std::optional<at::Tensor>& cu_seqlens,
    const std::optional<at::Tensor>& mask, double gamma, double lambda) {
  const at::Tensor offsets = offsets_of(rewards, cu_seqlens);
  const at::Tensor r = rewards.contiguous(), v = values.contiguous();
  const auto valid = contiguous(mask);
  at::Tensor advantages = at::empty_like(r), returns = at::empty_like(r);
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "gae", [&] {
    const scalar_t *reward = r.const_data_ptr<scalar_t>(), *value = v.const_data_ptr<scalar_t>();
    scalar_t *advantage = advantages.mutable_data_ptr<scalar_t>(), *target = returns.mutable_data_ptr<scalar_t>();
    const bool* keep = mask_pointer(valid);
    const double decay = gamma * lambda;
    for_each_sequence(offsets, [&](int64_t begin, int64_t end) {
      double carry = 0, next = 0;
      for (int64_t t = end - 1; t >= begin; --t) {
        if (keep && !keep[t]) {
          advantage[t] = target[t] = 0;
          continue;
        }
        const double error = double(reward[t]) + gamma * next - double(value[t]);
        carry = decay == 0 ? error : error + decay * carry;
        next = value[t];
        advantage[t] = static_cast<scalar_t>(carry);
        target[t] = static_cast<scalar_t>(carry + next);
      }
    });
  });
  return {advantages, returns};
}

std::tuple<at::Tensor, at::Tensor> gae_backward(
    const at::Tensor& d_advantages, const at::Tensor& d_returns, const std::optional<at::Tensor>& cu_seqlens,
    const std::optional<at::Tensor>& mask, double gamma, double lambda) {
  const at::Tensor offsets = offsets_of(d_returns, cu_seqlens);
  const at::Tensor da = d_advantages.contiguous(), dr = d_returns.contiguous();
  const auto valid = contiguous(mask);
  at::Tensor d_rewards = at::empty_like(dr), d_values = at::empty_like(dr);
  AT_DISPATCH_FLOATING_TYPES(dr.scalar_type(), "gae_backward", [&] {
    const scalar_t *advantage = da.const_data_ptr<scalar_t>(), *target = dr.const_data_ptr<scalar_t>();
    scalar_t *reward = d_rewards.mutable_data_ptr<scalar_t>(), *value = d_values.mutable_data_ptr<scalar_t>();
    const bool* keep = mask_pointer(valid);
    const double decay = gamma * lambda;
    for_each_sequence(offsets, [&](int64_t begin, int64_t end) {
      double carry = 0;  // the gradient of the previous valid token's error
      for (int64_t t = begin; t < end; ++t) {
        if (keep && !keep[t]) {
          reward[t] = value[t] = 0;
          continue;
        }
        const double sum = double(advantage[t]) + double(target[t]);
        const double error = decay == 0 ? sum : sum + decay * carry;
        reward[t] = static_cast<scalar_t>(error);
        value[t] = static_cast<scalar_t>(double(target[t]) - error + gamma * carry);
        carry = error;
      }
    });
  });
  return {d_rewards, d_values};
}

TORCH_LIBRARY_IMPL(airl_kernels, CPU, m) {
  m.impl("discounted_returns", &discounted_returns);
  m.impl("group_advantages", &group_advantages);
  m.impl("gae", &gae);
  m.impl("gae_backward", &gae_backward);
}

}  // namespace
}  // namespace airl_kernels
