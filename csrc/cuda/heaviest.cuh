// The highest scores of a row, kept while it streams past: a warp's affair.
//
// A score and its event make one 64-bit *key* whose order is the contract's: the higher score first, ties to
// the earlier event. So the keys kept are the same whatever the order they came in, and however a history was
// cut. A row has a list of `top` keys in memory, in falling order; slot i of it is read and written by lane
// i % 32 of the row's warp alone.
#pragma once

#include "cuda/streaming.cuh"

namespace attnrec::cuda {

using Key = long long;
constexpr Key kNothing = -0x7fffffffffffffffll - 1;  // below every key of a score

// 0 and -0, which are equal, as the same. No NaN.
__device__ __forceinline__ Key key_of(float score, int event) {
  int bits = __float_as_int(score == 0.0f ? 0.0f : score);
  bits ^= (bits >> 31) & 0x7fffffff;
  return (static_cast<Key>(bits) << 32) | static_cast<unsigned>(0x7fffffff - event);
}

__device__ __forceinline__ float score_of(Key key) {  // -inf of kNothing
  if (key == kNothing) return -infinity();
  const int bits = static_cast<int>(key >> 32);
  return __int_as_float(bits ^ ((bits >> 31) & 0x7fffffff));
}

__device__ __forceinline__ int event_of(Key key) {  // -1 of kNothing
  return key == kNothing ? -1 : 0x7fffffff - static_cast<int>(key & 0x7fffffff);
}

// Puts the keys of the lanes `hits` into a row's list, and what they drive out at its end away. Returns the
// score that a later event must exceed to enter: the last one's, -inf of a list with room; `floor` is what it
// was.
__device__ __forceinline__ float insert(Key* list, int top, unsigned hits, Key key, float floor) {
  for (int page = 0; page < top && hits; page += kWarp) {
    const int slot = page + lane();
    Key own = slot < top ? list[slot] : kNothing;
    Key last = __shfl_sync(kAll, own, kWarp - 1);
    if (!__any_sync(kAll, (hits >> lane() & 1) && key > last)) continue;
    for (unsigned rest = hits; rest; rest &= rest - 1) {
      const int from = __ffs(rest) - 1;
      const Key next = __shfl_sync(kAll, key, from);
      last = __shfl_sync(kAll, own, kWarp - 1);
      Key before = __shfl_up_sync(kAll, own, 1);
      if (lane() == 0) before = 0x7fffffffffffffffll;
      own = own > next ? own : min(before, next);
      // What falls off the page goes on to the next one.
      if (lane() == from) key = min(last, next);
    }
    if (slot < top) list[slot] = own;
    if (page + kWarp >= top) floor = score_of(__shfl_sync(kAll, own, (top - 1) % kWarp));
    hits &= __ballot_sync(kAll, key != kNothing);
  }
  return floor;
}

}  // namespace attnrec::cuda
