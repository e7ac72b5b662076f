// attnrec::target_attention_top on a GPU.
#include <limits>
#include <tuple>

#include "cuda/attention_binding.h"
#include "cuda/target_attention_top.h"

namespace attnrec::cuda {
namespace {

std::tuple<Tensor, Tensor> target_attention_top(Tensor query, Tensor key, Tensor q_offsets, Tensor kv_offsets,
                                                int64_t top, std::optional<double> scale,
                                                OptionalTensor kv_lengths, OptionalTensor visible,
                                                OptionalTensor self_key, OptionalTensor key_bias) {
  const char* op = "target_attention_top";
  ATTNREC_CHECK(top >= 0, op, "top must be at least 0, got ", top);
  ATTNREC_CHECK(top <= std::numeric_limits<int>::max() - 32, op, "top must be below 2^31 - 32, got ", top);
  const Launch launch(query);
  std::vector<Tensor> kept;
  const Attention a = attention_of(op, query, key, nullptr, q_offsets, kv_offsets, scale, kv_lengths, visible,
                                   self_key, nullptr, key_bias, kept);
  const TopPlan plan = plan_target_attention_top(a, top);
  Tensor weights = new_empty(query, {a.rows, a.heads, top});
  Tensor events = new_empty(query, {a.rows, a.heads, top}, ScalarType::Long);
  Tensor parts = new_empty(query, {plan.rows.part_floats}, ScalarType::Float);
  Tensor lists = new_empty(query, {plan.list_keys}, ScalarType::Long);
  Launch::check(
      op, launch_target_attention_top(a, plan, top, weights.mutable_data_ptr(),
                                      static_cast<int64_t*>(events.mutable_data_ptr()),
                                      static_cast<float*>(parts.mutable_data_ptr()),
                                      static_cast<int64_t*>(lists.mutable_data_ptr()), launch.stream()));
  return {weights, events};
}

}  // namespace
}  // namespace attnrec::cuda

STABLE_TORCH_LIBRARY_IMPL(attnrec, CUDA, m) {
  m.impl("target_attention_top", TORCH_BOX(&attnrec::cuda::target_attention_top));
}
