// The jagged batch: which rows are a user's, and which of them are a tile's.
#pragma once

#include "cuda/arguments.h"

namespace attnrec::cuda {

// Division of numbers below 2^31 by one that is known before the launch, without a division (Granlund and
// Montgomery 1994): a product's upper half, a sum and a shift.
class Divisor {
 public:
  explicit Divisor(uint32_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << shift_) < divisor) shift_++;
    factor_ =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor)) / divisor + 1);
  }
  __device__ int quotient(int n) const { return (__umulhi(n, factor_) + n) >> shift_; }
  __device__ int remainder(int n) const { return n - quotient(n) * static_cast<int>(divisor_); }

 private:
  uint32_t divisor_, factor_ = 0, shift_ = 0;
};

// Rows `first … end`.
struct Range {
  int64_t first, end;
};

// A user's part of `total` rows, legal whatever the offsets hold.
__device__ inline Range user_range(const Indices& offsets, int64_t user, int64_t total) {
  const int64_t first = min(max(offsets[user], int64_t{0}), total);
  return {first, min(max(offsets[user + 1], first), total)};
}

// The number of a user's first tile, where no tile of `rows` rows crosses a user's border. It leaves room for
// all tiles of the users before.
__device__ inline int64_t first_tile(int64_t first_row, int64_t user, int rows) {
  return first_row / rows + user;
}

// How many tiles a launch needs, without a look at the offsets.
inline int64_t count_tiles(int64_t users, int64_t total, int rows) {
  return (total + rows - 1) / rows + users;
}

struct Tile {
  int64_t user;
  Range rows;  // empty where there is no such tile
};

// The user of tile number `tile` is the last one whose first tile is at or before it. All lanes of a warp
// search together, 128 users a round: a round costs a memory latency, one does for 128 users, two for 16
// thousand.
__device__ inline Tile find_tile(int64_t tile, const Indices& offsets, int64_t users, int64_t total,
                                 int rows_of_tile) {
  constexpr int kLanes = 32, kEach = 4;
  const int lane = threadIdx.x % kLanes;
  int64_t low = 0, span = max(users, int64_t{1});
  while (span > 1) {
    const int64_t width = (span + kLanes * kEach - 1) / (kLanes * kEach);
    bool before[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int64_t at = (i * kLanes + lane) * width;
      before[i] = at < span && first_tile(offsets[low + at], low + at, rows_of_tile) <= tile;
    }
    int count = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) count += __popc(__ballot_sync(~0u, before[i]));
    const int64_t skipped = (max(count, 1) - 1) * width;
    span = min(width, span - skipped);
    low += skipped;
  }
  Range rows = user_range(offsets, low, total);
  const int64_t ahead = (tile - first_tile(rows.first, low, rows_of_tile)) * rows_of_tile;
  if (ahead < 0) return {low, {rows.first, rows.first}};
  rows.first = min(rows.first + ahead, rows.end);
  return {low, rows};
}

}  // namespace attnrec::cuda
