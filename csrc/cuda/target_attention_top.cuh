// The readout of the streaming softmax that keeps each row's heaviest events beside its maximum and sum, in
// one pass: tile for tile the arithmetic of target_attention_weights, and so the same bits.
//
// A row's list is where its events are to be written, so it costs no memory; only where each chunk of a
// history has a block of its own, the chunks have lists, which a second kernel merges.
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/heaviest.cuh"
#include "cuda/target_attention_top.h"

namespace attnrec::cuda {

struct TopLaunch {
  RowsLaunch rows;
  int top;
  void* weights;
  int64_t* events;
  Key* lists;  // of chunks, or null
};

// A tile's scores of a warp in shared memory, for the lanes to share a row.
template <class Kind, int D>
constexpr int kSharedScores = 16 * (kScored<Kind, D> + 8);

// Makes weights and events of a list.
template <class T>
__device__ __forceinline__ void finish(const Key* list, int top, float unit, float base, float inverse,
                                       T* weights, int64_t* events) {
  for (int slot = lane(); slot < top; slot += kWarp) {
    const Key key = list[slot];
    const float weight = ptx::exp2(fmaf(score_of(key), unit, -base)) * inverse;
    weights[slot] = from_float<T>(key == kNothing ? 0.0f : weight);
    events[slot] = event_of(key);
  }
}

template <class Kind, int D>
__global__ __launch_bounds__(kMostThreads, 1) void target_attention_top_kernel(const Attention a,
                                                                               const TopLaunch p) {
  using T = typename Kind::T;
  constexpr int N = kScored<Kind, D>, S = N + 8;
  extern __shared__ __align__(16) char memory[];
  const Tile tile = find_tile(blockIdx.x, a.q_offsets, a.users, a.rows, p.rows.candidates);
  AttentionRows<Kind, D> block;
  if (!block.begin(a, p.rows, tile, memory)) return;
  const int64_t all_rows = a.rows * a.heads;
  int chunk = p.rows.apart ? blockIdx.z : 0;
  const int end = p.rows.apart ? min(chunk + 1, block.chunks()) : block.chunks();
  if (chunk >= end) return;
  // Behind the block's rows, some for each warp.
  float* shared = reinterpret_cast<float*>(block.queries + 16 * (blockDim.x / kWarp) * kStride<T, D>) +
                  threadIdx.x / kWarp * kSharedScores<Kind, D>;
  const auto list_of = [&](int64_t place) {
    Key* lists = p.lists ? p.lists + blockIdx.z * all_rows * p.top : reinterpret_cast<Key*>(p.events);
    return lists + place * p.top;
  };
  // The score that an event must exceed for a place in its row's list.
  float floor[2];
#pragma unroll
  for (int h = 0; h < 2; h++) floor[h] = block.rows.valid(block.row_of(h)) ? -infinity() : infinity();
  for (int i = 0; i < 16; i++) {
    const int r = block.first_row + i;
    if (!block.rows.valid(r)) continue;
    Key* list = list_of(block.place(a, r));
    for (int slot = lane(); slot < p.top; slot += kWarp) list[slot] = kNothing;
  }

  const float unit = block.scoring.unit();
  // Before times its unit: afterwards two scores might have become equal.
  const auto select = [&](int event, const float (&s)[1][N / 8][4]) {
    bool above[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = s[0][0][2 * h];
#pragma unroll
      for (int j = 0; j < N / 8; j++) x = fmaxf(x, fmaxf(s[0][j][2 * h], s[0][j][2 * h + 1]));
      above[h] = x > floor[h];
    }
    if (!__any_sync(kAll, above[0] || above[1])) return;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        *reinterpret_cast<float2*>(shared + (8 * h + lane() / 4) * S + 8 * j + lane() % 4 * 2) =
            make_float2(s[0][j][2 * h], s[0][j][2 * h + 1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++) {
      for (unsigned rest = __ballot_sync(kAll, above[h]); rest;) {
        const int g = (__ffs(rest) - 1) / 4, i = 8 * h + g;
        rest &= ~(0xfu << 4 * g);
        Key* list = list_of(block.place(a, block.first_row + i));
        float least = __shfl_sync(kAll, floor[h], 4 * g);
        for (int first = 0; first < N; first += kWarp) {
          const int n = first + lane();
          const float score = n < N ? shared[i * S + n] : -infinity();
          const unsigned hits = __ballot_sync(kAll, score > least);
          if (hits) least = insert(list, p.top, hits, key_of(score, event + n), least);
        }
        if (lane() / 4 == g) floor[h] = least;
      }
    }
    __syncwarp();  // the scores may be written over
  };

  WholeSoftmax whole;
  whole.clear();
  for (; chunk < end; chunk++) {
    RowSoftmax<1> softmax;
    block.start(a, chunk, softmax);
    block.for_each(chunk, [&](int event, float (&s)[1][N / 8][4]) {
      select(event, s);
      add_scores(softmax, s, unit);
    });
    whole.take(softmax);
  }
  if (p.lists) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = block.row_of(h);
      if (!block.rows.valid(r) || lane() % 4 != 0) continue;
      *part_of(p.rows.parts, blockIdx.z, all_rows, block.place(a, r)) = make_float2(whole.m[h], whole.l[h]);
    }
    return;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    for (int g = 0; g < 8; g++) {
      const int r = block.first_row + 8 * h + g;
      const float base = __shfl_sync(kAll, whole.base(h), 4 * g);
      const float inverse = __shfl_sync(kAll, whole.inverse(h), 4 * g);
      if (!block.rows.valid(r)) continue;
      const int64_t at = block.place(a, r) * p.top;
      finish(reinterpret_cast<Key*>(p.events) + at, p.top, unit, base, inverse,
             static_cast<T*>(p.weights) + at, p.events + at);
    }
  }
}

// The chunks' lists of each row, and their softmaxes in order: a warp for a row.
template <class T>
__global__ __launch_bounds__(kMostThreads) void target_attention_top_merge_kernel(const Attention a,
                                                                                  const TopLaunch p) {
  const Tile tile = find_tile(blockIdx.x, a.q_offsets, a.users, a.rows, p.rows.candidates);
  if (tile.rows.first >= tile.rows.end) return;
  const int length = history_of(a, tile.user).length, warps = blockDim.x / kWarp;
  const int64_t all_rows = a.rows * a.heads;
  for (int i = threadIdx.x / kWarp; i < p.rows.candidates * p.rows.pack; i += warps) {
    const int64_t candidate = tile.rows.first + i / p.rows.pack;
    if (candidate >= tile.rows.end) return;
    const int64_t place = candidate * a.heads + blockIdx.y * p.rows.pack + i % p.rows.pack;
    const int chunks = max(1, (seen_events(a, candidate, length) + kChunkEvents - 1) / kChunkEvents);
    Key* list = reinterpret_cast<Key*>(p.events) + place * p.top;
    for (int slot = lane(); slot < p.top; slot += kWarp) list[slot] = p.lists[place * p.top + slot];
    float floor = score_of(p.lists[place * p.top + p.top - 1]);
    WholeSoftmax whole;
    whole.clear();
    for (int chunk = 0; chunk < chunks; chunk++) {
      const float2 part = *part_of(p.rows.parts, chunk, all_rows, place);
      whole.take(0, part.x, part.y);
      if (chunk == 0) continue;
      const Key* next = p.lists + (chunk * all_rows + place) * p.top;
      for (int first = 0; first < p.top; first += kWarp) {
        const Key key = first + lane() < p.top ? next[first + lane()] : kNothing;
        const unsigned hits = __ballot_sync(kAll, score_of(key) > floor);
        if (!hits) break;
        floor = insert(list, p.top, hits, key, floor);
      }
    }
    const float unit = p.rows.factor <= 0.0f || a.key_bias ? 1.0f : p.rows.factor;
    finish(list, p.top, unit, whole.base(0), whole.inverse(0), static_cast<T*>(p.weights) + place * p.top,
           p.events + place * p.top);
  }
}

}  // namespace attnrec::cuda
