// attnrec::target_attention_weights on a GPU.
#include <tuple>

#include "cuda/attention_binding.h"
#include "cuda/target_attention_weights.h"

namespace attnrec::cuda {
namespace {

std::tuple<Tensor, Tensor> target_attention_weights(Tensor query, Tensor key, Tensor q_offsets,
                                                    Tensor kv_offsets, std::optional<double> scale,
                                                    OptionalTensor kv_lengths, OptionalTensor visible,
                                                    OptionalTensor self_key, OptionalTensor key_bias) {
  const char* op = "target_attention_weights";
  const Launch launch(query);
  std::vector<Tensor> kept;
  const Attention a = attention_of(op, query, key, nullptr, q_offsets, kv_offsets, scale, kv_lengths, visible,
                                   self_key, nullptr, key_bias, kept);
  Tensor offsets = new_empty(query, {a.users + 1}, ScalarType::Long);
  auto* begins = static_cast<int64_t*>(offsets.mutable_data_ptr());
  Launch::check(op, launch_pair_offsets(a, begins, launch.stream()));
  // How many weights one user has is known from shapes. Of several it is a value on the device, and this
  // waits for it.
  int64_t pairs = a.users * a.rows * a.events;
  if (a.users > 1 && a.rows > 0 && a.events > 0) {
    Launch::check(op, read_pairs(a, begins, &pairs, launch.stream()));
  }
  Tensor weights = new_empty(query, {pairs, a.heads});
  const RowsPlan plan = plan_target_attention_weights(a);
  Tensor parts = new_empty(query, {plan.part_floats}, ScalarType::Float);
  Launch::check(
      op, launch_target_attention_weights(a, plan, begins, pairs, weights.mutable_data_ptr(),
                                          static_cast<float*>(parts.mutable_data_ptr()), launch.stream()));
  return {weights, offsets};
}

}  // namespace
}  // namespace attnrec::cuda

STABLE_TORCH_LIBRARY_IMPL(attnrec, CUDA, m) {
  m.impl("target_attention_weights", TORCH_BOX(&attnrec::cuda::target_attention_weights));
}
