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

// The same for the units 0 … of a call, in their order. Threads take units that cost little several at a
// time: what they read then lies together for longer, and they do not take turns at the same lines of memory
// (softmax_score of 4,000 users with 50 items each: 1.6 times as fast with two threads; attention of 1,000
// users with one candidate and 50 events 1.3 in fp32, 1.4 in bf16).
template <class Function>
void for_each_unit(const std::vector<Unit>& units, const Function& function) {
  constexpr int64_t kRunsOfAThread = 32;
  double total = 0, sum = 0;
  for (const Unit& unit : units) total += unit.cost;
  const double fair = total / static_cast<double>(torch::stable::get_num_threads() * kRunsOfAThread);
  const int64_t count = static_cast<int64_t>(units.size());
  std::vector<int64_t> ends;  // of the runs
  for (int64_t i = 0; i < count; i++) {
    sum += units[i].cost;
    if (sum < fair && i + 1 < count) continue;
    ends.push_back(i + 1);
    sum = 0;
  }
  for_each_unit(static_cast<int64_t>(ends.size()), [&](int64_t run) {
    for (int64_t i = run ? ends[run - 1] : 0; i < ends[run]; i++) function(i);
  });
}

}  // namespace attnrec::cpu
