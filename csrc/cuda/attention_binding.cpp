#include "cuda/attention_binding.h"

#include <cmath>

namespace attnrec::cuda {

Attention attention_of(const char* op, const Tensor& query, const Tensor& key, const Tensor* value,
                       const Tensor& q_offsets, const Tensor& kv_offsets, std::optional<double> scale,
                       const OptionalTensor& kv_lengths, const OptionalTensor& visible,
                       const OptionalTensor& self_key, const OptionalTensor* self_value,
                       const OptionalTensor& key_bias, std::vector<Tensor>& kept) {
  check_attention(op, query, key, value, q_offsets, kv_offsets, scale, kv_lengths, visible, self_key,
                  self_value, key_bias);
  Attention a;
  a.element = element_of(op, "query", query);
  a.tf32 = tf32_is_allowed();
  a.head_dim = static_cast<int>(query.size(2));
  a.heads = static_cast<int>(query.size(1));
  a.kv_heads = static_cast<int>(key.size(1));
  a.users = q_offsets.size(0) - 1;
  a.rows = query.size(0);
  a.events = key.size(0);
  a.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(a.head_dim)));
  a.query = vectors_of(query, kept);
  a.key = vectors_of(key, kept);
  if (value) a.value = vectors_of(*value, kept);
  if (self_key) a.self_key = vectors_of(*self_key, kept);
  if (self_value && *self_value) a.self_value = vectors_of(**self_value, kept);
  a.q_offsets = indices_of(q_offsets, kept);
  a.kv_offsets = indices_of(kv_offsets, kept);
  if (kv_lengths) a.kv_lengths = indices_of(*kv_lengths, kept);
  if (visible) a.visible = indices_of(*visible, kept);
  if (key_bias) {
    a.key_bias = key_bias->const_data_ptr();
    a.bias_element = element_of(op, "key_bias", *key_bias);
    a.bias_row_stride = key_bias->stride(0);
    a.bias_head_stride = key_bias->stride(1);
  }
  return a;
}

}  // namespace attnrec::cuda
