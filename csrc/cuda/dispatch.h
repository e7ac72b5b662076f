// From run-time dtypes and head dims to the kernels' template arguments, and the launch itself.
#pragma once

#include <type_traits>

#include "cuda/arguments.h"
#include "cuda/products.cuh"

namespace attnrec::cuda {

// Head dims that the kernels are compiled for; others run in the next larger one, with loads cut at D.
inline int native_head_dim(int dim) {
  return dim <= 16 ? 16 : dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

template <class Kind, class Function>
auto for_dim(int dim, const Function& function) {
  switch (native_head_dim(dim)) {
    case 16:
      return function(Kind{}, std::integral_constant<int, 16>{});
    case 32:
      return function(Kind{}, std::integral_constant<int, 32>{});
    case 64:
      return function(Kind{}, std::integral_constant<int, 64>{});
    case 128:
      return function(Kind{}, std::integral_constant<int, 128>{});
    default:
      return function(Kind{}, std::integral_constant<int, 256>{});
  }
}

// function(Kind{}, integral_constant<int, D>{}), fp32 exact.
template <class Function>
auto for_exact_kind_and_dim(Element element, int dim, const Function& function) {
  switch (element) {
    case Element::kBFloat16:
      return for_dim<BFloat16>(dim, function);
    case Element::kFloat16:
      return for_dim<Float16>(dim, function);
    default:
      return for_dim<Float32>(dim, function);
  }
}

// Likewise, fp32 rounded to tf32 where that is allowed.
template <class Function>
auto for_kind_and_dim(Element element, bool tf32, int dim, const Function& function) {
  if (tf32 && element == Element::kFloat32) return for_dim<TFloat32>(dim, function);
  return for_exact_kind_and_dim(element, dim, function);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, unsigned threads, int64_t shared_bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace attnrec::cuda
