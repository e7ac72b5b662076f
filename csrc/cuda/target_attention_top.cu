// attnrec::target_attention_top on CUDA: launch plan and launcher.
#include "cuda/target_attention_top.cuh"

namespace attnrec::cuda {
namespace {

// Keys that the chunks' lists may have in all: 64 MB.
constexpr int64_t kMostKeys = 8 << 20;

}  // namespace

TopPlan plan_target_attention_top(const Attention& a, int64_t top) {
  TopPlan plan{plan_rows(a), 0};
  RowsPlan& rows = plan.rows;
  const int64_t keys = rows.chunks * a.rows * a.heads * top;
  if (rows.apart && keys > kMostKeys) rows.apart = false, rows.part_floats = 0;
  plan.list_keys = rows.apart ? keys : 0;
  for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    rows.shared_bytes += 4 * rows.warps * kSharedScores<decltype(kind), decltype(dim)::value>;
  });
  return plan;
}

cudaError_t launch_target_attention_top(const Attention& a, const TopPlan& plan, int64_t top, void* weights,
                                        int64_t* events, float* parts, int64_t* lists, cudaStream_t stream) {
  const RowsPlan& rows = plan.rows;
  if (a.rows * a.heads * top == 0 || a.users == 0) return cudaSuccess;
  const TopLaunch launch{rows_launch(a, rows, parts), static_cast<int>(top), weights, events,
                         rows.apart ? reinterpret_cast<Key*>(lists) : nullptr};
  const dim3 grid(static_cast<unsigned>(rows.tiles), rows.head_tiles, rows.apart ? rows.chunks : 1);
  const cudaError_t error = for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    return launch_kernel(target_attention_top_kernel<decltype(kind), decltype(dim)::value>, grid,
                         kWarp * rows.warps, rows.shared_bytes, stream, a, launch);
  });
  if (error != cudaSuccess || !rows.apart) return error;
  return with_element(a.element, [&](auto element) {
    return launch_kernel(target_attention_top_merge_kernel<decltype(element)>, dim3(grid.x, grid.y),
                         kMostThreads, 0, stream, a, launch);
  });
}

}  // namespace attnrec::cuda
