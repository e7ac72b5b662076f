// attnrec::catalog_cross_entropy on a GPU.
#include "cuda/catalog_cross_entropy_binding.h"

#include <tuple>
#include <utility>

namespace attnrec::cuda {

CrossEntropy cross_entropy_of(const char* op, const Tensor& users, const Tensor& table, const Tensor& target,
                              double temperature, const OptionalTensor& bias, const OptionalTensor& logq,
                              double label_smoothing, int64_t ignore_index, const OptionalTensor& negatives,
                              bool in_batch, std::vector<Tensor>& kept) {
  check_cross_entropy(op, users, table, target, temperature, bias, logq, label_smoothing, negatives,
                      in_batch);
  CrossEntropy c;
  c.element = element_of(op, "users", users);
  c.tf32 = tf32_is_allowed();
  ATTNREC_CHECK(users.size(1) <= 256, op, "users must have a dim of 1 to 256 on a GPU, got shape ",
                shape_of(users));
  c.dim = static_cast<int>(users.size(1));
  c.rows = users.size(0);
  c.table_items = table.size(0);
  c.items = negatives ? negatives->size(0) : c.table_items;
  for (const auto& [name, n] :
       {std::pair{"users", c.rows}, std::pair{"table", c.table_items}, std::pair{"negatives", c.items}}) {
    ATTNREC_CHECK(n <= kMostCrossEntropyRows, op, name, " must have at most ", kMostCrossEntropyRows,
                  " rows on a GPU, got ", n);
  }
  c.users = vectors_of(users, kept);
  c.table = vectors_of(table, kept);
  c.target = indices_of(target, kept);
  if (negatives) c.negatives = indices_of(*negatives, kept);
  c.sampled = negatives.has_value();
  c.in_batch = in_batch;
  c.ignore_index = ignore_index;
  c.factor = static_cast<float>(1 / temperature);
  if (bias) {
    c.bias = bias->const_data_ptr();
    c.bias_element = element_of(op, "bias", *bias);
    c.bias_stride = bias->stride(0);
  }
  if (logq) {
    c.logq = logq->const_data_ptr();
    c.logq_element = element_of(op, "logq", *logq);
    c.logq_stride = logq->stride(0);
  }
  c.smoothing = static_cast<float>(label_smoothing);
  return c;
}

namespace {

std::tuple<Tensor, Tensor> catalog_cross_entropy(Tensor users, Tensor table, Tensor target,
                                                 double temperature, OptionalTensor bias, OptionalTensor logq,
                                                 double label_smoothing, int64_t ignore_index,
                                                 OptionalTensor negatives, bool in_batch) {
  const char* op = "catalog_cross_entropy";
  const Launch launch(users);
  std::vector<Tensor> kept;
  const CrossEntropy c = cross_entropy_of(op, users, table, target, temperature, bias, logq, label_smoothing,
                                          ignore_index, negatives, in_batch, kept);
  const CrossEntropyPlan plan = plan_catalog_cross_entropy(c);
  Tensor loss = new_empty(users, {c.rows}, ScalarType::Float);
  Tensor lse = new_empty(users, {c.rows}, ScalarType::Float);
  Tensor scratch = new_empty(users, {plan.scratch_bytes}, ScalarType::Byte);
  Launch::check(op, launch_catalog_cross_entropy(c, plan, static_cast<float*>(loss.mutable_data_ptr()),
                                                 static_cast<float*>(lse.mutable_data_ptr()),
                                                 scratch.mutable_data_ptr(), launch.stream()));
  return {loss, lse};
}

}  // namespace
}  // namespace attnrec::cuda

STABLE_TORCH_LIBRARY_IMPL(attnrec, CUDA, m) {
  m.impl("catalog_cross_entropy", TORCH_BOX(&attnrec::cuda::catalog_cross_entropy));
}
