// The k best items of each user and their log-sum-exp, in one pass over the catalogue.
//
// 1. sort_exclusions_kernel: each user's excluded ids in rising order.
// 2. catalog_topk_kernel, of a sample of the items: the best of many groups. The k-th best of these
//    (catalog_topk_floor_kernel) is reached by k items or more, so it is a floor for the whole catalogue.
// 3. catalog_topk_kernel: parts of the catalogue times tiles of users. A score that reaches the user's floor
//    goes into a list, one of each user and part; the rest goes only into a running softmax.
// 4. catalog_topk_merge_kernel: the k best of a user's lists, sorted, and its log-sum-exp.
//
// A thread compares the best of its scores of a row with the row's entry, and the warp votes: mostly nobody
// has one that enters, and the tile costs one comparison a row. Where somebody has, ballots say where in the
// row's list each score goes. A warp owns its rows' lists, so nothing of this is shared between warps.
#pragma once

#include "cuda/catalog_topk.h"
#include "cuda/selection.cuh"
#include "cuda/streaming.cuh"

namespace attnrec::cuda {

constexpr int kSampleEvery = 7;     // of so many items one is sampled; odd, as catalogues may have a period
constexpr int kMergeThreads = 256;  // also of the kernels that take a user's exclusions or its sample
constexpr int kSortedInShared = 4096;  // excluded ids

// Items of a tile.
template <class Kind, int D>
constexpr int kItems = sizeof(typename Kind::T) == 4 ? (D <= 128 ? 32 : 16) : (D <= 128 ? 64 : 32);

// On an SM. A100, D = 64: 129 cycles a thousand scores, without a bound 143; at 16 a fourth spills.
template <class Kind, int D>
constexpr int kTopkBlocks = sizeof(typename Kind::T) == 2 && (D == 32 || D == 64) ? 4 : 1;

// Where scratch memory is divided.
struct CatalogTopkScratch {
  uint64_t* lists;       // [users, parts, capacity]
  uint64_t* merged;      // [users, room], where it does not fit in shared memory
  uint64_t* floors;      // [users], of the sample
  float* highest;        // [users], of the sample
  float* best;           // [users, sample_blocks, tile], of each group
  float *maxima, *sums;  // [users, parts]: the softmaxes
  int* counts;           // [users, parts]: of the lists
  int* excluded;         // [exclusions]
};

struct CatalogTopkLaunch {
  float factor;  // 1 / temperature
  bool user_vectors, item_vectors;
  int k, part, parts, capacity, sampled, room;
  bool has_sample, in_shared;
  float* scores;
  int64_t* ids;
  float* lse;
  CatalogTopkScratch scratch;
};

// --- exclusions --------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kMergeThreads) sort_exclusions_kernel(const CatalogTopk c, int* sorted) {
  __shared__ int few[kSortedInShared];
  const Range own = user_range(c.exclude_offsets, blockIdx.x, c.exclusions);
  const int64_t n = own.end - own.first;
  int* ids = n <= kSortedInShared ? few : sorted + own.first;
  for (int64_t i = threadIdx.x; i < n; i += kMergeThreads) {
    const int64_t id = c.excluded[own.first + i];
    ids[i] =
        id >= 0 && id < c.items ? static_cast<int>(id) : kNever;  // outside of the catalogue: of no effect
  }
  sort(BlockTeam(), ids, n, [](int a, int b) { return a < b; });
  if (ids != few) return;
  for (int64_t i = threadIdx.x; i < n; i += kMergeThreads) sorted[own.first + i] = few[i];
}

// The items that a block looks at: `origin + every * i` for i < count, the set that it streams.
struct Stretch {
  int origin, every, count;

  __device__ int id(int i) const { return origin + every * i; }
};

// A thread's two rows' next excluded id of the stretch.
struct Exclusions {
  const int *at[2], *end[2];
  int next[2];

  __device__ int load(int h) const { return at[h] < end[h] ? *at[h] : kNever; }

  __device__ void find(const CatalogTopk& c, const int* sorted, const int64_t (&users)[2], int first) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      at[h] = end[h] = sorted;
      if (sorted && users[h] < c.users) {
        const Range own = user_range(c.exclude_offsets, users[h], c.exclusions);
        at[h] = sorted + own.first;
        end[h] = sorted + own.end;
        for (const int* last = end[h]; at[h] < last;) {
          const int* middle = at[h] + (last - at[h]) / 2;
          if (*middle < first)
            at[h] = middle + 1;
          else
            last = middle;
        }
      }
      next[h] = load(h);
    }
  }

  // Hides what is excluded of a tile of scores, of items `event …` of the stretch.
  template <int NT>
  __device__ __forceinline__ void hide(float (&s)[1][NT][4], const Stretch& stretch, int event) {
    const int first = stretch.id(event), behind = stretch.id(event + 8 * NT);
    if (!__any_sync(kAll, min(next[0], next[1]) < behind)) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      while (next[h] < behind) {
        const int ahead = next[h] - first, column = ahead / stretch.every;
        if (column * stretch.every == ahead) {
#pragma unroll
          for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
              if (column_of(j, e) == column) s[0][j][2 * h + e] = -infinity();
            }
          }
        }
        at[h]++;
        next[h] = load(h);
      }
    }
    __syncwarp();
  }
};

// --- the pass over the catalogue ---------------------------------------------------------------------------

// Unlike Maximum: a NaN is never the best.
struct Best {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// What scores are taken relative to: an infinite maximum would make NaN of itself.
__device__ __forceinline__ float finite_base(float m) { return fabsf(m) == infinity() ? 0.0f : m; }

// What a warp has in shared memory beside the tiles.
template <int N>
struct WarpMemory {
  uint64_t floors[16];
  int counts[16];
  union {
    float scores[N / 4][kWarp];  // of one row of each thread
    int histogram[kBins];
  };
};

template <class Kind, int D>
struct CatalogTopkMemory {
  using T = typename Kind::T;
  static constexpr int kN = kItems<Kind, D>, kStages = 2 * kTile<T, D, kN>;
  static constexpr int64_t bytes(int warps) {
    return (kStages + 16 * warps * kStride<T, D>)*static_cast<int64_t>(sizeof(T)) +
           warps * static_cast<int64_t>(sizeof(WarpMemory<kN>));
  }
};

// The lists of a warp's 16 rows, and what the rows of this thread have: a base m, which no score seen is far
// above, a sum l of e^(score - m), and the score from which on one enters the list.
template <int N>
struct RowsBest {
  WarpMemory<N>& memory;
  uint64_t* lists;
  int64_t list_stride;
  int k, limit;  // a list of more keys may not hold another tile's
  float m[2], l[2], entry[2];

  __device__ static int row(int h) { return 8 * h + lane() / 4; }

  // Looks at a tile, of which `top` are the best scores of this thread's rows. Ids are from
  // stretch.id(event).
  __device__ __forceinline__ void take(const float (&s)[1][N / 8][4], const float (&top)[2],
                                       const Stretch& stretch, int event) {
    const int t = lane() % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!__any_sync(kAll, top[h] >= entry[h])) continue;
      // The entry is never above m + slack, so the base moves only where something enters.
      const float best = over_lanes<4>(top[h], Best());
      if (best > m[h] + kSlack) {
        l[h] *= ptx::exp2((m[h] - best) * kLog2e);
        m[h] = best;
      }
      unsigned hits = 0;
#pragma unroll
      for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float score = s[0][j][2 * h + e];
          memory.scores[2 * j + e][lane()] = score;
          if (score >= entry[h]) hits |= 1u << (2 * j + e);
        }
      }
      const uint64_t floor = memory.floors[row(h)];
      int count = memory.counts[row(h)];
      uint64_t* list = lists + row(h) * list_stride;
      // A score of each thread a turn; mostly there is one in all.
      while (__any_sync(kAll, hits)) {
        const int n = __ffs(hits) - 1;
        uint64_t key = kNothing;
        if (hits) key = key_of(memory.scores[n][lane()], stretch.id(event + column_of(n / 2, n)));
        hits &= hits - 1;
        const bool enters = key != kNothing && key >= floor;
        const unsigned of_row = __ballot_sync(kAll, enters) >> (lane() - t) & 15;
        if (enters) list[count + __popc(of_row & ((1u << t) - 1))] = key;
        count += __popc(of_row);
      }
      if (t == 0) memory.counts[row(h)] = count;
      __syncwarp();
    }
    unsigned full = __ballot_sync(kAll, lane() < 16 && memory.counts[lane() % 16] > limit);
    for (; full; full &= full - 1) {
      const int r = __ffs(full) - 1;
      const uint64_t floor = drop_below_kth(WarpTeam(), lists + r * list_stride, &memory.counts[r], k,
                                            (limit - k) / 4, memory.histogram);
      if (lane() == 0) memory.floors[r] = floor;
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++) entry[h] = entry_of(memory.floors[row(h)], stretch.id(event + N));
  }
};

template <class Kind, int D, bool kSample>
__global__ __launch_bounds__(kMostThreads,
                             kTopkBlocks<Kind, D>) void catalog_topk_kernel(const CatalogTopk c,
                                                                            const CatalogTopkLaunch p) {
  using T = typename Kind::T;
  using Memory = CatalogTopkMemory<Kind, D>;
  constexpr int N = Memory::kN;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, block = blockIdx.y;
  const int64_t first_user = blockIdx.x * int64_t{16} * warps;
  // A sample's blocks take turns with its items: neighbours in a catalogue may be alike.
  const Stretch stretch =
      kSample ? Stretch{(block * kSampleEvery + kSampleEvery / 2), static_cast<int>(gridDim.y) * kSampleEvery,
                        p.sampled}
              : Stretch{block * p.part, 1,
                        static_cast<int>(min(int64_t{p.part}, c.items - block * int64_t{p.part}))};

  extern __shared__ __align__(16) char memory[];
  T* stages = reinterpret_cast<T*>(memory);
  T* rows = stages + Memory::kStages;
  auto& own = reinterpret_cast<WarpMemory<N>*>(rows + 16 * warps * kStride<T, D>)[warp];
  load_tile<T, D>(rows, 16 * warps, c.dim, p.user_vectors, [&](int r) -> const T* {
    return first_user + r < c.users
               ? static_cast<const T*>(c.user.data) + (first_user + r) * c.user.row_stride
               : nullptr;
  });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  Rows<Kind, D, 1, D <= 128> query;
  query.load(rows + 16 * warp * kStride<T, D>);

  const int64_t warp_user = first_user + 16 * warp;
  const int64_t users[2] = {warp_user + lane() / 4, warp_user + 8 + lane() / 4};
  Exclusions exclusions;
  exclusions.find(c, p.scratch.excluded, users, stretch.origin);

  const Set<T> set{{static_cast<const T*>(c.item.data) + stretch.origin * c.item.row_stride, nullptr},
                   {c.item.row_stride * stretch.every, 0},
                   {c.dim, 0},
                   p.item_vectors};
  // Natural units: equal scores, which the lower id decides, have to be equal.
  Scoring scoring{p.factor,
                  c.bias || p.factor != 1.0f,
                  nullptr,
                  c.bias_element,
                  c.bias_stride * stretch.every,
                  stretch.count,
                  1.0f};
  if (c.bias) {
    scoring.bias = static_cast<const char*>(c.bias) +
                   stretch.origin * c.bias_stride * (c.bias_element == Element::kFloat32 ? 4 : 2);
  }
  const int seen[1][2] = {{stretch.count, stretch.count}};
  const auto for_each = [&](const auto& readout) {
    for_each_tile<T, D, 0, N>(
        set, stages, 0, stretch.count, [](int, int) { return true; },
        [&](int event, const T* tile, const T*) {
          float s[1][N / 8][4];
          scores<Kind, D, N, 1>(s, query, tile);
          mask_scores(s, scoring, seen, event, event + N > stretch.count);
          exclusions.hide(s, stretch, event);
          readout(event, s);
        });
  };

  if constexpr (kSample) {
    float best[N / 8][4];  // of each column
#pragma unroll
    for (int j = 0; j < N / 8; j++) best[j][0] = best[j][1] = best[j][2] = best[j][3] = -infinity();
    for_each([&](int, const float (&s)[1][N / 8][4]) {
#pragma unroll
      for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) best[j][e] = fmaxf(best[j][e], s[0][j][e]);
      }
    });
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (users[h] >= c.users) continue;
      float* to = p.scratch.best + (users[h] * gridDim.y + block) * N;
#pragma unroll
      for (int j = 0; j < N / 8; j++) {
        to[column_of(j, 0)] = best[j][2 * h];
        to[column_of(j, 1)] = best[j][2 * h + 1];
      }
    }
  } else {
    const int64_t list_stride = static_cast<int64_t>(p.parts) * p.capacity;
    RowsBest<N> kept{
        own,         p.scratch.lists + (warp_user * p.parts + block) * p.capacity, list_stride,
        p.k,         p.capacity < stretch.count ? p.capacity - N : kNever,         {-infinity(), -infinity()},
        {0.0f, 0.0f}};
    if (lane() < 16) {
      const int64_t user = warp_user + lane();
      own.counts[lane()] = 0;
      own.floors[lane()] = user >= c.users ? kUnreached : p.has_sample ? p.scratch.floors[user] : kNothing;
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++) {
      kept.entry[h] = entry_of(own.floors[kept.row(h)], stretch.origin);
      if (p.has_sample && users[h] < c.users) kept.m[h] = p.scratch.highest[users[h]];
    }
    for_each([&](int event, const float (&s)[1][N / 8][4]) {
      float top[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        top[h] = s[0][0][2 * h];
#pragma unroll
        for (int j = 0; j < N / 8; j++) top[h] = fmaxf(top[h], fmaxf(s[0][j][2 * h], s[0][j][2 * h + 1]));
      }
      if (__any_sync(kAll, top[0] >= kept.entry[0] || top[1] >= kept.entry[1]))
        kept.take(s, top, stretch, event);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        // Subtracted before it is scaled, so that the weight of the base is 1 however large it is.
        const float base = finite_base(kept.m[h]);
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
          kept.l[h] += ptx::exp2((s[0][j][2 * h] - base) * kLog2e);
          kept.l[h] += ptx::exp2((s[0][j][2 * h + 1] - base) * kLog2e);
        }
      }
    });
    const float sums[2] = {of_row(kept.l[0]), of_row(kept.l[1])};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (lane() % 4 != 0 || users[h] >= c.users) continue;
      const int64_t at = users[h] * p.parts + block;
      p.scratch.maxima[at] = kept.m[h];
      p.scratch.sums[at] = sums[h];
      p.scratch.counts[at] = own.counts[kept.row(h)];
    }
  }
}

}  // namespace attnrec::cuda
