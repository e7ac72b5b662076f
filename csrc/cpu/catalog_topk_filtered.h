// catalog_topk through a filter.
#pragma once

#include <vector>

#include "cpu/catalog_arguments.h"
#include "cpu/catalog_filter.h"

namespace attnrec::cpu {

// Where results go: `[batch, k]` and `[batch]`, scores and lse of element `working`.
struct TopkResults {
  void* scores;
  int64_t* ids;
  void* lse;
  Element working;
  int64_t k;
};

// Checks a filter's tensors against the catalogue. Nothing where there is none.
void check_filter(const char* op, const Tensor& catalog, const OptionalTensor& filter,
                  const OptionalTensor& scale, const OptionalTensor& error, CatalogFilter* to);

// Users whom the filter does not serve, rising, and for each a score that is not among its k best.
struct Unserved {
  std::vector<int64_t> users;
  std::vector<float> out_of_reach;
};

// Fills in the results of those users whom the filter serves and returns the others. `options` has exclusions
// and bias; its k is not read.
Unserved catalog_topk_filtered(const Attention& a, int64_t batch, const CatalogFilter& filter,
                               const TopkOptions& options, const TopkResults& results);

}  // namespace attnrec::cpu
