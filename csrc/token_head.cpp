// CPU kernels of the token head: kernels/airl_kernels/token_head.py in one pass over `hidden`.
//
// Rows are taken in tiles that fit a core's cache: the logits of a tile, what follows from them for each row, then
// the tile's gradients, while its rows are still near. Blocks of kBlock rows are independent; each adds up its own
// part of d weight, and the parts are summed in order, so that results do not depend on the number of threads.

#include "common.h"
#include "elementwise.h"
#include "rows.h"

namespace airl_kernels {
namespace {

constexpr int64_t kBlock = 512;             // rows with one part of d weight
constexpr int64_t kRun = 16;                // rows added up before they join the block's part: keeps rounding errors small
constexpr int64_t kTileBytes = 128 * 1024;  // of hidden, per tile

// The head's tensors, contiguous; hidden and weight of one type: float, double or bfloat16.
struct Head {
  at::Tensor hidden, weight;
  std::optional<at::Tensor> bias, index, offset;

  at::ScalarType accumulate() const { return hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  int64_t rows() const { return hidden.size(0); }
  int64_t width() const { return hidden.size(1); }
  bool bias_per_row() const { return index.has_value() && bias.has_value() && bias->numel() > 1; }
};

Head make_head(
    const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& offset) {
  at::ScalarType type = at::promote_types(hidden.scalar_type(), weight.scalar_type());
  if (type != at::kDouble && type != at::kBFloat16) type = at::kFloat;
  const at::ScalarType accumulate = type == at::kDouble ? at::kDouble : at::kFloat;
  Head head{hidden.to(type).contiguous(), weight.to(type).contiguous(), std::nullopt, std::nullopt, std::nullopt};
  if (bias.has_value()) head.bias = bias->to(accumulate).contiguous();
  if (offset.has_value()) head.offset = offset->to(accumulate).contiguous();
  if (index.has_value()) {
    head.index = index->contiguous();
    if (head.rows()) {
      const int64_t low = head.index->min().item<int64_t>(), high = head.index->max().item<int64_t>();
      TORCH_CHECK_INDEX(
          low >= 0 && high < weight.size(0), "index must lie within the ", weight.size(0), " rows of weight, got ",
          low, " to ", high, ".");
    }
  }
  return head;
}

template <typename T>
const T* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// One walk over the rows. Every output may be null. `live`: rows where it is 0 are not read, their logit is 0.
template <typename T>
class Walk {
 public:
  using Acc = acc_t<T>;

  Walk(const Head& head)
      : rows_(head.rows()), width_(head.width()), per_row_bias_(head.bias_per_row()),
        hidden_(head.hidden.const_data_ptr<T>()), weight_(head.weight.const_data_ptr<T>()),
        index_(pointer<int64_t>(head.index)), bias_(pointer<Acc>(head.bias)), offset_(pointer<Acc>(head.offset)) {}

  const Acc* live = nullptr;
  Acc* logits = nullptr;       // written when set
  Acc* slopes = nullptr;       // read for the gradients
  T* d_hidden = nullptr;
  Acc* d_weight = nullptr;     // [H], zeroed by the caller
  bool gradients = false;

  // between(first, last) turns logits into slopes for these rows and returns their loss. Returns the summed loss.
  template <typename Between>
  double run(const Between& between) {
    const int64_t blocks = (rows_ + kBlock - 1) / kBlock;
    const int64_t tile = std::clamp<int64_t>(kTileBytes / (width_ * int64_t(sizeof(T)) + 1), 1, kBlock);
    std::vector<Acc> parts(d_weight ? blocks * width_ : 0, Acc(0));
    std::vector<double> losses(blocks, 0);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      Buffers buffers(width_);
      const Acc* shared = index_ ? nullptr : row(weight_, 0, width_, buffers.weight.data());
      for (int64_t block = begin; block < end; ++block) {
        const int64_t stop = std::min(rows_, (block + 1) * kBlock);
        for (int64_t first = block * kBlock; first < stop; first += tile) {
          const int64_t last = std::min(stop, first + tile);
          if (logits) tile_logits(first, last, shared, buffers);
          losses[block] += between(first, last);
          if (gradients) tile_gradients(first, last, shared, d_weight ? &parts[block * width_] : nullptr, buffers);
        }
      }
    });
    for (int64_t block = 0; d_weight && block < blocks; ++block) {
      add_scaled(Acc(1), &parts[block * width_], d_weight, width_);
    }
    double total = 0;
    for (const double loss : losses) total += loss;
    return total;
  }

  // d weight and d bias of the action head: every row of weight gets its tokens in their order.
  void add_indexed(Acc* d_rows, Acc* d_bias) const {
    for (int64_t t = 0; t < rows_; ++t) {
      if (slopes[t] == 0) continue;
      add_scaled(slopes[t], hidden_ + t * width_, d_rows + index_[t] * width_, width_);
      if (d_bias) d_bias[index_[t]] += slopes[t];
    }
  }

 private:
  struct Buffers {
    explicit Buffers(int64_t width) : weight(width), gradient(width), sum(width) {}
    std::vector<Acc> weight, gradient, sum;
  };

  const Acc* weight_of(int64_t t, const Acc* shared, Buffers& buffers) const {
    return shared ? shared : row(weight_, index_[t], width_, buffers.weight.data());
  }

  void tile_logits(int64_t first, int64_t last, const Acc* shared, Buffers& buffers) const {
    for (int64_t t = first; t < last; ++t) {
      if (live && live[t] == 0) {
        logits[t] = 0;
        continue;
      }
      Acc z = dot(hidden_ + t * width_, weight_of(t, shared, buffers), width_);
      if (bias_) z += bias_[per_row_bias_ ? index_[t] : 0];
      if (offset_) z += offset_[t];
      logits[t] = z;
    }
  }

  void tile_gradients(int64_t first, int64_t last, const Acc* shared, Acc* part, Buffers& buffers) const {
    for (int64_t run = first; run < last; run += kRun) {
      std::fill(buffers.sum.begin(), buffers.sum.end(), Acc(0));
      for (int64_t t = run; t < std::min(last, run + kRun); ++t) {
        const Acc s = slopes[t];
        if (d_hidden && s == 0) {
          std::fill_n(d_hidden + t * width_, width_, T(0));
        } else if (d_hidden) {
          write_scaled(s, weight_of(t, shared, buffers), d_hidden + t * width_, buffers.gradient.data(), width_);
        }
        if (part && s != 0) add_scaled(s, hidden_ + t * width_, buffers.sum.data(), width_);
      }
      if (part) add_scaled(Acc(1), buffers.sum.data(), part, width_);
    }
  }

  int64_t rows_, width_;
  bool per_row_bias_;
  const T *hidden_, *weight_;
  const int64_t* index_;
  const Acc *bias_, *offset_;
};

#define DISPATCH_HEAD(head, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, (head).hidden.scalar_type(), name, __VA_ARGS__)

// The gradients as the caller's types and shapes; empty where not needed.
struct Gradients {
  at::Tensor hidden, weight, bias;
};

// Walks with gradients. `slopes` is filled by between(first, last) or before; returns the loss as well.
template <typename T, typename Between>
std::pair<double, Gradients> walk(
    const Head& head, const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    at::Tensor& slopes, bool need_hidden, bool need_weight, Walk<T>& rows, const Between& between) {
  using Acc = acc_t<T>;
  Gradients result{hidden.new_empty({0}), weight.new_empty({0}), weight.new_empty({0})};
  at::Tensor d_weight, d_bias;
  if (need_hidden) result.hidden = at::empty_like(head.hidden);
  if (need_weight) d_weight = at::zeros(weight.sizes(), slopes.options());
  rows.slopes = slopes.mutable_data_ptr<Acc>();
  rows.d_hidden = need_hidden ? result.hidden.template mutable_data_ptr<T>() : nullptr;
  Acc* weight_to = need_weight ? d_weight.template mutable_data_ptr<Acc>() : nullptr;
  rows.d_weight = head.index.has_value() ? nullptr : weight_to;
  rows.gradients = need_hidden || need_weight;
  const double loss = rows.run(between);
  if (need_hidden) result.hidden = result.hidden.to(hidden.scalar_type());
  if (need_weight) {
    if (head.bias_per_row()) d_bias = at::zeros({weight.size(0)}, slopes.options());
    if (head.index.has_value()) {
      rows.add_indexed(weight_to, d_bias.defined() ? d_bias.template mutable_data_ptr<Acc>() : nullptr);
    }
    result.weight = d_weight.to(weight.scalar_type());
    if (bias.has_value()) {
      result.bias = (d_bias.defined() ? d_bias : slopes.sum()).reshape(bias->sizes()).to(bias->scalar_type());
    }
  }
  return {loss, result};
}

constexpr auto kNothing = [](int64_t, int64_t) { return 0.0; };

// ---- the ops ----

at::Tensor token_rewards(
    const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& offset, std::string_view kind,
    double temperature, std::optional<double> clip) {
  const Head head = make_head(hidden, weight, bias, index, offset);
  if (!head.index.has_value() && head.hidden.scalar_type() == head.accumulate()) {
    // One vector and nothing to widen is a matrix-vector product, which the library does faster than the walk.
    at::Tensor rewards = at::mv(head.hidden, head.weight);
    if (head.bias.has_value()) rewards.add_(*head.bias);
    if (head.offset.has_value()) rewards.add_(*head.offset);
    AT_DISPATCH_FLOATING_TYPES(rewards.scalar_type(), "token_rewards", [&] {
      auto* r = rewards.mutable_data_ptr<scalar_t>();
      rewards_of(kind, r, r, head.rows(), temperature, clip);
    });
    return rewards;
  }
  at::Tensor rewards = at::empty({head.rows()}, hidden.options().dtype(head.accumulate()));
  DISPATCH_HEAD(head, "token_rewards", [&] {
    Walk<scalar_t> rows(head);
    auto* r = rows.logits = rewards.mutable_data_ptr<acc_t<scalar_t>>();
    rows.run([&](int64_t first, int64_t last) {
      rewards_of(kind, r + first, r + first, last - first, temperature, clip);
      return 0.0;
    });
  });
  return rewards;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> token_rewards_backward(
    const at::Tensor& grad, const at::Tensor& hidden, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& offset, std::string_view kind, double temperature, std::optional<double> clip,
    bool need_hidden, bool need_weight) {
  const Head head = make_head(hidden, weight, bias, index, offset);
  const at::Tensor incoming = grad.to(head.accumulate()).contiguous();
  at::Tensor slopes = at::empty_like(incoming);
  Gradients result;
  DISPATCH_HEAD(head, "token_rewards_backward", [&] {
    Walk<scalar_t> rows(head);
    const auto* g = incoming.const_data_ptr<acc_t<scalar_t>>();
    auto* s = slopes.mutable_data_ptr<acc_t<scalar_t>>();
    rows.live = g;
    rows.logits = s;  // a tile's logits, overwritten by its slopes
    const auto between = [&](int64_t first, int64_t last) {
      reward_slopes(kind, s + first, g + first, s + first, last - first, temperature, clip);
      return 0.0;
    };
    result = walk(head, hidden, weight, bias, slopes, need_hidden, need_weight, rows, between).second;
  });
  return {result.hidden, result.weight, result.bias, slopes};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> head_gradients(
    const at::Tensor& slope, const at::Tensor& hidden, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& index, bool need_hidden,
    bool need_weight) {
  const Head head = make_head(hidden, weight, bias, index, std::nullopt);
  at::Tensor slopes = slope.to(head.accumulate()).contiguous();
  Gradients result;
  DISPATCH_HEAD(head, "head_gradients", [&] {
    Walk<scalar_t> rows(head);
    result = walk(head, hidden, weight, bias, slopes, need_hidden, need_weight, rows, kNothing).second;
  });
  return {result.hidden, result.weight, result.bias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> discriminator_loss(
    const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& targets, const at::Tensor& weights, const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& cu_seqlens,
    const std::optional<at::Tensor>& pairs, std::string_view loss, double label_smoothing, double margin,
    bool need_hidden, bool need_weight) {
  const Head head = make_head(hidden, weight, bias, index, offset);
  const at::Tensor factors = weights.contiguous(), labels = targets.contiguous();
  at::Tensor logits = at::empty({head.rows()}, hidden.options().dtype(head.accumulate()));
  at::Tensor slopes = at::empty_like(logits), value = at::empty({}, logits.options());
  Gradients result;
  DISPATCH_HEAD(head, "discriminator_loss", [&] {
    using Acc = acc_t<scalar_t>;
    Walk<scalar_t> rows(head);
    const Acc *f = factors.const_data_ptr<Acc>(), *y = labels.const_data_ptr<Acc>();
    Acc *z = logits.mutable_data_ptr<Acc>(), *s = slopes.mutable_data_ptr<Acc>();
    rows.live = f;
    rows.logits = z;
    double total = 0;
    if (loss == "pairwise") {  // a slope needs every logit of its pair: two walks
      rows.run(kNothing);
      const at::Tensor offsets = checked_offsets(*cu_seqlens, head.rows()), pair = pairs->contiguous();
      total = pairwise_of(
          z, f, offsets.const_data_ptr<int64_t>(), pair.const_data_ptr<int64_t>(), s, pair.numel(), margin);
      rows.logits = nullptr;
      result = walk(head, hidden, weight, bias, slopes, need_hidden, need_weight, rows, kNothing).second;
    } else {
      const bool bce = loss == "bce";
      const auto between = [&](int64_t first, int64_t last) {
        const int64_t n = last - first;
        return bce ? bce_of(z + first, y + first, f + first, s + first, n, Acc(label_smoothing))
                   : wgan_of(z + first, y + first, f + first, s + first, n);
      };
      std::tie(total, result) = walk(head, hidden, weight, bias, slopes, need_hidden, need_weight, rows, between);
    }
    value.fill_(total);
  });
  return {value, logits, result.hidden, result.weight, result.bias, slopes};
}

TORCH_LIBRARY_IMPL(airl_kernels, CPU, m) {
  m.impl("token_rewards", &token_rewards);
  m.impl("token_rewards_backward", &token_rewards_backward);
  m.impl("head_gradients", &head_gradients);
  m.impl("discriminator_loss", &discriminator_loss);
}

}  // namespace
}  // namespace airl_kernels
