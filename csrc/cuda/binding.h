// From stable-ABI tensors to raw arguments on a GPU: conversions, allocation, the current stream.
//
// A file `<op>_binding.cpp` checks an op's arguments (checks.h), fills the structs of its launcher (`<op>.h`)
// and registers it. Nothing here or there waits for the GPU or reads a value from it, but for the number of
// all weights, which is the size of a result.
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda/arguments.h"
#include "tensors.h"

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

inline Vectors vectors_of(const Tensor& tensor, std::vector<Tensor>& kept) {
  return attnrec::vectors_of<Vectors>(tensor, kept);
}

// An int32 or int64 vector in place where it is contiguous, else a copy.
Indices indices_of(const Tensor& tensor, std::vector<Tensor>& kept);

// What attnrec::allow_tf32 was last told.
bool tf32_is_allowed();

}  // namespace attnrec::cuda
