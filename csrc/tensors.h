// What the bindings of every device do with tensors beside checking them (checks.h).
#pragma once

#include <initializer_list>
#include <vector>

#include "checks.h"

namespace attnrec {

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape,
                        std::optional<ScalarType> dtype = {}) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

// `[rows, heads, D]` or `[rows, D]` (one head) as a device's Vectors: in place where the last dimension is
// contiguous, else a copy, which `kept` holds alive.
template <class Vectors>
Vectors vectors_of(const Tensor& tensor, std::vector<Tensor>& kept) {
  const int64_t last = tensor.dim() - 1;
  kept.push_back(tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor
                                                                    : torch::stable::contiguous(tensor));
  const Tensor& read = kept.back();
  return {read.const_data_ptr(), read.stride(0), last == 2 ? read.stride(1) : 0};
}

}  // namespace attnrec
