// attnrec::catalog_cross_entropy on CUDA: what the kernels are told, how they are launched.
#pragma once

#include "cuda/arguments.h"

namespace attnrec::cuda {

// Rows `[T, D]` against the items of a table `[N, D]`, or with negatives against those of its rows `[M]` and
// each row's own target.
struct CrossEntropy {
  Element element = Element::kFloat32;  // of users and table
  bool tf32 = false;                    // fp32 products may round their operands to tf32
  int dim = 0;
  int64_t rows = 0, table_items = 0, items = 0;  // T, N, and N or M
  Vectors users, table;
  Indices target;     // [T]
  Indices negatives;  // [M]
  bool sampled = false, in_batch = false;
  int64_t ignore_index = -100;
  float factor = 1;                             // 1 / temperature
  const void *bias = nullptr, *logq = nullptr;  // [N] each, or null
  Element bias_element = Element::kFloat32, logq_element = Element::kFloat32;
  int64_t bias_stride = 0, logq_stride = 0;
  float smoothing = 0;

  // Whether an item's logit is more than a multiple of its product.
  bool adds() const { return bias || logq || in_batch; }
};

// Rows and items of the passes are numbered in 32 bits.
constexpr int64_t kMostCrossEntropyRows = (int64_t{1} << 31) - 4096;

// What the passes read of rows and items, padded to kCrossEntropyPad, in scratch memory.
struct CrossEntropyRows {
  int* target = nullptr;   // [T], within the table; -1: ignored
  int* ids = nullptr;      // [M] of the negatives, or null
  float* added = nullptr;  // [items], bias - logq; -inf hides an item; or null
  void* items = nullptr;   // [M, D] of the negatives, gathered, or null
  int64_t items_stride = 0;
  float* own = nullptr;  // [T], the row's own target's logit, before the factor where there is no `added`
};
constexpr int kCrossEntropyPad = 64;

// Of `memory`, or with null only their size.
CrossEntropyRows cross_entropy_rows(const CrossEntropy& c, char* memory, int64_t* bytes);

// Kernels that fill them; `own` only of calls with negatives.
cudaError_t launch_cross_entropy_rows(const CrossEntropy& c, const CrossEntropyRows& rows,
                                      cudaStream_t stream);

struct CrossEntropyPlan {
  int warps = 0;          // of a block
  int64_t row_tiles = 0;  // blocks of rows
  int splits = 0;         // of the items, a function of their number alone; a block each
  int64_t split = 0;      // items of one
  int64_t shared_bytes = 0;
  int64_t scratch_bytes = 0;
};

CrossEntropyPlan plan_catalog_cross_entropy(const CrossEntropy& c);

// loss, lse [T]; `scratch` as the plan says, beginning at a multiple of 16 bytes.
cudaError_t launch_catalog_cross_entropy(const CrossEntropy& c, const CrossEntropyPlan& plan, float* loss,
                                         float* lse, void* scratch, cudaStream_t stream);

}  // namespace attnrec::cuda
