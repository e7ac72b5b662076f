// attnrec::softmax_score and its gradient on the CPU.
#include "cpu/softmax_score.h"

#include <tuple>

#include "cpu/catalog_arguments.h"

namespace attnrec::cpu {
namespace {

// Items that one thread scores at a time. A user with more is cut here, and its parts are summed in order.
constexpr int64_t kChunk = 4096;

struct SoftmaxScoreArguments : CatalogArguments {
  std::vector<int64_t> offsets;
  std::vector<Unit> units;
  std::vector<int64_t> first_unit;  // of user b, up to first_unit[b + 1]

  SoftmaxScoreArguments(const char* op, const Tensor& users, const Tensor& items, const Tensor& offsets_,
                        double temperature, const OptionalTensor& bias)
      : CatalogArguments(op, users, "items", items, temperature) {
    check_softmax_score(op, users, items, offsets_, temperature, bias);
    offsets = offsets_of(op, "offsets", offsets_, items, "items");
    attention.users = users.size(0);
    attention.kv_offsets = offsets.data();
    if (bias) {
      attention.bias_element = element_of(op, "bias", *bias);
      attention.key_bias = bias->const_data_ptr();
      attention.bias_row_stride = bias->stride(0);
    }
    first_unit.push_back(0);
    for (int64_t b = 0; b < attention.users; b++) {
      const int64_t count = offsets[b + 1] - offsets[b];
      for (int64_t begin = 0; begin < count; begin += kChunk) {
        Unit unit;
        unit.user = unit.first = b;
        unit.rows = 1;
        unit.first_event = begin;
        unit.last_event = std::min(count, begin + kChunk);
        unit.cost = static_cast<double>(unit.last_event - begin);
        units.push_back(unit);
      }
      first_unit.push_back(static_cast<int64_t>(units.size()));
    }
  }

  // Probabilities of all items to `out`, of dtype `element`. `logits` is memory for [T_c] working numbers; it
  // may be `out` where that has the same dtype.
  void score(void* logits, Element element, void* out) const {
    const Kernels& tier = kernels(attention.element);
    const int64_t real_bytes = attention.element == Element::kFloat64 ? 8 : 4;
    std::vector<double> maximum(units.size()), sum(units.size());
    const auto normalize = [&](int64_t i, const SoftmaxParts& softmax) {
      const int64_t first = offsets[units[i].user] + units[i].first_event;
      tier.softmax_score_normalize(static_cast<const char*>(logits) + first * real_bytes,
                                   units[i].last_event - units[i].first_event, softmax.maximum, softmax.sum,
                                   element, static_cast<char*>(out) + first * element_bytes(element));
    };
    const auto parts_of = [&](int64_t i) {
      return first_unit[units[i].user + 1] - first_unit[units[i].user];
    };
    bool all_whole = true;
    for (int64_t b = 0; b < attention.users; b++) all_whole &= first_unit[b + 1] - first_unit[b] <= 1;
    for_each_unit(units, [&](int64_t i) {
      void* memory =
          thread_scratch(tier.softmax_score(attention, units[i], nullptr, nullptr, nullptr, nullptr));
      tier.softmax_score(attention, units[i], memory, logits, &maximum[i], &sum[i]);
      if (parts_of(i) > 1) return;
      SoftmaxParts softmax;
      softmax.add(maximum[i], sum[i]);
      normalize(i, softmax);
    });
    if (all_whole) return;
    for_each_unit(units, [&](int64_t i) {
      if (parts_of(i) == 1) return;
      SoftmaxParts softmax;
      for (int64_t u = first_unit[units[i].user]; u < first_unit[units[i].user + 1]; u++) {
        softmax.add(maximum[u], sum[u]);
      }
      normalize(i, softmax);
    });
  }
};

Tensor softmax_score(Tensor users, Tensor items, Tensor offsets, double temperature, OptionalTensor bias) {
  const SoftmaxScoreArguments arguments("softmax_score", users, items, offsets, temperature, bias);
  const Element element = arguments.attention.element;
  Tensor out = new_empty(users, {items.size(0)});
  const bool in_place = element == Element::kFloat32 || element == Element::kFloat64;
  Tensor logits = in_place ? out : new_empty(users, {items.size(0)}, working_dtype(element));
  arguments.score(logits.mutable_data_ptr(), element, out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> softmax_score_backward(Tensor grad, Tensor users, Tensor items,
                                                          Tensor offsets, Tensor probabilities,
                                                          double temperature, OptionalTensor bias) {
  const char* op = "softmax_score_backward";
  const SoftmaxScoreArguments arguments(op, users, items, offsets, temperature, bias);
  const Attention& a = arguments.attention;
  check_per_score(op, "grad", grad, users, items);
  check_per_score(op, "probabilities", probabilities, users, items);
  const bool wide = a.element == Element::kFloat32 || a.element == Element::kFloat64;
  const Element working = a.element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32;
  grad = torch::stable::contiguous(grad);
  Tensor p;
  if (wide) {
    p = torch::stable::contiguous(probabilities);
  } else {
    // Rounded to 16 bits they would be the largest error of the gradient; taking them again costs one reading
    // of the items, half as long as fp32's.
    p = new_empty(users, {items.size(0)}, working_dtype(a.element));
    arguments.score(p.mutable_data_ptr(), working, p.mutable_data_ptr());
  }

  const int64_t units = static_cast<int64_t>(arguments.units.size()), D = a.head_dim;
  Tensor grad_users = new_empty(users, {users.size(0), D});
  Tensor grad_items = new_empty(items, {items.size(0), D});
  Tensor grad_bias = bias ? new_empty(*bias, {items.size(0)}) : new_empty(users, {0});
  Tensor partial = new_empty(users, {units, D}, working_dtype(a.element));
  const Kernels& tier = kernels(a.element);
  with_real(a.element, [&](auto real) {
    using Real = decltype(real);
    const Real* probability = static_cast<const Real*>(p.const_data_ptr());
    std::vector<double> weighted(units);
    for_each_unit(arguments.units, [&](int64_t i) {
      const Unit& unit = arguments.units[i];
      const int64_t begin = arguments.offsets[unit.user];
      double sum = 0;
      for (int64_t j = begin + unit.first_event; j < begin + unit.last_event; j++) {
        // Where the probability is exactly 0, whatever the gradient says is nothing.
        if (probability[j] != 0)
          sum += load_element<double>(grad.const_data_ptr(), j, a.element) * probability[j];
      }
      weighted[i] = sum;
    });
    for_each_unit(arguments.units, [&](int64_t i) {
      const int64_t user = arguments.units[i].user;
      SoftmaxScoreGradient gradient{grad.const_data_ptr(),
                                    probability,
                                    0,
                                    grad_items.mutable_data_ptr(),
                                    static_cast<Real*>(partial.mutable_data_ptr()) + i * D,
                                    bias ? grad_bias.mutable_data_ptr() : nullptr};
      for (int64_t u = arguments.first_unit[user]; u < arguments.first_unit[user + 1]; u++) {
        gradient.weighted_grad += weighted[u];
      }
      void* memory = thread_scratch(tier.softmax_score_backward(a, arguments.units[i], nullptr, gradient));
      tier.softmax_score_backward(a, arguments.units[i], memory, gradient);
    });
    for_each_unit(a.users, [&](int64_t b) {
      for (int64_t d = 0; d < D; d++) {
        Real sum = 0;
        for (int64_t u = arguments.first_unit[b]; u < arguments.first_unit[b + 1]; u++) {
          sum += static_cast<const Real*>(partial.const_data_ptr())[u * D + d];
        }
        store_element(grad_users.mutable_data_ptr(), b * D + d, a.element, sum);
      }
    });
  });
  return {grad_users, grad_items, grad_bias};
}

}  // namespace
}  // namespace attnrec::cpu

STABLE_TORCH_LIBRARY_IMPL(attnrec, CPU, m) {
  m.impl("softmax_score", TORCH_BOX(&attnrec::cpu::softmax_score));
  m.impl("softmax_score_backward", TORCH_BOX(&attnrec::cpu::softmax_score_backward));
}
