// Vectors read 16 bytes a lane.
#pragma once

#include "cuda/element.cuh"

namespace attnrec::cuda {

// Elements in 16 bytes.
template <class T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

template <class T>
struct alignas(16) Piece {
  T x[kWidth<T>];

  __device__ float operator[](int i) const { return to_float(x[i]); }
};

// Elements `first … first + kWidth` of a vector of `dim`, zeros beyond its end. kAligned: `dim` is a multiple
// of kWidth and the vector begins at a multiple of 16 bytes. It changes how memory is read, not what is got.
template <class T, bool kAligned>
__device__ Piece<T> load_piece(const T* vector, int first, int dim) {
  Piece<T> piece;
  if constexpr (kAligned) {
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (first < dim) bits = __ldg(reinterpret_cast<const uint4*>(vector + first));
    *reinterpret_cast<uint4*>(piece.x) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<T>; i++) {
      piece.x[i] = first + i < dim ? vector[first + i] : from_float<T>(0);
    }
  }
  return piece;
}

template <class T, bool kAligned>
__device__ void store_piece(T* vector, int first, int dim, const Piece<T>& piece) {
  if constexpr (kAligned) {
    if (first < dim) *reinterpret_cast<uint4*>(vector + first) = *reinterpret_cast<const uint4*>(piece.x);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<T>; i++) {
      if (first + i < dim) vector[first + i] = piece.x[i];
    }
  }
}

// Whether all rows and heads begin at a multiple of 16 bytes and hold whole pieces.
inline bool is_aligned(const Vectors& vectors, int64_t dim, Element element) {
  return begin_aligned(vectors, element) && dim * element_bytes(element) % 16 == 0;
}

}  // namespace attnrec::cuda
