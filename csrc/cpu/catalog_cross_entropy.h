// The arguments of catalog_cross_entropy's kernels.
#pragma once

#include "cpu/arguments.h"

namespace attnrec::cpu {

// Rows `[T]` are those that are not ignored; the table is the catalogue, or with negatives their gathered
// rows `[M]`. `Real` is float, or double for float64 input.
struct CrossEntropyRows {
  // The target's place in the table; null with negatives, where it stands outside as a self slot.
  const int64_t* target = nullptr;
  // With negatives: row r does not see the events hits[hit_begin[r]] ... hits[hit_end[r]], which rise.
  const int64_t *hits = nullptr, *hit_begin = nullptr, *hit_end = nullptr;
};

// What one unit finds out about its rows: [T] each, from the unit's first row on.
struct CrossEntropyParts {
  double *maximum = nullptr, *sum = nullptr;
  double* target_logit = nullptr;  // written by the unit that has the target among its events
  double* total = nullptr;         // of all logits, for label smoothing; or null
};

struct CrossEntropyGradient {
  const double *lse = nullptr, *grad = nullptr;  // [T]; lse in nats
  double smoothing = 0;                          // label_smoothing
  int64_t classes = 0;                           // N
  void* users = nullptr;         // [rows of the unit, D], Real: what this unit's items add; or null
  int64_t users_row_stride = 0;  // of `users`, with room for D padded to whole registers
  void* table = nullptr;         // [N, D], contiguous; or null
  Element table_element = Element::kFloat32;
  const void* table_so_far = nullptr;  // [N, D], Real: the sum over the rows before this unit's; or null
  void* bias = nullptr;                // [N], Real, added to; or null
};

}  // namespace attnrec::cpu
