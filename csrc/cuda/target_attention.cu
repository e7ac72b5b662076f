// attnrec::target_attention on CUDA: launch plan and launcher.
#include "cuda/target_attention.cuh"

#include <algorithm>

#include "cuda/dispatch.h"

namespace attnrec::cuda {

AttentionPlan plan_target_attention(const Attention& a) {
  AttentionPlan plan{};
  plan.pack = a.heads_together();
  // As few rows as a user has on average, so that small requests leave no warps idle; no more than pay.
  const int64_t rows = (a.rows * plan.pack + a.users - 1) / std::max<int64_t>(a.users, 1);
  const int native = native_head_dim(a.head_dim);
  const bool wide = a.element != Element::kFloat32 && native <= 64;
  plan.row_blocks = wide && rows > 64 ? 2 : 1;
  const int most_warps = native == 256 && a.element == Element::kFloat32 ? 2 : 4;
  plan.warps = 1;
  while (plan.warps < most_warps && 16 * plan.row_blocks * plan.warps < rows) plan.warps *= 2;
  plan.candidates = 16 * plan.row_blocks * plan.warps / plan.pack;
  plan.tiles = count_tiles(a.users, a.rows, plan.candidates);
  plan.head_tiles = a.heads / plan.pack;
  plan.chunks = std::max(1, static_cast<int>((a.events + kChunkEvents - 1) / kChunkEvents));
  plan.apart = plan.chunks > 1 && plan.tiles * plan.head_tiles * plan.chunks <= kMostApart;
  plan.part_floats = plan.apart ? plan.chunks * a.rows * a.heads * (native + 2) : 0;
  for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    using Kind = decltype(kind);
    constexpr int D = decltype(dim)::value;
    const bool parks = plan.chunks > 1 && !plan.apart;
    plan.shared_bytes = plan.row_blocks == 2 ? AttentionMemory<Kind, D, 2>::bytes(plan.warps, parks)
                                             : AttentionMemory<Kind, D, 1>::bytes(plan.warps, parks);
  });
  return plan;
}

cudaError_t launch_target_attention(const Attention& a, const AttentionPlan& plan, void* out, float* lse,
                                    float* parts, cudaStream_t stream) {
  if (a.rows == 0 || a.users == 0) return cudaSuccess;
  const AttentionLaunch launch{a.factor(),
                               plan.pack,
                               plan.candidates,
                               plan.apart,
                               begin_aligned(a.query, a.element),
                               begin_aligned(a.key, a.element) && begin_aligned(a.value, a.element),
                               out,
                               lse,
                               parts};
  const dim3 grid(static_cast<unsigned>(plan.tiles), plan.head_tiles, plan.apart ? plan.chunks : 1);
  const unsigned threads = kWarp * plan.warps;
  return for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    using Kind = decltype(kind);
    constexpr int D = decltype(dim)::value;
    const auto run = [&](auto row_blocks) {
      constexpr int MT = decltype(row_blocks)::value;
      const dim3 blocks(grid.x, grid.y * (D / kColumns<D>), grid.z);
      return launch_kernel(target_attention_kernel<Kind, D, MT>, blocks, threads, plan.shared_bytes, stream,
                           a, launch);
    };
    cudaError_t error = cudaErrorInvalidValue;
    if constexpr (sizeof(typename Kind::T) == 2 && D <= 64) {
      error = plan.row_blocks == 2 ? run(std::integral_constant<int, 2>{})
                                   : run(std::integral_constant<int, 1>{});
    } else {
      error = run(std::integral_constant<int, 1>{});
    }
    if (error != cudaSuccess || !plan.apart) return error;
    return launch_kernel(target_attention_merge_kernel<Kind, D>, dim3(grid.x, grid.y), kMostThreads, 0,
                         stream, a, launch);
  });
}

}  // namespace attnrec::cuda
