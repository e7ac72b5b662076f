// attnrec::target_attention on the CPU.
#include <tuple>

#include "cpu/attention_arguments.h"

namespace attnrec::cpu {
namespace {

constexpr int64_t kRowsTogether = 32;  // of a user: with more, products take longer than memory

std::tuple<Tensor, Tensor> target_attention(Tensor query, Tensor key, Tensor value, Tensor q_offsets,
                                            Tensor kv_offsets, std::optional<double> scale,
                                            OptionalTensor kv_lengths, OptionalTensor visible,
                                            OptionalTensor self_key, OptionalTensor self_value,
                                            OptionalTensor key_bias, std::optional<int64_t> max_kv_length) {
  const AttentionArguments arguments("target_attention", query, key, &value, q_offsets, kv_offsets, scale,
                                     kv_lengths, visible, self_key, &self_value, key_bias);
  const Attention& a = arguments.attention;
  for (int64_t b = 0; max_kv_length && b < a.users; b++) {
    ATTNREC_CHECK(a.events(b) <= *max_kv_length, "target_attention", "max_kv_length must be at least ",
                  a.events(b), ", the events of user ", b, ", got ", *max_kv_length);
  }
  Tensor out = new_empty(query, {query.size(0), query.size(1), query.size(2)});
  Tensor lse = new_empty(query, {query.size(0), query.size(1)}, working_dtype(a.element));
  const std::vector<Unit> units = plan_units(a, kRowsTogether);
  const Kernels& tier = kernels(a.element);
  for_each_unit(units, [&](int64_t i) {
    void* memory = thread_scratch(tier.target_attention(a, units[i], nullptr, nullptr, nullptr));
    tier.target_attention(a, units[i], memory, out.mutable_data_ptr(), lse.mutable_data_ptr());
  });
  return {out, lse};
}

}  // namespace
}  // namespace attnrec::cpu

STABLE_TORCH_LIBRARY_IMPL(attnrec, CPU, m) {
  m.impl("target_attention", TORCH_BOX(&attnrec::cpu::target_attention));
}
