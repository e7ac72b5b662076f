// attnrec::catalog_topk on CUDA: launch plan and launcher.
#include "cuda/catalog_topk.cuh"

#include <algorithm>

#include "cuda/catalog_topk_merge.cuh"
#include "cuda/dispatch.h"

namespace attnrec::cuda {
namespace {

constexpr int64_t kListBytes = 128 << 20;  // of all lists, where parts are to be had
constexpr int64_t kWarps = 4096;           // that fill a large GPU
constexpr int64_t kMostParts = 2048;       // whose starts a block of the merge holds in shared memory
constexpr int64_t kMergedInShared = 8192;  // keys

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

CatalogTopkScratch divided(const CatalogTopk& c, const CatalogTopkPlan& plan, void* scratch) {
  CatalogTopkScratch s{};
  const int64_t of_parts = c.users * plan.parts, sampling = plan.sample_blocks > 0 ? c.users : 0;
  s.lists = static_cast<uint64_t*>(scratch);
  s.merged = s.lists + of_parts * plan.capacity;
  s.floors = s.merged + (plan.in_shared ? 0 : c.users * plan.room);
  s.highest = reinterpret_cast<float*>(s.floors + sampling);
  s.best = s.highest + sampling;
  s.maxima = s.best + c.users * plan.sample_blocks * plan.tile;
  s.sums = s.maxima + of_parts;
  s.counts = reinterpret_cast<int*>(s.sums + of_parts);
  if (c.excluded) s.excluded = s.counts + of_parts;
  return s;
}

}  // namespace

CatalogTopkPlan plan_catalog_topk(const CatalogTopk& c) {
  CatalogTopkPlan plan;
  plan.k = std::max(c.k, 1);
  const int64_t k = plan.k, users = std::max<int64_t>(c.users, 1);
  const int most_warps = c.element == Element::kFloat32 && native_head_dim(c.dim) == 256 ? 2 : 4;
  plan.warps = 1;
  while (plan.warps < most_warps && 16 * plan.warps < users) plan.warps *= 2;
  plan.row_tiles = ceil_div(users, 16 * plan.warps);
  for_exact_kind_and_dim(c.element, c.dim, [&](auto kind, auto dim) {
    using Memory = CatalogTopkMemory<decltype(kind), decltype(dim)::value>;
    plan.tile = Memory::kN;
    plan.shared_bytes = Memory::bytes(plan.warps);
  });
  const int64_t wanted = std::max<int64_t>(1, kWarps / (plan.row_tiles * plan.warps)), tile = plan.tile;

  // The k-th best of fewer groups would be a poor floor.
  const int64_t sampled = c.items / kSampleEvery;
  if (sampled >= 4 * k + tile) {
    plan.sample_blocks = std::clamp(wanted, ceil_div(4 * k, tile), sampled / tile);
    plan.sampled = sampled / plan.sample_blocks;
  }
  plan.capacity = (plan.sample_blocks ? k : 4 * k) + 2 * tile;
  // Where there is no floor for all, each part keeps k of its own.
  const int64_t pay = plan.sample_blocks ? c.items / (4 * tile) : c.items / (8 * k);
  const int64_t parts = std::clamp<int64_t>(std::min(pay, kListBytes / (8 * users * plan.capacity)), 1,
                                            std::min(wanted, kMostParts));
  plan.part = std::max<int64_t>(1, ceil_div(ceil_div(c.items, tile), parts)) * tile;
  plan.parts = ceil_div(c.items, plan.part);
  plan.capacity = std::min(plan.capacity, plan.part);

  plan.room = std::max(k + 4 * kMergeThreads, std::min(kMergedInShared, 12 * k + 4 * kMergeThreads));
  plan.in_shared = plan.room <= kMergedInShared;
  plan.merge_bytes = (plan.in_shared ? 8 * plan.room : 0) + 8 * ceil_div(plan.parts, 2);
  plan.keys = c.users *
              (plan.parts * plan.capacity + (plan.in_shared ? 0 : plan.room) + (plan.sample_blocks ? 1 : 0));
  plan.floats = c.users * (2 * plan.parts + (plan.sample_blocks ? plan.sample_blocks * tile + 1 : 0));
  plan.integers = c.users * plan.parts + (c.excluded ? c.exclusions : 0);
  return plan;
}

cudaError_t launch_catalog_topk(const CatalogTopk& c, const CatalogTopkPlan& plan, float* scores,
                                int64_t* ids, float* lse, void* scratch, cudaStream_t stream) {
  if (c.users == 0) return cudaSuccess;
  CatalogTopkLaunch launch{1.0f / c.temperature,
                           begin_aligned(c.user, c.element),
                           begin_aligned(c.item, c.element),
                           plan.k,
                           static_cast<int>(plan.part),
                           static_cast<int>(plan.parts),
                           static_cast<int>(plan.capacity),
                           static_cast<int>(plan.sampled),
                           static_cast<int>(plan.room),
                           plan.sample_blocks > 0,
                           plan.in_shared,
                           scores,
                           ids,
                           lse,
                           divided(c, plan, scratch)};
  const auto users = static_cast<unsigned>(c.users), row_tiles = static_cast<unsigned>(plan.row_tiles);
  const unsigned threads = kWarp * plan.warps;
  cudaError_t error = cudaSuccess;
  if (c.items > 0) {
    if (launch.scratch.excluded) {
      error =
          launch_kernel(sort_exclusions_kernel, users, kMergeThreads, 0, stream, c, launch.scratch.excluded);
      if (error != cudaSuccess) return error;
    }
    error = for_exact_kind_and_dim(c.element, c.dim, [&](auto kind, auto dim) {
      using Kind = decltype(kind);
      constexpr int D = decltype(dim)::value;
      if (plan.sample_blocks > 0) {
        const auto blocks = static_cast<unsigned>(plan.sample_blocks);
        cudaError_t failed = launch_kernel(catalog_topk_kernel<Kind, D, true>, dim3(row_tiles, blocks),
                                           threads, plan.shared_bytes, stream, c, launch);
        if (failed != cudaSuccess) return failed;
        failed = launch_kernel(catalog_topk_floor_kernel, users, kMergeThreads, 0, stream, launch.scratch,
                               static_cast<int>(plan.sample_blocks * plan.tile), plan.k);
        if (failed != cudaSuccess) return failed;
      }
      return launch_kernel(catalog_topk_kernel<Kind, D, false>,
                           dim3(row_tiles, static_cast<unsigned>(plan.parts)), threads, plan.shared_bytes,
                           stream, c, launch);
    });
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(catalog_topk_merge_kernel, users, kMergeThreads, plan.merge_bytes, stream, c.k,
                       launch);
}

}  // namespace attnrec::cuda
