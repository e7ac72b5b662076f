// The k best of a set: keys, and what a team of threads does with a list of them.
//
// A score and its id make one 64-bit key whose order is the contract's: the higher score first, ties to the
// lower id. So nothing below has to think of ties, and the k best of a set are the same whatever order it was
// looked at in and however it was cut. No order is kept within a list: what is left at the end is sorted
// once.
#pragma once

#include <cstdint>

namespace attnrec::cuda {

// --- keys --------------------------------------------------------------------------------------------------

constexpr uint64_t kNothing = 0, kUnreached = ~uint64_t{0};  // below and above every score's
constexpr uint32_t kLowest = 0x00800000;  // the lowest finite float's: -inf, whose is below, is never kept

// float as a number with the same order; 0 and -0, which are equal, as the same. No NaN.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t x) {
  return __uint_as_float(x >> 31 ? x ^ 0x80000000u : ~x);
}

__device__ __forceinline__ uint64_t key_of(float score, int id) {
  return static_cast<uint64_t>(ordered(score)) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ float score_of(uint64_t key) {
  return key == kNothing ? -__builtin_huge_valf() : from_ordered(static_cast<uint32_t>(key >> 32));
}
__device__ __forceinline__ int64_t id_of(uint64_t key) {
  return key == kNothing ? -1 : static_cast<int64_t>(~static_cast<uint32_t>(key));
}

// The score from which on an id of `first` or more can reach a key: what a loop compares with. Where the
// key's own id has gone by that is the next float, so that equal scores (a user of zeros) are not looked at
// for ever. It is a NaN, which nothing reaches, for kUnreached.
__device__ __forceinline__ float entry_of(uint64_t key, int first) {
  const uint32_t score = max(static_cast<uint32_t>(key >> 32), kLowest);
  const bool gone_by = ~static_cast<uint32_t>(key) < static_cast<uint32_t>(first);
  return from_ordered(key != kUnreached && gone_by ? score + 1 : score);
}

// --- teams -------------------------------------------------------------------------------------------------

struct WarpTeam {
  __device__ int rank() const { return threadIdx.x % 32; }
  __device__ int size() const { return 32; }
  __device__ void sync() const { __syncwarp(); }
};
struct BlockTeam {
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
};

constexpr int kBins = 256;  // of a histogram in shared memory

// A key that from k to k + slack of the n keys `load(i)` reach, or more where keys are equal; k <= n. Eight
// bits a round, from the highest on, until the bits that are known tell few enough from the rest.
template <class Team, class Load>
__device__ uint64_t kth_key(Team team, int n, int k, int slack, int* histogram, const Load& load) {
  const int lane = threadIdx.x % 32;
  uint64_t key = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    team.sync();
    for (int i = team.rank(); i < kBins; i += team.size()) histogram[i] = 0;
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) {
      const uint64_t other = load(i);
      if ((other ^ key) >> shift >> 8 == 0) atomicAdd(&histogram[other >> shift & (kBins - 1)], 1);
    }
    team.sync();
    if (team.rank() < 32) {
      // The bin with the k-th: a lane has eight of them, the first lane the highest.
      constexpr int kEach = kBins / 32;
      int bins[kEach], sum = 0;
#pragma unroll
      for (int e = 0; e < kEach; e++) sum += bins[e] = histogram[kBins - 1 - (lane * kEach + e)];
      int above = sum;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int x = __shfl_up_sync(~0u, above, distance);
        if (lane >= distance) above += x;
      }
      above -= sum;
      __syncwarp();
#pragma unroll
      for (int e = 0; e < kEach; e++) {
        if (above < k && k <= above + bins[e]) {
          histogram[0] = kBins - 1 - (lane * kEach + e), histogram[1] = above, histogram[2] = bins[e];
        }
        above += bins[e];
      }
    }
    team.sync();
    key |= static_cast<uint64_t>(histogram[0]) << shift;
    k -= histogram[1];
    if (histogram[2] - k <= slack) break;
  }
  return key;
}

// Appends the team's keys, one a thread where `keep`, in the order of the threads behind the `*count` there
// are. `sums` has room for a number of each warp. The team is to be synchronised before `*count` is read.
template <class Team>
__device__ __forceinline__ void append(Team team, uint64_t* keys, int* count, uint64_t key, bool keep,
                                       int* sums) {
  const unsigned votes = __ballot_sync(~0u, keep);
  const int lane = team.rank() % 32, warp = team.rank() / 32;
  if (lane == 0) sums[warp] = __popc(votes);
  team.sync();
  int at = *count, all = 0;
  for (int w = 0; w < team.size() / 32; w++) {
    if (w < warp) at += sums[w];
    all += sums[w];
  }
  if (keep) keys[at + __popc(votes & ((1u << lane) - 1))] = key;
  team.sync();  // all have read the count and the sums
  if (team.rank() == 0) *count += all;
}

// Drops what is not among the k + slack best of n keys, or among fewer, but keeps the k best; k < n. Returns
// the floor that the others reach. `*count` is the number of keys, before and after.
template <class Team>
__device__ uint64_t drop_below_kth(Team team, uint64_t* keys, int* count, int k, int slack, int* histogram) {
  const int n = *count;
  const uint64_t floor = kth_key(team, n, k, slack, histogram, [&](int i) { return keys[i]; });
  team.sync();
  if (team.rank() == 0) *count = 0;
  for (int first = 0; first < n; first += team.size()) {
    const int i = first + team.rank();
    const uint64_t key = i < n ? keys[i] : kNothing;
    // All have read theirs before one writes over them.
    append(team, keys, count, key, i < n && key >= floor, histogram);
  }
  team.sync();
  return floor;
}

// Sorts x[0 … n) so that `before(x[i + 1], x[i])` is nowhere true: a bitonic network whose exchanges all
// point the same way, so that n need not be a power of two.
template <class Team, class T, class Before>
__device__ void sort(Team team, T* x, int64_t n, const Before& before) {
  for (int64_t run = 2; run < 2 * n; run *= 2) {
    for (int64_t apart = run / 2; apart > 0; apart /= 2) {
      team.sync();
      for (int64_t pair = team.rank();; pair += team.size()) {
        const int64_t offset = pair & (apart - 1), begin = 2 * (pair - offset), low = begin + offset;
        if (low >= n) break;
        const int64_t high = begin + (apart == run / 2 ? 2 * apart - 1 - offset : apart + offset);
        if (high >= n) continue;
        const T first = x[low], second = x[high];
        if (before(second, first)) x[low] = second, x[high] = first;
      }
    }
  }
  team.sync();
}

}  // namespace attnrec::cuda
