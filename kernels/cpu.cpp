// CPU kernels of the rana ops: arguments are checked here. Semantics: reference.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "cpu_tiles.h"

namespace {

using at::Tensor;

void check_weight(at::ScalarType type, const Tensor& weight, int64_t d_out, const std::optional<Tensor>& bias) {
  TORCH_CHECK(weight.is_contiguous(), "the weight must be contiguous; call .contiguous() on it once");
  TORCH_CHECK(type == weight.scalar_type(), "input and weight must share a dtype, got ", type, " and ",
              weight.scalar_type(), "; convert one of them");
  TORCH_CHECK(!bias || (bias->scalar_type() == type && bias->numel() == d_out && bias->is_contiguous()),
              "expected a contiguous bias of ", d_out, " elements of ", type);
}

void check(const Tensor& x, const Tensor& weight, int64_t d_in, int64_t d_out, const std::optional<Tensor>& bias) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2, "expected an input of 1 or more dimensions and a weight of 2, got ",
              x.dim(), " and ", weight.dim());
  TORCH_CHECK(x.size(-1) == d_in, "the input has ", x.size(-1), " features, the weight expects ", d_in);
  check_weight(x.scalar_type(), weight, d_out, bias);
}

template <typename F>
void dispatch(at::ScalarType type, F&& f) {
  if (type == at::kFloat)
    f(float{});
  else if (type == at::kBFloat16)
    f(at::BFloat16{});
  else if (type == at::kHalf)
    f(at::Half{});
  else
    TORCH_CHECK(false, "rana kernels take float32, bfloat16 and float16, got ", type);
}

// Rows of a contiguous input, at most so many a time, each chunk through `f(x, rows, out)`.
template <typename T, typename F>
Tensor by_chunks(const Tensor& input, int64_t d_out, int64_t most, F&& f) {
  const Tensor x = input.contiguous();
  auto sizes = x.sizes().vec();
  const int64_t d = sizes.back();
  sizes.back() = d_out;
  Tensor out = at::empty(sizes, x.options());
  const int64_t rows = d_out == 0 ? 0 : out.numel() / d_out, chunks = at::divup(rows, most);
  for (int64_t i = 0, r = 0, next; i < chunks; ++i, r = next) {
    next = rows * (i + 1) / chunks;
    f(x.const_data_ptr<T>() + r * d, next - r, out.mutable_data_ptr<T>() + r * d_out);
  }
  return out;
}

template <typename T>
const T* data(const std::optional<Tensor>& bias) {
  return bias ? bias->const_data_ptr<T>() : nullptr;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x, weight, weight.dim() == 2 ? weight.size(1) : 0, weight.size(0), bias);
  Tensor out;
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    out = by_chunks<T>(x, weight.size(0), kTogether, [&](const T* in, int64_t rows, T* y) {
      dense_product<T>(in, rows, weight.size(1), weight.const_data_ptr<T>(), weight.size(0), data<T>(bias), y);
    });
  });
  return out;
}

void check_threshold(const Tensor& threshold, int64_t d) {
  TORCH_CHECK(threshold.scalar_type() == at::kFloat && threshold.is_contiguous() && threshold.numel() == d,
              "expected a contiguous float32 threshold of ", d, " elements, got ", threshold.numel(), " of ",
              threshold.scalar_type());
}

Scale scale_of(const std::optional<Tensor>& scale, const Tensor& x, int64_t masks) {
  if (!scale.has_value()) return {};
  auto sizes = x.sizes().vec();
  sizes.back() = masks;
  TORCH_CHECK(scale->scalar_type() == at::kFloat && scale->is_contiguous() && scale->sizes() == at::IntArrayRef(sizes),
              "expected a contiguous float32 scale ", at::IntArrayRef(sizes), ", got ", scale->sizes(), " of ",
              scale->scalar_type());
  return {scale->const_data_ptr<float>(), masks};
}

Tensor masked_linear(const Tensor& z, const Tensor& threshold, const Tensor& weight_t,
                     const std::optional<Tensor>& bias, at::IntArrayRef given, const std::optional<Tensor>& scale) {
  check(z, weight_t, weight_t.size(0), weight_t.dim() == 2 ? weight_t.size(1) : 0, bias);
  const int64_t whole = weight_t.size(1);
  const at::IntArrayRef parts = given.empty() ? at::IntArrayRef(whole) : given;
  int64_t columns = 0;
  for (int64_t part : parts) {
    TORCH_CHECK(part >= 0, "a part has ", part, " columns");
    columns += part;
  }
  TORCH_CHECK(columns == whole, "the parts have ", columns, " columns, the weight has ", whole);
  const int64_t masks = static_cast<int64_t>(parts.size());
  check_threshold(threshold, weight_t.size(0) * masks);
  Scale by = scale_of(scale, z, masks);
  Tensor out;
  dispatch(z.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    out = by_chunks<T>(z, weight_t.size(1), kTogether, [&](const T* in, int64_t rows, T* y) {
      masked_product<T>(in, rows, weight_t.size(0), threshold.const_data_ptr<float>(), weight_t.const_data_ptr<T>(), parts,
                     data<T>(bias), y, by);
      by = by.after(rows);
    });
  });
  return out;
}

Tensor rank_linear(const Tensor& x, const Tensor& basis, const Tensor& threshold, const Tensor& weight_t,
                   const std::optional<Tensor>& bias) {
  check(x, basis, basis.dim() == 2 ? basis.size(1) : 0, basis.size(0), std::nullopt);
  const int64_t d = basis.size(1), r = basis.size(0);
  TORCH_CHECK(weight_t.dim() == 2 && weight_t.size(0) == r, "the weight must have ", r, " rows, one per row of the basis");
  check_weight(x.scalar_type(), weight_t, weight_t.size(1), bias);
  check_threshold(threshold, r);
  Tensor out;
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    out = by_chunks<T>(x, weight_t.size(1), kTogether, [&](const T* in, int64_t rows, T* y) {
      T* z = buffer<T, 2>(rows * r);
      dense_product<T>(in, rows, d, basis.const_data_ptr<T>(), r, nullptr, z);
      masked_product<T>(z, rows, r, threshold.const_data_ptr<float>(), weight_t.const_data_ptr<T>(), weight_t.size(1),
                     data<T>(bias), y);
    });
  });
  return out;
}

Tensor gated_mlp(const Tensor& x, const Tensor& up_threshold, const Tensor& up_weight_t,
                 const std::optional<Tensor>& up_bias, const Tensor& down_threshold, const Tensor& down_weight_t,
                 const std::optional<Tensor>& down_bias, c10::string_view activation,
                 const std::optional<Tensor>& up_scale) {
  const Activation act = activation_of(activation);
  check(x, up_weight_t, up_weight_t.size(0), up_weight_t.dim() == 2 ? up_weight_t.size(1) : 0, up_bias);
  const bool apart = up_threshold.dim() == 2;  // gate and up have masks of their own
  const int64_t masks = apart ? 2 : 1;
  check_threshold(up_threshold, masks * up_weight_t.size(0));
  Scale by = scale_of(up_scale, x, masks);
  const int64_t d = up_weight_t.size(0), h = down_weight_t.size(0);
  TORCH_CHECK(up_weight_t.size(1) == 2 * h, "the first weight must have ", 2 * h, " columns, gate and up, got ",
              up_weight_t.size(1));
  check_weight(x.scalar_type(), down_weight_t, down_weight_t.size(1), down_bias);
  check_threshold(down_threshold, h);
  const std::vector<int64_t> columns(masks, 2 * h / masks);
  Tensor out;
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    out = by_chunks<T>(x, down_weight_t.size(1), kTogether, [&](const T* in, int64_t rows, T* y) {
      T* wide = buffer<T, 2>(rows * 2 * h);
      T* hidden = buffer<T, 3>(rows * h);
      masked_product<T>(in, rows, d, up_threshold.const_data_ptr<float>(), up_weight_t.const_data_ptr<T>(), columns,
                     data<T>(up_bias), wide, by);
      by = by.after(rows);
      gate(act, wide, rows, h, hidden);
      masked_product<T>(hidden, rows, h, down_threshold.const_data_ptr<float>(), down_weight_t.const_data_ptr<T>(),
                     down_weight_t.size(1), data<T>(down_bias), y);
    });
  });
  return out;
}

Tensor gated_up(const Tensor& x, const Tensor& threshold, const Tensor& gate_weight_t, const Tensor& gate_threshold,
                const Tensor& up_weight, const std::optional<Tensor>& bias, c10::string_view activation,
                const std::optional<Tensor>& scale) {
  const Activation act = activation_of(activation);
  check(x, up_weight, up_weight.dim() == 2 ? up_weight.size(1) : 0, 2 * up_weight.size(0), bias);
  const int64_t d = up_weight.size(1), h = up_weight.size(0);
  check(x, gate_weight_t, gate_weight_t.size(0), h, std::nullopt);
  TORCH_CHECK(gate_weight_t.dim() == 2 && gate_weight_t.size(0) == d && gate_weight_t.size(1) == h,
              "the gate's weight must be [", d, ", ", h, "], the transpose of up's shape");
  check_threshold(threshold, d);
  check_threshold(gate_threshold, h);
  Scale by = scale_of(scale, x, 2);
  Tensor out;
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    out = by_chunks<T>(x, 2 * h, kTogether, [&](const T* in, int64_t rows, T* y) {
      const T* shift = data<T>(bias);
      T* gate = buffer<T, 2>(rows * h);
      float* kept = buffer<float, 4>(rows * h);
      masked_product<T>(in, rows, d, threshold.const_data_ptr<float>(), gate_weight_t.const_data_ptr<T>(), h, shift, gate, by);
      survivors<T>(act, gate, rows, h, gate_threshold.const_data_ptr<float>(), by, kept);
      for (int64_t r = 0; r < rows; ++r) std::copy(gate + r * h, gate + (r + 1) * h, y + r * 2 * h);
      live_product<T>(in, rows, d, kept, up_weight.const_data_ptr<T>(), h, shift ? shift + h : nullptr, y + h, 2 * h);
      by = by.after(rows);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rana, CPU, m) {
  m.impl("linear", linear);
  m.impl("masked_linear", masked_linear);
  m.impl("rank_linear", rank_linear);
  m.impl("gated_mlp", gated_mlp);
  m.impl("gated_up", gated_up);
}
