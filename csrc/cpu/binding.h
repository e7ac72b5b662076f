// From stable-ABI tensors to raw arguments: conversions, checks of values, allocation, threads.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/tiers.h"
#include "tensors.h"

namespace attnrec::cpu {

// The element type of a floating tensor.
Element element_of(const char* op, const char* name, const Tensor& tensor);

inline Vectors vectors_of(const Tensor& tensor, std::vector<Tensor>& kept) {
  return attnrec::vectors_of<Vectors>(tensor, kept);
}

// An int32 or int64 vector of `count` numbers (any number where count < 0), any stride, on the device of
// `like`.
std::vector<int64_t> integers(const char* op, const char* name, const Tensor& tensor, int64_t count,
                              const Tensor& like);

// Offsets `[users + 1]`: from 0, rising, to the number of `rows`, whose name is `rows_name`.
std::vector<int64_t> offsets_of(const char* op, const char* name, const Tensor& tensor, const Tensor& rows,
                                const char* rows_name);

// fp32, or float64 beside float64: what sums, log-sum-exps and losses are kept in.
inline ScalarType working_dtype(Element element) {
  return element == Element::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// This thread's scratch memory, at least `bytes`, 64-byte aligned, kept for the next call.
void* thread_scratch(int64_t bytes);

// Runs function(i) for i in 0 … count, each once, on torch's threads; a thread that is done takes the next.
// What the threads compute must not depend on who takes what. Where one raises, no more are begun, and the
// caller gets its exception: the stable ABI would hand on that there was one, but not what it says.
template <class Function>
void for_each_unit(int64_t count, const Function& function) {
  if (count <= 1 || torch::stable::get_num_threads() == 1) {
    for (int64_t i = 0; i < count; i++) function(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<bool> raised{false};
  std::exception_ptr exception;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t i; (i = next++) < count;) function(i);
    } catch (...) {
      if (!raised.exchange(true)) exception = std::current_exception();
      next = count;
    }
    // What went past the caches is not ordered by the usual rules, but by this.
    std::atomic_thread_fence(std::memory_order_seq_cst);
  });
  if (exception) std::rethrow_exception(exception);
}

}  // namespace attnrec::cpu
