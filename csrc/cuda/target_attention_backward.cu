// attnrec::target_attention_backward on CUDA, the rows' pass and the self slots: launch plan and launcher.
#include "cuda/target_attention_backward.cuh"

#include "cuda/dispatch.h"

namespace attnrec::cuda {

GradRowsPlan plan_grad_rows(const Attention& a) {
  GradRowsPlan plan{};
  plan.pack = a.heads_together();
  const int64_t rows = (a.rows * plan.pack + a.users - 1) / std::max<int64_t>(a.users, 1);
  const int blocks = row_blocks(rows, a.head_dim, a.element);
  plan.candidates = 16 * blocks / plan.pack;
  plan.tiles = count_tiles(a.users, a.rows, plan.candidates);
  plan.head_tiles = a.heads / plan.pack;
  for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    using Kind = decltype(kind);
    constexpr int D = decltype(dim)::value;
    plan.warps = blocks * (D / kColumns<D>);
    plan.shared_bytes = GradRowsMemory<Kind, D>::bytes(blocks);
  });
  return plan;
}

cudaError_t launch_grad_rows(const Attention& a, const AttentionGradient& g, const GradRowsPlan& plan,
                             cudaStream_t stream) {
  if (a.rows == 0 || a.users == 0) return cudaSuccess;
  AttentionGradientLaunch launch = gradient_launch(a, g);
  launch.pack = plan.pack;
  launch.candidates = plan.candidates;
  const dim3 grid(static_cast<unsigned>(plan.tiles), plan.head_tiles);
  const cudaError_t error = for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    return launch_kernel(grad_rows_kernel<decltype(kind), decltype(dim)::value>, grid, kWarp * plan.warps,
                         plan.shared_bytes, stream, a, g, launch);
  });
  if (error != cudaSuccess || !a.self_key.data) return error;
  constexpr int kSlots = kMostThreads / kWarp;
  const int64_t slots = a.rows * a.kv_heads;
  const dim3 slot_grid(static_cast<unsigned>((slots + kSlots - 1) / kSlots));
  return with_element(a.element, [&](auto number) {
    return launch_kernel(grad_self_kernel<decltype(number)>, slot_grid, kMostThreads, 0, stream, a, g,
                         launch);
  });
}

}  // namespace attnrec::cuda
