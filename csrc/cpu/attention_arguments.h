// The arguments that the target_attention ops share: checked, converted, and cut into units.
#pragma once

#include "cpu/binding.h"

namespace attnrec::cpu {

// Holds what an `Attention` points to.
struct AttentionArguments {
  Attention attention;
  std::vector<int64_t> q_offsets, kv_offsets, kv_lengths, visible;
  std::vector<Tensor> kept;

  // `value`, `self_value` may be absent (the weights ops have none).
  AttentionArguments(const char* op, const Tensor& query, const Tensor& key, const Tensor* value,
                     const Tensor& q_offsets, const Tensor& kv_offsets, std::optional<double> scale,
                     const OptionalTensor& kv_lengths, const OptionalTensor& visible,
                     const OptionalTensor& self_key, const OptionalTensor* self_value,
                     const OptionalTensor& key_bias);
  AttentionArguments(const AttentionArguments&) = delete;

  int64_t candidates() const { return q_offsets.back(); }
};

// Cuts a call into units, dearest first. Units of a user split its rows only, and only as far as the threads
// need. A user with at most `rows_together` rows may have all its heads in one unit, as its parts.
std::vector<Unit> plan_units(const Attention& attention, int64_t rows_together = 0);

// Sorts units by their cost, for an even end: the last ones to be taken are cheap.
void dearest_first(std::vector<Unit>& units);

}  // namespace attnrec::cpu
