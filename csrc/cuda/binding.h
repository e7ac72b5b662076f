// From stable-ABI tensors to raw arguments on a GPU: conversions, allocation, the current stream.
//
// A file `<op>_binding.cpp` checks an op's arguments (checks.h), fills the structs of its launcher (`<op>.h`)
// and registers it. Nothing here or there waits for the GPU or reads a value from it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <vector>

#include "checks.h"
#include "cuda/arguments.h"

namespace attnrec::cuda {

// Makes the device of `tensor` the current one while it lives; launches go to that device's current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor);
  ~Launch();
  Launch(const Launch&) = delete;

  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

  // Raises where the launcher of `op` reports an error.
  static void check(const char* op, cudaError_t error);

 private:
  void* guard_ = nullptr;
  void* stream_ = nullptr;
};

// The element type of a floating tensor of an op that the reference serves in float64.
Element element_of(const char* op, const char* name, const Tensor& tensor);

// `[rows, heads, D]` or `[rows, D]` (one head) in place where the last dimension is contiguous, else a copy,
// which `kept` holds alive.
Vectors vectors_of(const Tensor& tensor, std::vector<Tensor>& kept);

// An int32 or int64 vector in place where it is contiguous, else a copy.
Indices indices_of(const Tensor& tensor, std::vector<Tensor>& kept);

// What attnrec::allow_tf32 was last told.
bool tf32_is_allowed();

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape,
                 std::optional<ScalarType> dtype = {});

}  // namespace attnrec::cuda
