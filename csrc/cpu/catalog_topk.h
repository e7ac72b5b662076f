// The arguments of catalog_topk's kernel.
#pragma once

#include "cpu/arguments.h"

namespace attnrec::cpu {

// The Attention that goes with it has scale 1: logits are u·i / temperature + bias, rounded step by step, so
// that equal products stay equal and a tie is a tie at every temperature.
struct TopkOptions {
  int64_t k = 0;  // to keep of a unit, at most its number of items
  double temperature = 1;
  // Row r's excluded items are excluded[exclude_offsets[r]] ... excluded[exclude_offsets[r + 1]], rising; or
  // null.
  const int64_t *excluded = nullptr, *exclude_offsets = nullptr;
  const void* bias = nullptr;  // [N], or null
  Element bias_element = Element::kFloat32;
  int64_t bias_stride = 0;
  // For each row a score that is not among its k best, nor are those below; or null.
  const float* out_of_reach = nullptr;
};

// What a unit finds: for each of its rows k scores and ids (unordered, the first counts[row] of them), and
// the maximum and sum of its softmax.
struct TopkParts {
  double* scores = nullptr;
  int64_t *ids = nullptr, *counts = nullptr;
  double *maximum = nullptr, *sum = nullptr;
};

}  // namespace attnrec::cpu
