#include "cuda/softmax_score.cuh"

#include <algorithm>

namespace attnrec::cuda {
namespace {

SoftmaxScoreScratch divided(const SoftmaxScorePlan& plan, float* scratch) {
  const int64_t each = plan.chunks;
  float* logits = scratch + plan.parts;
  return {scratch, scratch + each, scratch + 2 * each, logits, logits + plan.logits};
}

// Calls function(T{}, std::bool_constant<aligned>{}).
template <class Function>
void with_kernel(const SoftmaxScore& problem, const SoftmaxScorePlan& plan, const Function& function) {
  with_element(problem.element, [&](auto element) {
    if (plan.aligned) {
      function(element, std::true_type());
    } else {
      function(element, std::false_type());
    }
  });
}

}  // namespace

SoftmaxScorePlan plan_softmax_score(const SoftmaxScore& problem, bool backward) {
  SoftmaxScorePlan plan;
  plan.chunks = count_tiles(problem.users, problem.items, kChunk);
  plan.several = problem.items > kChunk;
  plan.aligned = is_aligned(problem.user, problem.dim, problem.element) &&
                 is_aligned(problem.item, problem.dim, problem.element);
  const int64_t width = 16 / element_bytes(problem.element);
  for (plan.lanes = 1; plan.lanes < 32 && plan.lanes * width < problem.dim;) plan.lanes *= 2;
  plan.parts = 3 * plan.chunks;
  if (plan.several && !(backward && problem.element == Element::kFloat32)) plan.logits = problem.items;
  if (plan.several && backward) plan.partial = plan.chunks * problem.dim;
  return plan;
}

cudaError_t launch_softmax_score(const SoftmaxScore& problem, void* out, float* scratch,
                                 cudaStream_t stream) {
  if (problem.users == 0 || problem.items == 0) return cudaSuccess;
  const SoftmaxScorePlan plan = plan_softmax_score(problem, false);
  const SoftmaxScoreScratch parts = divided(plan, scratch);
  const auto blocks = static_cast<unsigned>(plan.chunks);
  with_kernel(problem, plan, [&](auto element, auto aligned) {
    using T = decltype(element);
    score_kernel<T, aligned.value>
        <<<blocks, kThreads, 0, stream>>>(problem, static_cast<T*>(out), parts, plan.lanes);
    if (plan.several) {
      normalize_kernel<T><<<blocks, kThreads, 0, stream>>>(problem, static_cast<T*>(out), parts);
    }
  });
  return cudaGetLastError();
}

cudaError_t launch_softmax_score_backward(const SoftmaxScore& problem, const SoftmaxScoreGradient& gradient,
                                          float* scratch, cudaStream_t stream) {
  if (problem.users == 0) return cudaSuccess;
  const SoftmaxScorePlan plan = plan_softmax_score(problem, true);
  const SoftmaxScoreScratch parts = divided(plan, scratch);
  const auto blocks = static_cast<unsigned>(plan.chunks);
  with_kernel(problem, plan, [&](auto element, auto aligned) {
    using T = decltype(element);
    constexpr bool kAligned = decltype(aligned)::value;
    gradient_kernel<T, kAligned><<<blocks, kThreads, 0, stream>>>(problem, gradient, parts, plan.lanes);
    if (plan.several) {
      long_gradient_kernel<T, kAligned>
          <<<blocks, kThreads, 0, stream>>>(problem, gradient, parts, plan.lanes);
      const auto users = static_cast<unsigned>(std::min<int64_t>(problem.users, 1 << 20));
      sum_kernel<T>
          <<<users, kThreads, 0, stream>>>(problem, static_cast<T*>(gradient.grad_users), parts.partial);
    }
  });
  return cudaGetLastError();
}

}  // namespace attnrec::cuda
