// The products of few rows, bound by the bytes of the weight they read.
//
//   z, thresholds ─▶ masked x and the list of live rows, part by part ─▶ tasks of equal cost ─▶ float32 sums ─▶ bias ─▶ y
//
// The masked product walks the live rows of weight_t [d, d_out] eight at a time, so that eight streams are in flight, and
// prefetches eight or more ahead of them; each task owns a range of output columns, so no atomics, and every output is
// summed in the same order whatever the number of threads.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu_vector.h"

namespace {

constexpr int64_t kGroup = 8;           // weight rows read together
constexpr int64_t kLiveGroup = 4;       // gathered weight rows read together
constexpr int64_t kMaxRows = 16;        // input rows that share one pass over the weight
constexpr int64_t kTile = 6144;         // output columns at most, whose sums stay in the first-level cache (one input row)
constexpr int64_t kMinBytes = 1 << 15;  // weight bytes below which another thread does not pay
constexpr int64_t kAhead = 1 << 15;     // bytes between what is multiplied and what is prefetched
constexpr int64_t kColumn = 8;          // what a column costs beside its products, in products

// A buffer of the calling thread that lives from call to call, for one use each.
template <typename T, int Use>
T* buffer(int64_t size) {
  thread_local std::vector<T> values;
  if (static_cast<int64_t>(values.size()) < size) values.resize(size);
  return values.data();
}

int64_t grain(int64_t units, int64_t bytes) {
  return std::max<int64_t>(1, units * kMinBytes / std::max<int64_t>(bytes, 1));
}

// What a row's magnitudes are multiplied by, one for each mask of a row; no data: 1.
struct Scale {
  const float* data = nullptr;
  int64_t masks = 1;
  float of(int64_t row, int64_t mask) const { return data ? data[row * masks + mask] : 1.0f; }
  Scale after(int64_t rows) const { return {data ? data + rows * masks : data, masks}; }
};

// Columns [begin, begin + columns) of weight and out, with a mask of their own: the list of weight rows that some input row
// needs, and the masked input x [rows, d] in float32.
struct Part {
  int64_t begin, columns;
  const float* x;
  const int64_t* live;
  int64_t count;
  int64_t cost() const { return columns * (count + kColumn); }
};

// z [rows, d] -> x, zero where |z| * scale is below threshold; NaN is kept. Returns how many are in `live`.
template <typename T>
int64_t keep(const T* z, int64_t rows, int64_t d, const float* threshold, Scale scale, int64_t mask, float* x,
             int64_t* live) {
  for (int64_t r = 0; r < rows; ++r) {
    const float by = scale.of(r, mask);
    by_lane(d, [&](int64_t j, int64_t n) {
      const Floats value = load(z + r * d + j, n);
      store(x + r * d + j, absolute(value) * by < load(threshold + j, n) ? Floats{} : value, n);
    });
  }
  int64_t count = 0;
  for (int64_t j = 0; j < d; ++j) {
    bool any = x[j] != 0.0f;  // a kept zero adds nothing
    for (int64_t r = 1; r < rows; ++r) any |= x[r * d + j] != 0.0f;
    live[count] = j;
    count += any;
  }
  return count;
}

// acc[c] += sum over k of v[k] * w[k][c]; COUNT rows at once, the next ones prefetched. Sums are in the order of load2.
template <int COUNT, typename T>
inline void accumulate(float* acc, const float* v, const T* const* w, const T* const* next, int64_t n) {
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
    Two sums = load2(acc + c);
    for (int k = 0; k < COUNT; ++k) {
      const Two weight = load2(w[k] + c);
      sums.a += v[k] * weight.a;
      sums.b += v[k] * weight.b;
      if (next) prefetch2(next[k] + c);
    }
    store2(acc + c, sums);
  }
  if (c + kLane <= n) {
    Floats sums = load(acc + c);
    for (int k = 0; k < COUNT; ++k) sums += v[k] * load(w[k] + c);
    store(acc + c, sums);
    c += kLane;
  }
  for (; c < n; ++c)
    for (int k = 0; k < COUNT; ++k) acc[c] = std::fma(v[k], static_cast<float>(w[k][c]), acc[c]);
}

// Sums in the order of load2 -> outputs.
template <typename T>
inline void finish(T* out, const float* acc, const T* bias, int64_t n) {
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
    Two y = load2(acc + c);
    if (bias) {
      const Two b = load2(bias + c);
      y = {y.a + b.a, y.b + b.b};
    }
    store2(out + c, y);
  }
  by_lane(n - c, [&](int64_t i, int64_t m) {
    const Floats y = load(acc + c + i, m);
    store(out + c + i, bias ? y + load(bias + c + i, m) : y, m);
  });
}

// Columns [begin, begin + n) for all input rows; ld: elements from row to row of weight and out.
template <typename T>
void masked_tile(const Part& part, int64_t rows, int64_t d, const T* weight, int64_t ld, int64_t begin, int64_t n,
                 const T* bias, T* out, float* acc) {
  std::fill(acc, acc + rows * n, 0.0f);
  const int64_t row = n * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = std::max<int64_t>(1, kAhead / (kGroup * row)) * kGroup;  // rows
  const T* w[kGroup];
  const T* next[kGroup];
  float v[kGroup];
  int64_t i = 0;
  for (int64_t k = 0; k < std::min(ahead, part.count); ++k)
    for (int64_t c = 0; c < n; c += kStep) prefetch2(weight + part.live[k] * ld + begin + c);
  for (; i + kGroup <= part.count; i += kGroup) {
    const int64_t* live = part.live + i;
    const bool more = i + ahead + kGroup <= part.count;
    for (int64_t k = 0; k < kGroup; ++k) {
      w[k] = weight + live[k] * ld + begin;
      next[k] = more ? weight + live[ahead + k] * ld + begin : nullptr;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < kGroup; ++k) v[k] = part.x[r * d + live[k]];
      accumulate<kGroup, T>(acc + r * n, v, w, more && r == 0 ? next : nullptr, n);
    }
  }
  for (; i < part.count; ++i) {
    w[0] = weight + part.live[i] * ld + begin;
    for (int64_t r = 0; r < rows; ++r) accumulate<1, T>(acc + r * n, part.x + r * d + part.live[i], w, nullptr, n);
  }
  for (int64_t r = 0; r < rows; ++r) finish(out + r * ld + begin, acc + r * n, bias ? bias + begin : nullptr, n);
}

// The task's share of a part's columns begins at this one: tasks cost the same, and all parts are in one list of costs.
inline int64_t boundary(const Part& part, int64_t before, int64_t total, int64_t task, int64_t tasks) {
  if (task == tasks) return part.columns;
  const int64_t column = (total * task / tasks - before) / (part.count + kColumn) / kStep * kStep;
  return std::clamp<int64_t>(column, 0, part.columns);
}

// z [rows, d], threshold [parts, d], weight [d, ld] -> out [rows, ld]; the parts' columns lie side by side.
// False, with nothing done, if weight rows would be multiplied more than `limit` times on average.
template <typename T>
bool masked_rows(const T* z, int64_t rows, int64_t d, const float* threshold, const T* weight, at::IntArrayRef columns,
                 const T* bias, T* out, Scale scale, int64_t limit) {
  const int64_t masks = static_cast<int64_t>(columns.size());
  float* x = buffer<float, 0>(masks * rows * d);
  int64_t* live = buffer<int64_t, 0>(masks * d);
  Part* parts = buffer<Part, 0>(masks);
  int64_t ld = 0, total = 0, products = 0;
  for (int64_t m = 0; m < masks; ++m) {
    float* own = x + m * rows * d;
    const int64_t count = keep(z, rows, d, threshold + m * d, scale, m, own, live + m * d);
    parts[m] = {ld, columns[m], own, live + m * d, count};
    ld += columns[m];
    total += parts[m].cost();
    products += rows * columns[m] * count;
  }
  if (products > limit * ld * d) return false;
  const int64_t most = total * static_cast<int64_t>(sizeof(T)) / kMinBytes;
  const int64_t tasks = std::clamp<int64_t>(most, 1, at::get_num_threads());
  const int64_t widest = std::max(kStep, kTile / rows / kStep * kStep);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    float* acc = buffer<float, 1>(widest * rows);
    for (int64_t m = 0, before = 0; m < masks; before += parts[m++].cost()) {
      const Part& part = parts[m];
      const int64_t from = boundary(part, before, total, first, tasks), to = boundary(part, before, total, last, tasks);
      const int64_t tiles = std::max<int64_t>(1, at::divup(to - from, widest));  // of the same width
      const int64_t tile = at::divup(at::divup(to - from, tiles), kStep) * kStep;
      for (int64_t begin = from; begin < to; begin += tile)
        masked_tile(part, rows, d, weight, ld, part.begin + begin, std::min(tile, to - begin), bias, out, acc);
    }
  });
  return true;
}

// x in float32, in the order of load2.
template <typename T>
void widen(const T* x, int64_t d, float* wide) {
  int64_t c = 0;
  for (; c + kStep <= d; c += kStep) {
    const Two v = load2(x + c);
    store(wide + c, v.a);
    store(wide + c + kLane, v.b);
  }
  for (; c < d; ++c) wide[c] = static_cast<float>(x[c]);
}

// COUNT outputs at once: weight rows against x as `widen` has it; `next`: rows to prefetch, or none.
template <int COUNT, typename T>
inline void dot(const float* x, const T* const* weight, const T* const* next, int64_t d, float* result) {
  Floats a[COUNT] = {};
  int64_t c = 0;
  for (; c + kStep <= d; c += kStep) {
    const Two v = load2(x + c);
    for (int k = 0; k < COUNT; ++k) {
      const Two w = load2(weight[k] + c);
      a[k] += v.a * w.a;
      a[k] += v.b * w.b;
      if (next) prefetch2(next[k] + c);
    }
  }
  for (int k = 0; k < COUNT; ++k) {
    result[k] = sum(a[k]);
    for (int64_t t = c; t < d; ++t) result[k] = std::fma(x[t], static_cast<float>(weight[k][t]), result[k]);
  }
}

template <typename T>
inline T with_bias(float y, const T* bias, int64_t o) {
  return static_cast<T>(bias ? y + static_cast<float>(bias[o]) : y);
}

template <typename T>
void dense_rows(const T* x, int64_t rows, int64_t d, const T* weight, int64_t d_out, const T* bias, T* out) {
  float* wide = buffer<float, 0>(rows * d);
  for (int64_t r = 0; r < rows; ++r) widen(x + r * d, d, wide + r * d);
  const int64_t groups = at::divup(d_out, kGroup);
  at::parallel_for(0, groups, grain(groups, d * d_out * sizeof(T)), [&](int64_t first, int64_t last) {
    const T* w[kGroup];
    const T* next[kGroup];
    float result[kGroup];
    for (int64_t g = first; g < last; ++g) {
      const int64_t o = g * kGroup, n = std::min(kGroup, d_out - o);
      for (int64_t k = 0; k < n; ++k) {
        w[k] = weight + (o + k) * d;
        next[k] = w[k] + kGroup * d;  // behind the last row nothing is read
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (n == kGroup)
          dot<kGroup>(wide + r * d, w, r == 0 ? next : nullptr, d, result);
        else
          for (int64_t k = 0; k < n; ++k) dot<1, T>(wide + r * d, w + k, nullptr, d, result + k);
        for (int64_t k = 0; k < n; ++k) out[r * d_out + o + k] = with_bias(result[k], bias, o + k);
      }
    }
  });
}

// hidden[c] = act(y[c]) * y[h + c], the activation rounded to T first, as the plain form does.
template <typename T>
void gate(Activation a, const T* y, int64_t rows, int64_t h, T* hidden) {
  activated(a, [&](auto act) {
    at::parallel_for(0, rows, grain(rows, rows * h * sizeof(T)), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const T* row = y + r * 2 * h;
        by_lane(h, [&](int64_t c, int64_t n) {
          store(hidden + r * h + c, as<T>(activate<act.value>(load(row + c, n))) * load(row + h + c, n), n);
        });
      }
    });
  });
}

// kept[r][j] = 1 where the activated gate [rows, h], times the scale of mask 1, survives, else 0; NaN is kept.
template <typename T>
void survivors(Activation a, const T* gate, int64_t rows, int64_t h, const float* threshold, Scale scale, float* kept) {
  activated(a, [&](auto act) {
    at::parallel_for(0, rows, grain(rows, rows * h * sizeof(T)), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const float by = scale.of(r, 1);
        by_lane(h, [&](int64_t j, int64_t n) {
          const Floats g = as<T>(activate<act.value>(load(gate + r * h + j, n)));
          store(kept + r * h + j, absolute(g) * by < load(threshold + j, n) ? Floats{} : Floats{} + 1.0f, n);
        });
      }
    });
  });
}

// kept [rows, h] -> which of the h any row keeps; returns how many.
inline int64_t together(const float* kept, int64_t rows, int64_t h, int64_t* live) {
  float* any = buffer<float, 5>(h);
  std::copy(kept, kept + h, any);
  for (int64_t r = 1; r < rows; ++r)
    by_lane(h, [&](int64_t j, int64_t n) { store(any + j, load(any + j, n) + load(kept + r * h + j, n), n); });
  int64_t count = 0;
  for (int64_t j = 0; j < h; ++j) {
    live[count] = j;
    count += any[j] != 0.0f;
  }
  return count;
}

// out[r][j] = weight[j] . x[r] where kept, else 0; x [rows, d], weight [h, d], out's rows ld apart. The weight rows `live`
// are read once, and multiplied by every row of x.
template <typename T>
void live_rows(const T* x, int64_t rows, int64_t d, const float* kept, const int64_t* live, int64_t count, const T* weight,
               int64_t h, const T* bias, T* out, int64_t ld) {
  float* wide = buffer<float, 0>(rows * d);
  for (int64_t r = 0; r < rows; ++r) {
    widen(x + r * d, d, wide + r * d);
    std::fill(out + r * ld, out + r * ld + h, static_cast<T>(0.0f));
  }
  at::parallel_for(0, count, grain(count, count * d * sizeof(T)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += kLiveGroup) {
      float result[kLiveGroup];
      const int64_t n = std::min(kLiveGroup, last - i);
      const T* w[kLiveGroup];
      const T* next[kLiveGroup];
      for (int64_t k = 0; k < kLiveGroup; ++k) {
        w[k] = weight + live[std::min(i + k, last - 1)] * d;
        next[k] = weight + live[std::min(i + k + kLiveGroup, last - 1)] * d;
      }
      for (int64_t r = 0; r < rows; ++r) {
        dot<kLiveGroup>(wide + r * d, w, r == 0 ? next : nullptr, d, result);
        for (int64_t k = 0; k < n; ++k) {
          const int64_t j = live[i + k];
          if (kept[r * h + j] != 0.0f) out[r * ld + j] = with_bias(result[k], bias, j);
        }
      }
    }
  });
}

}  // namespace
