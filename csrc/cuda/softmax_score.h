// attnrec::softmax_score and its gradient on a GPU: what the kernels are told, how they are launched.
#pragma once

#include "cuda/arguments.h"

namespace attnrec::cuda {

// User b's items are `offsets[b] … offsets[b+1]`.
struct SoftmaxScore {
  Element element = Element::kFloat32;
  int64_t dim = 0, users = 0, items = 0;
  Vectors user, item;
  Indices offsets;
  float temperature = 1;
  const void* bias = nullptr;  // [items], or null
  Element bias_element = Element::kFloat32;
  int64_t bias_stride = 0;
};

struct SoftmaxScoreGradient {
  const void* grad = nullptr;  // [items], users' dtype
  int64_t grad_stride = 0;
  const float* probabilities = nullptr;  // [items], fp32 only: those of 16 bits would be the largest error
  void* grad_users = nullptr;            // [users, dim], contiguous
  void* grad_items = nullptr;            // [items, dim], contiguous
  void* grad_bias = nullptr;             // [items], the bias's dtype, or null
};

// A block takes a chunk of one user's items. Users with several chunks are finished by a second launch, which
// there is only where a user can have several.
struct SoftmaxScorePlan {
  int64_t chunks = 0;    // blocks
  bool several = false;  // whether a user can have several chunks
  bool aligned = false;  // whether vectors are read 16 bytes at a time
  int lanes = 0;         // of a warp, that share an item; a power of two
  int64_t parts = 0;     // floats in scratch: of each chunk, three numbers
  int64_t logits = 0;    // likewise: of each item
  int64_t partial = 0;   // likewise: of each chunk, what it adds to its user's gradient
  int64_t scratch() const { return parts + logits + partial; }
};

SoftmaxScorePlan plan_softmax_score(const SoftmaxScore& problem, bool backward);

// `out [items]` in users' dtype; `scratch` has room for the plan's floats.
cudaError_t launch_softmax_score(const SoftmaxScore& problem, void* out, float* scratch, cudaStream_t stream);

cudaError_t launch_softmax_score_backward(const SoftmaxScore& problem, const SoftmaxScoreGradient& gradient,
                                          float* scratch, cudaStream_t stream);

}  // namespace attnrec::cuda
