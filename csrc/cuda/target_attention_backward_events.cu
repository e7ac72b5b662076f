// attnrec::target_attention_backward on CUDA, the events' pass: launch plan and launcher.
#include "cuda/target_attention_backward_events.cuh"

#include "cuda/dispatch.h"

namespace attnrec::cuda {

GradEventsPlan plan_grad_events(const Attention& a) {
  GradEventsPlan plan{};
  const int64_t events = (a.events + a.users - 1) / std::max<int64_t>(a.users, 1);
  const int blocks = row_blocks(events, a.head_dim, a.element);
  plan.events = 16 * blocks;
  plan.tiles = count_tiles(a.users, a.events, plan.events);
  for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    using Kind = decltype(kind);
    constexpr int D = decltype(dim)::value;
    plan.warps = blocks * (D / kEventColumns<Kind, D>);
    plan.shared_bytes = GradEventsMemory<Kind, D>::bytes(blocks);
  });
  return plan;
}

cudaError_t launch_grad_events(const Attention& a, const AttentionGradient& g, const GradEventsPlan& plan,
                               cudaStream_t stream) {
  if (a.events == 0 || a.users == 0) return cudaSuccess;
  const GradEventsLaunch launch{gradient_launch(a, g), plan.events,
                                Divisor(static_cast<uint32_t>(heads_of_sweep(a)))};
  const dim3 grid(static_cast<unsigned>(plan.tiles), a.kv_heads);
  return for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    return launch_kernel(grad_events_kernel<decltype(kind), decltype(dim)::value>, grid, kWarp * plan.warps,
                         plan.shared_bytes, stream, a, g, launch);
  });
}

}  // namespace attnrec::cuda
