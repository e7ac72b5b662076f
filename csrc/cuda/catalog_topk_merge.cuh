// What is left of a catalogue after the pass over it: a user's groups become a floor, its lists a result.
#pragma once

#include "cuda/catalog_topk.cuh"

namespace attnrec::cuda {

// The k-th best of a user's groups, and the best score.
__global__ void __launch_bounds__(kMergeThreads)
    catalog_topk_floor_kernel(CatalogTopkScratch scratch, int groups, int k) {
  __shared__ int histogram[kBins];
  __shared__ float memory[kMergeThreads / kWarp];
  const float* best = scratch.best + blockIdx.x * static_cast<int64_t>(groups);
  const uint64_t floor = kth_key(BlockTeam(), groups, k, k / 8, histogram, [&](int i) {
    const uint32_t score = ordered(best[i]);
    return score >= kLowest ? static_cast<uint64_t>(score) << 32 : kNothing;
  });
  float highest = -infinity();
  for (int i = threadIdx.x; i < groups; i += kMergeThreads) highest = fmaxf(highest, best[i]);
  highest = over_block(highest, Maximum(), memory);
  if (threadIdx.x == 0) {
    scratch.floors[blockIdx.x] = floor;
    scratch.highest[blockIdx.x] = highest;
  }
}

// The log-sum-exp of a user's parts, always in the same order.
__device__ inline float merged_lse(const float* maxima, const float* sums, int parts, float* memory) {
  float m = -infinity(), l = 0.0f;
  for (int i = threadIdx.x; i < parts; i += kMergeThreads) m = fmaxf(m, maxima[i]);
  m = over_block(m, Maximum(), memory);
  for (int i = threadIdx.x; i < parts; i += kMergeThreads) {
    const float sum = sums[i];
    if (sum != 0.0f) l += sum * ptx::exp2((finite_base(maxima[i]) - finite_base(m)) * kLog2e);
  }
  l = over_block(l, Sum(), memory);
  return finite_base(m) + log2f(l) * kLn2;
}

__global__ void __launch_bounds__(kMergeThreads) catalog_topk_merge_kernel(int results, CatalogTopkLaunch p) {
  constexpr int kWarps = kMergeThreads / kWarp;
  extern __shared__ __align__(16) char memory[];
  __shared__ int histogram[kBins], of_warps[kWarps], count;
  __shared__ float floats[kWarps];
  const int64_t user = blockIdx.x;
  uint64_t* keys = p.in_shared ? reinterpret_cast<uint64_t*>(memory) : p.scratch.merged + user * p.room;
  int* starts =
      reinterpret_cast<int*>(memory + (p.in_shared ? 8 * p.room : 0));  // of the lists, side by side

  const float lse =
      merged_lse(p.scratch.maxima + user * p.parts, p.scratch.sums + user * p.parts, p.parts, floats);
  if (threadIdx.x == 0) p.lse[user] = lse, count = 0;

  int total = 0;
  for (int first = 0; first < p.parts; first += kMergeThreads) {
    const int part = first + threadIdx.x;
    const int own = part < p.parts ? p.scratch.counts[user * p.parts + part] : 0;
    int before = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int x = __shfl_up_sync(kAll, before, distance);
      if (lane() >= distance) before += x;
    }
    if (lane() == kWarp - 1) of_warps[threadIdx.x / kWarp] = before;
    __syncthreads();
    int here = 0;
    for (int w = 0; w < kWarps; w++) {
      if (w == threadIdx.x / kWarp) before += here;
      here += of_warps[w];
    }
    if (part < p.parts) starts[part] = total + before - own;
    total += here;
    __syncthreads();
  }

  uint64_t floor = kNothing;
  for (int first = 0; first < total; first += kMergeThreads) {
    const int held = count;
    __syncthreads();  // all have read it
    if (held + kMergeThreads > p.room) floor = drop_below_kth(BlockTeam(), keys, &count, p.k, 0, histogram);
    const int i = first + threadIdx.x;
    uint64_t key = kNothing;
    if (i < total) {
      int part = 0;  // the last one that begins at i or before
      for (int behind = p.parts; behind - part > 1;) {
        const int middle = (part + behind) / 2;
        if (starts[middle] <= i)
          part = middle;
        else
          behind = middle;
      }
      key = p.scratch.lists[(user * p.parts + part) * p.capacity + i - starts[part]];
    }
    append(BlockTeam(), keys, &count, key, key != kNothing && key >= floor, histogram);
    __syncthreads();
  }
  __syncthreads();
  if (count > p.k) drop_below_kth(BlockTeam(), keys, &count, p.k, 0, histogram);
  const int found = count;
  if (found <= kMergeThreads) {
    // Fewer steps than a network's: a key's place is the number of higher ones.
    const uint64_t key = threadIdx.x < found ? keys[threadIdx.x] : kNothing;
    int place = 0;
    if (threadIdx.x < found) {
      for (int i = 0; i < found; i++) place += keys[i] > key;
    }
    __syncthreads();
    if (threadIdx.x < found) keys[place] = key;
    __syncthreads();
  } else {
    sort(BlockTeam(), keys, found, [](uint64_t a, uint64_t b) { return a > b; });
  }
  for (int i = threadIdx.x; i < results; i += kMergeThreads) {
    const uint64_t key = i < found ? keys[i] : kNothing;
    p.scores[user * results + i] = score_of(key);
    p.ids[user * results + i] = id_of(key);
  }
}

}  // namespace attnrec::cuda
