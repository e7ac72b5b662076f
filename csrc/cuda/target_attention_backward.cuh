// The gradient of target_attention, and its rows' pass: a block has a tile of rows, runs over the events that
// they see and adds up dQ. With P = exp(s - lse), dP = dO V^T and, for each row, shift = dO out - grad_lse,
//
//   dS = P (dP - shift),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO,  dbias = sum of dS over rows
//
// (Dao et al. 2022, FlashAttention, algorithm 4). The events' pass (target_attention_backward_events.cuh)
// computes the scores again with the roles swapped. Every sum is one thread's, in an order that depends on
// places in the user's history or among its candidates only.
#pragma once

#include <algorithm>

#include "cuda/dispatch.h"
#include "cuda/streaming.cuh"
#include "cuda/target_attention_backward.h"
#include "cuda/vectors.cuh"

namespace attnrec::cuda {

// Rows of a tile of what is streamed, events or rows. Part of what a result's bits depend on, so a function
// of dtype and head dim alone.
template <class Kind, int D>
constexpr int kStreamed = D <= 64                                    ? 32
                          : sizeof(typename Kind::T) == 4 && D > 128 ? 8
                                                                     : 16;

// The two operands that stay are held in registers up to this head dim.
template <int D>
constexpr bool kHeldBoth = D <= 64;

// Blocks of 16 rows (or events) to a thread block. `average`: how many of them a user has, so that small
// requests leave no warps idle. A block of 16 has one warp, or several that share its columns.
inline int row_blocks(int64_t average, int head_dim, Element element) {
  const int parts = head_dim > 128 ? 2 : 1;
  const int most = (element == Element::kFloat32 && head_dim > 64 ? 2 : 4) / parts;
  int blocks = 1;
  while (blocks < most && 16 * blocks < average) blocks *= 2;
  return blocks;
}

struct AttentionGradientLaunch {
  float factor, scale;             // scale * log2(e), scale
  bool rows_vectors;               // query and grad_out begin at multiples of 16 bytes
  bool set_vectors;                // so do key and value
  bool out_vectors, self_vectors;  // these do, and hold whole pieces of 16 bytes
  int sweep_heads;                 // of a sweep of the events' pass
  int pack = 1, candidates = 0;    // of a tile of the rows' pass
};

inline AttentionGradientLaunch gradient_launch(const Attention& a, const AttentionGradient& g) {
  return {a.factor(),
          static_cast<float>(a.scale),
          begin_aligned(a.query, a.element) && begin_aligned(g.grad_out, a.element),
          begin_aligned(a.key, a.element) && begin_aligned(a.value, a.element),
          is_aligned(g.out, a.head_dim, a.element),
          is_aligned(a.self_key, a.head_dim, a.element) && is_aligned(a.self_value, a.head_dim, a.element),
          heads_of_sweep(a)};
}

// --- what both passes need ---------------------------------------------------------------------------------

template <int NT>
__device__ __forceinline__ bool non_finite(const float (&x)[NT][4], const bool (&counts)[2]) {
  bool found = false;
#pragma unroll
  for (int j = 0; j < NT; j++) {
#pragma unroll
    for (int c = 0; c < 4; c++) found |= counts[c / 2] && !(fabsf(x[j][c]) < infinity());
  }
  return found;
}

template <int NT>
__device__ __forceinline__ void clear(float (&x)[NT][4]) {
#pragma unroll
  for (int j = 0; j < NT; j++) x[j][0] = x[j][1] = x[j][2] = x[j][3] = 0.0f;
}

template <class T>
__device__ __forceinline__ const T* row_of(const Vectors& x, int64_t row, int head) {
  return static_cast<const T*>(x.data) + row * x.row_stride + head * x.head_stride;
}

// Where a row's number is in each of the states: rows of a sweep of the events' pass lie together.
__device__ __forceinline__ int64_t state_of(const Attention& a, int sweep_heads, int64_t candidate,
                                            int head) {
  return (head / sweep_heads * a.rows + candidate) * sweep_heads + head % sweep_heads;
}

// A row in shared memory times one in global memory, by the four threads that share a row; all get the sum.
template <class T, int D>
__device__ __forceinline__ float row_product(const T* shared, const T* global, int dim, bool vectors) {
  float sum = 0.0f;
  const auto add = [&](auto aligned) {
#pragma unroll(D > 64 ? 1 : 2)
    for (int d = lane() % 4 * kWidth<T>; d < D; d += 4 * kWidth<T>) {
      const Piece<T>& x = *reinterpret_cast<const Piece<T>*>(shared + d);
      const Piece<T> y = load_piece<T, decltype(aligned)::value>(global, d, dim);
#pragma unroll
      for (int i = 0; i < kWidth<T>; i++) sum = fmaf(x[i], y[i], sum);
    }
  };
  if (global) vectors ? add(std::true_type{}) : add(std::false_type{});
  return of_row(sum);
}

// --- the rows' pass ----------------------------------------------------------------------------------------

// What is known of a row before the events.
struct RowNumbers {
  float minus_lse, shift, grad_lse;  // shift: as `out` tells it
  float self_weight, self_grad;      // P and dP of the self slot
};

// On an SM. A100: 155 cycles a thousand scores at D = 32, without a bound 175; 275 at 64, without 333.
template <class Kind, int D>
constexpr int kGradRowsBlocks = sizeof(typename Kind::T) == 4 ? 1
                                : D > 32                      ? 3
                                                              : 4;

template <class Kind, int D>
struct GradRowsMemory {
  using T = typename Kind::T;
  static constexpr int kStages = 4 * kTile<T, D, kStreamed<Kind, D>>;

  static constexpr int64_t bytes(int blocks) {
    return (kStages + 2 * 16 * blocks * kStride<T, D>)*static_cast<int64_t>(sizeof(T)) +
           (kKinds * D + 16 * blocks * (1 + sizeof(RowNumbers) / 4) + 2) * 4;
  }
};

template <class Kind, int D>
__global__ __launch_bounds__(kMostThreads, kGradRowsBlocks<Kind, D>) void grad_rows_kernel(
    const Attention a, const AttentionGradient g, const AttentionGradientLaunch p) {
  using T = typename Kind::T;
  constexpr int N = kStreamed<Kind, D>, V = kColumns<D>, kParts = D / V;
  const Tile tile = find_tile(blockIdx.x, a.q_offsets, a.users, a.rows, p.candidates);
  if (tile.rows.first >= tile.rows.end) return;
  const int head = blockIdx.y * p.pack, kv_head = head / (a.heads / a.kv_heads);
  const RowTile rows{tile.rows, head, p.pack, p.candidates};
  const History history = history_of(a, tile.user);
  const int warp = threadIdx.x / kWarp, all_rows = 16 * (blockDim.x / kWarp / kParts);
  const int first_row = warp / kParts * 16, first_column = warp % kParts * V, t = lane() % 4;
  const auto own = [&](int h) { return first_row + 8 * h + lane() / 4; };

  extern __shared__ __align__(16) char memory[];
  T* stages = reinterpret_cast<T*>(memory);
  T* queries = stages + GradRowsMemory<Kind, D>::kStages;
  T* grad_outs = queries + all_rows * kStride<T, D>;
  int* bad_events = reinterpret_cast<int*>(grad_outs + all_rows * kStride<T, D>);
  RowNumbers* numbers = reinterpret_cast<RowNumbers*>(bad_events + kKinds * D);
  int* seen_of = reinterpret_cast<int*>(numbers + all_rows);
  int* bounds = seen_of + all_rows;  // of seen_of

  // How many events each row sees; -1 where it has lse = -inf, and so sees nothing, not even its self slot:
  // nothing of it is computed with, and its gradients are zeros.
  if (threadIdx.x == 0) bounds[0] = history.length, bounds[1] = 0;
  __syncthreads();
  const auto lse_of = [&](int r) { return *row_of<float>(g.lse, rows.candidate(r), rows.query_head(r)); };
  for (int r = threadIdx.x; r < all_rows; r += blockDim.x) {
    seen_of[r] = -1;
    if (!rows.valid(r)) continue;
    if (lse_of(r) != -infinity()) seen_of[r] = seen_events(a, rows.candidate(r), history.length);
    atomicMin(&bounds[0], max(seen_of[r], 0));
    atomicMax(&bounds[1], seen_of[r]);
  }
  __syncthreads();
  const int least = bounds[0], most = bounds[1];

#pragma unroll 1
  for (int x = 0; x < 2; x++) {
    load_tile<T, D>(x ? grad_outs : queries, all_rows, a.head_dim, p.rows_vectors, [&](int r) {
      return seen_of[r] < 0 ? nullptr
                            : row_of<T>(x ? g.grad_out : a.query, rows.candidate(r), rows.query_head(r));
    });
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  Rows<Kind, D, 1, kHeldBoth<D>> query, grad_out;
  query.load(queries + first_row * kStride<T, D>);
  grad_out.load(grad_outs + first_row * kStride<T, D>);

#pragma unroll 1
  for (int r = threadIdx.x / 4; r < all_rows; r += blockDim.x / 4) {
    const bool sees = seen_of[r] >= 0;
    const int q_head = rows.query_head(r);
    const int64_t candidate = rows.candidate(r);
    const auto product = [&](const T* shared, const Vectors& x, int at_head, bool vectors) {
      return row_product<T, D>(shared + r * kStride<T, D>, sees ? row_of<T>(x, candidate, at_head) : nullptr,
                               a.head_dim, vectors);
    };
    RowNumbers of{sees ? -kLog2e * lse_of(r) : -infinity(), 0.0f, 0.0f, 0.0f, 0.0f};
    if (sees && g.grad_lse.data) of.grad_lse = *row_of<float>(g.grad_lse, candidate, q_head);
    of.shift = product(grad_outs, g.out, q_head, p.out_vectors) - of.grad_lse;
    if (a.self_key.data) {
      of.self_weight =
          ptx::exp2(fmaf(product(queries, a.self_key, kv_head, p.self_vectors), p.factor, of.minus_lse));
      of.self_grad = product(grad_outs, a.self_value, kv_head, p.self_vectors);
      if (seen_of[r] == 0) of.shift = of.self_grad - of.grad_lse;
    }
    if (t == 0) numbers[r] = of;
  }
  __syncthreads();
  int seen[1][2];
  bool sees[2];
  RowNumbers of[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    seen[0][h] = max(seen_of[own(h)], 0);
    sees[h] = seen_of[own(h)] >= 0;
    of[h] = numbers[own(h)];
  }

  const Scoring scoring = scoring_of(a, p.factor, history, head);
  const bool some_hidden = a.visible.data || a.key_bias;
  const NonFinite bad{bad_events, D};

  float grad[1][V / 8][4], shift[2], total[2];
  bool careful = false;
  while (true) {
    clear(grad[0]);
#pragma unroll
    for (int h = 0; h < 2; h++) shift[h] = of[h].shift, total[h] = 0.0f;
    const Set<T> set{{row_of<T>(a.key, history.begin, kv_head), row_of<T>(a.value, history.begin, kv_head)},
                     {a.key.row_stride, a.value.row_stride},
                     {a.head_dim, a.head_dim},
                     p.set_vectors};
    for_each_tile<T, D, D, N>(
        set, stages, 0, most, [](int, int) { return true; },
        [&](int event, T* keys, T* values) {
          if (careful) {
            take_out_hidden<T, D, N>(keys, scoring, event);
            take_out_hidden<T, D, N>(values, scoring, event);
            __syncthreads();
          }
          float s[1][N / 8][4], dp[1][N / 8][4];
          scores<Kind, D, N, 1>(s, query, keys);
          scores<Kind, D, N, 1>(dp, grad_out, values);
          mask_scores(s, scoring, seen, event, event + N > least);
#pragma unroll
          for (int j = 0; j < N / 8; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
              s[0][j][c] = ptx::exp2(fmaf(s[0][j][c], scoring.unit(), of[c / 2].minus_lse));
              if constexpr (sizeof(T) == 4) total[c / 2] += s[0][j][c];
            }
          }
          if (careful) {
            for_each_score(dp[0], [&](float& x, int j, int c) {
              if (event + column_of(j, c) >= seen[0][c / 2]) x = 0.0f;
            });
            __syncthreads();
            take_out_non_finite<Kind, D, N>(keys, bad, [&](int n) { return event + n; });
            __syncthreads();
          }
          if (event == 0 && least <= N) {
        // A shift made from `out` has the error of its rounding. Where all events of a row are here, it is
        // known better; plain PyTorch, which keeps the weights, is nearly exact for such a row.
#pragma unroll
            for (int h = 0; h < 2; h++) {
              float here = 0.0f, weighted = 0.0f;
#pragma unroll
              for (int j = 0; j < N / 8; j++) {
#pragma unroll
                for (int c = 2 * h; c < 2 * h + 2; c++) {
                  here += s[0][j][c];
                  weighted = fmaf(s[0][j][c], dp[0][j][c], weighted);
                }
              }
              here = of_row(here) + of[h].self_weight;
              weighted = fmaf(of[h].self_weight, of[h].self_grad, of_row(weighted));
              if (seen[0][h] > 0 && seen[0][h] <= N) shift[h] = weighted / here - of[h].grad_lse;
            }
          }
          for_each_score(dp[0], [&](float& x, int j, int c) { x = s[0][j][c] * (x - shift[c / 2]); });
          weigh<Kind, V, N, 1, D>(grad, dp, keys + first_column);
        });
    if (careful || !some_hidden || !__syncthreads_or(non_finite(grad[0], sees))) break;
    careful = true;
    for (int i = threadIdx.x; i < kKinds * D; i += blockDim.x) bad_events[i] = kNever;
    __syncthreads();
  }
  if (careful) {
    for_each_score(grad[0], [&](float& x, int j, int c) {
      const int *first = bad_events + first_column + column_of(j, c), n = seen[0][c / 2];
      if (min(first[kNan * D], min(first[kPlus * D], first[kMinus * D])) < n) x = not_a_number();
    });
  }

#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = own(h), q_head = rows.query_head(r);
    // The rounding of the lse makes all weights of a row wrong by one factor near 1: in fp32 it is found.
    const float sum = of_row(total[h]) + of[h].self_weight;
    const float norm = sizeof(T) == 4 && sum > 0.0f ? 1.0f / sum : 1.0f;
    if (!rows.valid(r)) continue;
    const int64_t candidate = rows.candidate(r);
    const int dim = min(a.head_dim - first_column, V);
    const bool self = a.self_key.data && sees[h];
    const T* self_key = self ? row_of<T>(a.self_key, candidate, kv_head) + first_column : nullptr;
    const float of_self = of[h].self_weight * (of[h].self_grad - shift[h]);
    T* to = static_cast<T*>(g.grad_query) + (candidate * a.heads + q_head) * a.head_dim + first_column;
#pragma unroll
    for (int d = 0; d < V / 8; d++) {
      float x[2];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        x[c] = grad[0][d][2 * h + c];
        if (self && 8 * d + 2 * t + c < dim)
          x[c] = fmaf(of_self, to_float(self_key[8 * d + 2 * t + c]), x[c]);
        x[c] *= norm * p.scale;
      }
      store_pair<Kind>(to, 8 * d + 2 * t, dim, a.head_dim % 2 == 0, x[0], x[1]);
    }
    if (t == 0 && first_column == 0) {
      float* states = g.states + state_of(a, p.sweep_heads, candidate, q_head);
      const int64_t each = a.rows * a.heads;
      states[kMinusLse * each] = of[h].minus_lse;
      states[kShift * each] = shift[h];
      states[kNorm * each] = norm;
      states[kSeen * each] = __int_as_float(seen[0][h]);
      if (a.self_key.data) {
        states[kSelfWeight * each] = of[h].self_weight * norm;
        states[kSelfChange * each] = of_self * norm;
      }
    }
  }
}

// --- self slots --------------------------------------------------------------------------------------------

// dK and dV of each candidate's own slot, over the heads that share it: a warp for a slot.
template <class T>
__global__ __launch_bounds__(kMostThreads) void grad_self_kernel(const Attention a, const AttentionGradient g,
                                                                 const AttentionGradientLaunch p) {
  constexpr int kEach = 256 / kWarp;
  const int group = a.heads / a.kv_heads;
  const int64_t slot = int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (slot >= a.rows * a.kv_heads) return;
  const int64_t candidate = slot / a.kv_heads, each = a.rows * a.heads;
  const int kv_head = static_cast<int>(slot % a.kv_heads);
  const auto load = [&](float (&x)[kEach], const Vectors& from, int head) {
    const T* row = row_of<T>(from, candidate, head);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int d = i * kWarp + lane();
      x[i] = d < a.head_dim ? to_float(row[d]) : 0.0f;
    }
  };
  float grad_key[kEach] = {}, grad_value[kEach] = {};
  for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
    const float* states = g.states + state_of(a, p.sweep_heads, candidate, head);
    if (states[kMinusLse * each] == -infinity()) continue;
    float query[kEach], grad_out[kEach];
    load(query, a.query, head);
    load(grad_out, g.grad_out, head);
    const float weight = states[kSelfWeight * each], change = states[kSelfChange * each];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      grad_key[i] = fmaf(change, query[i], grad_key[i]);
      grad_value[i] = fmaf(weight, grad_out[i], grad_value[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int d = i * kWarp + lane();
    if (d >= a.head_dim) break;
    static_cast<T*>(g.grad_self_key)[slot * a.head_dim + d] = from_float<T>(grad_key[i] * p.scale);
    static_cast<T*>(g.grad_self_value)[slot * a.head_dim + d] = from_float<T>(grad_value[i]);
  }
}

}  // namespace attnrec::cuda
