// Numbers as tensors hold them, and as kernels compute with them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/arguments.h"

namespace attnrec::cuda {

// Calls function(T{}) with the type of the element.
template <class Function>
auto with_element(Element element, const Function& function) {
  switch (element) {
    case Element::kBFloat16:
      return function(__nv_bfloat16{});
    case Element::kFloat16:
      return function(__half{});
    default:
      return function(float{});
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// Rounded to nearest, ties to even.
template <class T>
__device__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Element i of a vector whose type is known at run time only, as a bias is: it may be fp32 beside 16 bits.
__device__ inline float load_element(const void* data, int64_t i, Element element) {
  switch (element) {
    case Element::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    case Element::kFloat16:
      return to_float(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ inline void store_element(void* data, int64_t i, Element element, float x) {
  switch (element) {
    case Element::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(x);
      break;
    case Element::kFloat16:
      static_cast<__half*>(data)[i] = from_float<__half>(x);
      break;
    default:
      static_cast<float*>(data)[i] = x;
  }
}

}  // namespace attnrec::cuda
