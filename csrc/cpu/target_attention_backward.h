// What target_attention_backward's kernel gets beside the forward's arguments.
#pragma once

#include "cpu/arguments.h"

namespace attnrec::cpu {

struct AttentionGradients {
  Vectors grad_out, out;  // [T_c, heads, D] of the query's element
  Vectors lse, grad_lse;  // [T_c, heads] in the working precision; grad_lse may be absent
  // Results, contiguous: [T_l, kv_heads, D], [T_c, kv_heads, D] and [T_l, heads]; null where there is no such
  // input.
  void *grad_key = nullptr, *grad_value = nullptr, *grad_self_key = nullptr, *grad_self_value = nullptr;
  void* grad_key_bias = nullptr;
  bool past_caches = false;  // whether grad_key and grad_value go past the caches
};

// Where a unit's part of the query's gradient goes: [candidates of the user, heads, D], contiguous.
struct GradQuery {
  void* data = nullptr;
  Element element = Element::kFloat32;
};

}  // namespace attnrec::cpu
