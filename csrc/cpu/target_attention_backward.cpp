// attnrec::target_attention_backward on the CPU.
#include <algorithm>
#include <tuple>

#include "cpu/attention_arguments.h"

namespace attnrec::cpu {
namespace {

constexpr const char* kOp = "target_attention_backward";

// A long history is cut into at most 8 pieces, so that several threads can work for one user. A candidate's
// gradient is then the sum over the pieces in their order. How many there are depends on the history alone.
int64_t events_of_a_piece(int64_t events) {
  const int64_t pieces = std::clamp<int64_t>((events + 1023) / 1024, 1, 8), tile = 128;
  return std::max<int64_t>(1, ((events + pieces - 1) / pieces + tile - 1) / tile * tile);
}

// Whether gradients of so many bytes, of keys and as many of values, are better written past the caches. One
// candidate's with respect to 200 events a user, and a sum over both, took 1.03 of the time at 0.8 MB each,
// 1 / 1.16 at 1.6 and 1 / 1.3 to 1 / 1.45 from 3.3 on (2 cores with 1 MiB of L2 each). From 32 MiB on malloc
// gives new pages each time, of which the system has just written zeros into the caches: at 39 MB 1.08 of the
// time. (softmax_score's, 8 MB of items, took as long either way.)
bool past_caches(int64_t bytes) { return bytes >= int64_t{2} << 20 && bytes < int64_t{32} << 20; }

std::vector<Unit> plan_backward(const Attention& a) {
  const int group = a.heads / a.kv_heads;
  std::vector<Unit> units;
  for (int64_t b = 0; b < a.users; b++) {
    const int64_t candidates = a.q_offsets[b + 1] - a.q_offsets[b], events = a.events(b);
    const int64_t piece = events_of_a_piece(events);
    for (int kv_head = 0; kv_head < a.kv_heads; kv_head++) {
      for (int64_t first = 0; first == 0 || first < events; first += piece) {
        const int64_t last = std::min(first + piece, events);
        units.push_back({b, a.q_offsets[b], static_cast<int>(candidates * group), group, kv_head * group,
                         kv_head, first, last, 1,
                         static_cast<double>(candidates + 8) * static_cast<double>(last - first)});
      }
    }
  }
  dearest_first(units);
  return units;
}

Vectors per_row(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> target_attention_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,
    Tensor q_offsets, Tensor kv_offsets, std::optional<double> scale, OptionalTensor kv_lengths,
    OptionalTensor visible, OptionalTensor self_key, OptionalTensor self_value, OptionalTensor key_bias) {
  AttentionArguments arguments(kOp, query, key, &value, q_offsets, kv_offsets, scale, kv_lengths, visible,
                               self_key, &self_value, key_bias);
  const Attention& a = arguments.attention;
  const ScalarType working = working_dtype(a.element);
  check_attention_outputs(kOp, grad_out, grad_lse, query, out, lse, working);
  AttentionGradients g;
  g.grad_out = vectors_of(grad_out, arguments.kept);
  g.out = vectors_of(out, arguments.kept);
  g.lse = per_row(lse);
  if (grad_lse) g.grad_lse = per_row(*grad_lse);

  const int64_t D = a.head_dim, rows = query.size(0), events = key.size(0);
  const auto gradient = [&](const OptionalTensor& of, int64_t n, int64_t heads) {
    return of ? new_empty(query, {n, heads, D}) : new_empty(query, {0});
  };
  Tensor grad_query = gradient(query, rows, a.heads);
  Tensor grad_key = gradient(key, events, a.kv_heads), grad_value = gradient(value, events, a.kv_heads);
  Tensor grad_self_key = gradient(self_key, rows, a.kv_heads),
         grad_self_value = gradient(self_value, rows, a.kv_heads);
  Tensor grad_key_bias = key_bias ? new_empty(*key_bias, {events, a.heads}) : new_empty(query, {0});
  g.grad_key = grad_key.mutable_data_ptr();
  g.grad_value = grad_value.mutable_data_ptr();
  g.grad_self_key = grad_self_key.mutable_data_ptr();
  g.grad_self_value = grad_self_value.mutable_data_ptr();
  g.grad_key_bias = grad_key_bias.mutable_data_ptr();
  g.past_caches = past_caches(grad_key.numel() * element_bytes(a.element));

  // Where a history has several pieces, each has its own sum for the query's gradient.
  struct Parts {
    int64_t begin, size, count;
  };
  std::vector<Parts> parts(a.users);
  int64_t numbers = 0;
  for (int64_t b = 0; b < a.users; b++) {
    const int64_t piece = events_of_a_piece(a.events(b)), count = (a.events(b) + piece - 1) / piece;
    parts[b] = {numbers, (a.q_offsets[b + 1] - a.q_offsets[b]) * a.heads * D, count};
    if (count > 1) numbers += parts[b].size * count;
  }
  Tensor sums = new_empty(query, {numbers}, working);
  const Element sums_element = working == ScalarType::Double ? Element::kFloat64 : Element::kFloat32;
  char* sums_data = static_cast<char*>(sums.mutable_data_ptr());
  char* query_data = static_cast<char*>(grad_query.mutable_data_ptr());
  const auto result_of = [&](int64_t b) {
    return query_data + a.q_offsets[b] * a.heads * D * element_bytes(a.element);
  };

  const std::vector<Unit> units = plan_backward(a);
  const Kernels& tier = kernels(a.element);
  for_each_unit(units, [&](int64_t i) {
    const Unit& unit = units[i];
    const Parts& own = parts[unit.user];
    GradQuery to{result_of(unit.user), a.element};
    if (own.count > 1) {
      const int64_t piece = unit.first_event / events_of_a_piece(a.events(unit.user));
      to = {sums_data + (own.begin + piece * own.size) * element_bytes(sums_element), sums_element};
    }
    void* memory = thread_scratch(tier.target_attention_backward(a, unit, nullptr, g, to));
    tier.target_attention_backward(a, unit, memory, g, to);
  });

  for (int64_t b = 0; b < a.users; b++) {
    const Parts& own = parts[b];
    if (own.count <= 1) continue;
    const int64_t slice = 1 << 16;
    for_each_unit((own.size + slice - 1) / slice, [&](int64_t i) {
      const int64_t begin = i * slice;
      tier.target_attention_backward_add(sums_data + (own.begin + begin) * element_bytes(sums_element),
                                         own.count, own.size, std::min(slice, own.size - begin), a.element,
                                         result_of(b) + begin * element_bytes(a.element));
    });
  }
  return {grad_query, grad_key, grad_value, grad_self_key, grad_self_value, grad_key_bias};
}

}  // namespace
}  // namespace attnrec::cpu

STABLE_TORCH_LIBRARY_IMPL(attnrec, CPU, m) {
  m.impl("target_attention_backward", TORCH_BOX(&attnrec::cpu::target_attention_backward));
}
