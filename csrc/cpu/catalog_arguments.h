// What the ops over users and items share: checked arguments, fixed chunks of items, softmaxes taken in
// parts.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/binding.h"

namespace attnrec::cpu {

// `users [rows, D]` against `items [N, D]` as the streaming softmax's problem: one head, scores in natural
// units.
struct CatalogArguments {
  Attention attention;
  std::vector<Tensor> kept;

  CatalogArguments(const char* op, const Tensor& users, const char* items_name, const Tensor& items,
                   double temperature);
  CatalogArguments(const CatalogArguments&) = delete;
};

// Cuts `items` into at most `most` chunks of whole tiles, at least `fewest` items each: their bounds. Results
// are summed chunk by chunk, so that this may depend on the number of items, never on threads or on the
// batch.
std::vector<int64_t> chunk_bounds(int64_t items, int64_t fewest, int64_t most);

// A softmax's running maximum and sum, of parts that are added in a fixed order.
struct SoftmaxParts {
  double maximum = -std::numeric_limits<double>::infinity(), sum = 0;

  void add(double part_maximum, double part_sum) {
    if (part_maximum > maximum) {
      sum *= std::exp(maximum - part_maximum);
      maximum = part_maximum;
    }
    // Equal first: both may be -inf.
    sum += part_maximum == maximum ? part_sum : part_sum * std::exp(part_maximum - maximum);
  }
  double lse() const { return sum == 0 ? -std::numeric_limits<double>::infinity() : maximum + std::log(sum); }
};

// Calls function(Real{}) with the type that sums are kept in.
template <class Function>
auto with_real(Element element, const Function& function) {
  return element == Element::kFloat64 ? function(double{}) : function(float{});
}

}  // namespace attnrec::cpu
