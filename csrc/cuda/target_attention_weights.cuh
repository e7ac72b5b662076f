// The readouts of the streaming softmax that find a row's maximum and sum, and then write its weights: two
// passes over the keys, with no scores kept between. One block runs both, or, where rows do not fill a chip,
// a block for each chunk of a history: first the one, and in a second launch the other.
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/target_attention_weights.h"

namespace attnrec::cuda {

constexpr int kOffsetThreads = 512;

// One block; `offsets` begin with 0.
__global__ void __launch_bounds__(kOffsetThreads) pair_offsets_kernel(const Attention a, int64_t* offsets) {
  __shared__ int64_t of_warps[kOffsetThreads / kWarp];
  const int warp = threadIdx.x / kWarp;
  int64_t before = 0;
  if (threadIdx.x == 0) offsets[0] = 0;
  for (int64_t begin = 0; begin < a.users; begin += kOffsetThreads) {
    const int64_t user = begin + threadIdx.x;
    long long pairs = 0;
    if (user < a.users) {
      const Range rows = user_range(a.q_offsets, user, a.rows),
                  room = user_range(a.kv_offsets, user, a.events);
      pairs = (rows.end - rows.first) * (room.end - room.first);
    }
    // The sums up to each thread: in its warp, of the warps before, of the rounds before.
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const long long other = __shfl_up_sync(kAll, pairs, distance);
      if (lane() >= distance) pairs += other;
    }
    if (lane() == kWarp - 1) of_warps[warp] = pairs;
    __syncthreads();
    int64_t all = 0;
    for (int w = 0; w < kOffsetThreads / kWarp; w++) {
      if (w == warp) pairs += before + all;
      all += of_warps[w];
    }
    if (user < a.users) offsets[user + 1] = pairs;
    before += all;
    __syncthreads();
  }
}

enum class Pass { kBoth, kSums, kWeights };

struct WeightsLaunch {
  RowsLaunch rows;
  Pass pass;
  const int64_t* offsets;
  int64_t pairs;
  void* weights;
};

template <class Kind, int D>
__global__ __launch_bounds__(kMostThreads, 1) void target_attention_weights_kernel(const Attention a,
                                                                                   const WeightsLaunch p) {
  using T = typename Kind::T;
  constexpr int N = kScored<Kind, D>;
  extern __shared__ __align__(16) char memory[];
  const Tile tile = find_tile(blockIdx.x, a.q_offsets, a.users, a.rows, p.rows.candidates);
  AttentionRows<Kind, D> block;
  if (!block.begin(a, p.rows, tile, memory)) return;
  const float unit = block.scoring.unit();
  const int64_t all_rows = a.rows * a.heads;
  WholeSoftmax whole;
  whole.clear();

  if (p.pass != Pass::kWeights) {
    int chunk = p.rows.apart ? blockIdx.z : 0;
    const int end = p.rows.apart ? min(chunk + 1, block.chunks()) : block.chunks();
    for (; chunk < end; chunk++) {
      RowSoftmax<1> softmax;
      block.start(a, chunk, softmax);
      block.for_each(chunk, [&](int, float (&s)[1][N / 8][4]) { add_scores(softmax, s, unit); });
      whole.take(softmax);
      if (!p.rows.apart) continue;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = block.row_of(h);
        if (!block.rows.valid(r) || lane() % 4 != 0) continue;
        *part_of(p.rows.parts, chunk, all_rows, block.place(a, r)) = make_float2(whole.m[h], whole.l[h]);
      }
    }
    if (p.pass == Pass::kSums) return;
  } else {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = block.row_of(h);
      if (!block.rows.valid(r)) continue;
      for (int chunk = 0; chunk < block.chunks(); chunk++) {
        const float2 part = *part_of(p.rows.parts, chunk, all_rows, block.place(a, r));
        whole.take(h, part.x, part.y);
      }
    }
  }

  // Rows' weights begin here, events are `heads` apart; limit 0: nothing is written.
  T* to[2];
  int limit[2];
  float base[2], inverse[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = block.row_of(h);
    const Range own = user_range(a.q_offsets, tile.user, a.rows);
    const int64_t pair = p.offsets[tile.user] + (block.rows.candidate(r) - own.first) * block.room;
    // Sums of offsets that are out of range may overflow.
    const bool valid = block.rows.valid(r) && pair >= 0 && pair + block.room <= p.pairs;
    limit[h] = valid ? block.room : 0;
    to[h] = static_cast<T*>(p.weights) + (valid ? pair * a.heads + block.rows.query_head(r) : 0);
    base[h] = whole.base(h);
    inverse[h] = whole.inverse(h);
  }
  const auto write = [&](int event, const float (&w)[1][N / 8][4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int n = event + column_of(j, c);
          if (n < limit[h]) to[h][static_cast<int64_t>(n) * a.heads] = from_float<T>(w[0][j][2 * h + c]);
        }
      }
    }
  };
  int chunk = p.rows.apart ? blockIdx.z : 0;
  const int end = p.rows.apart ? chunk + 1 : (block.room + kChunkEvents - 1) / kChunkEvents;
  for (; chunk < end; chunk++) {
    block.for_each(chunk, [&](int event, float (&s)[1][N / 8][4]) {
#pragma unroll
      for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
          s[0][j][c] = ptx::exp2(fmaf(s[0][j][c], unit, -base[c / 2])) * inverse[c / 2];
        }
      }
      if (event + N > block.least) {  // what a row does not see is 0, also where its sum is NaN
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
#pragma unroll
          for (int c = 0; c < 4; c++) {
            if (event + column_of(j, c) >= block.seen[0][c / 2]) s[0][j][c] = 0.0f;
          }
        }
      }
      write(event, s);
    });
    // Nobody sees the rest.
    const int seen_tiles = (block.most + N - 1) / N * N;
    for (int event = max(seen_tiles, chunk * kChunkEvents);
         event < min(block.room, (chunk + 1) * kChunkEvents); event += N) {
      const float nothing[1][N / 8][4] = {};
      write(event, nothing);
    }
  }
}

}  // namespace attnrec::cuda
