// attnrec::target_attention_top on the CPU.
#include <tuple>

#include "cpu/attention_arguments.h"

namespace attnrec::cpu {
namespace {

std::tuple<Tensor, Tensor> target_attention_top(Tensor query, Tensor key, Tensor q_offsets, Tensor kv_offsets,
                                                int64_t top, std::optional<double> scale,
                                                OptionalTensor kv_lengths, OptionalTensor visible,
                                                OptionalTensor self_key, OptionalTensor key_bias) {
  ATTNREC_CHECK(top >= 0, "target_attention_top", "top must be at least 0, got ", top);
  const AttentionArguments arguments("target_attention_top", query, key, nullptr, q_offsets, kv_offsets,
                                     scale, kv_lengths, visible, self_key, nullptr, key_bias);
  const Attention& a = arguments.attention;
  Tensor weights = new_empty(query, {query.size(0), query.size(1), top});
  Tensor events = new_empty(query, {query.size(0), query.size(1), top}, ScalarType::Long);
  const Kernels& tier = kernels(a.element);
  void* to = weights.mutable_data_ptr();
  auto* events_to = static_cast<int64_t*>(events.mutable_data_ptr());
  const std::vector<Unit> units = plan_units(a);
  for_each_unit(units, [&](int64_t i) {
    void* memory = thread_scratch(tier.target_attention_top(a, units[i], nullptr, top, nullptr, nullptr));
    tier.target_attention_top(a, units[i], memory, top, to, events_to);
  });
  return {weights, events};
}

}  // namespace
}  // namespace attnrec::cpu

STABLE_TORCH_LIBRARY_IMPL(attnrec, CPU, m) {
  m.impl("target_attention_top", TORCH_BOX(&attnrec::cpu::target_attention_top));
}
