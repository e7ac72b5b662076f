// The readout of the streaming softmax that keeps the log-sum-exp alone.
//
// A block has a tile of rows and one split of the items. Logits are in nats, or products that are a factor
// away from them, and a row's own target gets its logit from the same product: where it takes all, the loss
// is 0 exactly, however large the logits.
//
// Nothing is multiplied by the weights, so a row's four threads need no common base: each has the maximum and
// the sum of its own columns, and they meet once, after the last tile.
#pragma once

#include "cuda/catalog_cross_entropy_tiles.cuh"

namespace attnrec::cuda {

// Items of a tile, and the blocks of 16 rows that a warp has: part of what a result's bits depend on, so a
// function of dtype and dim alone.
template <class Kind, int D>
struct LogSumShape {
  using T = typename Kind::T;
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kN = kHalf ? (D <= 128 ? 64 : 32) : (D <= 64 ? 32 : 16);
  static constexpr int kMT = kHalf && D <= 128 ? 2 : 1;
  static constexpr bool kHeld = D <= 128;
  // On an SM. A100: 86 cycles a thousand scores at D = 32, without a bound 110; 106 at 64, without 134.
  static constexpr int kBlocks = kHalf && D <= 64 ? 3 : 1;

  static constexpr int64_t bytes(int warps) {
    return (2 * kTile<T, D, kN> + 16 * kMT * warps * kStride<T, D>)*static_cast<int64_t>(sizeof(T));
  }
};

// --- rows and items ----------------------------------------------------------------------------------------

__device__ inline int64_t clamped(int64_t id, int64_t items) { return min(max(id, int64_t{0}), items - 1); }

__device__ inline float added_to(const CrossEntropy& c, int64_t item) {
  float x = c.bias ? load_element(c.bias, item * c.bias_stride, c.bias_element) : 0.0f;
  if (c.logq) x -= load_element(c.logq, item * c.logq_stride, c.logq_element);
  return x;
}

__device__ inline int64_t padded(int64_t n) {
  return (n + kCrossEntropyPad - 1) / kCrossEntropyPad * kCrossEntropyPad;
}

// Reads no id that is not there, and through none that is not the table's.
__global__ void cross_entropy_rows_kernel(const CrossEntropy c, const CrossEntropyRows to) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t r = first; r < padded(c.rows); r += step) {
    int target = -1;
    if (r < c.rows && c.table_items > 0 && c.target[r] != c.ignore_index) {
      target = static_cast<int>(clamped(c.target[r], c.table_items));
    }
    to.target[r] = target;
  }
  for (int64_t i = first; i < padded(c.items); i += step) {
    const bool there = i < c.items && c.table_items > 0;
    const bool hidden = !there || (c.in_batch && c.negatives[i] == c.ignore_index);
    const int64_t item = hidden ? 0 : c.sampled ? clamped(c.negatives[i], c.table_items) : i;
    if (to.ids) to.ids[i] = hidden ? -2 : static_cast<int>(item);
    if (to.added) to.added[i] = hidden ? -infinity() : added_to(c, item);
  }
  if (!to.items || c.table_items == 0) return;
  for (int64_t i = first; i < c.items * c.dim; i += step) {
    const int64_t item = clamped(c.negatives[i / c.dim], c.table_items), d = i % c.dim;
    const int64_t from = item * c.table.row_stride + d, at = i / c.dim * to.items_stride + d;
    if (c.element == Element::kFloat32) {
      static_cast<float*>(to.items)[at] = static_cast<const float*>(c.table.data)[from];
    } else {
      static_cast<uint16_t*>(to.items)[at] = static_cast<const uint16_t*>(c.table.data)[from];
    }
  }
}

// The logits of the rows' own targets, where these stand outside the items: a warp a row.
__global__ void cross_entropy_own_kernel(const CrossEntropy c, const CrossEntropyRows rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= c.rows) return;
  const int64_t item = rows.target[row];
  if (item < 0) return;
  const float added = rows.added ? added_to(c, item) : 0.0f;
  float x = 0.0f;
  for (int d = lane(); d < c.dim && added != -infinity(); d += kWarp) {
    x = fmaf(load_element(c.users.data, row * c.users.row_stride + d, c.element),
             load_element(c.table.data, item * c.table.row_stride + d, c.element), x);
  }
  x = over_lanes(x, Sum());
  if (rows.added) x = added == -infinity() ? added : fmaf(x, c.factor, added);
  if (lane() == 0) rows.own[row] = x;
}

// --- the softmax -------------------------------------------------------------------------------------------

// The maximum and the sum of exp2((s - maximum) * unit) over some scores.
struct LogSum {
  float m = -infinity(), l = 0.0f;

  // The factor of a sum relative to `from` that makes it relative to `to`, which is not lower.
  static __device__ __forceinline__ float rescaled(float from, float to, float unit) {
    return from == to ? 1.0f : ptx::exp2((from - to) * unit);  // -inf - -inf is NaN
  }
  __device__ __forceinline__ void raise(float x, float unit) {
    if (x > m) {
      l *= rescaled(m, x, unit);
      m = x;
    }
  }
  // The difference first: 0 for the highest score, whatever the rounding of a product with the unit.
  __device__ __forceinline__ float weight(float s, float unit) const {
    return ptx::exp2((s - (m == -infinity() ? 0.0f : m)) * unit);
  }
  __device__ __forceinline__ void merge(float m_next, float l_next, float unit) {
    const float highest = fmaxf(m, m_next);
    l = fmaf(l, rescaled(m, highest, unit), __fmul_rn(l_next, rescaled(m_next, highest, unit)));
    m = highest;
  }
};

struct CrossEntropyParts {
  float *maxima, *sums;  // [splits, T]
  float* totals;         // likewise: of the scores, for label smoothing; or null
};

struct LogSumLaunch {
  CrossEntropyRows rows;
  CrossEntropyParts parts;
  Vectors items;
  int64_t split;
  bool user_vectors, item_vectors;
};

template <class Kind, int D>
__global__ __launch_bounds__(kMostThreads,
                             LogSumShape<Kind, D>::kBlocks) void log_sum_kernel(const CrossEntropy c,
                                                                                const LogSumLaunch p) {
  using T = typename Kind::T;
  using Shape = LogSumShape<Kind, D>;
  constexpr int N = Shape::kN, NT = N / 8, MT = Shape::kMT;
  const int tile_rows = 16 * MT * (blockDim.x / kWarp), first_row = threadIdx.x / kWarp * 16 * MT;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile_rows;

  int target[MT][2];
  bool any = false;
#pragma unroll
  for (int i = 0; i < MT; i++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = begin + first_row + 16 * i + 8 * h + lane() / 4;
      target[i][h] = row < c.rows ? p.rows.target[row] : -1;
      any |= target[i][h] >= 0;
    }
  }
  if (!__syncthreads_or(any)) return;

  extern __shared__ __align__(16) char memory[];
  T* stages = reinterpret_cast<T*>(memory);
  T* users = stages + 2 * kTile<T, D, N>;
  load_tile<T, D>(users, tile_rows, c.dim, p.user_vectors, [&](int r) -> const T* {
    const bool kept = begin + r < c.rows && p.rows.target[begin + r] >= 0;
    return kept ? row_of<T>(c.users, begin + r) : nullptr;
  });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  Rows<Kind, D, MT, Shape::kHeld> rows;
  rows.load(users + first_row * kStride<T, D>);

  const int first = static_cast<int>(blockIdx.y * p.split);
  const int last = static_cast<int>(min(first + p.split, c.items));
  const ItemColumns columns{p.rows.ids, p.rows.added, c.factor, last};
  const float unit = (p.rows.added ? 1.0f : c.factor) * kLog2e;
  LogSum sums[MT][2];
  float totals[MT][2] = {};
  const Set<T> set{
      {static_cast<const T*>(p.items.data), nullptr}, {p.items.row_stride, 0}, {c.dim, 0}, p.item_vectors};
  const auto shown = [&](int event, int) { return columns.shown(event); };
  for_each_tile<T, D, 0, N>(set, stages, first, last, shown, [&](int event, const T* tile, const T*) {
    float s[MT][NT][4];
    scores<Kind, D, N, MT>(s, rows, tile);
    columns.logits(s, target, event);
    if (!p.rows.ids) {
      for_own(s, target, event, [&](int i, int h, float x) {
        p.rows.own[begin + first_row + 16 * i + 8 * h + lane() / 4] = x;
      });
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = s[i][0][2 * h], sum = 0.0f;
#pragma unroll
        for (int j = 0; j < NT; j++) top = fmaxf(top, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        sums[i][h].raise(top, unit);
#pragma unroll
        for (int j = 0; j < NT; j++) {
          sum += sums[i][h].weight(s[i][j][2 * h], unit);
          sum += sums[i][h].weight(s[i][j][2 * h + 1], unit);
        }
        sums[i][h].l += sum;
      }
    }
    if (p.parts.totals) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float sum = 0.0f;
#pragma unroll
          for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int x = 0; x < 2; x++) {
              if (event + column_of(j, x) < last) sum += s[i][j][2 * h + x];
            }
          }
          totals[i][h] += sum;
        }
      }
    }
  });

#pragma unroll
  for (int i = 0; i < MT; i++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      LogSum& x = sums[i][h];
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        x.merge(__shfl_xor_sync(kAll, x.m, distance), __shfl_xor_sync(kAll, x.l, distance), unit);
      }
      const float total = of_row(totals[i][h]);
      if (target[i][h] < 0 || lane() % 4 != 0) continue;
      const int64_t at =
          static_cast<int64_t>(blockIdx.y) * c.rows + begin + first_row + 16 * i + 8 * h + lane() / 4;
      p.parts.maxima[at] = x.m;
      p.parts.sums[at] = x.l;
      if (p.parts.totals) p.parts.totals[at] = total;
    }
  }
}

// A row's splits merged in their order, and its loss: a thread a row.
__global__ void cross_entropy_loss_kernel(const CrossEntropy c, const CrossEntropyRows rows,
                                          const CrossEntropyParts parts, int splits, float* loss,
                                          float* lse) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= c.rows) return;
  if (rows.target[row] < 0) {
    loss[row] = 0.0f;
    lse[row] = -infinity();
    return;
  }
  const float factor = rows.added ? 1.0f : c.factor, own = rows.own[row];
  LogSum sum;
  float total = 0.0f;
  if (rows.ids) {
    sum.m = own;
    sum.l = own == -infinity() ? 0.0f : own - own + 1.0f;  // NaN where the logit is
  }
  for (int split = 0; split < splits; split++) {
    const int64_t at = static_cast<int64_t>(split) * c.rows + row;
    sum.merge(parts.maxima[at], parts.sums[at], factor * kLog2e);
    if (parts.totals) total += parts.totals[at];
  }
  const float log_l = logf(sum.l == 0.0f ? 1.0f : sum.l);
  float of_row = fmaf(sum.m - own, factor, log_l);
  if (parts.totals) {
    of_row = fmaf(c.smoothing, (own - total / static_cast<float>(c.items)) * factor, of_row);
  }
  loss[row] = of_row;
  // Rounded before the sum, as the backward's logits are: where l is 1, it finds weights of exactly 1.
  lse[row] = sum.l == 0.0f ? -infinity() : __fmul_rn(sum.m, factor) + log_l;
}

}  // namespace attnrec::cuda
