// attnrec::softmax_score and its gradient on a GPU.
#include <tuple>

#include "cuda/binding.h"
#include "cuda/softmax_score.h"

namespace attnrec::cuda {
namespace {

SoftmaxScore problem_of(const char* op, const Tensor& users, const Tensor& items, const Tensor& offsets,
                        double temperature, const OptionalTensor& bias, std::vector<Tensor>& kept) {
  check_softmax_score(op, users, items, offsets, temperature, bias);
  SoftmaxScore problem;
  problem.element = element_of(op, "users", users);
  problem.dim = users.size(1);
  problem.users = users.size(0);
  problem.items = items.size(0);
  problem.user = vectors_of(users, kept);
  problem.item = vectors_of(items, kept);
  problem.offsets = indices_of(offsets, kept);
  problem.temperature = static_cast<float>(temperature);
  if (bias) {
    problem.bias = bias->const_data_ptr();
    problem.bias_element = element_of(op, "bias", *bias);
    problem.bias_stride = bias->stride(0);
  }
  return problem;
}

Tensor scratch_of(const SoftmaxScorePlan& plan, const Tensor& like) {
  return new_empty(like, {plan.scratch()}, ScalarType::Float);
}

Tensor softmax_score(Tensor users, Tensor items, Tensor offsets, double temperature, OptionalTensor bias) {
  const char* op = "softmax_score";
  const Launch launch(users);
  std::vector<Tensor> kept;
  const SoftmaxScore problem = problem_of(op, users, items, offsets, temperature, bias, kept);
  Tensor out = new_empty(users, {problem.items});
  Tensor scratch = scratch_of(plan_softmax_score(problem, false), users);
  Launch::check(op, launch_softmax_score(problem, out.mutable_data_ptr(),
                                         static_cast<float*>(scratch.mutable_data_ptr()), launch.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> softmax_score_backward(Tensor grad, Tensor users, Tensor items,
                                                          Tensor offsets, Tensor probabilities,
                                                          double temperature, OptionalTensor bias) {
  const char* op = "softmax_score_backward";
  const Launch launch(users);
  std::vector<Tensor> kept;
  const SoftmaxScore problem = problem_of(op, users, items, offsets, temperature, bias, kept);
  check_per_score(op, "grad", grad, users, items);
  check_per_score(op, "probabilities", probabilities, users, items);
  Tensor grad_users = new_empty(users, {problem.users, problem.dim});
  Tensor grad_items = new_empty(items, {problem.items, problem.dim});
  Tensor grad_bias = bias ? new_empty(*bias, {problem.items}) : new_empty(users, {0});
  Tensor scratch = scratch_of(plan_softmax_score(problem, true), users);
  SoftmaxScoreGradient gradient;
  gradient.grad = grad.const_data_ptr();
  gradient.grad_stride = grad.stride(0);
  if (problem.element == Element::kFloat32) {
    kept.push_back(torch::stable::contiguous(probabilities));
    gradient.probabilities = static_cast<const float*>(kept.back().const_data_ptr());
  }
  gradient.grad_users = grad_users.mutable_data_ptr();
  gradient.grad_items = grad_items.mutable_data_ptr();
  if (bias) gradient.grad_bias = grad_bias.mutable_data_ptr();
  Launch::check(op, launch_softmax_score_backward(
                        problem, gradient, static_cast<float*>(scratch.mutable_data_ptr()), launch.stream()));
  return {grad_users, grad_items, grad_bias};
}

}  // namespace
}  // namespace attnrec::cuda

STABLE_TORCH_LIBRARY_IMPL(attnrec, CUDA, m) {
  m.impl("softmax_score", TORCH_BOX(&attnrec::cuda::softmax_score));
  m.impl("softmax_score_backward", TORCH_BOX(&attnrec::cuda::softmax_score_backward));
}
