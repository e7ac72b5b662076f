// The gradient of attnrec::catalog_cross_entropy on a GPU.
#include "cuda/catalog_cross_entropy_backward.h"

#include <array>
#include <tuple>
#include <utility>

#include "cuda/catalog_cross_entropy_binding.h"

namespace attnrec::cuda {
namespace {

// The numbers in order, and where each stood; equal ones keep theirs.
std::pair<Tensor, Tensor> sorted(const Tensor& numbers) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(numbers), from(std::optional<bool>(true)), from(int64_t{-1}),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor, Tensor> catalog_cross_entropy_backward(
    Tensor grad_loss, Tensor users, Tensor table, Tensor target, Tensor lse, double temperature,
    OptionalTensor bias, OptionalTensor logq, double label_smoothing, int64_t ignore_index,
    OptionalTensor negatives, bool in_batch, bool needs_users, bool needs_table) {
  const char* op = "catalog_cross_entropy_backward";
  const Launch launch(users);
  std::vector<Tensor> kept;
  const CrossEntropy c = cross_entropy_of(op, users, table, target, temperature, bias, logq, label_smoothing,
                                          ignore_index, negatives, in_batch, kept);
  check_floating(op, "grad_loss", grad_loss);
  check_tensor(op, "grad_loss", grad_loss, 1, grad_loss.scalar_type(), users);
  check_tensor(op, "lse", lse, 1, ScalarType::Float, users);
  for (const auto& [name, tensor] : {std::pair{"grad_loss", &grad_loss}, std::pair{"lse", &lse}}) {
    ATTNREC_CHECK(tensor->size(0) == c.rows, op, name, " must have shape [", c.rows, "], got ",
                  shape_of(*tensor));
  }
  Tensor grad_users = new_empty(users, {needs_users ? c.rows : 0, c.dim});
  Tensor grad_table = new_empty(table, {needs_table ? c.table_items : 0, c.dim});
  Tensor grad_bias = new_empty(bias ? *bias : users, {bias ? c.table_items : 0});
  if (c.sampled || c.rows == 0) {
    torch::stable::zero_(grad_table);
    torch::stable::zero_(grad_bias);
  }
  CrossEntropyGradient g;
  g.grad_loss = grad_loss.const_data_ptr();
  g.grad_element = element_of(op, "grad_loss", grad_loss);
  g.grad_stride = grad_loss.stride(0);
  g.lse = static_cast<const float*>(lse.const_data_ptr());
  g.lse_stride = lse.stride(0);
  if (needs_users) g.users = grad_users.mutable_data_ptr();
  if (needs_table && c.table_items > 0) g.table = grad_table.mutable_data_ptr();
  if (bias && c.table_items > 0) {
    g.bias = grad_bias.mutable_data_ptr();
    g.bias_element = element_of(op, "bias", *bias);
  }
  const CrossEntropyGradientPlan plan = plan_catalog_cross_entropy_backward(c, g);
  Tensor scratch = new_empty(users, {plan.scratch_bytes}, ScalarType::Byte);
  const bool collects = c.sampled && g.of_items() && c.rows > 0;
  Tensor keys = new_empty(users, {collects ? c.items + c.rows : 0}, ScalarType::Long);
  Launch::check(op,
                launch_catalog_cross_entropy_backward(
                    c, g, plan, scratch.mutable_data_ptr(),
                    collects ? static_cast<int64_t*>(keys.mutable_data_ptr()) : nullptr, launch.stream()));
  if (collects) {
    const auto [in_order, order] = sorted(keys);
    Launch::check(op, launch_cross_entropy_collect(c, g, plan, scratch.mutable_data_ptr(),
                                                   static_cast<const int64_t*>(in_order.const_data_ptr()),
                                                   static_cast<const int64_t*>(order.const_data_ptr()),
                                                   launch.stream()));
  }
  const auto given = [&](const Tensor& grad, bool needed) { return needed ? grad : new_empty(users, {0}); };
  return {given(grad_users, needs_users), given(grad_table, needs_table), grad_bias};
}

}  // namespace
}  // namespace attnrec::cuda

STABLE_TORCH_LIBRARY_IMPL(attnrec, CUDA, m) {
  m.impl("catalog_cross_entropy_backward", TORCH_BOX(&attnrec::cuda::catalog_cross_entropy_backward));
}
