// Products of many rows (prefill, large batches), bound by multiply-adds.
//
//   masked x, part by part ─▶ panels of kStep outputs, copied in the order of use ─▶ tiles of kTall rows in registers ─▶ y
//
// While a panel is multiplied the weight's lines of the next are fetched. Pairs of bfloat16 are multiplied together where
// the processor can. Each task owns whole panels, so every output is summed in the same order whatever the number of threads.
#pragma once
#include <type_traits>

#include "cpu_products.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kTogether = 256;  // rows of which masked copies are made at a time
constexpr int64_t kSteps = 384;     // of a panel, 48 kB: all inputs of a small model in one go
constexpr int64_t kSums = 1 << 16;  // sums of a task that stay in the second-level cache
constexpr int64_t kFetch = 8;       // steps between fetches of the next panel's lines
constexpr int64_t kLine = 64;       // bytes
constexpr double kNearlyAll = 0.85;  // of the weight rows: picking them costs more than leaving out the others saves
#ifdef __AVX512F__
constexpr int64_t kTall = 12;  // rows of a tile: 24 vectors of sums, of the 32 that there are
#else
constexpr int64_t kTall = 3;  // a vector takes two registers or more
#endif

// How T is multiplied: a step takes kDepth inputs, an Operand of x, and as many weights of each output.
template <typename T>
struct Step {
  using Operand = float;
  static constexpr int64_t kDepth = 1;
  static Two columns(const T* w, const T*) { return load2(w); }
  static Floats inputs(const T* w) { return load(w); }
  static Floats add(Floats sum, Operand x, Floats w) { return sum + x * w; }
};

#ifdef __AVX512BF16__
template <>
struct Step<at::BFloat16> {
  using Operand = uint32_t;
  static constexpr int64_t kDepth = 2;
  static Words raw(const at::BFloat16* w) { return reinterpret_cast<Words>(*reinterpret_cast<const Bits*>(w)); }
  static Two columns(const at::BFloat16* w, const at::BFloat16* next) {
    const Words a = raw(w), b = raw(next);
    return {reinterpret_cast<Floats>((a & 0xffffu) | (b << 16)), reinterpret_cast<Floats>((a >> 16) | (b & 0xffff0000u))};
  }
  static Floats inputs(const at::BFloat16* w) { return reinterpret_cast<Floats>(raw(w)); }
  static Floats add(Floats sum, Operand x, Floats w) {
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)_mm512_set1_epi32(x),
                                                     (__m512bh)reinterpret_cast<__m512>(w)));
  }
};
#endif

// How often weights are multiplied at most where rows are faster than tiles: rows convert them each time, tiles copy them.
#ifdef __AVX512F__
template <typename T>
constexpr int64_t kMaskedRows = std::is_same_v<T, float> ? 12 : std::is_same_v<T, at::Half> ? 2 : 7;
template <typename T>
constexpr int64_t kDenseRows = std::is_same_v<T, float> ? 18 : std::is_same_v<T, at::Half> ? 5 : 9;
#else  // not measured
template <typename T>
constexpr int64_t kMaskedRows = kMaxRows;
template <typename T>
constexpr int64_t kDenseRows = kMaxRows;
#endif

// Weight rows, `ld` bytes apart, of which a panel's line is fetched while a tile is multiplied, `each` with every kFetch steps.
struct Ahead {
  const char* line = nullptr;
  int64_t ld = 0, rows = 0, each = 0;
  template <int64_t Bytes>
  void fetch(int64_t turn) const {
    for (int64_t i = turn * each; i < std::min((turn + 1) * each, rows); ++i)
      for (int64_t b = 0; b < Bytes; b += kLine) prefetch(line + i * ld + b);
  }
};

// What a tile starts from, nothing or `sums` [rows, kStep], and where it ends: there, or with a bias in out, ld apart.
template <typename T>
struct Ends {
  bool more;
  float* sums;
  T* out;
  int64_t ld;
  Two bias;
};

// sums [ROWS, kStep] (+)= x [ROWS, steps], ld operands apart, times the panel.
template <typename T, int ROWS>
void tile(const typename Step<T>::Operand* x, int64_t ld, const Two* panel, int64_t steps, Ahead ahead, const Ends<T>& ends) {
  using S = Step<T>;
  Two acc[ROWS] = {};
  for (int r = 0; ends.more && r < ROWS; ++r) acc[r] = {load(ends.sums + r * kStep), load(ends.sums + r * kStep + kLane)};
  for (int64_t k = 0; k < steps;) {
    ahead.fetch<kStep * sizeof(T)>(k / kFetch);
    for (const int64_t end = std::min(k + kFetch, steps); k < end; ++k) {
      const Two w = panel[k];
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) acc[r] = {S::add(acc[r].a, x[r * ld + k], w.a), S::add(acc[r].b, x[r * ld + k], w.b)};
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    if (ends.out) {
      store2(ends.out + r * ends.ld, {acc[r].a + ends.bias.a, acc[r].b + ends.bias.b});
    } else {
      store(ends.sums + r * kStep, acc[r].a);
      store(ends.sums + r * kStep + kLane, acc[r].b);
    }
  }
}

template <typename T, int ROWS = kTall>
void tile_of(int64_t rows, const typename Step<T>::Operand* x, int64_t ld, const Two* panel, int64_t steps, Ahead ahead,
             const Ends<T>& ends) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      tile<T, ROWS>(x, ld, panel, steps, ahead, ends);
    else
      tile_of<T, ROWS - 1>(rows, x, ld, panel, steps, ahead, ends);
  }
}

// A weight whose columns are outputs: weight_t [d, d_out]. All below: inputs [from, from + depth), kStep outputs from `out`,
// of which `count` exist.
template <typename T>
struct ByColumn {
  const T* w;
  int64_t d, d_out;
  void pack(int64_t from, int64_t depth, int64_t out, int64_t count, Two* panel) const {
    constexpr int64_t deep = Step<T>::kDepth;
    const T* row = w + from * d_out + out;
    T some[2 * kStep] = {};  // where the weight ends
    for (int64_t k = 0; k < depth; k += deep, row += deep * d_out, ++panel) {
      const int64_t rows = std::min(deep, depth - k);
      if (count == kStep && rows == deep) {
        *panel = Step<T>::columns(row, row + d_out);
      } else {
        std::fill(some, some + 2 * kStep, static_cast<T>(0.0f));
        for (int64_t i = 0; i < rows; ++i) std::copy(row + i * d_out, row + i * d_out + count, some + i * kStep);
        *panel = Step<T>::columns(some, some + kStep);
      }
    }
  }
  Ahead ahead(int64_t from, int64_t depth, int64_t out, int64_t turn, int64_t turns, int64_t steps) const {
    const int64_t first = depth * turn / turns, rows = depth * (turn + 1) / turns - first;
    const int64_t bytes = d_out * static_cast<int64_t>(sizeof(T));
    return {reinterpret_cast<const char*>(w + (from + first) * d_out + out), bytes, rows,
            at::divup(rows * kFetch, steps)};
  }
};

// A weight whose rows are outputs: weight [d_out, d].
template <typename T>
struct ByRow {
  const T* w;
  int64_t d, d_out;
  void pack(int64_t from, int64_t depth, int64_t out, int64_t count, Two* panel) const {
    using S = Step<T>;
    constexpr int64_t inputs = kLane * S::kDepth;
    for (int64_t k = 0; k < depth; k += inputs, panel += kLane)
      for (int half = 0; half < 2; ++half) {
        Floats square[kLane];
        for (int64_t c = 0; c < kLane; ++c) {
          const int64_t column = std::is_same_v<T, at::BFloat16> ? 2 * c + half : c + half * kLane;  // the order of load2
          const T* row = w + (out + column) * d + from + k;
          const int64_t n = column < count ? std::min(inputs, depth - k) : 0;
          T some[inputs] = {};
          if (n < inputs) std::copy(row, row + n, some);
          square[c] = S::inputs(n < inputs ? some : row);
        }
        transpose(square);
        const int64_t steps = std::min(kLane, at::divup(depth - k, S::kDepth));
        for (int64_t s = 0; s < steps; ++s) (half ? panel[s].b : panel[s].a) = square[s];
      }
  }
  // Lines in a row: the processor fetches them.
  Ahead ahead(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) const { return {}; }
};

// x [rows, ld operands], a weight, bias [d_out] or null -> out [rows, d_out].
template <typename T, typename Weight>
struct Product {
  const typename Step<T>::Operand* x;
  int64_t rows, ld;
  Weight weight;
  const T* bias;
  T* out;

  // Panels [first, last) of the outputs [begin, end): some inputs for all panels, then the next, so that x stays near.
  void panels(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    constexpr int64_t deep = Step<T>::kDepth;
    const int64_t blocks = at::divup(ld, kSteps), tiles = at::divup(rows, kTall);
    char* memory = buffer<char, 1>(kSteps * sizeof(Two) + kLine);
    Two* panel = reinterpret_cast<Two*>((reinterpret_cast<uintptr_t>(memory) + kLine - 1) / kLine * kLine);
    float* sums = buffer<float, 1>((last - first) * rows * kStep);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t from = ld * b / blocks, steps = ld * (b + 1) / blocks - from;
      const int64_t input = from * deep, depth = std::min(steps * deep, weight.d - input);
      for (int64_t p = first; p < last; ++p) {
        const int64_t column = begin + p * kStep, count = std::min(kStep, end - column);
        float* own = sums + (p - first) * rows * kStep;
        weight.pack(input, depth, column, count, panel);
        T* y = b + 1 == blocks && count == kStep ? out + column : nullptr;
        const Two shift = bias && y ? load2(bias + column) : Two{};
        const bool same = p + 1 < last;  // inputs, of the next panel
        const int64_t next = same ? input : input + depth, left = std::min(depth, weight.d - next);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = rows * t / tiles, height = rows * (t + 1) / tiles - row;
          const Ahead ahead = weight.ahead(next, left, same ? column + kStep : begin + first * kStep, t, tiles, steps);
          const Ends<T> ends{b > 0, own + row * kStep, y ? y + row * weight.d_out : nullptr, weight.d_out, shift};
          tile_of<T>(height, x + row * ld + from, ld, panel, steps, ahead, ends);
        }
        if (b + 1 == blocks && !y) write(own, column, count);
      }
    }
  }

  // Of a panel with fewer than kStep outputs.
  void write(const float* sums, int64_t column, int64_t count) const {
    T shift[kStep] = {}, whole[kStep];
    if (bias) std::copy(bias + column, bias + column + count, shift);
    for (int64_t r = 0; r < rows; ++r, sums += kStep) {
      finish(whole, sums, shift, kStep);
      std::copy(whole, whole + count, out + r * weight.d_out + column);
    }
  }
};

// Products with the outputs of a part each, side by side, as tasks of some panels each.
template <typename T, typename Weight>
void by_panels(const Product<T, Weight>* parts, at::IntArrayRef columns) {
  int64_t panels = 0;
  for (int64_t each : columns) panels += at::divup(each, kStep);
  const int64_t most = std::max<int64_t>(1, kSums / (parts->rows * kStep));
  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    int64_t before = 0, begin = 0;
    for (size_t m = 0; m < columns.size(); begin += columns[m++]) {
      const int64_t count = at::divup(columns[m], kStep);
      const int64_t from = std::clamp<int64_t>(first - before, 0, count), to = std::clamp<int64_t>(last - before, 0, count);
      for (int64_t p = from; p < to; p += most) parts[m].panels(begin, begin + columns[m], p, std::min(p + most, to));
      before += count;
    }
  });
}

// f(row of z, row of x) for all: x [rows, ld operands] is z [rows, d] with zeros behind d.
template <typename T, typename F>
void as_operands(const T* z, int64_t rows, int64_t d, typename Step<T>::Operand* x, int64_t ld, F&& f) {
  using Number = std::conditional_t<Step<T>::kDepth == 1, float, T>;
  const int64_t width = ld * Step<T>::kDepth;
  at::parallel_for(0, rows, grain(rows, rows * d * sizeof(T)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      Number* row = reinterpret_cast<Number*>(x) + r * width;
      by_lane(d, [&](int64_t j, int64_t n) { store_exact(row + j, f(r, j, n, load(z + r * d + j, n)), n); });
      std::fill(row + d, row + width, static_cast<Number>(0.0f));
    }
  });
}

template <typename T>
int64_t operands(int64_t d) {
  return at::divup(d, Step<T>::kDepth);
}

// As masked_rows, for many rows: z [rows, d], threshold [parts, d], weight_t [d, d_out] -> out [rows, d_out].
template <typename T>
void masked_tiles(const T* z, int64_t rows, int64_t d, const float* threshold, const T* weight_t, at::IntArrayRef columns,
                  const T* bias, T* out, Scale scale) {
  const int64_t masks = static_cast<int64_t>(columns.size()), ld = operands<T>(d);
  auto* x = buffer<typename Step<T>::Operand, 0>(masks * rows * ld);
  int64_t d_out = 0;
  for (int64_t each : columns) d_out += each;
  std::vector<Product<T, ByColumn<T>>> parts;
  for (int64_t m = 0; m < masks; ++m, x += rows * ld, threshold += d) {
    as_operands<T>(z, rows, d, x, ld, [&](int64_t r, int64_t j, int64_t n, Floats v) {
      return absolute(v) * scale.of(r, m) < load(threshold + j, n) ? Floats{} : v;  // NaN is kept
    });
    parts.push_back({x, rows, ld, {weight_t, d, d_out}, bias, out});
  }
  by_panels(parts.data(), columns);
}

// As dense_rows, for many rows: x [rows, d], weight [d_out, d] -> out [rows, d_out].
template <typename T>
void dense_tiles(const T* x, int64_t rows, int64_t d, const T* weight, int64_t d_out, const T* bias, T* out) {
  const int64_t ld = operands<T>(d);
  auto* copy = buffer<typename Step<T>::Operand, 0>(rows * ld);
  as_operands<T>(x, rows, d, copy, ld, [](int64_t, int64_t, int64_t, Floats v) { return v; });
  const Product<T, ByRow<T>> product{copy, rows, ld, {weight, d, d_out}, bias, out};
  by_panels(&product, d_out);
}

// By rows while they share few of the weights that they read, else by tiles, which have something to multiply (d > 0).
template <typename T>
void masked_product(const T* z, int64_t rows, int64_t d, const float* threshold, const T* weight_t, at::IntArrayRef columns,
                    const T* bias, T* out, Scale scale = {}) {
  const int64_t limit = d > 0 ? kMaskedRows<T> : rows;
  if ((rows > kMaxRows && d > 0) || !masked_rows(z, rows, d, threshold, weight_t, columns, bias, out, scale, limit))
    masked_tiles(z, rows, d, threshold, weight_t, columns, bias, out, scale);
}

template <typename T>
void dense_product(const T* x, int64_t rows, int64_t d, const T* weight, int64_t d_out, const T* bias, T* out) {
  (rows > kDenseRows<T> && d > 0 ? dense_tiles<T> : dense_rows<T>)(x, rows, d, weight, d_out, bias, out);
}

// As live_rows; where the rows together keep nearly all, dense.
template <typename T>
void live_product(const T* x, int64_t rows, int64_t d, const float* kept, const T* weight, int64_t h, const T* bias, T* out,
                  int64_t ld) {
  if (rows == 0) return;
  int64_t* live = buffer<int64_t, 0>(h);
  const int64_t count = together(kept, rows, h, live);
  if (rows == 1 || (rows <= kDenseRows<T> && count < kNearlyAll * h))
    return live_rows(x, rows, d, kept, live, count, weight, h, bias, out, ld);
  T* up = buffer<T, 3>(rows * h);
  dense_product(x, rows, d, weight, h, bias, up);
  at::parallel_for(0, rows, grain(rows, rows * h * sizeof(T)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      for (int64_t j = 0; j < h; ++j) out[r * ld + j] = kept[r * h + j] != 0.0f ? up[r * h + j] : static_cast<T>(0.0f);
  });
}

}  // namespace
