// The arguments that the target_attention ops share: checked and converted.
#pragma once

#include "cuda/attention.h"
#include "cuda/binding.h"

namespace attnrec::cuda {

// `value`, `self_value` may be absent (the weights ops have none). `kept` holds alive what it points to.
Attention attention_of(const char* op, const Tensor& query, const Tensor& key, const Tensor* value,
                       const Tensor& q_offsets, const Tensor& kv_offsets, std::optional<double> scale,
                       const OptionalTensor& kv_lengths, const OptionalTensor& visible,
                       const OptionalTensor& self_key, const OptionalTensor* self_value,
                       const OptionalTensor& key_bias, std::vector<Tensor>& kept);

}  // namespace attnrec::cuda
