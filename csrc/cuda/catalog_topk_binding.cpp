// attnrec::catalog_topk on a GPU.
#include <tuple>

#include "cuda/binding.h"
#include "cuda/catalog_topk.h"

namespace attnrec::cuda {
namespace {

// A filter would change neither ids nor scores, and is not read.
std::tuple<Tensor, Tensor, Tensor> catalog_topk(Tensor users, Tensor catalog, int64_t k,
                                                OptionalTensor exclude_ids, OptionalTensor exclude_offsets,
                                                OptionalTensor bias, double temperature, OptionalTensor,
                                                OptionalTensor, OptionalTensor) {
  const char* op = "catalog_topk";
  check_catalog_topk(op, users, catalog, k, exclude_ids, exclude_offsets, bias, temperature);
  ATTNREC_CHECK(users.size(1) <= 256, op, "users must have a dim of at most 256 on a GPU, got shape ",
                shape_of(users));
  ATTNREC_CHECK(catalog.size(0) >> 30 == 0, op, "catalog must have less than 2^30 items on a GPU, got shape ",
                shape_of(catalog));
  const Launch launch(users);
  std::vector<Tensor> kept;
  CatalogTopk c;
  c.element = element_of(op, "users", users);
  c.dim = static_cast<int>(users.size(1));
  c.users = users.size(0);
  c.items = catalog.size(0);
  c.k = static_cast<int>(k);
  c.user = vectors_of(users, kept);
  c.item = vectors_of(catalog, kept);
  c.temperature = static_cast<float>(temperature);
  if (bias) {
    c.bias = bias->const_data_ptr();
    c.bias_element = element_of(op, "bias", *bias);
    c.bias_stride = bias->stride(0);
  }
  if (exclude_ids && exclude_ids->size(0) > 0) {
    c.excluded = indices_of(*exclude_ids, kept);
    c.exclude_offsets = indices_of(*exclude_offsets, kept);
    c.exclusions = exclude_ids->size(0);
  }
  const CatalogTopkPlan plan = plan_catalog_topk(c);
  Tensor scores = new_empty(users, {c.users, k}, ScalarType::Float);
  Tensor ids = new_empty(users, {c.users, k}, ScalarType::Long);
  Tensor lse = new_empty(users, {c.users}, ScalarType::Float);
  Tensor scratch = new_empty(users, {plan.scratch()}, ScalarType::Long);
  Launch::check(op, launch_catalog_topk(c, plan, static_cast<float*>(scores.mutable_data_ptr()),
                                        static_cast<int64_t*>(ids.mutable_data_ptr()),
                                        static_cast<float*>(lse.mutable_data_ptr()),
                                        scratch.mutable_data_ptr(), launch.stream()));
  return {scores, ids, lse};
}

}  // namespace
}  // namespace attnrec::cuda

STABLE_TORCH_LIBRARY_IMPL(attnrec, CUDA, m) {
  m.impl("catalog_topk", TORCH_BOX(&attnrec::cuda::catalog_topk));
}
