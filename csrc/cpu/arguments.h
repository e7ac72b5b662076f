// What the binding hands to the kernels: raw pointers, strides in elements, no framework types.
#pragma once

#include <cstdint>

#include "cpu/element.h"

namespace attnrec::cpu {

// Vectors `[rows, heads, D]` of any row and head stride; the last dimension is contiguous.
struct Vectors {
  const void* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;

  const void* at(int64_t row, int64_t head, Element element) const {
    return static_cast<const char*>(data) + (row * row_stride + head * head_stride) * element_bytes(element);
  }
};

// The streaming softmax's problem: user b's rows `q_offsets[b] … q_offsets[b+1]` against its events
// `kv_offsets[b] … + kv_lengths[b]`. The catalogue ops are the case of one user, one head, key = the item
// table.
struct Attention {
  Element element = Element::kFloat32;  // of every Vectors here
  int head_dim = 0, heads = 0, kv_heads = 0;
  int64_t users = 0;
  double scale = 1.0;
  double units = 1.4426950408889634;  // of the scores: log2(e) makes exp an exp2; 1 leaves them as they are
  Vectors query, key, value, self_key, self_value;
  const int64_t* q_offsets = nullptr;   // [users + 1]
  const int64_t* kv_offsets = nullptr;  // [users + 1]
  const int64_t* kv_lengths = nullptr;  // [users], or null: the whole room
  const int64_t* visible = nullptr;     // [T_c], or null: all events
  const void* key_bias = nullptr;       // [T_l, heads], or null
  Element bias_element = Element::kFloat32;
  int64_t bias_row_stride = 0, bias_head_stride = 0;

  int64_t room(int64_t user) const { return kv_offsets[user + 1] - kv_offsets[user]; }
  int64_t events(int64_t user) const { return kv_lengths ? kv_lengths[user] : room(user); }
};

// A piece of work that one thread does alone: `rows` rows of one user against the events of one key/value
// head. A row is a (candidate, head) pair: row r is candidate `first + r / group`, head `head + r % group`.
// What a row gives does not depend on the unit that it is in.
struct Unit {
  int64_t user = 0;
  int64_t first = 0;  // candidate, counted over the batch
  int rows = 0;       // candidates of the unit times group
  int group = 1;      // query heads of the unit: those of one kv head, or one
  int head = 0, kv_head = 0;
  int64_t first_event = 0, last_event = INT64_MAX;  // of the user's history; only the backward cuts it
  int parts = 1;    // units in one: this and those of the heads that follow, each with as many rows
  double cost = 0;  // beside that of the call's other units

  int64_t candidate(int row) const { return first + (group == 1 ? row : row / group); }
  int query_head(int row) const { return head + (group == 1 ? 0 : row % group); }
};

}  // namespace attnrec::cpu
