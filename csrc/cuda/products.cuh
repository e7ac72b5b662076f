// Products of a warp's rows with a tile of the stream, for every kind of number.
//
// A warp has one or more blocks of 16 rows. The stream's tiles, `[N, D]`, lie in shared memory, and so do the
// rows. There are two products, and every kernel is made of them:
//   scores  s [16, N] = rows [16, D] tile^T      (Q K^T, dO V^T; with the roles swapped K Q^T, V dO^T)
//   weigh   acc [16, D] += p [16, N] tile [N, D]  (P V, dS K; dS^T Q, P^T dO)
// Sums lie in registers as mma.sync lays them out (ptx.h), whatever the kind, so that what stands between the
// two products, masks and softmax, is written once: `x[j][c]` of a thread is row g + 8 * (c / 2), column
// 8 * j + 2 * t + c % 2.
#pragma once

#include <type_traits>

#include "cuda/element.cuh"
#include "cuda/ptx.h"

namespace attnrec::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }

// Elements from one row to the next in shared memory. The 16 bytes more than a row has put the eight rows
// that an ldmatrix reads, and the rows that a fp32 product reads, into different banks at every D.
template <class T, int D>
constexpr int kStride = D + 16 / static_cast<int>(sizeof(T));

// --- the kinds of numbers ----------------------------------------------------------------------------------

struct BFloat16 {
  using T = __nv_bfloat16;
  static __device__ uint32_t pack(float a, float b) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(x);
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_bf16(d, a, b0, b1);
  }
};

struct Float16 {
  using T = __half;
  static __device__ uint32_t pack(float a, float b) {
    const __half2 x = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(x);
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_f16(d, a, b0, b1);
  }
};

struct Float32 {  // exact: fused multiply-adds
  using T = float;
};

struct TFloat32 : Float32 {};  // fp32 with operands rounded to tf32

// --- values that are not finite ----------------------------------------------------------------------------

constexpr int kNever = 0x7fffffff;
enum { kNan, kPlus, kMinus, kKinds };

// Where each of the D columns of what was weighed has its first NaN, infinity and negative infinity: event
// numbers, in shared memory. A weight of zero does not keep such a value out of a sum (0 * NaN is NaN), so it
// is left out of the product, and added to the rows that see it.
struct NonFinite {
  int* first = nullptr;  // [kKinds, D]
  int columns = 0;

  __device__ float take(float x, int event, int column) const {
    if (fabsf(x) <= 3.402823466e38f) return x;
    const int kind = x != x ? kNan : x > 0 ? kPlus : kMinus;
    atomicMin(&first[kind * columns + column], event);
    return 0.0f;
  }
};

// --- 16-bit numbers: mma.sync over 16 of the reduction -----------------------------------------------------

// The rows' side of `scores`, for MT blocks of 16 rows from `shared` on. HELD: read into registers once.
template <class Kind, int D, int MT, bool HELD>
struct Rows {
  using T = typename Kind::T;
  const T* at;
  uint32_t held[HELD ? MT : 1][HELD ? D / 16 : 1][4];

  __device__ void load(const T* shared) {
    at = shared + (lane() % 16) * kStride<T, D> + lane() / 16 * 8;
    if constexpr (HELD) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) ptx::ldmatrix(held[i][k], at + i * 16 * kStride<T, D> + k * 16);
      }
    }
  }
  __device__ void fragment(uint32_t (&a)[4], int i, int k) const {
    if constexpr (HELD) {
#pragma unroll
      for (int c = 0; c < 4; c++) a[c] = held[i][k][c];
    } else {
      ptx::ldmatrix(a, at + i * 16 * kStride<T, D> + k * 16);
    }
  }
};

template <class Kind, int D, int N, int MT, bool HELD>
__device__ __forceinline__ void scores_half(float (&s)[MT][N / 8][4], const Rows<Kind, D, MT, HELD>& rows,
                                            const typename Kind::T* tile) {
  using T = typename Kind::T;
  const T* at = tile + (lane() / 16 * 8 + lane() % 8) * kStride<T, D> + lane() / 8 % 2 * 8;
#pragma unroll
  for (int i = 0; i < MT; i++) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) s[i][j][0] = s[i][j][1] = s[i][j][2] = s[i][j][3] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t a[MT][4];
#pragma unroll
    for (int i = 0; i < MT; i++) rows.fragment(a[i], i, k);
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
      uint32_t b[4];
      ptx::ldmatrix(b, at + j * 16 * kStride<T, D> + k * 16);
#pragma unroll
      for (int i = 0; i < MT; i++) {
        Kind::mma(s[i][2 * j], a[i], b[0], b[1]);
        Kind::mma(s[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

template <class Kind, int D, int N, int MT, int W>
__device__ __forceinline__ void weigh_half(float (&acc)[MT][D / 8][4], const float (&p)[MT][N / 8][4],
                                           const typename Kind::T* tile) {
  using T = typename Kind::T;
  const T* at = tile + (lane() / 8 % 2 * 8 + lane() % 8) * kStride<T, W> + lane() / 16 * 8;
#pragma unroll
  for (int k = 0; k < N / 16; k++) {
    uint32_t a[MT][4];
#pragma unroll
    for (int i = 0; i < MT; i++) {
      a[i][0] = Kind::pack(p[i][2 * k][0], p[i][2 * k][1]);
      a[i][1] = Kind::pack(p[i][2 * k][2], p[i][2 * k][3]);
      a[i][2] = Kind::pack(p[i][2 * k + 1][0], p[i][2 * k + 1][1]);
      a[i][3] = Kind::pack(p[i][2 * k + 1][2], p[i][2 * k + 1][3]);
    }
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      uint32_t b[4];
      ptx::ldmatrix_trans(b, at + k * 16 * kStride<T, W> + j * 16);
#pragma unroll
      for (int i = 0; i < MT; i++) {
        Kind::mma(acc[i][2 * j], a[i], b[0], b[1]);
        Kind::mma(acc[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// --- fp32 --------------------------------------------------------------------------------------------------

template <int D, int MT, bool HELD>
struct Rows<Float32, D, MT, HELD> {
  const float* at;
  __device__ void load(const float* shared) { at = shared; }
};
template <int D, int MT, bool HELD>
struct Rows<TFloat32, D, MT, HELD> : Rows<Float32, D, MT, HELD> {};

// A thread reads its two rows and its two columns, four numbers at a time: 2 + N / 4 reads of 16 bytes for
// 2 N multiply-adds.
template <int D, int N, int MT, class AnyRows>
__device__ __forceinline__ void scores_exact(float (&s)[MT][N / 8][4], const AnyRows& rows,
                                             const float* tile) {
  static_assert(MT == 1);
  constexpr int S = kStride<float, D>;
  const float* row = rows.at + lane() / 4 * S;
  const float* column = tile + lane() % 4 * 2 * S;
#pragma unroll
  for (int j = 0; j < N / 8; j++) s[0][j][0] = s[0][j][1] = s[0][j][2] = s[0][j][3] = 0.0f;
#pragma unroll(D > 64 ? 1 : 2)
  for (int begin = 0; begin < D; begin += 16) {
    // Sixteen products apart, then onto the rest: one long sum would be less exact than PyTorch's at D = 256.
    float part[N / 8][4] = {};
#pragma unroll
    for (int k = begin; k < begin + 16; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(row + k);
      const float4 a1 = *reinterpret_cast<const float4*>(row + 8 * S + k);
      const auto add = [&](float& sum, const float4& a, const float4& b) {
        sum = fmaf(a.x, b.x, sum);
        sum = fmaf(a.y, b.y, sum);
        sum = fmaf(a.z, b.z, sum);
        sum = fmaf(a.w, b.w, sum);
      };
#pragma unroll
      for (int j = 0; j < N / 8; j++) {
        const float4 b0 = *reinterpret_cast<const float4*>(column + j * 8 * S + k);
        const float4 b1 = *reinterpret_cast<const float4*>(column + (j * 8 + 1) * S + k);
        add(part[j][0], a0, b0);
        add(part[j][1], a0, b1);
        add(part[j][2], a1, b0);
        add(part[j][3], a1, b1);
      }
    }
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
      for (int c = 0; c < 4; c++) s[0][j][c] += part[j][c];
    }
  }
}

// A weight is with one thread of the four that need it; they pass it round.
template <int D, int N, int MT, int W>
__device__ __forceinline__ void weigh_exact(float (&acc)[MT][D / 8][4], const float (&p)[MT][N / 8][4],
                                            const float* tile) {
  static_assert(MT == 1);
  constexpr int S = kStride<float, W>;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
#pragma unroll 1
    for (int t = 0; t < 4; t++) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int n = 8 * j + 2 * t + c, from = lane() / 4 * 4 + t;
        const float p0 = __shfl_sync(kAll, p[0][j][c], from), p1 = __shfl_sync(kAll, p[0][j][2 + c], from);
        const float* row = tile + n * S + lane() % 4 * 2;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
          const float2 v = *reinterpret_cast<const float2*>(row + 8 * d);
          acc[0][d][0] = fmaf(p0, v.x, acc[0][d][0]);
          acc[0][d][1] = fmaf(p0, v.y, acc[0][d][1]);
          acc[0][d][2] = fmaf(p1, v.x, acc[0][d][2]);
          acc[0][d][3] = fmaf(p1, v.y, acc[0][d][3]);
        }
      }
    }
  }
}

template <int D, int N, int MT, class AnyRows>
__device__ __forceinline__ void scores_tf32(float (&s)[MT][N / 8][4], const AnyRows& rows,
                                            const float* tile) {
  static_assert(MT == 1);
  constexpr int S = kStride<float, D>;
  const float* row = rows.at + lane() / 4 * S + lane() % 4;
  const float* column = tile + lane() / 4 * S + lane() % 4;
#pragma unroll
  for (int j = 0; j < N / 8; j++) s[0][j][0] = s[0][j][1] = s[0][j][2] = s[0][j][3] = 0.0f;
#pragma unroll(D > 128 ? 1 : 4)
  for (int k = 0; k < D; k += 8) {
    const uint32_t a[4] = {ptx::tf32(row[k]), ptx::tf32(row[8 * S + k]), ptx::tf32(row[k + 4]),
                           ptx::tf32(row[8 * S + k + 4])};
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      ptx::mma_tf32(s[0][j], a, ptx::tf32(column[j * 8 * S + k]), ptx::tf32(column[j * 8 * S + k + 4]));
    }
  }
}

// The reduction's numbers 2t and 2t + 1 of eight stand where the instruction has t and t + 4, on both sides:
// so the weights need not change threads.
template <int D, int N, int MT, int W>
__device__ __forceinline__ void weigh_tf32(float (&acc)[MT][D / 8][4], const float (&p)[MT][N / 8][4],
                                           const float* tile) {
  static_assert(MT == 1);
  constexpr int S = kStride<float, W>;
  const float* at = tile + lane() % 4 * 2 * S + lane() / 4;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const uint32_t a[4] = {ptx::tf32(p[0][j][0]), ptx::tf32(p[0][j][2]), ptx::tf32(p[0][j][1]),
                           ptx::tf32(p[0][j][3])};
#pragma unroll
    for (int d = 0; d < D / 8; d++) {
      const float b0 = at[j * 8 * S + 8 * d], b1 = at[(j * 8 + 1) * S + 8 * d];
      ptx::mma_tf32(acc[0][d], a, ptx::tf32(b0), ptx::tf32(b1));
    }
  }
}

// --- whatever the kind -------------------------------------------------------------------------------------

template <class Kind, int D, int N, int MT, bool HELD>
__device__ __forceinline__ void scores(float (&s)[MT][N / 8][4], const Rows<Kind, D, MT, HELD>& rows,
                                       const typename Kind::T* tile) {
  if constexpr (std::is_same_v<Kind, Float32>) {
    scores_exact<D, N, MT>(s, rows, tile);
  } else if constexpr (std::is_same_v<Kind, TFloat32>) {
    scores_tf32<D, N, MT>(s, rows, tile);
  } else {
    scores_half<Kind, D, N, MT, HELD>(s, rows, tile);
  }
}

// The tile's rows are `W` wide; with `tile` at another column than the first, W > D weighs some of them.
template <class Kind, int D, int N, int MT, int W = D>
__device__ __forceinline__ void weigh(float (&acc)[MT][D / 8][4], const float (&p)[MT][N / 8][4],
                                      const typename Kind::T* tile) {
  if constexpr (std::is_same_v<Kind, Float32>) {
    weigh_exact<D, N, MT, W>(acc, p, tile);
  } else if constexpr (std::is_same_v<Kind, TFloat32>) {
    weigh_tf32<D, N, MT, W>(acc, p, tile);
  } else {
    weigh_half<Kind, D, N, MT, W>(acc, p, tile);
  }
}

}  // namespace attnrec::cuda
