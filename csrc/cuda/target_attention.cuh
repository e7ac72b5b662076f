// The readout of the streaming softmax that adds up values.
#pragma once

#include "cuda/streaming.cuh"
#include "cuda/target_attention.h"

namespace attnrec::cuda {

// Events of a tile. Part of what a result's bits depend on, so a function of dtype and head dim alone.
template <class Kind, int D>
constexpr int kEvents = sizeof(typename Kind::T) == 4 ? (D <= 64 ? 32 : 16) : (D <= 128 ? 32 : 16);

// Beyond, a block's rows are read from shared memory at every tile: with the sums they do not fit in
// registers.
template <int D, int MT>
constexpr bool kHeld = D * MT <= 128;

// On an SM. A100, D = 32: 110 cycles a thousand scores, without a bound 134; with tiles of 64 events 121,
// beside which a third spills.
template <class Kind, int D>
constexpr int kAttentionBlocks = sizeof(typename Kind::T) == 4 || D > 32 ? 1
                                 : D > 16                                ? 3
                                                                         : 4;

template <class Kind, int D, int MT>
struct AttentionMemory {
  using T = typename Kind::T;
  static constexpr int kN = kEvents<Kind, D>;
  static constexpr int kStages = 2 * (kTile<T, D, kN> + kTile<T, kColumns<D>, kN>);
  static constexpr int kParked = MT * (kColumns<D> / 2 + 4);  // floats of a thread: its sums, m and l

  static constexpr int64_t bytes(int warps, bool parks) {
    return (kStages + 16 * MT * warps * kStride<T, D>)*static_cast<int64_t>(sizeof(T)) +
           kKinds * kColumns<D> * 4 + (parks ? kParked * 4 * kWarp * warps : 0);
  }
};

// What a thread has of its rows' result.
template <int D, int MT>
struct AttentionSums {
  RowSoftmax<MT> softmax;
  float acc[MT][D / 8][4];

  __device__ void clear() {
    softmax.clear();
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int d = 0; d < D / 8; d++) acc[i][d][0] = acc[i][d][1] = acc[i][d][2] = acc[i][d][3] = 0.0f;
    }
  }
  __device__ void rescale(int i, int h, float alpha) {
#pragma unroll
    for (int d = 0; d < D / 8; d++) acc[i][d][2 * h] *= alpha, acc[i][d][2 * h + 1] *= alpha;
  }
  // The rows' sums, the same number in the four threads of a row from here on.
  __device__ void reduce() {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) softmax.l[i][h] = of_row(softmax.l[i][h]);
    }
  }
  __device__ bool any_non_finite() const {
    bool bad = false;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int d = 0; d < D / 8; d++) {
#pragma unroll
        for (int c = 0; c < 4; c++) bad |= !(fabsf(acc[i][d][c]) < infinity());
      }
    }
    return bad;
  }
  // Visits every float; the order is that of `merge`'s.
  template <class Function>
  __device__ __forceinline__ void for_each(const Function& function) {
    int n = 0;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        function(softmax.m[i][h], n++);
        function(softmax.l[i][h], n++);
      }
#pragma unroll
      for (int d = 0; d < D / 8; d++) {
#pragma unroll
        for (int c = 0; c < 4; c++) function(acc[i][d][c], n++);
      }
    }
  }
  // Takes in what came before these sums, which `before(n)` gives in the order of `for_each`.
  template <class Before>
  __device__ __forceinline__ void merge(const Before& before) {
    int n = 0;
#pragma unroll
    for (int i = 0; i < MT; i++) {
      const Merge merges[2] = {{before(n), softmax.m[i][0]}, {before(n + 2), softmax.m[i][1]}};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        softmax.m[i][h] = merges[h].m;
        softmax.l[i][h] = merges[h](before(n + 2 * h + 1), softmax.l[i][h]);
      }
      n += 4;
#pragma unroll
      for (int d = 0; d < D / 8; d++) {
#pragma unroll
        for (int c = 0; c < 4; c++) acc[i][d][c] = merges[c / 2](before(n++), acc[i][d][c]);
        ptx::keep_order();
      }
    }
  }
};

struct AttentionLaunch {
  float factor;  // scale * log2(e)
  int pack, candidates;
  bool apart, query_vectors, set_vectors;
  void* out;
  float *lse, *parts;
};

template <class Kind, int D, int MT>
__global__ __launch_bounds__(kMostThreads, kAttentionBlocks<Kind, D>) void target_attention_kernel(
    const Attention a, const AttentionLaunch p) {
  using T = typename Kind::T;
  using Memory = AttentionMemory<Kind, D, MT>;
  constexpr int N = Memory::kN, V = kColumns<D>, kParts = D / V;
  const Tile tile = find_tile(blockIdx.x, a.q_offsets, a.users, a.rows, p.candidates);
  if (tile.rows.first >= tile.rows.end) return;
  const int first_column = blockIdx.y % kParts * V, dim = min(a.head_dim - first_column, V);  // of the values
  const int head = blockIdx.y / kParts * p.pack, kv_head = head / (a.heads / a.kv_heads);
  const RowTile rows{tile.rows, head, p.pack, p.candidates};
  const History history = history_of(a, tile.user);
  const int warps = blockDim.x / kWarp, first_row = threadIdx.x / kWarp * 16 * MT;
  const auto row_of = [&](int i, int h) { return first_row + 16 * i + 8 * h + lane() / 4; };

  extern __shared__ __align__(16) char memory[];
  T* stages = reinterpret_cast<T*>(memory);
  T* queries = stages + Memory::kStages;
  int* bad_events = reinterpret_cast<int*>(queries + 16 * MT * warps * kStride<T, D>);
  float* parked = reinterpret_cast<float*>(bad_events + kKinds * V) + threadIdx.x;

  // How many events each row sees, and the bounds of that over the block's rows.
  int seen[MT][2], least, most;
  int* bounds = bad_events;  // not in use yet
  bound_seen(a, rows, 16 * MT * warps, history.length, bounds, least, most);
#pragma unroll
  for (int i = 0; i < MT; i++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = row_of(i, h);
      seen[i][h] = rows.valid(r) ? seen_events(a, rows.candidate(r), history.length) : 0;
    }
  }
  int chunk = 0, end_chunk = max(1, (most + kChunkEvents - 1) / kChunkEvents);
  if (p.apart) {
    chunk = blockIdx.z;
    if (chunk >= end_chunk) return;
    end_chunk = chunk + 1;
  }

  const auto row_at = [&](const Vectors& x, int r, int at_head) {
    return static_cast<const T*>(x.data) + rows.candidate(r) * x.row_stride + at_head * x.head_stride;
  };
  load_tile<T, D>(queries, 16 * MT * warps, a.head_dim, p.query_vectors, [&](int r) -> const T* {
    return rows.valid(r) ? row_at(a.query, r, rows.query_head(r)) : nullptr;
  });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  Rows<Kind, D, MT, kHeld<D, MT>> query;
  query.load(queries + first_row * kStride<T, D>);

  Set<T> set{
      {static_cast<const T*>(a.key.data) + history.begin * a.key.row_stride + kv_head * a.key.head_stride,
       static_cast<const T*>(a.value.data) + history.begin * a.value.row_stride +
           kv_head * a.value.head_stride + first_column},
      {a.key.row_stride, a.value.row_stride},
      {a.head_dim, dim},
      p.set_vectors};
  const Scoring scoring = scoring_of(a, p.factor, history, head);
  const bool some_hidden = a.visible.data || a.key_bias;

  AttentionSums<V, MT> sums;
  const auto start = [&] {
    sums.clear();
    if (!a.self_key.data || chunk > 0) return;
    // The self slot: what a row starts from.
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = row_of(i, h), t = lane() % 4;
        sums.softmax.m[i][h] = self_product<D>(a, rows, queries, r, kv_head) * p.factor;
        if (!rows.valid(r)) continue;
        const float weight = self_weight(sums.softmax.m[i][h]);
        sums.softmax.l[i][h] = t == 0 ? weight : 0.0f;
        const T* v = row_at(a.self_value, r, kv_head) + first_column;
#pragma unroll
        for (int d = 0; d < V / 8; d++) {
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const int column = 8 * d + 2 * t + c;
            if (column < dim) sums.acc[i][d][2 * h + c] = to_float(v[column]) * weight;
          }
        }
      }
    }
  };

  const NonFinite bad{bad_events, V};
  const bool parks = end_chunk - chunk > 1;
  for (; chunk < end_chunk; chunk++) {
    // An event that a row does not see has weight 0 there, which keeps a value out unless it is not finite. A
    // look at the sums after the loop costs nothing; where it finds something, the chunk is run again.
    bool careful = false;
    while (true) {
      start();
      for_each_tile<T, D, V, N>(
          set, stages, chunk * kChunkEvents, min(most, (chunk + 1) * kChunkEvents),
          [](int, int) { return true; },
          [&](int event, const T* keys, T* values) {
            if (careful) {
              take_out_hidden<T, V, N>(values, scoring, event);
              take_out_non_finite<Kind, V, N>(values, bad, [&](int n) { return event + n; });
              __syncthreads();
            }
            float s[MT][N / 8][4];
            scores<Kind, D, N, MT>(s, query, keys);
            mask_scores(s, scoring, seen, event, event + N > least);
            sums.softmax.move_base(s, scoring.unit(), [&](int i, int h, float x) { sums.rescale(i, h, x); });
            sums.softmax.weights(s, scoring.unit());
            weigh<Kind, V, N, MT>(sums.acc, s, values);
          });
      if (careful || !some_hidden || !__syncthreads_or(sums.any_non_finite())) break;
      careful = true;
      for (int i = threadIdx.x; i < kKinds * V; i += blockDim.x) bad_events[i] = kNever;
      __syncthreads();
    }
    if (careful) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int d = 0; d < V / 8; d++) {
#pragma unroll
          for (int c = 0; c < 4; c++) {
            const int *first = bad_events + column_of(d, c), n = seen[i][c / 2];
            float& x = sums.acc[i][d][c];
            if (first[kPlus * V] < n) x += infinity();
            if (first[kMinus * V] < n) x -= infinity();
            if (first[kNan * V] < n) x = __int_as_float(0x7fffffff);
          }
          ptx::keep_order();
        }
      }
      __syncthreads();
    }
    sums.reduce();
    if (chunk > 0 && !p.apart) sums.merge([&](int n) { return parked[n * blockDim.x]; });
    if (parks && chunk + 1 < end_chunk) sums.for_each([&](float x, int n) { parked[n * blockDim.x] = x; });
  }

#pragma unroll
  for (int i = 0; i < MT; i++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = row_of(i, h), t = lane() % 4;
      if (!rows.valid(r)) continue;
      const int64_t row = rows.candidate(r) * a.heads + rows.query_head(r);
      const float m = sums.softmax.m[i][h], l = sums.softmax.l[i][h];
      if (p.apart) {
        float* part = p.parts + (static_cast<int64_t>(blockIdx.z) * a.rows * a.heads + row) * (D + 2);
        if (t == 0 && first_column == 0) part[D] = m, part[D + 1] = l;
#pragma unroll
        for (int d = 0; d < V / 8; d++) {
          *reinterpret_cast<float2*>(part + first_column + 8 * d + 2 * t) =
              make_float2(sums.acc[i][d][2 * h], sums.acc[i][d][2 * h + 1]);
        }
      } else {
        const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
        T* out = static_cast<T*>(p.out) + row * a.head_dim + first_column;
#pragma unroll
        for (int d = 0; d < V / 8; d++) {
          store_pair<Kind>(out, 8 * d + 2 * t, dim, a.head_dim % 2 == 0, sums.acc[i][d][2 * h] * inverse,
                           sums.acc[i][d][2 * h + 1] * inverse);
        }
        if (t == 0 && first_column == 0) p.lse[row] = log_sum_exp(m, l);
      }
    }
  }
}

// The chunks of each row, in order: a warp for a row.
template <class Kind, int D>
__global__ __launch_bounds__(kMostThreads) void target_attention_merge_kernel(const Attention a,
                                                                              const AttentionLaunch p) {
  constexpr int kEach = (D + kWarp - 1) / kWarp;
  const Tile tile = find_tile(blockIdx.x, a.q_offsets, a.users, a.rows, p.candidates);
  if (tile.rows.first >= tile.rows.end) return;
  const int length = history_of(a, tile.user).length, warps = blockDim.x / kWarp;
  for (int i = threadIdx.x / kWarp; i < p.candidates * p.pack; i += warps) {
    const int64_t candidate = tile.rows.first + i / p.pack;
    if (candidate >= tile.rows.end) return;
    const int64_t row = candidate * a.heads + blockIdx.y * p.pack + i % p.pack;
    const int chunks = max(1, (seen_events(a, candidate, length) + kChunkEvents - 1) / kChunkEvents);
    float m = -infinity(), l = 0.0f, acc[kEach] = {};
    for (int chunk = 0; chunk < chunks; chunk++) {
      const float* part = p.parts + (static_cast<int64_t>(chunk) * a.rows * a.heads + row) * (D + 2);
      if (chunk == 0) {
        m = part[D], l = part[D + 1];
#pragma unroll
        for (int c = 0; c < kEach; c++) acc[c] = c * kWarp + lane() < D ? part[c * kWarp + lane()] : 0.0f;
        continue;
      }
      const Merge merge(m, part[D]);
      m = merge.m;
      l = merge(l, part[D + 1]);
#pragma unroll
      for (int c = 0; c < kEach; c++) {
        if (c * kWarp + lane() < D) acc[c] = merge(acc[c], part[c * kWarp + lane()]);
      }
    }
    const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
    typename Kind::T* out = static_cast<typename Kind::T*>(p.out) + row * a.head_dim;
#pragma unroll
    for (int c = 0; c < kEach; c++) {
      const int d = c * kWarp + lane();
      if (d < a.head_dim) out[d] = from_float<typename Kind::T>(acc[c] * inverse);
    }
    if (lane() == 0) p.lse[row] = log_sum_exp(m, l);
  }
}

}  // namespace attnrec::cuda
