// The arguments of softmax_score's kernels.
#pragma once

#include "cpu/arguments.h"

namespace attnrec::cpu {

// `Real` is float, or double for float64 input.
struct SoftmaxScoreGradient {
  const void* grad = nullptr;           // [T_c], users' dtype
  const void* probabilities = nullptr;  // [T_c], Real
  double weighted_grad = 0;             // the user's sum of grad · probability
  void* grad_items = nullptr;           // [T_c, D], contiguous
  void* grad_user = nullptr;            // [D], Real: what this unit's items add to it
  void* grad_bias = nullptr;            // [T_c], the bias's dtype, where there is one
};

}  // namespace attnrec::cpu
