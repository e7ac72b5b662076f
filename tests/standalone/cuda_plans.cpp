// The launch plans of csrc/cuda for tests/test_cuda_plans.py: numbers in, numbers out.
#include <initializer_list>

#include "cuda/catalog_cross_entropy_backward.h"
#include "cuda/catalog_topk.h"
#include "cuda/softmax_score.h"
#include "cuda/target_attention.h"
#include "cuda/target_attention_backward.h"
#include "cuda/target_attention_top.h"
#include "cuda/target_attention_weights.h"

namespace cuda = attnrec::cuda;

extern "C" void plan_softmax_score(int element, int64_t dim, int64_t users, int64_t items, int64_t row_stride,
                                   int64_t address, bool backward, int64_t* out) {
  cuda::SoftmaxScore problem;
  problem.element = static_cast<cuda::Element>(element);
  problem.dim = dim;
  problem.users = users;
  problem.items = items;
  problem.user = {nullptr, dim, 0};
  problem.item = {reinterpret_cast<const void*>(address), row_stride, 0};
  const cuda::SoftmaxScorePlan plan = cuda::plan_softmax_score(problem, backward);
  const int64_t values[] = {plan.chunks, plan.several, plan.aligned, plan.lanes,
                            plan.parts,  plan.logits,  plan.partial};
  for (int64_t value : values) *out++ = value;
}

namespace {

cuda::Attention attention(int element, int64_t dim, int64_t heads, int64_t kv_heads, int64_t users,
                          int64_t rows, int64_t events, bool bias) {
  cuda::Attention a;
  a.element = static_cast<cuda::Element>(element);
  a.head_dim = static_cast<int>(dim);
  a.heads = static_cast<int>(heads);
  a.kv_heads = static_cast<int>(kv_heads);
  a.users = users;
  a.rows = rows;
  a.events = events;
  if (bias) a.key_bias = "";  // not read
  return a;
}

}  // namespace

extern "C" void plan_target_attention(int element, int64_t dim, int64_t heads, int64_t kv_heads,
                                      int64_t users, int64_t rows, int64_t events, bool bias, int64_t* out) {
  const cuda::AttentionPlan plan =
      cuda::plan_target_attention(attention(element, dim, heads, kv_heads, users, rows, events, bias));
  const int64_t values[] = {plan.warps,        plan.row_blocks, plan.pack,   plan.candidates,
                            plan.tiles,        plan.head_tiles, plan.chunks, plan.apart,
                            plan.shared_bytes, plan.part_floats};
  for (int64_t value : values) *out++ = value;
}

// `top` -1: of all weights.
extern "C" void plan_target_attention_weights(int element, int64_t dim, int64_t heads, int64_t kv_heads,
                                              int64_t users, int64_t rows, int64_t events, bool bias,
                                              int64_t top, int64_t* out) {
  const cuda::Attention a = attention(element, dim, heads, kv_heads, users, rows, events, bias);
  cuda::TopPlan plan{cuda::plan_target_attention_weights(a), 0};
  if (top >= 0) plan = cuda::plan_target_attention_top(a, top);
  const cuda::RowsPlan& of_rows = plan.rows;
  const int64_t values[] = {of_rows.warps,       of_rows.pack,   of_rows.candidates, of_rows.tiles,
                            of_rows.head_tiles,  of_rows.chunks, of_rows.apart,      of_rows.shared_bytes,
                            of_rows.part_floats, plan.list_keys};
  for (int64_t value : values) *out++ = value;
}

extern "C" void plan_target_attention_backward(int element, int64_t dim, int64_t heads, int64_t kv_heads,
                                               int64_t users, int64_t rows, int64_t events, bool bias,
                                               int64_t* out) {
  const cuda::Attention a = attention(element, dim, heads, kv_heads, users, rows, events, bias);
  const cuda::GradRowsPlan of_rows = cuda::plan_grad_rows(a);
  const cuda::GradEventsPlan of_events = cuda::plan_grad_events(a);
  const int64_t values[] = {of_rows.warps,      of_rows.pack,          of_rows.candidates, of_rows.tiles,
                            of_rows.head_tiles, of_rows.shared_bytes,  of_events.warps,    of_events.events,
                            of_events.tiles,    of_events.shared_bytes};
  for (int64_t value : values) *out++ = value;
}

namespace {

cuda::CrossEntropy cross_entropy(int element, int64_t dim, int64_t rows, int64_t items, int64_t negatives) {
  cuda::CrossEntropy c;
  c.element = static_cast<cuda::Element>(element);
  c.dim = static_cast<int>(dim);
  c.rows = rows;
  c.table_items = items;
  c.sampled = negatives >= 0;
  c.items = c.sampled ? negatives : items;
  return c;
}

}  // namespace

extern "C" void plan_catalog_cross_entropy(int element, int64_t dim, int64_t rows, int64_t items,
                                           int64_t negatives, int64_t* out) {
  const cuda::CrossEntropyPlan plan =
      cuda::plan_catalog_cross_entropy(cross_entropy(element, dim, rows, items, negatives));
  const int64_t values[] = {plan.warps, plan.row_tiles,    plan.splits,
                            plan.split, plan.shared_bytes, plan.scratch_bytes};
  for (int64_t value : values) *out++ = value;
}

extern "C" void plan_catalog_cross_entropy_backward(int element, int64_t dim, int64_t rows, int64_t items,
                                                    int64_t negatives, int64_t* out) {
  cuda::CrossEntropyGradient g;
  g.users = g.table = g.bias = &g;  // not read
  const cuda::CrossEntropyGradientPlan plan =
      cuda::plan_catalog_cross_entropy_backward(cross_entropy(element, dim, rows, items, negatives), g);
  for (const cuda::GradientPass& pass : {plan.users, plan.items}) {
    const int64_t values[] = {pass.warps, pass.tile,        pass.pieces,
                              pass.piece, pass.part_floats, pass.shared_bytes};
    for (int64_t value : values) *out++ = value;
  }
  *out++ = plan.group;
  *out++ = plan.direct;
  *out++ = plan.scratch_bytes;
}

extern "C" void plan_catalog_topk(int element, int64_t dim, int64_t users, int64_t items, int64_t k,
                                  int64_t exclusions, int64_t* out) {
  cuda::CatalogTopk c;
  c.element = static_cast<cuda::Element>(element);
  c.dim = static_cast<int>(dim);
  c.users = users;
  c.items = items;
  c.k = static_cast<int>(k);
  c.exclusions = exclusions;
  if (exclusions > 0) c.excluded.data = &c;  // not read
  const cuda::CatalogTopkPlan plan = cuda::plan_catalog_topk(c);
  const int64_t values[] = {plan.warps,         plan.row_tiles, plan.k,         plan.tile,
                            plan.sample_blocks, plan.sampled,   plan.part,      plan.parts,
                            plan.capacity,      plan.room,      plan.in_shared, plan.shared_bytes,
                            plan.merge_bytes,   plan.keys,      plan.floats,    plan.integers};
  for (int64_t value : values) *out++ = value;
}
