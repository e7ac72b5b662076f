// attnrec::target_attention_weights on the CPU.
#include <algorithm>
#include <tuple>

#include "cpu/attention_arguments.h"

namespace attnrec::cpu {
namespace {

// Candidates in all heads. Fewer than 8 would leave products rows short; more than 256 rows' tiles of weights
// would not stay in L2.
std::vector<Unit> plan(const Attention& a) {
  const int group = a.key_bias ? 1 : a.heads / a.kv_heads;
  const int64_t together = std::max(8, 256 / a.heads);
  std::vector<Unit> units;
  for (int64_t b = 0; b < a.users; b++) {
    for (int64_t first = a.q_offsets[b]; first < a.q_offsets[b + 1]; first += together) {
      const int rows = static_cast<int>(std::min(together, a.q_offsets[b + 1] - first)) * group;
      units.push_back({b, first, rows, group, 0, 0, 0, INT64_MAX, a.heads / group,
                       static_cast<double>(rows) * static_cast<double>(a.room(b))});
    }
  }
  dearest_first(units);
  return units;
}

std::tuple<Tensor, Tensor> target_attention_weights(Tensor query, Tensor key, Tensor q_offsets,
                                                    Tensor kv_offsets, std::optional<double> scale,
                                                    OptionalTensor kv_lengths, OptionalTensor visible,
                                                    OptionalTensor self_key, OptionalTensor key_bias) {
  const AttentionArguments arguments("target_attention_weights", query, key, nullptr, q_offsets, kv_offsets,
                                     scale, kv_lengths, visible, self_key, nullptr, key_bias);
  const Attention& a = arguments.attention;
  Tensor offsets = new_empty(query, {a.users + 1}, ScalarType::Long);
  auto* pairs = static_cast<int64_t*>(offsets.mutable_data_ptr());
  pairs[0] = 0;
  for (int64_t b = 0; b < a.users; b++) {
    pairs[b + 1] = pairs[b] + (a.q_offsets[b + 1] - a.q_offsets[b]) * a.room(b);
  }
  Tensor weights = new_empty(query, {pairs[a.users], a.heads});
  const Kernels& tier = kernels(a.element);
  void* to = weights.mutable_data_ptr();
  const std::vector<Unit> units = plan(a);
  for_each_unit(units, [&](int64_t i) {
    void* memory = thread_scratch(tier.target_attention_weights(a, units[i], nullptr, nullptr, nullptr));
    tier.target_attention_weights(a, units[i], memory, pairs, to);
  });
  return {weights, offsets};
}

}  // namespace
}  // namespace attnrec::cpu

STABLE_TORCH_LIBRARY_IMPL(attnrec, CPU, m) {
  m.impl("target_attention_weights", TORCH_BOX(&attnrec::cpu::target_attention_weights));
}
