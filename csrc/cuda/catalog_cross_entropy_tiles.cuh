// What is done to a tile of scores of users and items, forward and backward.
#pragma once

#include "cuda/catalog_cross_entropy.h"
#include "cuda/streaming.cuh"

namespace attnrec::cuda {

template <class T>
__device__ __forceinline__ const T* row_of(const Vectors& x, int64_t row) {
  return static_cast<const T*>(x.data) + row * x.row_stride;
}

// What is done to a tile's products in every pass that has rows of users and columns of items.
struct ItemColumns {
  const int* ids;      // of negatives, or null
  const float* added;  // or null
  float factor;
  int count;

  // Whether item `n` is computed with.
  __device__ bool shown(int n) const { return !added || added[n] != -infinity(); }

  // Products of rows with items `first …` to logits, or as they are where nothing is added: -inf where there
  // is no item or it is hidden, and where it is the row's own target among the negatives.
  template <int MT, int NT>
  __device__ __forceinline__ void logits(float (&s)[MT][NT][4], const int (&target)[MT][2], int first) const {
    if (added) {
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const float2 x = *reinterpret_cast<const float2*>(added + first + column_of(j, 0));
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
          for (int c = 0; c < 4; c++) s[i][j][c] = fmaf(s[i][j][c], factor, c % 2 ? x.y : x.x);
        }
      }
    } else if (first + 8 * NT > count) {
#pragma unroll
      for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
          if (first + column_of(j, c) < count) continue;
#pragma unroll
          for (int i = 0; i < MT; i++) s[i][j][c] = -infinity();
        }
      }
    }
    if (ids) {
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const int2 x = *reinterpret_cast<const int2*>(ids + first + column_of(j, 0));
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
          for (int c = 0; c < 4; c++) {
            if ((c % 2 ? x.y : x.x) == target[i][c / 2]) s[i][j][c] = -infinity();
          }
        }
      }
    }
  }
};

// Calls own(i, h, s) for the scores of rows' own targets among items `first …`, in the thread that has them.
template <int MT, int NT, class Function>
__device__ __forceinline__ void for_own(float (&s)[MT][NT][4], const int (&target)[MT][2], int first,
                                        const Function& own) {
#pragma unroll
  for (int i = 0; i < MT; i++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int place = target[i][h] - first;
      if (place < 0 || place >= 8 * NT) continue;  // nearly always
#pragma unroll
      for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          if (place == column_of(j, c)) own(i, h, s[i][j][2 * h + c]);
        }
      }
    }
  }
}

}  // namespace attnrec::cuda
