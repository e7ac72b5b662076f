// From stable-ABI tensors to raw arguments: checks that name the argument, conversions, allocation, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/tiers.h"

// Every message reads "attnrec: <op>: <argument> must …, got …".
#define ATTNREC_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, "attnrec: ", op, ": ", __VA_ARGS__)

namespace attnrec::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// "[3, 4, 16]"
std::string shape_of(const Tensor& tensor);

// The element type of a floating tensor on the CPU.
Element element_of(const char* op, const char* name, const Tensor& tensor);

// Checks device, dtype and rank. `like` is the tensor whose dtype it must have.
void check_tensor(const char* op, const char* name, const Tensor& tensor, int64_t rank, ScalarType dtype);

// `[rows, heads, D]` or `[rows, D]` (one head) in place where the last dimension is contiguous, else a copy,
// which `kept` holds alive.
Vectors vectors_of(const Tensor& tensor, std::vector<Tensor>& kept);

// An int32 or int64 vector of `count` numbers (any number where count < 0), any stride.
std::vector<int64_t> integers(const char* op, const char* name, const Tensor& tensor, int64_t count);

// Offsets `[users + 1]`: from 0, rising, to `total`, the rows of `rows_name`.
std::vector<int64_t> offsets_of(const char* op, const char* name, const Tensor& tensor, int64_t total,
                                const char* rows_name);

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape,
                 std::optional<ScalarType> dtype = {});

// fp32, or float64 beside float64: what sums, log-sum-exps and losses are kept in.
inline ScalarType working_dtype(Element element) {
  return element == Element::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// This thread's scratch memory, at least `bytes`, 64-byte aligned, kept for the next call.
void* thread_scratch(int64_t bytes);

// Runs function(i) for i in 0 … count, each once, on torch's threads; a thread that is done takes the next.
// What the threads compute must not depend on who takes what.
template <class Function>
void for_each_unit(int64_t count, const Function& function) {
  if (count <= 1 || torch::stable::get_num_threads() == 1) {
    for (int64_t i = 0; i < count; i++) function(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) function(i);
  });
}

}  // namespace attnrec::cpu
