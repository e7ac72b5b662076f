// The gradient of attnrec::catalog_cross_entropy on CUDA: launch plan and launcher.
#include "cuda/catalog_cross_entropy_backward.cuh"

#include <algorithm>

#include "cuda/dispatch.h"

namespace attnrec::cuda {
namespace {

// Pieces of the items: their number is a function of the items' alone, so that a row's gradient is the same
// bits in any batch.
constexpr int64_t kMostPieces = 32, kFewestItems = 2048;
// Floats of the users' sums that stand in memory at a time, but for so many users at least.
constexpr int64_t kMostSums = int64_t{1} << 24, kFewestOfGroup = 1024;
// Blocks that the items' pass wants, and users that one of them has at least.
constexpr int64_t kBlocks = 512, kFewestUsers = 512;
constexpr unsigned kThreads = 256;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
unsigned blocks_of(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }
int width_of(const CrossEntropy& c) { return static_cast<int>(round_up(c.dim, 2)); }

GradientScratch divided(const CrossEntropy& c, const CrossEntropyGradient& g,
                        const CrossEntropyGradientPlan& plan, char* memory, int64_t* bytes) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* at = reinterpret_cast<float*>(memory + used);
    used += round_up(floats * 4, 16);
    return at;
  };
  GradientScratch scratch{};
  scratch.rows = reinterpret_cast<RowGradient*>(take(2 * round_up(c.rows, kCrossEntropyPad)));
  if (c.element == Element::kFloat16) scratch.scale = take(1);
  if (c.sampled) scratch.change = take(c.rows);
  if (g.users) scratch.of_users = take(plan.users.part_floats);
  if (g.table && !plan.direct) scratch.of_items = take(plan.items.part_floats);
  if (g.bias) scratch.of_bias = take(plan.items.pieces * c.items);
  scratch.width = width_of(c);
  *bytes = used;
  return scratch;
}

}  // namespace

CrossEntropyGradientPlan plan_catalog_cross_entropy_backward(const CrossEntropy& c,
                                                             const CrossEntropyGradient& g) {
  CrossEntropyGradientPlan plan;
  const int64_t width = width_of(c);
  for_kind_and_dim(c.element, c.tf32, c.dim, [&](auto kind, auto dim) {
    using Shape = GradientShape<decltype(kind), decltype(dim)::value>;
    const auto divide = [&](GradientPass& pass, int64_t rows) {
      const int most_warps = Shape::kHalf || Shape::kSecond == 0 ? 4 : 2;
      pass.warps = 1;
      while (pass.warps < most_warps && 16 * Shape::kMT * pass.warps < rows) pass.warps *= 2;
      pass.tile = 16 * Shape::kMT * pass.warps;
      pass.shared_bytes = Shape::bytes(pass.warps);
    };
    const auto cut = [&](GradientPass& pass, int64_t stream, int64_t pieces) {
      if (stream == 0) return;
      pass.piece = round_up((stream + pieces - 1) / pieces, Shape::kN);
      pass.pieces = static_cast<int>((stream + pass.piece - 1) / pass.piece);
    };
    cut(plan.users, c.items, std::min(kMostPieces, (c.items + kFewestItems - 1) / kFewestItems));
    const int64_t of_user = std::max(plan.users.pieces, 1) * width;
    plan.group = std::min(c.rows, std::max(kFewestOfGroup, kMostSums / of_user / 128 * 128));
    divide(plan.users, plan.group);
    divide(plan.items, c.items);
    const int64_t wanted = kBlocks / std::max<int64_t>((c.items + plan.items.tile - 1) / plan.items.tile, 1);
    const int64_t most = (c.rows + kFewestUsers - 1) / kFewestUsers;
    cut(plan.items, c.rows, std::max<int64_t>(std::min(wanted, most), 1));
  });
  plan.direct = g.table && !c.sampled && plan.items.pieces == 1;
  plan.users.part_floats = plan.users.pieces * plan.group * width;
  plan.items.part_floats = plan.items.pieces * c.items * width;
  int64_t rows = 0, rest = 0;
  cross_entropy_rows(c, nullptr, &rows);
  divided(c, g, plan, nullptr, &rest);
  plan.scratch_bytes = rows + rest;
  return plan;
}

cudaError_t launch_catalog_cross_entropy_backward(const CrossEntropy& c, const CrossEntropyGradient& g,
                                                  const CrossEntropyGradientPlan& plan, void* memory,
                                                  int64_t* keys, cudaStream_t stream) {
  if (c.rows == 0) return cudaSuccess;
  int64_t used = 0;
  const CrossEntropyRows rows = cross_entropy_rows(c, static_cast<char*>(memory), &used);
  const GradientScratch scratch = divided(c, g, plan, static_cast<char*>(memory) + used, &used);
  const bool half = c.element == Element::kFloat16;
  const float gain = half ? kGain : 0.0f, gained = half ? 16384.0f : 1.0f;
  cudaError_t error = launch_cross_entropy_rows(c, rows, stream);
  const auto then = [&](auto kernel, dim3 grid, unsigned threads, const auto&... arguments) {
    if (error == cudaSuccess) error = launch_kernel(kernel, grid, threads, 0, stream, arguments...);
  };
  if (half) then(gradient_scale_kernel, 1, 1024, c, g, rows, scratch.scale);
  const int64_t padded = round_up(c.rows, kCrossEntropyPad);
  then(gradient_rows_kernel, blocks_of(std::max(padded, keys ? c.items + c.rows : 0)), kThreads, c, g, rows,
       scratch, padded, keys);

  GradientLaunch p{};
  p.rows = rows;
  p.scratch = scratch;
  p.gain = gain;
  p.share = (1.0f - c.smoothing) * gained;
  p.even = c.items ? c.smoothing / static_cast<float>(c.items) * gained : 0.0f;
  const Vectors items = c.sampled ? Vectors{rows.items, rows.items_stride, 0} : c.table;
  const auto pass = [&](const GradientPass& of) {
    if (error != cudaSuccess || p.stay_count == 0 || of.pieces == 0) return;
    const int64_t tiles = (p.stay_count + of.tile - 1) / of.tile;
    p.stay_vectors = begin_aligned(p.stay, c.element);
    p.stream_vectors = begin_aligned(p.stream, c.element);
    p.piece = of.piece;
    error = for_kind_and_dim(c.element, c.tf32, c.dim, [&](auto kind, auto dim) {
      constexpr int D = decltype(dim)::value;
      const dim3 grid(static_cast<unsigned>(tiles), of.pieces, D / kColumns<D>);
      return launch_kernel(gradient_pass_kernel<decltype(kind), D>, grid, kWarp * of.warps, of.shared_bytes,
                           stream, c, p);
    });
  };
  if (g.users) {
    p.stream = items;
    p.stream_count = c.items;
    p.sums = scratch.of_users;
    for (int64_t first = 0; first < c.rows; first += plan.group) {
      const int64_t count = std::min(plan.group, c.rows - first);
      p.stay = {
          static_cast<const char*>(c.users.data) + first * c.users.row_stride * element_bytes(c.element),
          c.users.row_stride, 0};
      p.stay_count = count;
      p.rows.target = rows.target + first;
      p.scratch.rows = scratch.rows + first;
      pass(plan.users);
      then(finish_users_kernel, blocks_of(count * c.dim), kThreads, c, g, rows, scratch, plan.users.pieces,
           gain, first, count);
    }
    p.rows = rows;
    p.scratch = scratch;
  }
  if (g.of_items()) {
    p.by_items = true;
    p.stay = items;
    p.stay_count = c.items;
    p.stream = c.users;
    p.stream_count = c.rows;
    p.sums = scratch.of_items;
    p.of_bias = scratch.of_bias;
    p.direct = plan.direct ? g.table : nullptr;
    pass(plan.items);
    const bool sums = g.table && !plan.direct;
    if (!c.sampled && (sums || g.bias)) {
      then(finish_items_kernel, blocks_of(c.items * (sums ? c.dim : 1)), kThreads, c, g, scratch,
           plan.items.pieces, sums);
    }
  }
  return error;
}

cudaError_t launch_cross_entropy_collect(const CrossEntropy& c, const CrossEntropyGradient& g,
                                         const CrossEntropyGradientPlan& plan, void* memory,
                                         const int64_t* keys, const int64_t* order, cudaStream_t stream) {
  if (c.rows == 0) return cudaSuccess;
  int64_t used = 0;
  cross_entropy_rows(c, static_cast<char*>(memory), &used);
  const GradientScratch scratch = divided(c, g, plan, static_cast<char*>(memory) + used, &used);
  return launch_kernel(cross_entropy_collect_kernel, static_cast<unsigned>(c.items + c.rows), kCollectThreads,
                       0, stream, c, g, scratch, plan.items.pieces, keys, order);
}

}  // namespace attnrec::cuda
