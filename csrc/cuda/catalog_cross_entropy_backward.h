// The gradient of attnrec::catalog_cross_entropy on CUDA.
#pragma once

#include "cuda/catalog_cross_entropy.h"

namespace attnrec::cuda {

struct CrossEntropyGradient {
  const void* grad_loss = nullptr;  // [T]
  Element grad_element = Element::kFloat32;
  int64_t grad_stride = 0;
  const float* lse = nullptr;  // [T], the forward's
  int64_t lse_stride = 0;
  // Contiguous, or null where it is not needed: [T, D] and [N, D] in users' dtype, [N] in the bias's. With
  // negatives those of the table and the bias hold zeros before.
  void *users = nullptr, *table = nullptr, *bias = nullptr;
  Element bias_element = Element::kFloat32;

  bool of_items() const { return table || bias; }
};

// A pass over rows that stay, users or items, while the others stream by in pieces, each with sums of its own
// and a block for each tile of rows.
struct GradientPass {
  int warps = 0;     // of a block
  int64_t tile = 0;  // rows that stay in one
  int pieces = 0;
  int64_t piece = 0;        // rows of one
  int64_t part_floats = 0;  // of memory for the sums
  int64_t shared_bytes = 0;
};

struct CrossEntropyGradientPlan {
  GradientPass users, items;
  int64_t group = 0;    // users whose sums stand in memory at a time
  bool direct = false;  // the items' pass stores the table's gradient itself
  int64_t scratch_bytes = 0;
};

CrossEntropyGradientPlan plan_catalog_cross_entropy_backward(const CrossEntropy& c,
                                                             const CrossEntropyGradient& g);

// The gradients of users and items. With negatives those of the negatives and of the rows' own targets are
// left in `scratch`, and `keys [M + T]` says which item each is of (N: of none).
cudaError_t launch_catalog_cross_entropy_backward(const CrossEntropy& c, const CrossEntropyGradient& g,
                                                  const CrossEntropyGradientPlan& plan, void* scratch,
                                                  int64_t* keys, cudaStream_t stream);

// Then, with negatives: sums what is of one item. `keys` rise, `order` says where each stood before.
cudaError_t launch_cross_entropy_collect(const CrossEntropy& c, const CrossEntropyGradient& g,
                                         const CrossEntropyGradientPlan& plan, void* scratch,
                                         const int64_t* keys, const int64_t* order, cudaStream_t stream);

}  // namespace attnrec::cuda
