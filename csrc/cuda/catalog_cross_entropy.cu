// attnrec::catalog_cross_entropy on CUDA: launch plan and launcher.
#include "cuda/catalog_cross_entropy.cuh"

#include <algorithm>

#include "cuda/dispatch.h"

namespace attnrec::cuda {
namespace {

// The items are cut into at most kMostSplits of at least kFewestItems: enough blocks for a chip where rows
// are few, and little to merge.
constexpr int64_t kMostSplits = 64, kFewestItems = 2048;
constexpr unsigned kThreads = 256;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
unsigned blocks_of(int64_t n, int64_t each) {
  return static_cast<unsigned>(std::clamp<int64_t>((n + each - 1) / each, 1, 1 << 30));
}

CrossEntropyParts parts_of(const CrossEntropy& c, const CrossEntropyPlan& plan, char* memory) {
  float* floats = reinterpret_cast<float*>(memory);
  const int64_t each = plan.splits * c.rows;
  return {floats, floats + each, c.smoothing > 0 ? floats + 2 * each : nullptr};
}

}  // namespace

CrossEntropyRows cross_entropy_rows(const CrossEntropy& c, char* memory, int64_t* bytes) {
  CrossEntropyRows rows;
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    char* at = memory + used;
    used += round_up(size, 16);
    return at;
  };
  const int64_t width = round_up(c.dim, 8), padded = round_up(c.items, kCrossEntropyPad);
  rows.target = reinterpret_cast<int*>(take(round_up(c.rows, kCrossEntropyPad) * 4));
  rows.own = reinterpret_cast<float*>(take(c.rows * 4));
  if (c.adds()) rows.added = reinterpret_cast<float*>(take(padded * 4));
  if (c.sampled) {
    rows.ids = reinterpret_cast<int*>(take(padded * 4));
    rows.items = take(c.items * width * element_bytes(c.element));
    rows.items_stride = width;
  }
  *bytes = used;
  return rows;
}

cudaError_t launch_cross_entropy_rows(const CrossEntropy& c, const CrossEntropyRows& rows,
                                      cudaStream_t stream) {
  const int64_t numbers = std::max(c.rows, c.sampled ? c.items * c.dim : c.adds() ? c.items : 0);
  const unsigned blocks = std::min(blocks_of(numbers, kThreads), 4096u);
  const cudaError_t error = launch_kernel(cross_entropy_rows_kernel, blocks, kThreads, 0, stream, c, rows);
  if (error != cudaSuccess || !c.sampled) return error;
  return launch_kernel(cross_entropy_own_kernel, blocks_of(c.rows, kThreads / kWarp), kThreads, 0, stream, c,
                       rows);
}

CrossEntropyPlan plan_catalog_cross_entropy(const CrossEntropy& c) {
  CrossEntropyPlan plan;
  for_kind_and_dim(c.element, c.tf32, c.dim, [&](auto kind, auto dim) {
    using Shape = LogSumShape<decltype(kind), decltype(dim)::value>;
    plan.warps = 1;
    while (plan.warps < 4 && 16 * Shape::kMT * plan.warps < c.rows) plan.warps *= 2;
    const int64_t tile = 16 * Shape::kMT * plan.warps;
    plan.row_tiles = (c.rows + tile - 1) / tile;
    if (c.items > 0) {
      const int64_t splits = std::min(kMostSplits, (c.items + kFewestItems - 1) / kFewestItems);
      plan.split = round_up((c.items + splits - 1) / splits, Shape::kN);
      plan.splits = static_cast<int>((c.items + plan.split - 1) / plan.split);
    }
    plan.shared_bytes = Shape::bytes(plan.warps);
  });
  cross_entropy_rows(c, nullptr, &plan.scratch_bytes);
  plan.scratch_bytes += plan.splits * c.rows * (c.smoothing > 0 ? 3 : 2) * 4;
  return plan;
}

cudaError_t launch_catalog_cross_entropy(const CrossEntropy& c, const CrossEntropyPlan& plan, float* loss,
                                         float* lse, void* scratch, cudaStream_t stream) {
  if (c.rows == 0) return cudaSuccess;
  char* memory = static_cast<char*>(scratch);
  int64_t used = 0;
  const CrossEntropyRows rows = cross_entropy_rows(c, memory, &used);
  const CrossEntropyParts parts = parts_of(c, plan, memory + used);
  cudaError_t error = launch_cross_entropy_rows(c, rows, stream);
  if (error != cudaSuccess) return error;
  if (plan.splits > 0) {
    const Vectors items = c.sampled ? Vectors{rows.items, rows.items_stride, 0} : c.table;
    const LogSumLaunch launch{
        rows, parts, items, plan.split, begin_aligned(c.users, c.element), begin_aligned(items, c.element)};
    const dim3 grid(static_cast<unsigned>(plan.row_tiles), plan.splits);
    error = for_kind_and_dim(c.element, c.tf32, c.dim, [&](auto kind, auto dim) {
      return launch_kernel(log_sum_kernel<decltype(kind), decltype(dim)::value>, grid, kWarp * plan.warps,
                           plan.shared_bytes, stream, c, launch);
    });
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(cross_entropy_loss_kernel, blocks_of(c.rows, kThreads), kThreads, 0, stream, c, rows,
                       parts, plan.splits, loss, lse);
}

}  // namespace attnrec::cuda
