// The streaming softmax: what every kernel that runs rows past a set of events shares.
//
// A block has a tile of rows (candidates and heads of one user), 16 or 32 to a warp, and runs over the user's
// events tile by tile (`for_each_tile`). What it does with a tile of scores is the readout.
//
// One order of summation, whatever else is in the batch: tiles are cut at multiples of N from the start of a
// history, N depends on dtype and head dim only, and rows share loads, never arithmetic.
#pragma once

#include "cuda/attention.h"
#include "cuda/jagged.cuh"
#include "cuda/products.cuh"
#include "cuda/reductions.cuh"

namespace attnrec::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Threads of a block at most. How many such blocks an SM is to have at a time is what a kernel asks for in
// `__launch_bounds__`: with 3 ptxas keeps to 168 registers, with 4 to 128, without a number to 255. In half
// precision it is as many as do not spill; beside each number is what benches/model_cuda.py says of it.
constexpr int kMostThreads = 128;
// Events of a chunk. A longer history is cut into chunks by an event's place in it; their softmaxes are
// merged in order, by the same arithmetic whether one block runs all of them or a block each.
constexpr int kChunkEvents = 1024;
// Blocks at most, where each runs a chunk: more fill a chip without that, and their parts wait in memory (of
// 64 rows with 130 floats each 70 MB).
constexpr int64_t kMostApart = 2048;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// --- the jagged batch --------------------------------------------------------------------------------------

struct History {
  int64_t begin;
  int length;
};

__device__ __forceinline__ History history_of(const Attention& a, int64_t user) {
  const Range room = user_range(a.kv_offsets, user, a.events);
  int64_t length = room.end - room.first;
  if (a.kv_lengths.data) length = min(max(a.kv_lengths[user], int64_t{0}), length);
  return {room.first, static_cast<int>(length)};
}

// A block's tile of rows: row r is candidate `first + r / pack`, head `head + r % pack`.
struct RowTile {
  Range range;  // candidates of the tile's user from the tile's first on
  int head, pack, candidates;

  __device__ int64_t candidate(int r) const { return range.first + r / pack; }
  __device__ int query_head(int r) const { return head + r % pack; }
  __device__ bool valid(int r) const { return r / pack < candidates && candidate(r) < range.end; }
};

// How many of `length` events a candidate sees.
__device__ __forceinline__ int seen_events(const Attention& a, int64_t candidate, int length) {
  if (!a.visible.data) return length;
  return static_cast<int>(min(max(a.visible[candidate], int64_t{0}), static_cast<int64_t>(length)));
}

// The fewest and the most events that a block's first `count` rows see; `bounds`: two numbers in shared
// memory.
__device__ __forceinline__ void bound_seen(const Attention& a, const RowTile& rows, int count, int length,
                                           int* bounds, int& least, int& most) {
  least = most = length;
  if (!a.visible.data) return;
  if (threadIdx.x == 0) bounds[0] = length, bounds[1] = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    if (!rows.valid(r)) continue;
    const int n = seen_events(a, rows.candidate(r), length);
    atomicMin(&bounds[0], n);
    atomicMax(&bounds[1], n);
  }
  __syncthreads();
  least = bounds[0], most = bounds[1];
}

// --- loads -------------------------------------------------------------------------------------------------

// A row to be copied: zeros where it is not `there`, and nothing is read then.
template <class T>
struct Source {
  const T* at;
  bool there;
};

// Row n >= 0 of rows `stride` apart; n unsigned, which is two instructions less than signed.
template <class T>
__device__ __forceinline__ const T* row_behind(const T* first, int64_t stride, int n) {
  return first + static_cast<uint32_t>(n) * stride;
}

// Rows of K tensors to shared memory by the whole block, under way until `cp_async_wait`, with zeros beyond
// `dim`; `row_at(x, r)`: row r of tensor x, which goes `x * apart` behind `shared`. `vectors`: rows begin at
// multiples of 16 bytes. A thread copies the same columns of each of its rows, and whether a row is there is
// a matter of how many bytes it has, not of a branch: with branches this was half of the instructions of a
// gradient's loop.
template <class T, int D, int K, class RowAt>
__device__ __forceinline__ void load_tiles(T* shared, int apart, int rows, const int (&dim)[K], bool vectors,
                                           const RowAt& row_at) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T)), kPieces = D / kPiece;
  constexpr int kAcross = kPieces < kWarp ? kPieces : kWarp;
  const int column = threadIdx.x % kAcross * kPiece;
  const auto for_each_piece = [&](const auto& copy) {
    for (int r = threadIdx.x / kAcross; r < rows; r += blockDim.x / kAcross) {
#pragma unroll
      for (int x = 0; x < K; x++) {
        const Source<T> row = row_at(x, r);
#pragma unroll
        for (int d = 0; d < D; d += kAcross * kPiece) {
          copy(shared + x * apart + r * kStride<T, D> + column + d, row.at + column + d,
               row.there ? dim[x] - column - d : 0);
        }
      }
    }
  };
  bool whole = vectors;
#pragma unroll
  for (int x = 0; x < K; x++) whole &= dim[x] % kPiece == 0;
  if (whole) {
    for_each_piece([](T* to, const T* from, int count) { ptx::cp_async(to, from, count > 0 ? 16 : 0); });
  } else if (vectors) {
    for_each_piece([](T* to, const T* from, int count) {
      ptx::cp_async(to, from, min(max(count, 0), kPiece) * static_cast<int>(sizeof(T)));
    });
  } else {
    for_each_piece([](T* to, const T* from, int count) {
#pragma unroll
      for (int e = 0; e < kPiece; e++) to[e] = e < count ? from[e] : from_float<T>(0.0f);
    });
  }
}

// The same of one tensor, of which `row_at(r)` is null for zeros.
template <class T, int D, class RowAt>
__device__ __forceinline__ void load_tile(T* shared, int rows, int dim, bool vectors, const RowAt& row_at) {
  load_tiles<T, D, 1>(shared, 0, rows, {dim}, vectors, [&](int, int r) -> Source<T> {
    const T* row = row_at(r);
    return {row, row != nullptr};
  });
}

// The set: one or two tensors whose rows are read side by side, keys and values.
template <class T>
struct Set {
  const T* rows[2];
  int64_t stride[2];
  int dim[2];
  bool vectors;
};

// Elements of a tile of N rows.
template <class T, int D, int N>
constexpr int kTile = D > 0 ? N * kStride<T, D> : 0;

// Runs `step(row, tile0, tile1)` over the tiles of rows `first` (a multiple of N) to `last`, D0 and D1 wide;
// D1 = 0: of one tensor. While one is worked on the next is loaded: `stages` holds two of each.
// `row_at(x, row)`: the row in tensor x; where `shown(x, row)` is false it is zeros. `load_more(row, to)`
// loads what belongs to the tile beside, MORE elements behind tile1.
template <class T, int D0, int D1, int N, int MORE, class RowAt, class Shown, class LoadMore, class Step>
__device__ __forceinline__ void stream_tiles(T* stages, int first, int last, const int (&dim)[2],
                                             bool vectors, const RowAt& row_at, const Shown& shown,
                                             const LoadMore& load_more, const Step& step) {
  constexpr int kSecond = kTile<T, D0, N>, kMore = kSecond + kTile<T, D1, N>, kStage = kMore + MORE;
  const auto load = [&](int row, T* stage) {
    const auto at = [&](int x, int n) -> Source<T> {
      return {row_at(x, row + n), row + n < last && shown(x, row + n)};
    };
    if constexpr (D0 == D1 && sizeof(T) == 2) {  // the addresses of two spill beside what fp32 keeps
      load_tiles<T, D0, 2>(stage, kSecond, N, dim, vectors, at);
    } else {
      load_tiles<T, D0, 1>(stage, 0, N, {dim[0]}, vectors, at);
      if constexpr (D1 > 0) {
        load_tiles<T, D1, 1>(stage + kSecond, 0, N, {dim[1]}, vectors, [&](int, int n) { return at(1, n); });
      }
    }
    load_more(row, stage + kMore);
    ptx::cp_async_commit();
  };
  // One load more than steps, in one place of the code.
  int now = 0;
  for (int row = first - N; row < last; row += N, now ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the other one any more
    if (row + N < last) load(row + N, stages + (now ^ 1) * kStage);
    if (row < first) continue;
    T* tile = stages + now * kStage;
    step(row, tile, tile + kSecond);
  }
  __syncthreads();
}

// The same over rows of a set, events. `shown(event, x)`: false keeps row `event` of tensor x out, as zeros.
template <class T, int D0, int D1, int N, class Shown, class Step>
__device__ __forceinline__ void for_each_tile(const Set<T>& set, T* stages, int first, int last,
                                              const Shown& shown, const Step& step) {
  stream_tiles<T, D0, D1, N, 0>(
      stages, first, last, set.dim, set.vectors,
      [&](int x, int event) { return row_behind(set.rows[x], set.stride[x], event); },
      [&](int x, int event) { return shown(event, x); }, [](int, T*) {}, step);
}

// --- scores ------------------------------------------------------------------------------------------------

// What turns products into scores in units of log2 (or others: the factor and the bias's unit say which):
// `s * unit`, with `s` after `mask_scores`.
struct Scoring {
  float factor;      // scale * log2(e)
  bool multiply;     // the factor is taken into the scores; always where it is not positive
  const void* bias;  // of the set's rows, or null
  Element bias_element;
  int64_t bias_stride;
  int length;                // of the set
  float bias_unit = kLog2e;  // what the bias is multiplied with

  __device__ float unit() const { return multiply ? 1.0f : factor; }
  __device__ float bias_at(int event) const {  // -inf beyond the end
    if (event >= length) return -infinity();
    return load_element(bias, event * bias_stride, bias_element);
  }
};

__device__ __forceinline__ Scoring scoring_of(const Attention& a, float factor, const History& history,
                                              int head) {
  Scoring scoring{factor,        factor <= 0.0f || a.key_bias, nullptr, a.bias_element, a.bias_row_stride,
                  history.length};
  if (a.key_bias) {
    scoring.bias = static_cast<const char*>(a.key_bias) +
                   (history.begin * a.bias_row_stride + head * a.bias_head_stride) *
                       (a.bias_element == Element::kFloat32 ? 4 : 2);
  }
  return scoring;
}

// The careful run: 0 * NaN is NaN, so a value that is not finite must not reach the rows that do not see it.
// The usual loop does not look for such values; where its sums are not finite, the pass is run again, and
// they are taken out of the tile before it is weighed, and noted by column and `number_of(row of the tile)`.
template <class Kind, int D, int N, class NumberOf>
__device__ __forceinline__ void take_out_non_finite(typename Kind::T* tile, const NonFinite& bad,
                                                    const NumberOf& number_of) {
  using T = typename Kind::T;
  for (int i = threadIdx.x; i < N * D; i += blockDim.x) {
    T& x = tile[i / D * kStride<T, D> + i % D];
    x = from_float<T>(bad.take(to_float(x), number_of(i / D), i % D));
  }
}

// In it, zeros in place of the rows that the bias hides. Each thread has the numbers of the tile that it has
// in `take_out_non_finite`.
template <class T, int D, int N>
__device__ __forceinline__ void take_out_hidden(T* tile, const Scoring& scoring, int event) {
  if (!scoring.bias) return;
  for (int i = threadIdx.x; i < N * D; i += blockDim.x) {
    if (scoring.bias_at(event + i / D) == -infinity())
      tile[i / D * kStride<T, D> + i % D] = from_float<T>(0.0f);
  }
}

// The event of column `c` of `s[j]`, counted in the tile.
__device__ __forceinline__ int column_of(int j, int c) { return 8 * j + lane() % 4 * 2 + c % 2; }

// function(x, j, c) for each number of 16 rows that a thread has.
template <int NT, class Function>
__device__ __forceinline__ void for_each_score(float (&x)[NT][4], const Function& function) {
#pragma unroll
  for (int j = 0; j < NT; j++) {
#pragma unroll
    for (int c = 0; c < 4; c++) function(x[j][c], j, c);
  }
}

// Products as scores; -inf where `event + column >= seen[row]` (`masked`: there may be such) or the bias is
// -inf.
template <int MT, int NT>
__device__ __forceinline__ void mask_scores(float (&s)[MT][NT][4], const Scoring& scoring,
                                            const int (&seen)[MT][2], int event, bool masked) {
  if (scoring.multiply) {
    if (scoring.bias) {
#pragma unroll
      for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float bias = scoring.bias_at(event + column_of(j, c)) * scoring.bias_unit;
#pragma unroll
          for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
              float& x = s[i][j][2 * h + c];
              x = bias == -infinity() ? bias : fmaf(x, scoring.factor, bias);
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < MT; i++) {
        for_each_score(s[i], [&](float& x, int, int) { x *= scoring.factor; });
      }
    }
  }
  if (masked) {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
          if (event + column_of(j, c) >= seen[i][c / 2]) s[i][j][c] = -infinity();
        }
      }
    }
  }
}

// --- the softmax -------------------------------------------------------------------------------------------

// Over the four threads that have a row's columns.
template <class Operation = Sum>
__device__ __forceinline__ float of_row(float x, Operation operation = {}) {
  return over_lanes<4>(x, operation);
}

// The query of row r, in shared memory, times its candidate's own slot: the same number in the row's threads.
template <int D, class T>
__device__ __forceinline__ float self_product(const Attention& a, const RowTile& rows, const T* queries,
                                              int r, int kv_head) {
  float product = 0.0f;
  if (rows.valid(r)) {
    const T* q = queries + r * kStride<T, D>;
    const T* k = static_cast<const T*>(a.self_key.data) + rows.candidate(r) * a.self_key.row_stride +
                 kv_head * a.self_key.head_stride;
    for (int d = lane() % 4; d < a.head_dim; d += 4) product = fmaf(to_float(q[d]), to_float(k[d]), product);
  }
  return of_row(product);
}

// What a softmax that starts from a self slot with score m weighs: 1, or 0 where that is -inf, or NaN.
__device__ __forceinline__ float self_weight(float m) { return m == -infinity() ? 0.0f : ptx::exp2(m - m); }

// How far, in units of log2, a score may lie above a row's base before the base moves: weights up to 2^8 are
// as good as weights up to 1 in fp32 sums and as bf16 or fp16 operands. It moves a few times in a history;
// the rest of the time a row's maximum is not needed, and the warp does not exchange it: one vote in place of
// two shuffles a row and of a product for each of its D sums.
constexpr float kSlack = 8.0f;

// A row's base m (units of log2) and this thread's part of its sum l of 2^(score - m); rows g and g + 8 of
// each block of 16.
template <int MT>
struct RowSoftmax {
  float m[MT][2], l[MT][2];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) m[i][h] = -infinity(), l[i][h] = 0.0f;
    }
  }

  // A row's base is its own affair: what other rows of the warp do leaves its bits alone.
  template <int NT, class Rescale>
  __device__ __forceinline__ void move_base(const float (&s)[MT][NT][4], float unit, const Rescale& rescale) {
    float top[MT][2];
    bool above = false;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float x = s[i][0][2 * h];
#pragma unroll
        for (int j = 0; j < NT; j++) x = fmaxf(x, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        top[i][h] = x * unit;
        above |= top[i][h] > m[i][h] + kSlack;
      }
    }
    if (!__any_sync(kAll, above)) return;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float x = of_row(top[i][h], Maximum());
        float alpha = 1.0f;
        if (x > m[i][h] + kSlack) {
          alpha = ptx::exp2(m[i][h] - x);  // 0 where there was nothing
          m[i][h] = x;
        }
        l[i][h] *= alpha;
        rescale(i, h, alpha);
      }
    }
  }

  // Turns scores into weights relative to the base, which `move_base` has set, and adds them up.
  template <int NT>
  __device__ __forceinline__ void weights(float (&s)[MT][NT][4], float unit) {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float base = m[i][h] == -infinity() ? 0.0f : m[i][h];  // nothing seen: weights of 0
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
          for (int c = 2 * h; c < 2 * h + 2; c++) {
            s[i][j][c] = ptx::exp2(fmaf(s[i][j][c], unit, -base));
            l[i][h] += s[i][j][c];
          }
        }
      }
    }
  }
};

// The factors that bring the sums of two stretches of events to one base. With a stretch that saw nothing
// they are exactly 1 and 0.
struct Merge {
  float m, before, next;

  __device__ Merge(float m_before, float m_next) {
    m = fmaxf(m_before, m_next);
    before = m_before == m ? 1.0f : ptx::exp2(m_before - m);
    next = m_next == m ? 1.0f : ptx::exp2(m_next - m);
    if (m_next == -infinity()) next = 0.0f;
  }
  __device__ float operator()(float x_before, float x_next) const {
    return fmaf(x_before, before, __fmul_rn(x_next, next));
  }
};

// --- sums and results --------------------------------------------------------------------------------------

// Columns that a thread adds up of a row. At D = 256 two share it: all sums, and what is live beside them,
// are more than the 255 registers of a thread. Each takes the scores for itself.
template <int D>
constexpr int kColumns = D > 128 ? 128 : D;

// Two neighbours of a row, from column `d` on; `pairs`: rows begin at a multiple of two elements.
template <class Kind>
__device__ __forceinline__ void store_pair(typename Kind::T* row, int d, int dim, bool pairs, float x,
                                           float y) {
  if (pairs) {
    if (d >= dim) return;
    if constexpr (sizeof(typename Kind::T) == 2) {
      *reinterpret_cast<uint32_t*>(row + d) = Kind::pack(x, y);
    } else {
      *reinterpret_cast<float2*>(row + d) = make_float2(x, y);
    }
  } else {
    if (d < dim) row[d] = from_float<typename Kind::T>(x);
    if (d + 1 < dim) row[d + 1] = from_float<typename Kind::T>(y);
  }
}

// Natural log of a row's sum of exponentials.
__device__ __forceinline__ float log_sum_exp(float m, float l) {
  return l == 0.0f ? -infinity() : (m + log2f(l)) * kLn2;
}

}  // namespace attnrec::cuda
