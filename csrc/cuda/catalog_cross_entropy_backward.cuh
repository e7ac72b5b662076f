// The gradient of catalog_cross_entropy. With p the softmax, a row's logits have the gradient
//
//   grad * (p - (1 - smoothing) [its own target] - smoothing / N)
//
// and from it come those of users, table and bias, in two passes without atomics, which take the scores
// again and are one kernel: users stay and items stream by, or items stay and users stream by. The target's
// share is subtracted before a weight is rounded to the operands' dtype, because p - 1 cancels.
#pragma once

#include "cuda/catalog_cross_entropy_backward.h"
#include "cuda/catalog_cross_entropy_tiles.cuh"

namespace attnrec::cuda {

template <class Kind, int D>
struct GradientShape {
  using T = typename Kind::T;
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kN = kHalf ? (D <= 16 ? 64 : D <= 128 ? 32 : 16) : (D <= 64 ? 32 : 16);
  static constexpr int kMT = kHalf && D <= 64 ? 2 : 1;
  static constexpr bool kHeld = D * kMT <= 128;
  // On an SM. A100, D = 32: 96 cycles a thousand scores, without a bound and with tiles of 64 rows 122; 346
  // at 128, without 431; at 64 a third spills.
  static constexpr int kBlocks = !kHalf || D > 128 || D == 64 ? 1 : D == 32 ? 4 : 3;
  // A second tile of the columns that a block adds up, where they are not all of the first one's.
  static constexpr int kSecond = kColumns<D> < D ? kColumns<D> : 0;

  static constexpr int64_t bytes(int warps) {
    return (2 * (kTile<T, D, kN> + kTile<T, kSecond, kN>)+16 * kMT * warps *
            kStride<T, D>)*static_cast<int64_t>(sizeof(T));
  }
};

// What the passes read of a row beside its vector; lse = inf and grad = 0 where it is ignored or not there.
struct RowGradient {
  float lse, grad;  // the loss's gradient, over the scale
};

// In fp16 weights are multiplied by 2^kGain where they are operands: most over a large table are not normal
// numbers there. In the exponent it costs nothing.
constexpr float kGain = 14.0f;

struct GradientScratch {
  RowGradient* rows;           // [T], padded as CrossEntropyRows
  float* scale;                // a power of two that brings the loss's gradients near 1; or null: 1
  float* change;               // [T], of the own targets' logits, with negatives
  float *of_users, *of_items;  // [pieces, T, width], [pieces, items, width]
  float* of_bias;              // [pieces, items]
  int width;                   // D, rounded up
};

struct GradientLaunch {
  CrossEntropyRows rows;
  GradientScratch scratch;
  Vectors stay, stream;
  int64_t stay_count, stream_count;
  bool by_items;  // items stay
  bool stay_vectors, stream_vectors;
  int64_t piece;
  float gain, share, even;  // share and even times 2^gain
  float* sums;              // [pieces, stay_count, width], or null
  float* of_bias;           // [pieces, stay_count], or null
  void* direct;             // in place of `sums`: [stay_count, D] in T
};

template <class Kind, int D>
__global__ __launch_bounds__(kMostThreads, GradientShape<Kind, D>::kBlocks) void gradient_pass_kernel(
    const CrossEntropy c, const GradientLaunch p) {
  using T = typename Kind::T;
  using Shape = GradientShape<Kind, D>;
  constexpr int N = Shape::kN, NT = N / 8, MT = Shape::kMT, V = kColumns<D>;
  const int tile_rows = 16 * MT * (blockDim.x / kWarp), first_row = threadIdx.x / kWarp * 16 * MT;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile_rows;
  const int first_column = blockIdx.z * V;
  const auto row_at = [&](int i, int h) { return begin + first_row + 16 * i + 8 * h + lane() / 4; };

  // Of each row that stays: a user's target and lse, or an item's id and what is added to its logits.
  int id[MT][2];
  float number[MT][2], of_bias[MT][2] = {};
#pragma unroll
  for (int i = 0; i < MT; i++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = row_at(i, h);
      const bool there = row < p.stay_count;
      if (p.by_items) {
        id[i][h] = p.rows.ids && there ? p.rows.ids[row] : static_cast<int>(row);
        number[i][h] = p.rows.added && there ? p.rows.added[row] : 0.0f;
      } else {
        id[i][h] = there ? p.rows.target[row] : -1;
        number[i][h] = there ? p.scratch.rows[row].lse : infinity();
      }
    }
  }

  extern __shared__ __align__(16) char memory[];
  T* stages = reinterpret_cast<T*>(memory);
  T* stay = stages + 2 * (kTile<T, D, N> + kTile<T, Shape::kSecond, N>);
  load_tile<T, D>(stay, tile_rows, c.dim, p.stay_vectors, [&](int r) -> const T* {
    const int64_t row = begin + r;
    if (row >= p.stay_count) return nullptr;
    const bool hidden =
        p.by_items ? p.rows.added && p.rows.added[row] == -infinity() : p.rows.target[row] < 0;
    return hidden ? nullptr : row_of<T>(p.stay, row);
  });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  Rows<Kind, D, MT, Shape::kHeld> rows;
  rows.load(stay + first_row * kStride<T, D>);

  const Set<T> set{
      {static_cast<const T*>(p.stream.data), static_cast<const T*>(p.stream.data) + first_column},
      {p.stream.row_stride, p.stream.row_stride},
      {c.dim, c.dim - first_column},
      p.stream_vectors};
  const auto shown = [&](int n, int) {
    if (p.by_items) return p.rows.target[n] >= 0;
    return !p.rows.added || p.rows.added[n] != -infinity();
  };
  const auto weight = [&](float z, float lse) { return ptx::exp2(fmaf(z - lse, kLog2e, p.gain)); };

  // Of users, by the items that stream by. Logits are rounded as in the forward, where they may be an lse.
  const auto of_users = [&](float (&s)[MT][NT][4], int event, const ItemColumns& columns) {
    columns.logits(s, id, event);
    const float factor = columns.added ? 1.0f : c.factor;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int x = 0; x < 4; x++) {
          s[i][j][x] = weight(__fmul_rn(s[i][j][x], factor), number[i][x / 2]);
        }
      }
    }
    if (columns.ids) return;
    for_own(s, id, event, [&](int, int, float& x) { x -= p.share; });
    if (p.even == 0.0f) return;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int x = 0; x < 4; x++) s[i][j][x] -= p.even;
      }
    }
  };
  // Of items, by the users that stream by.
  const auto of_items = [&](float (&s)[MT][NT][4], int event) {
#pragma unroll
    for (int j = 0; j < NT; j++) {
      const int column = event + column_of(j, 0);
      const float4 of_rows = *reinterpret_cast<const float4*>(p.scratch.rows + column);
      const int2 targets = *reinterpret_cast<const int2*>(p.rows.target + column);
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int x = 0; x < 4; x++) {
          const float z = fmaf(s[i][j][x], c.factor, number[i][x / 2]);
          const bool own = (x % 2 ? targets.y : targets.x) == id[i][x / 2];
          float d = weight(own && p.rows.ids ? -infinity() : z, x % 2 ? of_rows.z : of_rows.x);
          if (own && !p.rows.ids) d -= p.share;
          d = (d - p.even) * (x % 2 ? of_rows.w : of_rows.y);
          of_bias[i][x / 2] += d;
          s[i][j][x] = d;
        }
      }
    }
  };

  float scale = 1.0f;
  if (p.by_items) scale = ptx::exp2(-p.gain) * (p.scratch.scale ? *p.scratch.scale : 1.0f);
  float acc[MT][V / 8][4] = {};
  const int first = static_cast<int>(blockIdx.y * p.piece);
  const int last = static_cast<int>(min(first + p.piece, p.stream_count));
  const ItemColumns columns{p.rows.ids, p.rows.added, c.factor, last};
  for_each_tile<T, D, Shape::kSecond, N>(set, stages, first, last, shown,
                                         [&](int event, const T* tile, const T* second) {
                                           float s[MT][NT][4];
                                           scores<Kind, D, N, MT>(s, rows, tile);
                                           if (p.by_items) {
                                             of_items(s, event);
                                           } else {
                                             of_users(s, event, columns);
                                           }
                                           if (p.sums || p.direct)
                                             weigh<Kind, V, N, MT>(acc, s, V == D ? tile : second);
                                         });

#pragma unroll
  for (int i = 0; i < MT; i++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = row_at(i, h);
      const float bias = of_row(of_bias[i][h]) * scale;
      if (row >= p.stay_count) continue;
      const int64_t at = blockIdx.y * p.stay_count + row;
      if (p.of_bias && first_column == 0 && lane() % 4 == 0) p.of_bias[at] = bias;
      if (!p.sums && !p.direct) continue;
      const bool hidden = p.by_items && number[i][h] == -infinity();
      const float factor = p.by_items ? scale * c.factor : 1.0f;
#pragma unroll
      for (int d = 0; d < V / 8; d++) {
        const int column = 8 * d + lane() % 4 * 2;
        const float x = hidden ? 0.0f : acc[i][d][2 * h] * factor;
        const float y = hidden ? 0.0f : acc[i][d][2 * h + 1] * factor;
        if (p.direct) {
          store_pair<Kind>(static_cast<T*>(p.direct) + row * c.dim + first_column, column,
                           c.dim - first_column, c.dim % 2 == 0, x, y);
        } else if (first_column + column < p.scratch.width) {
          float* to = p.sums + at * p.scratch.width + first_column + column;
          *reinterpret_cast<float2*>(to) = make_float2(x, y);
        }
      }
    }
  }
}

// --- before and after the passes ---------------------------------------------------------------------------

__device__ inline float grad_of(const CrossEntropyGradient& g, int64_t row) {
  return load_element(g.grad_loss, row * g.grad_stride, g.grad_element);
}

// The power of two below the largest gradient. One block.
__global__ void gradient_scale_kernel(const CrossEntropy c, const CrossEntropyGradient g,
                                      const CrossEntropyRows rows, float* scale) {
  __shared__ float memory[kWarp];
  float most = 0.0f;
  for (int64_t r = threadIdx.x; r < c.rows; r += blockDim.x) {
    if (rows.target[r] >= 0) most = fmaxf(most, fabsf(grad_of(g, r)));
  }
  most = over_block(most, Maximum(), memory);
  const int exponent = __float_as_int(most) & 0x7f800000;
  if (threadIdx.x == 0) *scale = exponent == 0 || exponent == 0x7f800000 ? 1.0f : __int_as_float(exponent);
}

__global__ void gradient_rows_kernel(const CrossEntropy c, const CrossEntropyGradient g,
                                     const CrossEntropyRows rows, const GradientScratch scratch,
                                     int64_t padded, int64_t* keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < padded) {
    RowGradient x{infinity(), 0.0f};
    float change = 0.0f;
    if (rows.target[i] >= 0) {
      x.lse = g.lse[i * g.lse_stride];
      x.grad = grad_of(g, i) / (scratch.scale ? *scratch.scale : 1.0f);
      if (scratch.change) {
        const float z = __fmul_rn(rows.own[i], rows.added ? 1.0f : c.factor);
        change = grad_of(g, i) * (ptx::exp2((z - x.lse) * kLog2e) - 1.0f);
      }
    }
    scratch.rows[i] = x;
    if (scratch.change && i < c.rows) scratch.change[i] = change;
  }
  if (!keys || i >= c.items + c.rows) return;
  const int id = i < c.items ? rows.ids[i] : rows.target[i - c.items];
  keys[i] = id < 0 ? c.table_items : id;
}

// The gradients of `count` users from `first` on, from what the pieces of the items gave: a thread a number.
__global__ void finish_users_kernel(const CrossEntropy c, const CrossEntropyGradient g,
                                    const CrossEntropyRows rows, const GradientScratch scratch, int pieces,
                                    float gain, int64_t first, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t in_group = i / c.dim, row = first + in_group, d = i % c.dim;
  if (in_group >= count) return;
  float total = 0.0f;
  if (rows.target[row] >= 0) {
    for (int piece = 0; piece < pieces; piece++) {
      total += scratch.of_users[(piece * count + in_group) * scratch.width + d];
    }
    total *= ptx::exp2(-gain) * grad_of(g, row);
    if (scratch.change) {
      const float own = load_element(c.table.data, rows.target[row] * c.table.row_stride + d, c.element);
      total = fmaf(scratch.change[row], own, total);
    }
    total *= c.factor;
  }
  store_element(g.users, row * c.dim + d, c.element, total);
}

// The items' gradients from what the pieces of the rows gave; without negatives.
__global__ void finish_items_kernel(const CrossEntropy c, const CrossEntropyGradient g,
                                    const GradientScratch scratch, int pieces, bool table) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (table && i < c.items * c.dim) {
    const int64_t item = i / c.dim, d = i % c.dim;
    float total = 0.0f;
    for (int piece = 0; piece < pieces; piece++) {
      total += scratch.of_items[(piece * c.items + item) * scratch.width + d];
    }
    store_element(g.table, i, c.element, total);
  }
  if (g.bias && i < c.items) {
    float total = 0.0f;
    for (int piece = 0; piece < pieces; piece++) total += scratch.of_bias[piece * c.items + i];
    store_element(g.bias, i, g.bias_element, total);
  }
}

// One item's gradient from all entries with its key: negatives, numbers below M, and rows whose target it is.
// The block of the first of them sums them, always in the same order.
constexpr int kCollectThreads = 128;

__global__ void cross_entropy_collect_kernel(const CrossEntropy c, const CrossEntropyGradient g,
                                             const GradientScratch scratch, int pieces, const int64_t* keys,
                                             const int64_t* order) {
  const int64_t first = blockIdx.x, entries = c.items + c.rows, key = keys[first];
  if (key >= c.table_items || (first > 0 && keys[first - 1] == key)) return;
  __shared__ float memory[kCollectThreads];
  // Column D is the bias.
  int columns = 1;
  while (columns < kCollectThreads && columns < c.dim + 1) columns *= 2;
  const int groups = kCollectThreads / columns, group = threadIdx.x / columns;
  for (int d = threadIdx.x % columns; d - static_cast<int>(threadIdx.x) % columns < c.dim + 1; d += columns) {
    float total = 0.0f;
    for (int64_t e = first + group; e < entries && keys[e] == key && d <= c.dim; e += groups) {
      const int64_t number = order[e], row = number - c.items;
      if (row >= 0) {
        const float change = scratch.change[row];
        if (d == c.dim) {
          total += change;
        } else if (g.table) {
          const float user = load_element(c.users.data, row * c.users.row_stride + d, c.element);
          total = fmaf(change * c.factor, user, total);
        }
      } else if (d < c.dim ? g.table != nullptr : g.bias != nullptr) {
        for (int piece = 0; piece < pieces; piece++) {
          const int64_t at = piece * c.items + number;
          total += d < c.dim ? scratch.of_items[at * scratch.width + d] : scratch.of_bias[at];
        }
      }
    }
    memory[threadIdx.x] = total;
    __syncthreads();
    if (group == 0 && d <= c.dim) {
      for (int i = 1; i < groups; i++) total += memory[i * columns + threadIdx.x];
      if (d < c.dim && g.table) store_element(g.table, key * c.dim + d, c.element, total);
      if (d == c.dim && g.bias) store_element(g.bias, key, g.bias_element, total);
    }
    __syncthreads();
  }
}

}  // namespace attnrec::cuda
