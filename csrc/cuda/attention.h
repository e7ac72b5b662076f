// The streaming softmax's problem, as the binding hands it to the launchers: raw pointers on the device.
#pragma once

#include "cuda/arguments.h"

namespace attnrec::cuda {

// User b's rows `q_offsets[b] … q_offsets[b + 1]` against its events `kv_offsets[b] … + kv_lengths[b]`.
struct Attention {
  Element element = Element::kFloat32;  // of every Vectors here
  bool tf32 = false;                    // fp32 products may round their operands to tf32
  int head_dim = 0, heads = 0, kv_heads = 0;
  int64_t users = 0, rows = 0, events = 0;  // B, T_c, T_l
  double scale = 1.0;
  Vectors query, key, value, self_key, self_value;
  Indices q_offsets, kv_offsets;   // [users + 1]
  Indices kv_lengths;              // [users], or data = null: the whole room
  Indices visible;                 // [rows], or data = null: all events
  const void* key_bias = nullptr;  // [events, heads], or null
  Element bias_element = Element::kFloat32;
  int64_t bias_row_stride = 0, bias_head_stride = 0;

  // From products to scores in units of log2.
  float factor() const { return static_cast<float>(scale * 1.4426950408889634); }
  // Heads of a group that share a tile of rows. With a bias a tile has one, so that an event's bias is one
  // number.
  int heads_together() const {
    const int group = heads / kv_heads;
    return key_bias || group > 16 ? 1 : group;
  }
};

}  // namespace attnrec::cuda
