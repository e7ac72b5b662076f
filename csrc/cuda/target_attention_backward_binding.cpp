// attnrec::target_attention_backward on a GPU.
#include <tuple>

#include "cuda/attention_binding.h"
#include "cuda/target_attention_backward.h"

namespace attnrec::cuda {
namespace {

Vectors numbers_of_rows(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> target_attention_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,
    Tensor q_offsets, Tensor kv_offsets, std::optional<double> scale, OptionalTensor kv_lengths,
    OptionalTensor visible, OptionalTensor self_key, OptionalTensor self_value, OptionalTensor key_bias) {
  const char* op = "target_attention_backward";
  const Launch launch(query);
  std::vector<Tensor> kept;
  const Attention a = attention_of(op, query, key, &value, q_offsets, kv_offsets, scale, kv_lengths, visible,
                                   self_key, &self_value, key_bias, kept);
  check_attention_outputs(op, grad_out, grad_lse, query, out, lse, ScalarType::Float);
  const auto gradient = [&](const OptionalTensor& of, int64_t rows, int64_t heads) {
    return of ? new_empty(query, {rows, heads, a.head_dim}) : new_empty(query, {0});
  };
  Tensor grad_query = gradient(query, a.rows, a.heads);
  Tensor grad_key = gradient(key, a.events, a.kv_heads), grad_value = gradient(value, a.events, a.kv_heads);
  Tensor grad_self_key = gradient(self_key, a.rows, a.kv_heads),
         grad_self_value = gradient(self_value, a.rows, a.kv_heads);
  Tensor grad_key_bias = key_bias ? new_empty(*key_bias, {a.events, a.heads}) : new_empty(query, {0});
  Tensor states = new_empty(query, {kStates * a.rows * a.heads}, ScalarType::Float);

  AttentionGradient g;
  g.grad_out = vectors_of(grad_out, kept);
  g.out = vectors_of(out, kept);
  g.lse = numbers_of_rows(lse);
  if (grad_lse) g.grad_lse = numbers_of_rows(*grad_lse);
  g.grad_query = grad_query.mutable_data_ptr();
  g.grad_key = grad_key.mutable_data_ptr();
  g.grad_value = grad_value.mutable_data_ptr();
  if (self_key) g.grad_self_key = grad_self_key.mutable_data_ptr();
  if (self_value) g.grad_self_value = grad_self_value.mutable_data_ptr();
  if (key_bias) g.grad_key_bias = grad_key_bias.mutable_data_ptr();
  g.states = static_cast<float*>(states.mutable_data_ptr());
  Launch::check(op, launch_grad_rows(a, g, plan_grad_rows(a), launch.stream()));
  Launch::check(op, launch_grad_events(a, g, plan_grad_events(a), launch.stream()));
  return {grad_query, grad_key, grad_value, grad_self_key, grad_self_value, grad_key_bias};
}

}  // namespace
}  // namespace attnrec::cuda

STABLE_TORCH_LIBRARY_IMPL(attnrec, CUDA, m) {
  m.impl("target_attention_backward", TORCH_BOX(&attnrec::cuda::target_attention_backward));
}
