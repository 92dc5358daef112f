// CPU kernels of the rana ops for few rows (decode). Semantics: reference.py.
//
// Both are bound by the bytes of the weight they read. The masked product walks the live rows of weight_t
// [d, d_out] eight at a time, so that eight streams are in flight, and prefetches the next eight; each thread
// owns a range of output columns, so no atomics, and every output is summed in the same order whatever the
// number of threads. Vectors are GCC/Clang vector extensions of 16 floats: the compiler lowers them to AVX-512, to
// pairs of AVX2 registers, or to what the target has.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kLane = 16;          // floats in a vector
constexpr int64_t kGroup = 8;          // weight rows read together
constexpr int64_t kLiveGroup = 4;      // gathered weight rows read together
constexpr int64_t kMaxRows = 16;       // input rows that share one pass over the weight
constexpr int64_t kTile = 2048;        // output columns whose sums stay in the first-level cache (one input row)
constexpr int64_t kMinBytes = 1 << 15; // weight bytes below which another thread does not pay

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
typedef _Float16 Float16s __attribute__((vector_size(32), aligned(2)));

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline Floats load(const at::BFloat16* p) {
  const Halves raw = *reinterpret_cast<const Halves*>(p);
  return reinterpret_cast<Floats>(__builtin_convertvector(raw, Words) << 16);
}
inline Floats load(const at::Half* p) {
  return __builtin_convertvector(*reinterpret_cast<const Float16s*>(p), Floats);
}

inline float sum(Floats v) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// Scratch of one calling thread: grows to the largest site and stays.
struct Scratch {
  std::vector<float> x;
  std::vector<int64_t> live;
};
Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

int64_t grain(int64_t units, int64_t bytes) {
  return std::max<int64_t>(1, units * kMinBytes / std::max<int64_t>(bytes, 1));
}

template <typename T>
inline void store(T* out, const float* acc, const T* bias, int64_t n) {
  for (int64_t c = 0; c < n; ++c) out[c] = static_cast<T>(bias ? acc[c] + static_cast<float>(bias[c]) : acc[c]);
}

// acc[c] += sum over k of v[k] * w[k][c]; COUNT rows at once, the next ones prefetched.
template <int COUNT, typename T>
inline void accumulate(float* acc, const float* v, const T* const* w, const T* const* next, int64_t n) {
  int64_t c = 0;
  for (; c + kLane <= n; c += kLane) {
    Floats a = load(acc + c);
    for (int k = 0; k < COUNT; ++k) {
      a += v[k] * load(w[k] + c);
      if (next) __builtin_prefetch(next[k] + c);
    }
    *reinterpret_cast<Floats*>(acc + c) = a;
  }
  for (; c < n; ++c)
    for (int k = 0; k < COUNT; ++k) acc[c] = std::fma(v[k], static_cast<float>(w[k][c]), acc[c]);
}

// One range of columns [begin, begin + n) of one tile, for all input rows; ld: elements from row to row of weight and out.
template <typename T>
void masked_tile(const float* x, int64_t rows, int64_t d, const std::vector<int64_t>& live, const T* weight, int64_t ld,
                 int64_t begin, int64_t n, const T* bias, T* out, float* acc) {
  std::fill(acc, acc + rows * n, 0.0f);
  const int64_t count = static_cast<int64_t>(live.size());
  const T* w[kGroup];
  const T* next[kGroup];
  float v[kGroup];
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    const bool more = i + 2 * kGroup <= count;
    for (int64_t k = 0; k < kGroup; ++k) {
      w[k] = weight + live[i + k] * ld + begin;
      next[k] = more ? weight + live[i + kGroup + k] * ld + begin : nullptr;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < kGroup; ++k) v[k] = x[r * d + live[i + k]];
      accumulate<kGroup, T>(acc + r * n, v, w, more && r == 0 ? next : nullptr, n);
    }
  }
  for (; i < count; ++i) {
    w[0] = weight + live[i] * ld + begin;
    for (int64_t r = 0; r < rows; ++r) accumulate<1, T>(acc + r * n, x + r * d + live[i], w, nullptr, n);
  }
  for (int64_t r = 0; r < rows; ++r) store(out + r * ld + begin, acc + r * n, bias ? bias + begin : nullptr, n);
}

// What a row's thresholds are divided by, one for each mask of a row; no data: 1.
struct Scale {
  const float* data = nullptr;
  int64_t masks = 1;
  float of(int64_t row) const { return data ? data[row * masks] : 1.0f; }
  Scale next(int64_t count) const { return {data ? data + count : data, masks}; }
};

// Columns [0, d_out) of weight and out, whose rows are ld elements apart.
template <typename T>
void masked_rows(const T* z, int64_t rows, int64_t d, const float* threshold, const T* weight, int64_t d_out,
                 int64_t ld, const T* bias, T* out, Scale scale = {}) {
  Scratch& s = scratch();
  s.x.resize(rows * d);
  s.live.clear();
  for (int64_t r = 0; r < rows; ++r) {
    const float by = scale.of(r);
    for (int64_t j = 0; j < d; ++j) {
      const float value = static_cast<float>(z[r * d + j]);
      s.x[r * d + j] = std::fabs(value) < threshold[j] / by ? 0.0f : value;  // NaN is kept
    }
  }
  for (int64_t j = 0; j < d; ++j) {
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) any |= s.x[r * d + j] != 0.0f;  // a kept zero adds nothing
    if (any) s.live.push_back(j);
  }
  const float* x = s.x.data();
  const std::vector<int64_t>& live = s.live;
  const int64_t blocks = (d_out + kLane - 1) / kLane;
  const int64_t tile = std::max(kLane, kTile / rows / kLane * kLane);
  const int64_t bytes = static_cast<int64_t>(live.size()) * d_out * sizeof(T);
  at::parallel_for(0, blocks, grain(blocks, bytes), [&](int64_t first, int64_t last) {
    thread_local std::vector<float> acc;
    acc.resize(tile * rows);
    const int64_t end = std::min(last * kLane, d_out);
    for (int64_t begin = first * kLane; begin < end; begin += tile)
      masked_tile(x, rows, d, live, weight, ld, begin, std::min(tile, end - begin), bias, out, acc.data());
  });
}

// The same, one mask per part: threshold [parts, d], the parts' columns side by side.
template <typename T>
void masked_parts(const T* z, int64_t rows, int64_t d, const float* threshold, const T* weight, at::IntArrayRef parts,
                  const T* bias, T* out, Scale scale) {
  int64_t ld = 0, begin = 0;
  for (int64_t part : parts) ld += part;
  for (int64_t part : parts) {
    masked_rows(z, rows, d, threshold, weight + begin, part, ld, bias ? bias + begin : nullptr, out + begin, scale);
    threshold += d;
    scale = scale.next(1);
    begin += part;
  }
}

// COUNT outputs at once: COUNT weight rows streamed against x in float32.
template <int COUNT, typename T>
inline void dot(const float* x, const T* weight, int64_t d, float* result) {
  Floats a[COUNT] = {};
  int64_t c = 0;
  for (; c + kLane <= d; c += kLane) {
    const Floats v = load(x + c);
    for (int k = 0; k < COUNT; ++k) {
      a[k] += v * load(weight + k * d + c);
      __builtin_prefetch(weight + (k + COUNT) * d + c);
    }
  }
  for (int k = 0; k < COUNT; ++k) {
    result[k] = sum(a[k]);
    for (int64_t t = c; t < d; ++t) result[k] = std::fma(x[t], static_cast<float>(weight[k * d + t]), result[k]);
  }
}

// The same for rows anywhere.
template <int COUNT, typename T>
inline void gathered_dot(const float* x, const T* const* weight, int64_t d, float* result) {
  Floats a[COUNT] = {};
  int64_t c = 0;
  for (; c + kLane <= d; c += kLane) {
    const Floats v = load(x + c);
    for (int k = 0; k < COUNT; ++k) a[k] += v * load(weight[k] + c);
  }
  for (int k = 0; k < COUNT; ++k) {
    result[k] = sum(a[k]);
    for (int64_t t = c; t < d; ++t) result[k] = std::fma(x[t], static_cast<float>(weight[k][t]), result[k]);
  }
}

template <typename T>
void dense_rows(const T* x, int64_t rows, int64_t d, const T* weight, int64_t d_out, const T* bias, T* out) {
  Scratch& s = scratch();
  s.x.resize(rows * d);
  for (int64_t i = 0; i < rows * d; ++i) s.x[i] = static_cast<float>(x[i]);
  const float* wide = s.x.data();
  const int64_t groups = (d_out + kGroup - 1) / kGroup;
  at::parallel_for(0, groups, grain(groups, d * d_out * sizeof(T)), [&](int64_t first, int64_t last) {
    float result[kGroup];
    for (int64_t g = first; g < last; ++g) {
      const int64_t o = g * kGroup, n = std::min(kGroup, d_out - o);
      for (int64_t r = 0; r < rows; ++r) {
        if (n == kGroup)
          dot<kGroup>(wide + r * d, weight + o * d, d, result);
        else
          for (int64_t k = 0; k < n; ++k) dot<1>(wide + r * d, weight + (o + k) * d, d, result + k);
        store(out + r * d_out + o, result, bias ? bias + o : nullptr, n);
      }
    }
  });
}

// exp for |v| up to 87, else saturated; relative error below 2e-7. Remez polynomial of 2^f on [-1/2, 1/2].
inline Floats exponential(Floats v) {
  v = v < 87.0f ? v : Floats{} + 87.0f;
  v = v > -87.0f ? v : Floats{} - 87.0f;
  const Floats t = v * 1.44269504f;
  const Ints n = __builtin_convertvector(t + (t < 0.0f ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
  const Floats f = t - __builtin_convertvector(n, Floats);
  Floats p = Floats{} + 1.535336188e-4f;
  for (float c : {1.339887440e-3f, 9.618437357e-3f, 5.550332548e-2f, 2.402264791e-1f, 6.931472028e-1f, 1.0f}) p = p * f + c;
  return p * reinterpret_cast<Floats>((n + 127) << 23);
}

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

Activation activation_of(c10::string_view name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK(false, "unknown activation '", name, "'; known: silu, gelu, gelu_tanh, relu");
}

template <Activation A>
inline Floats activate(Floats v) {
  if constexpr (A == Activation::kSilu) return v / (1.0f + exponential(-v));
  if constexpr (A == Activation::kGeluTanh) {  // tanh(u) = 1 - 2 / (exp(2u) + 1)
    const Floats u = 0.7978845608f * (v + 0.044715f * v * v * v);
    return v * (1.0f - 1.0f / (exponential(2.0f * u) + 1.0f));
  }
  if constexpr (A == Activation::kGelu) {
    Floats y;
    for (int i = 0; i < kLane; ++i) y[i] = 0.5f * v[i] * (1.0f + std::erf(v[i] * 0.7071067812f));
    return y;
  }
  return v < 0.0f ? Floats{} : v;  // NaN is kept
}

// hidden[c] = act(y[c]) * y[h + c], the activation rounded to T first, as the plain form does.
template <Activation A, typename T>
void gate_rows(const T* y, int64_t rows, int64_t h, T* hidden) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < h; c += kLane) {
      Floats gate = {}, up = {};
      const int64_t n = std::min(kLane, h - c);
      for (int64_t i = 0; i < n; ++i) {
        gate[i] = static_cast<float>(y[r * 2 * h + c + i]);
        up[i] = static_cast<float>(y[r * 2 * h + h + c + i]);
      }
      const Floats a = activate<A>(gate);
      for (int64_t i = 0; i < n; ++i)
        hidden[r * h + c + i] = static_cast<T>(static_cast<float>(static_cast<T>(a[i])) * up[i]);
    }
}

template <typename T>
void gate(Activation a, const T* y, int64_t rows, int64_t h, T* hidden) {
  switch (a) {
    case Activation::kSilu: return gate_rows<Activation::kSilu>(y, rows, h, hidden);
    case Activation::kGelu: return gate_rows<Activation::kGelu>(y, rows, h, hidden);
    case Activation::kGeluTanh: return gate_rows<Activation::kGeluTanh>(y, rows, h, hidden);
    case Activation::kRelu: return gate_rows<Activation::kRelu>(y, rows, h, hidden);
  }
}

template <typename T>
void activations(Activation a, const T* gate, int64_t h, float* out) {
  for (int64_t c = 0; c < h; c += kLane) {
    Floats v = {};
    const int64_t n = std::min(kLane, h - c);
    for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(gate[c + i]);
    switch (a) {
      case Activation::kSilu: v = activate<Activation::kSilu>(v); break;
      case Activation::kGelu: v = activate<Activation::kGelu>(v); break;
      case Activation::kGeluTanh: v = activate<Activation::kGeluTanh>(v); break;
      case Activation::kRelu: v = activate<Activation::kRelu>(v); break;
    }
    for (int64_t i = 0; i < n; ++i) out[c + i] = static_cast<float>(static_cast<T>(v[i]));
  }
}

// out[j] = weight[j] . x where the activated gate survives, else 0; x [d], weight [h, d].
template <typename T>
void live_rows(const T* x, int64_t d, Activation a, const T* gate, const float* threshold, const T* weight, int64_t h,
               const T* bias, T* out) {
  Scratch& s = scratch();
  s.x.resize(d + h);
  float* activated = s.x.data() + d;
  activations(a, gate, h, activated);
  s.live.clear();
  for (int64_t j = 0; j < h; ++j) {
    if (std::fabs(activated[j]) < threshold[j])
      out[j] = static_cast<T>(0.0f);
    else
      s.live.push_back(j);
  }
  for (int64_t i = 0; i < d; ++i) s.x[i] = static_cast<float>(x[i]);
  const float* wide = s.x.data();
  const std::vector<int64_t>& live = s.live;
  const int64_t count = static_cast<int64_t>(live.size());
  at::parallel_for(0, count, grain(count, count * d * sizeof(T)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += kLiveGroup) {
      float result[kLiveGroup];
      const int64_t n = std::min(kLiveGroup, last - i);
      const T* w[kLiveGroup];
      for (int64_t k = 0; k < kLiveGroup; ++k) w[k] = weight + live[i + std::min(k, n - 1)] * d;
      gathered_dot<kLiveGroup>(wide, w, d, result);
      for (int64_t k = 0; k < n; ++k)
        out[live[i + k]] = static_cast<T>(bias ? result[k] + static_cast<float>(bias[live[i + k]]) : result[k]);
    }
  });
}

// A buffer of the calling thread that lives from call to call.
template <typename T, int Which>
T* buffer(int64_t size) {
  thread_local std::vector<T> values;
  if (static_cast<int64_t>(values.size()) < size) values.resize(size);
  return values.data();
}

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

// Rows of a contiguous input, at most kMaxRows a time, each chunk through `f(x, rows, out)`.
template <typename T, typename F>
Tensor by_chunks(const Tensor& input, int64_t d_out, F&& f) {
  const Tensor x = input.contiguous();
  auto sizes = x.sizes().vec();
  const int64_t d = sizes.back();
  sizes.back() = d_out;
  Tensor out = at::empty(sizes, x.options());
  const int64_t rows = d_out == 0 ? 0 : out.numel() / d_out;
  for (int64_t r = 0; r < rows; r += kMaxRows)
    f(x.const_data_ptr<T>() + r * d, std::min(kMaxRows, rows - r), out.mutable_data_ptr<T>() + r * d_out);
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
    out = by_chunks<T>(x, weight.size(0), [&](const T* in, int64_t rows, T* y) {
      dense_rows<T>(in, rows, weight.size(1), weight.const_data_ptr<T>(), weight.size(0), data<T>(bias), y);
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
  for (int64_t part : parts) columns += part;
  TORCH_CHECK(columns == whole, "the parts have ", columns, " columns, the weight has ", whole);
  const int64_t masks = static_cast<int64_t>(parts.size());
  check_threshold(threshold, weight_t.size(0) * masks);
  Scale by = scale_of(scale, z, masks);
  Tensor out;
  dispatch(z.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    out = by_chunks<T>(z, weight_t.size(1), [&](const T* in, int64_t rows, T* y) {
      masked_parts<T>(in, rows, weight_t.size(0), threshold.const_data_ptr<float>(), weight_t.const_data_ptr<T>(), parts,
                      data<T>(bias), y, by);
      by = by.next(rows * masks);
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
    out = by_chunks<T>(x, weight_t.size(1), [&](const T* in, int64_t rows, T* y) {
      T* z = buffer<T, 0>(rows * r);
      dense_rows<T>(in, rows, d, basis.const_data_ptr<T>(), r, nullptr, z);
      masked_rows<T>(z, rows, r, threshold.const_data_ptr<float>(), weight_t.const_data_ptr<T>(), weight_t.size(1),
                     weight_t.size(1), data<T>(bias), y);
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
  Tensor out;
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    out = by_chunks<T>(x, down_weight_t.size(1), [&](const T* in, int64_t rows, T* y) {
      T* wide = buffer<T, 0>(rows * 2 * h);
      T* hidden = buffer<T, 1>(rows * h);
      masked_parts<T>(in, rows, d, up_threshold.const_data_ptr<float>(), up_weight_t.const_data_ptr<T>(),
                      apart ? at::IntArrayRef({h, h}) : at::IntArrayRef({2 * h}), data<T>(up_bias), wide, by);
      by = by.next(rows * masks);
      gate(act, wide, rows, h, hidden);
      masked_rows<T>(hidden, rows, h, down_threshold.const_data_ptr<float>(), down_weight_t.const_data_ptr<T>(),
                     down_weight_t.size(1), down_weight_t.size(1), data<T>(down_bias), y);
    });
  });
  return out;
}

Tensor gated_up(const Tensor& x, const Tensor& threshold, const Tensor& gate_weight_t, const Tensor& gate_threshold,
                const Tensor& up_weight, const std::optional<Tensor>& bias, c10::string_view activation) {
  const Activation act = activation_of(activation);
  check(x, up_weight, up_weight.dim() == 2 ? up_weight.size(1) : 0, 2 * up_weight.size(0), bias);
  const int64_t d = up_weight.size(1), h = up_weight.size(0);
  check(x, gate_weight_t, gate_weight_t.size(0), h, std::nullopt);
  TORCH_CHECK(gate_weight_t.dim() == 2 && gate_weight_t.size(0) == d && gate_weight_t.size(1) == h,
              "the gate's weight must be [", d, ", ", h, "], the transpose of up's shape");
  check_threshold(threshold, d);
  check_threshold(gate_threshold, h);
  Tensor out;
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    out = by_chunks<T>(x, 2 * h, [&](const T* in, int64_t rows, T* y) {
      const T* shift = data<T>(bias);
      for (int64_t r = 0; r < rows; ++r) {  // each row has a list of live outputs of its own
        T* row = y + r * 2 * h;
        masked_rows<T>(in + r * d, 1, d, threshold.const_data_ptr<float>(), gate_weight_t.const_data_ptr<T>(), h, h, shift,
                       row);
        live_rows<T>(in + r * d, d, act, row, gate_threshold.const_data_ptr<float>(), up_weight.const_data_ptr<T>(), h,
                     shift ? shift + h : nullptr, row + h);
      }
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
