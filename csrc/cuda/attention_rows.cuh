// A block's rows, its user's events, and the scores of one with the other: how the readouts begin that want
// scores and no values.
#pragma once

#include <algorithm>

#include "cuda/attention_rows.h"
#include "cuda/dispatch.h"
#include "cuda/streaming.cuh"

namespace attnrec::cuda {

// Events of a tile. Part of what a result's bits depend on, so a function of dtype and head dim alone.
template <class Kind, int D>
constexpr int kScored = sizeof(typename Kind::T) == 4 ? (D <= 64 ? 32 : 16) : (D <= 64 ? 64 : 32);

struct RowsLaunch {
  float factor;  // scale * log2(e)
  int pack, candidates;
  bool apart, query_vectors, key_vectors;
  float* parts;
};

template <class Kind, int D>
struct RowsMemory {
  using T = typename Kind::T;
  static constexpr int kStages = 2 * kTile<T, D, kScored<Kind, D>>;

  static constexpr int64_t bytes(int warps) {
    return (kStages + 16 * warps * kStride<T, D>)*static_cast<int64_t>(sizeof(T));
  }
};

template <class Kind, int D>
struct AttentionRows {
  using T = typename Kind::T;
  static constexpr int N = kScored<Kind, D>;

  RowTile rows;
  History history;
  int room;         // of the history
  int first_row;    // of the warp in the block
  int seen[1][2];   // events that rows g and g + 8 of the warp see
  int least, most;  // of that, over the block's rows
  int kv_head;
  T *stages, *queries;
  Rows<Kind, D, 1, (D <= 128)> query;
  Set<T> set;
  Scoring scoring;

  __device__ int row_of(int h) const { return first_row + 8 * h + lane() / 4; }
  // The place of row r of the block among all rows and heads.
  __device__ int64_t place(const Attention& a, int r) const {
    return rows.candidate(r) * a.heads + rows.query_head(r);
  }
  __device__ int chunks() const { return max(1, (most + kChunkEvents - 1) / kChunkEvents); }

  // False where there is no such tile. `memory`: of the block, as RowsMemory says.
  __device__ __forceinline__ bool begin(const Attention& a, const RowsLaunch& p, const Tile& tile,
                                        char* memory) {
    if (tile.rows.first >= tile.rows.end) return false;
    const int head = blockIdx.y * p.pack, warps = blockDim.x / kWarp;
    rows = {tile.rows, head, p.pack, p.candidates};
    history = history_of(a, tile.user);
    const Range all = user_range(a.kv_offsets, tile.user, a.events);
    room = static_cast<int>(all.end - all.first);
    first_row = threadIdx.x / kWarp * 16;
    kv_head = head / (a.heads / a.kv_heads);
    stages = reinterpret_cast<T*>(memory);
    queries = stages + RowsMemory<Kind, D>::kStages;

    int* bounds = reinterpret_cast<int*>(memory);  // not in use yet
    bound_seen(a, rows, 16 * warps, history.length, bounds, least, most);
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = row_of(h);
      seen[0][h] = rows.valid(r) ? seen_events(a, rows.candidate(r), history.length) : 0;
    }

    load_tile<T, D>(queries, 16 * warps, a.head_dim, p.query_vectors, [&](int r) -> const T* {
      if (!rows.valid(r)) return nullptr;
      return static_cast<const T*>(a.query.data) + rows.candidate(r) * a.query.row_stride +
             rows.query_head(r) * a.query.head_stride;
    });
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    query.load(queries + first_row * kStride<T, D>);

    set = {
        {static_cast<const T*>(a.key.data) + history.begin * a.key.row_stride + kv_head * a.key.head_stride,
         nullptr},
        {a.key.row_stride, 0},
        {a.head_dim, 0},
        p.key_vectors};
    scoring = scoring_of(a, p.factor, history, head);
    return true;
  }

  // What a row's softmax starts from: nothing, or in the first chunk its self slot.
  __device__ __forceinline__ void start(const Attention& a, int chunk, RowSoftmax<1>& softmax) const {
    softmax.clear();
    if (!a.self_key.data || chunk > 0) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float m = self_product<D>(a, rows, queries, row_of(h), kv_head) * scoring.factor;
      softmax.m[0][h] = m;
      softmax.l[0][h] = lane() % 4 == 0 ? self_weight(m) : 0.0f;
    }
  }

  // Runs `step(event, s)` over the chunk's tiles, `s` the scores of this warp's rows (-inf: not seen).
  template <class Step>
  __device__ __forceinline__ void for_each(int chunk, const Step& step) const {
    const auto shown = [](int, int) { return true; };
    for_each_tile<T, D, 0, N>(set, stages, chunk * kChunkEvents, min(most, (chunk + 1) * kChunkEvents), shown,
                              [&](int event, const T* keys, const T*) {
                                float s[1][N / 8][4];
                                scores<Kind, D, N, 1>(s, query, keys);
                                mask_scores(s, scoring, seen, event, event + N > least);
                                step(event, s);
                              });
  }
};

// The step of a softmax that keeps its maximum and sum alone; it leaves weights in `s`.
template <int NT>
__device__ __forceinline__ void add_scores(RowSoftmax<1>& softmax, float (&s)[1][NT][4], float unit) {
  softmax.move_base(s, unit, [](int, int, float) {});
  softmax.weights(s, unit);
}

// A row's softmax over a whole history, chunk by chunk in order; the same number in the four threads of a
// row.
struct WholeSoftmax {
  float m[2], l[2];

  __device__ void clear() { m[0] = m[1] = -infinity(), l[0] = l[1] = 0.0f; }
  __device__ __forceinline__ void take(int h, float m_next, float l_next) {
    const Merge merge(m[h], m_next);
    m[h] = merge.m;
    l[h] = merge(l[h], l_next);
  }
  __device__ __forceinline__ void take(const RowSoftmax<1>& next) {
#pragma unroll
    for (int h = 0; h < 2; h++) take(h, next.m[0][h], of_row(next.l[0][h]));
  }
  __device__ float base(int h) const { return m[h] == -infinity() ? 0.0f : m[h]; }
  __device__ float inverse(int h) const { return l[h] == 0.0f ? 0.0f : 1.0f / l[h]; }
};

// A chunk's maximum and sum of row `place` of `rows`.
__device__ __forceinline__ float2* part_of(float* parts, int chunk, int64_t rows, int64_t place) {
  return reinterpret_cast<float2*>(parts) + chunk * rows + place;
}

// --- host --------------------------------------------------------------------------------------------------

inline RowsPlan plan_rows(const Attention& a) {
  RowsPlan plan{};
  plan.pack = a.heads_together();
  // As few rows as a user has on average, so that small requests leave no warps idle.
  const int64_t rows = (a.rows * plan.pack + a.users - 1) / std::max<int64_t>(a.users, 1);
  const int most_warps = a.element == Element::kFloat32 && native_head_dim(a.head_dim) == 256 ? 2 : 4;
  plan.warps = 1;
  while (plan.warps < most_warps && 16 * plan.warps < rows) plan.warps *= 2;
  plan.candidates = 16 * plan.warps / plan.pack;
  plan.tiles = count_tiles(a.users, a.rows, plan.candidates);
  plan.head_tiles = a.heads / plan.pack;
  plan.chunks = std::max(1, static_cast<int>((a.events + kChunkEvents - 1) / kChunkEvents));
  plan.apart = plan.chunks > 1 && plan.tiles * plan.head_tiles * plan.chunks <= kMostApart;
  plan.part_floats = plan.apart ? plan.chunks * a.rows * a.heads * 2 : 0;
  for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    plan.shared_bytes = RowsMemory<decltype(kind), decltype(dim)::value>::bytes(plan.warps);
  });
  return plan;
}

inline RowsLaunch rows_launch(const Attention& a, const RowsPlan& plan, float* parts) {
  return {a.factor(),
          plan.pack,
          plan.candidates,
          plan.apart,
          begin_aligned(a.query, a.element),
          begin_aligned(a.key, a.element),
          parts};
}

}  // namespace attnrec::cuda
