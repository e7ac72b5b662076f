// What the binding hands to the launchers, and these to their kernels: raw pointers, strides in elements, no
// framework types. All pointers are the device's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace attnrec::cuda {

enum class Element : int { kFloat32, kBFloat16, kFloat16 };

constexpr int element_bytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Vectors `[rows, heads, D]` of any row and head stride; the last dimension is contiguous.
struct Vectors {
  const void* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;
};

// Whether all of them begin at a multiple of 16 bytes.
inline bool begin_aligned(const Vectors& vectors, Element element) {
  const int64_t bytes = element_bytes(element);
  return (reinterpret_cast<uintptr_t>(vectors.data) | static_cast<uintptr_t>(vectors.row_stride * bytes) |
          static_cast<uintptr_t>(vectors.head_stride * bytes)) %
             16 ==
         0;
}

// A contiguous vector of int64 (`wide`) or int32 numbers: offsets, lengths, ids.
struct Indices {
  const void* data = nullptr;
  bool wide = true;

  __host__ __device__ explicit operator bool() const { return data != nullptr; }
  __host__ __device__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace attnrec::cuda
