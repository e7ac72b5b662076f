// attnrec::target_attention on a GPU.
#include <tuple>

#include "cuda/attention_binding.h"
#include "cuda/target_attention.h"

namespace attnrec::cuda {
namespace {

std::tuple<Tensor, Tensor> target_attention(Tensor query, Tensor key, Tensor value, Tensor q_offsets,
                                            Tensor kv_offsets, std::optional<double> scale,
                                            OptionalTensor kv_lengths, OptionalTensor visible,
                                            OptionalTensor self_key, OptionalTensor self_value,
                                            OptionalTensor key_bias, std::optional<int64_t>) {
  const char* op = "target_attention";
  const Launch launch(query);
  std::vector<Tensor> kept;
  const Attention a = attention_of(op, query, key, &value, q_offsets, kv_offsets, scale, kv_lengths, visible,
                                   self_key, &self_value, key_bias, kept);
  const AttentionPlan plan = plan_target_attention(a);
  Tensor out = new_empty(query, {a.rows, a.heads, a.head_dim});
  Tensor lse = new_empty(query, {a.rows, a.heads}, ScalarType::Float);
  Tensor parts = new_empty(query, {plan.part_floats}, ScalarType::Float);
  Launch::check(op, launch_target_attention(a, plan, out.mutable_data_ptr(),
                                            static_cast<float*>(lse.mutable_data_ptr()),
                                            static_cast<float*>(parts.mutable_data_ptr()), launch.stream()));
  return {out, lse};
}

}  // namespace
}  // namespace attnrec::cuda

STABLE_TORCH_LIBRARY_IMPL(attnrec, CUDA, m) {
  m.impl("target_attention", TORCH_BOX(&attnrec::cuda::target_attention));
}
