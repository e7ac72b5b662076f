// One row a set of items, so there is no matrix product in it, and what counts is to read each item once.
//
// A user's items are cut into chunks of kChunk by their place in the user's list, a block each. A group of
// lanes takes an item, 16 bytes a lane. The chunk's logits stay in shared memory, where the block finishes a
// user who has one chunk. Of one with several they go to scratch memory, and a second kernel merges the
// chunks in their order. Nothing depends on the other users, so that a user's results are the same bits in
// any batch.
//
// Logits stay in nats: where one item takes all, its probability is 1 exactly, however large the logits.
//
// Gradient, with d = p (grad - Σ grad p): d to the bias, d / temperature · user to an item, and
// Σ d / temperature · item to the user.
#pragma once

#include "cuda/jagged.cuh"
#include "cuda/reductions.cuh"
#include "cuda/softmax_score.h"
#include "cuda/vectors.cuh"

namespace attnrec::cuda {

constexpr int kChunk = 1024;
constexpr int kThreads = 128, kWarps = kThreads / 32;  // more idle where a user has few items
constexpr int kTogether = 4;  // items of a group of lanes whose loads are in flight together
constexpr int kBlocks = 4;    // of a multiprocessor at least: asked for more, the compiler spills registers
constexpr float kHidden = -__builtin_huge_valf();

// Where scratch memory is divided: the parts [3][chunks], logits [items], partial gradients [chunks][dim].
struct SoftmaxScoreScratch {
  float *maxima, *totals, *weights, *logits, *partial;
};

// A softmax over items: its maximum, Σ exp(z - maximum), and Σ weight · exp(z - maximum).
struct Softmax {
  float maximum, total, weighted;

  // Relative to what exponentials are taken: a user whose items are all hidden has no maximum.
  __device__ float base() const { return maximum == kHidden ? 0 : maximum; }
  __device__ float probability(float z) const { return expf(z - base()) / (total == 0 ? 1 : total); }
  __device__ float mean() const { return weighted / (total == 0 ? 1 : total); }
};

// What a block knows of its chunk.
struct Chunk {
  int64_t user, first;  // its first item
  int count;            // its items
  Range all;            // the user's items
  bool whole;           // they are one chunk

  __device__ Chunk(const SoftmaxScore& s) {
    const Tile tile = find_tile(blockIdx.x, s.offsets, s.users, s.items, kChunk);
    user = tile.user;
    first = tile.rows.first;
    count = static_cast<int>(min(tile.rows.end - first, int64_t{kChunk}));
    all = user_range(s.offsets, user, s.items);
    whole = all.end - all.first <= kChunk;
  }
};

// The chunk's logits, to shared memory; kHidden where the bias is. The block is to be synchronised after.
template <class T, bool kAligned>
__device__ void chunk_logits(const SoftmaxScore& s, const Chunk& chunk, int lanes, float* logits) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int groups = 32 / lanes, of_pass = groups * kWarps;
  const int dim = static_cast<int>(s.dim), own = lane % lanes * kWidth<T>;
  const T* row = static_cast<const T*>(s.user.data) + chunk.user * s.user.row_stride;
  const T* items = static_cast<const T*>(s.item.data) + chunk.first * s.item.row_stride;
  for (int begin = warp * groups; begin < chunk.count; begin += of_pass * kTogether) {
    const auto item = [&](int i) { return begin + i * of_pass + lane / lanes; };
    float sum[kTogether], bias[kTogether];  // the bias is kHidden also where there is no item
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      sum[i] = 0;
      bias[i] = item(i) < chunk.count ? 0 : kHidden;
      if (s.bias != nullptr && item(i) < chunk.count) {
        bias[i] = load_element(s.bias, (chunk.first + item(i)) * s.bias_stride, s.bias_element);
      }
    }
    for (int first = own; first - own < dim; first += lanes * kWidth<T>) {
      Piece<T> x[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int there = bias[i] != kHidden ? dim : 0;
        x[i] = load_piece<T, kAligned>(items + item(i) * s.item.row_stride, first, there);
      }
      const Piece<T> of_user = load_piece<T, kAligned>(row, first, dim);
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
#pragma unroll
        for (int d = 0; d < kWidth<T>; d++) sum[i] = fmaf(x[i][d], of_user[d], sum[i]);
      }
    }
    // As over_lanes, with the shuffles of all items in flight together: one after the other each waits for
    // the one before.
    for (int distance = lanes >> 1; distance > 0; distance >>= 1) {
#pragma unroll
      for (int i = 0; i < kTogether; i++) sum[i] += __shfl_xor_sync(~0u, sum[i], distance);
    }
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      if (item(i) < chunk.count && lane % lanes == 0) {
        logits[item(i)] = bias[i] != kHidden ? sum[i] / s.temperature + bias[i] : kHidden;
      }
    }
  }
}

// The softmax over the chunk's logits in shared memory; `weight(n)` is asked only where exp is not 0, and if
// kWeighted.
template <bool kWeighted, class Weight>
__device__ Softmax chunk_softmax(const float* logits, int count, float* memory, const Weight& weight) {
  Softmax softmax{kHidden, 0, 0};
  for (int n = threadIdx.x; n < count; n += kThreads) softmax.maximum = Maximum()(softmax.maximum, logits[n]);
  softmax.maximum = over_block(softmax.maximum, Maximum(), memory);
  for (int n = threadIdx.x; n < count; n += kThreads) {
    const float e = expf(logits[n] - softmax.base());
    softmax.total += e;
    if (kWeighted && e != 0) softmax.weighted += weight(n) * e;
  }
  softmax.total = over_block(softmax.total, Sum(), memory);
  if (kWeighted) softmax.weighted = over_block(softmax.weighted, Sum(), memory);
  return softmax;
}

// The softmax over all chunks of a user, from their parts in scratch memory. Each warp takes it for itself.
__device__ inline Softmax merged(const Chunk& chunk, const SoftmaxScoreScratch& scratch) {
  const int64_t first = first_tile(chunk.all.first, chunk.user, kChunk);
  const int64_t chunks = (chunk.all.end - chunk.all.first + kChunk - 1) / kChunk;
  const int lane = threadIdx.x % 32;
  Softmax softmax{kHidden, 0, 0};
  for (int64_t i = lane; i < chunks; i += 32) {
    softmax.maximum = Maximum()(softmax.maximum, scratch.maxima[first + i]);
  }
  softmax.maximum = over_lanes(softmax.maximum, Maximum());
  for (int64_t i = lane; i < chunks; i += 32) {
    const float factor = expf(scratch.maxima[first + i] - softmax.base());
    softmax.total += scratch.totals[first + i] * factor;
    softmax.weighted += scratch.weights[first + i] * factor;
  }
  softmax.total = over_lanes(softmax.total, Sum());
  softmax.weighted = over_lanes(softmax.weighted, Sum());
  return softmax;
}

// The chunk's part of a user with several, for `merged`, and its logits.
__device__ inline void leave(const Chunk& chunk, const Softmax& softmax, const float* logits,
                             const SoftmaxScoreScratch& scratch) {
  if (threadIdx.x == 0) {
    scratch.maxima[blockIdx.x] = softmax.maximum;
    scratch.totals[blockIdx.x] = softmax.total;
    scratch.weights[blockIdx.x] = softmax.weighted;
  }
  for (int n = threadIdx.x; n < chunk.count; n += kThreads) scratch.logits[chunk.first + n] = logits[n];
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks)
    score_kernel(SoftmaxScore s, T* out, SoftmaxScoreScratch scratch, int lanes) {
  __shared__ float logits[kChunk], memory[kWarps];
  const Chunk chunk(s);
  if (chunk.count == 0) return;
  chunk_logits<T, kAligned>(s, chunk, lanes, logits);
  __syncthreads();
  const Softmax softmax = chunk_softmax<false>(logits, chunk.count, memory, [](int) { return 0.0f; });
  if (!chunk.whole) return leave(chunk, softmax, logits, scratch);
  for (int n = threadIdx.x; n < chunk.count; n += kThreads) {
    out[chunk.first + n] = from_float<T>(softmax.probability(logits[n]));
  }
}

// Probabilities of users with several chunks.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    normalize_kernel(SoftmaxScore s, T* out, SoftmaxScoreScratch scratch) {
  const Chunk chunk(s);
  if (chunk.count == 0 || chunk.whole) return;
  const Softmax softmax = merged(chunk, scratch);
  for (int n = threadIdx.x; n < chunk.count; n += kThreads) {
    out[chunk.first + n] = from_float<T>(softmax.probability(scratch.logits[chunk.first + n]));
  }
}

// The chunk's part of all gradients. `p` are its probabilities in shared memory, which it writes over; `mean`
// is Σ grad p over the user's items.
template <class T, bool kAligned>
__device__ void chunk_gradients(const SoftmaxScore& s, const SoftmaxScoreGradient& g, const Chunk& chunk,
                                int lanes, float mean, float* p, const SoftmaxScoreScratch& scratch) {
  constexpr int kEach = kWidth<T>;
  __shared__ float of_warps[kWarps][32 * kEach];
  __syncthreads();
  for (int n = threadIdx.x; n < chunk.count; n += kThreads) {
    // Hidden items have p = 0. Neither their gradient nor their vector is read.
    float change = 0;
    if (p[n] != 0) {
      const T* grad = static_cast<const T*>(g.grad);
      change = p[n] * (to_float(grad[(chunk.first + n) * g.grad_stride]) - mean);
    }
    if (g.grad_bias != nullptr) store_element(g.grad_bias, chunk.first + n, s.bias_element, change);
    p[n] = change / s.temperature;
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int groups = 32 / lanes, of_pass = groups * kWarps;
  const int dim = static_cast<int>(s.dim), own = lane % lanes * kWidth<T>;
  const T* row = static_cast<const T*>(s.user.data) + chunk.user * s.user.row_stride;
  const T* items = static_cast<const T*>(s.item.data) + chunk.first * s.item.row_stride;
  T* grad_items = static_cast<T*>(g.grad_items) + chunk.first * s.dim;
  for (int first = own; first - own < dim; first += lanes * kWidth<T>) {
    const Piece<T> of_user = load_piece<T, kAligned>(row, first, dim);
    float total[kEach] = {};
    for (int begin = warp * groups; begin < chunk.count; begin += of_pass * kTogether) {
      Piece<T> x[kTogether];
      float change[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int n = begin + i * of_pass + lane / lanes;
        change[i] = n < chunk.count ? p[n] : 0;
        x[i] = load_piece<T, kAligned>(items + n * s.item.row_stride, first, change[i] != 0 ? dim : 0);
      }
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int n = begin + i * of_pass + lane / lanes;
        if (n >= chunk.count) break;
        Piece<T> of_item{};
        if (change[i] != 0) {
#pragma unroll
          for (int d = 0; d < kWidth<T>; d++) {
            total[d] = fmaf(x[i][d], change[i], total[d]);
            of_item.x[d] = from_float<T>(of_user[d] * change[i]);
          }
        }
        store_piece<T, kAligned>(grad_items + n * s.dim, first, dim, of_item);
      }
    }
    // The groups' sums, and then the warps', always in the same order.
    for (int distance = 16; distance >= lanes; distance /= 2) {
#pragma unroll
      for (int d = 0; d < kEach; d++) total[d] += __shfl_xor_sync(~0u, total[d], distance);
    }
    if (lane < lanes) {
#pragma unroll
      for (int d = 0; d < kEach; d++) of_warps[warp][lane * kEach + d] = total[d];
    }
    __syncthreads();
    const int d = first - own + threadIdx.x;
    if (threadIdx.x < lanes * kEach && d < dim) {
      float sum = 0;
      for (int w = 0; w < kWarps; w++) sum += of_warps[w][threadIdx.x];
      if (chunk.whole) {
        static_cast<T*>(g.grad_users)[chunk.user * s.dim + d] = from_float<T>(sum);
      } else {
        scratch.partial[blockIdx.x * s.dim + d] = sum;
      }
    }
    __syncthreads();
  }
}

// All gradients of users with one chunk; of those with several the sums that their gradients need.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_kernel(SoftmaxScore s, SoftmaxScoreGradient g, SoftmaxScoreScratch scratch, int lanes) {
  __shared__ float p[kChunk], memory[kWarps];
  const Chunk chunk(s);
  if (chunk.count == 0) {
    // The first chunk of a user without items.
    if (chunk.all.first == chunk.all.end && blockIdx.x == first_tile(chunk.all.first, chunk.user, kChunk)) {
      T* grad_user = static_cast<T*>(g.grad_users) + chunk.user * s.dim;
      for (int64_t d = threadIdx.x; d < s.dim; d += kThreads) grad_user[d] = from_float<T>(0);
    }
    return;
  }
  const auto grad = [&](int n) {
    return to_float(static_cast<const T*>(g.grad)[(chunk.first + n) * g.grad_stride]);
  };
  float mean = 0;
  if constexpr (sizeof(T) == 4) {
    float weighted = 0;
    for (int n = threadIdx.x; n < chunk.count; n += kThreads) {
      p[n] = g.probabilities[chunk.first + n];
      if (p[n] != 0) weighted += p[n] * grad(n);  // where it is 0, whatever grad says is nothing
    }
    mean = over_block(weighted, Sum(), memory);
    if (!chunk.whole) {
      if (threadIdx.x == 0) scratch.weights[blockIdx.x] = mean;
      return;
    }
  } else {
    chunk_logits<T, kAligned>(s, chunk, lanes, p);
    __syncthreads();
    const Softmax softmax = chunk_softmax<true>(p, chunk.count, memory, grad);
    if (!chunk.whole) return leave(chunk, softmax, p, scratch);
    for (int n = threadIdx.x; n < chunk.count; n += kThreads) p[n] = softmax.probability(p[n]);
    mean = softmax.mean();
  }
  chunk_gradients<T, kAligned>(s, g, chunk, lanes, mean, p, scratch);
}

// The gradients of users with several chunks; their own as parts, which `sum_kernel` adds.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks)
    long_gradient_kernel(SoftmaxScore s, SoftmaxScoreGradient g, SoftmaxScoreScratch scratch, int lanes) {
  __shared__ float p[kChunk];
  const Chunk chunk(s);
  if (chunk.count == 0 || chunk.whole) return;
  float mean = 0;
  if constexpr (sizeof(T) == 4) {
    const int64_t first = first_tile(chunk.all.first, chunk.user, kChunk);
    const int64_t chunks = (chunk.all.end - chunk.all.first + kChunk - 1) / kChunk;
    for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) mean += scratch.weights[first + i];
    mean = over_lanes(mean, Sum());
    for (int n = threadIdx.x; n < chunk.count; n += kThreads) p[n] = g.probabilities[chunk.first + n];
  } else {
    const Softmax softmax = merged(chunk, scratch);
    for (int n = threadIdx.x; n < chunk.count; n += kThreads) {
      p[n] = softmax.probability(scratch.logits[chunk.first + n]);
    }
    mean = softmax.mean();
  }
  chunk_gradients<T, kAligned>(s, g, chunk, lanes, mean, p, scratch);
}

// The gradients of users with several chunks: the chunks' parts, in their order. A block a user.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_kernel(SoftmaxScore s, T* grad_users, const float* partial) {
  for (int64_t user = blockIdx.x; user < s.users; user += gridDim.x) {
    const Range all = user_range(s.offsets, user, s.items);
    const int64_t chunks = (all.end - all.first + kChunk - 1) / kChunk;
    if (chunks < 2) continue;
    const float* parts = partial + first_tile(all.first, user, kChunk) * s.dim;
    for (int64_t d = threadIdx.x; d < s.dim; d += kThreads) {
      float sum = 0;
      for (int64_t i = 0; i < chunks; i++) sum += parts[i * s.dim + d];
      grad_users[user * s.dim + d] = from_float<T>(sum);
    }
  }
}

}  // namespace attnrec::cuda
