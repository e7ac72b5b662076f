// Sums and maxima over a warp and over a block, in an order that is always the same.
#pragma once

#include "cuda/ptx.h"

namespace attnrec::cuda {

struct Sum {
  static constexpr float kNeutral = 0;
  __device__ float operator()(float a, float b) const { return a + b; }
};
// NaN stays NaN.
struct Maximum {
  static constexpr float kNeutral = -__builtin_huge_valf();
  __device__ float operator()(float a, float b) const { return ptx::max_or_nan(a, b); }
};

// Over groups of kLanes neighbours, a power of two; every lane of the warp takes part and gets its group's.
template <int kLanes = 32, class Operation>
__device__ float over_lanes(float x, Operation operation) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x = operation(x, __shfl_xor_sync(~0u, x, distance));
  }
  return x;
}

// Over the block; every thread takes part and gets it. `memory` has room for a number of each warp.
template <class Operation>
__device__ float over_block(float x, Operation operation, float* memory) {
  x = over_lanes(x, operation);
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) memory[threadIdx.x / 32] = x;
  __syncthreads();
  x = over_lanes(lane < warps ? memory[lane] : Operation::kNeutral, operation);
  __syncthreads();  // `memory` may be written again
  return x;
}

}  // namespace attnrec::cuda
