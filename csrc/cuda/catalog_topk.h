// attnrec::catalog_topk on a GPU: what the kernels are told, how they are launched.
#pragma once

#include "cuda/arguments.h"

namespace attnrec::cuda {

struct CatalogTopk {
  Element element = Element::kFloat32;
  int dim = 0;
  int64_t users = 0, items = 0;
  int k = 0;
  Vectors user, item;
  float temperature = 1;
  const void* bias = nullptr;  // [items], or null
  Element bias_element = Element::kFloat32;
  int64_t bias_stride = 0;
  // User b may not be given the items `excluded[exclude_offsets[b] … exclude_offsets[b + 1]]`.
  Indices excluded, exclude_offsets;
  int64_t exclusions = 0;  // of all users
};

// How the work is cut. What is best does not depend on it, lse only by rounding.
struct CatalogTopkPlan {
  int warps = 0;                // of a block, 16 users each
  int64_t row_tiles = 0;        // of users
  int k = 0;                    // as asked for, but at least 1: lse needs the pass too
  int tile = 0;                 // items of a tile
  int64_t sample_blocks = 0;    // 0: the catalogue is too small for a sample
  int64_t sampled = 0;          // items of such a block
  int64_t part = 0, parts = 0;  // items of a part of the catalogue, and how many parts
  int64_t capacity = 0;         // keys of a list: one of each user and part
  int64_t room = 0;             // keys of the list that a user's are merged in
  bool in_shared = false;       // that list lies in shared memory
  int64_t shared_bytes = 0, merge_bytes = 0;
  int64_t keys = 0, floats = 0, integers = 0;  // numbers in scratch memory, of 64, 32 and 32 bits
  int64_t scratch() const { return keys + (floats + integers + 1) / 2; }  // of 64 bits
};

CatalogTopkPlan plan_catalog_topk(const CatalogTopk& problem);

// scores [users, k], ids [users, k], lse [users]; `scratch` as the plan says.
cudaError_t launch_catalog_topk(const CatalogTopk& problem, const CatalogTopkPlan& plan, float* scores,
                                int64_t* ids, float* lse, void* scratch, cudaStream_t stream);

}  // namespace attnrec::cuda
