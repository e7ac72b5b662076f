#include "cpu/attention_arguments.h"

#include <algorithm>
#include <cmath>

namespace attnrec::cpu {

AttentionArguments::AttentionArguments(const char* op, const Tensor& query, const Tensor& key,
                                       const Tensor* value, const Tensor& q_offsets_,
                                       const Tensor& kv_offsets_, std::optional<double> scale,
                                       const OptionalTensor& kv_lengths_, const OptionalTensor& visible_,
                                       const OptionalTensor& self_key, const OptionalTensor* self_value,
                                       const OptionalTensor& key_bias) {
  check_attention(op, query, key, value, q_offsets_, kv_offsets_, scale, kv_lengths_, visible_, self_key,
                  self_value, key_bias);
  Attention& a = attention;
  const int64_t rows = query.size(0);
  a.element = element_of(op, "query", query);
  a.head_dim = static_cast<int>(query.size(2));
  a.heads = static_cast<int>(query.size(1));
  a.kv_heads = static_cast<int>(key.size(1));
  a.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(a.head_dim)));
  a.query = vectors_of(query, kept);
  a.key = vectors_of(key, kept);
  if (value) a.value = vectors_of(*value, kept);
  if (self_key) a.self_key = vectors_of(*self_key, kept);
  if (self_value && *self_value) a.self_value = vectors_of(**self_value, kept);
  if (key_bias) {
    a.bias_element = element_of(op, "key_bias", *key_bias);
    a.key_bias = key_bias->const_data_ptr();
    a.bias_row_stride = key_bias->stride(0);
    a.bias_head_stride = key_bias->stride(1);
  }

  q_offsets = offsets_of(op, "q_offsets", q_offsets_, query, "query");
  kv_offsets = offsets_of(op, "kv_offsets", kv_offsets_, key, "key");
  a.users = static_cast<int64_t>(q_offsets.size()) - 1;
  a.q_offsets = q_offsets.data();
  a.kv_offsets = kv_offsets.data();
  if (kv_lengths_) {
    kv_lengths = integers(op, "kv_lengths", *kv_lengths_, a.users, query);
    for (int64_t b = 0; b < a.users; b++) {
      const int64_t room = kv_offsets[b + 1] - kv_offsets[b];
      ATTNREC_CHECK(kv_lengths[b] >= 0 && kv_lengths[b] <= room, op,
                    "kv_lengths must be from 0 to the user's room ", room, ", got ", kv_lengths[b],
                    " at user ", b);
    }
    a.kv_lengths = kv_lengths.data();
  }
  if (visible_) {
    visible = integers(op, "visible", *visible_, rows, query);
    for (int64_t b = 0; b < a.users; b++) {
      const int64_t room = kv_offsets[b + 1] - kv_offsets[b];
      for (int64_t c = q_offsets[b]; c < q_offsets[b + 1]; c++) {
        ATTNREC_CHECK(visible[c] >= 0 && visible[c] <= room, op, "visible must be from 0 to the user's room ",
                      room, ", got ", visible[c], " at row ", c);
      }
    }
    a.visible = visible.data();
  }
}

void dearest_first(std::vector<Unit>& units) {
  const auto dearer = [](const Unit& a, const Unit& b) { return a.cost > b.cost; };
  if (!std::is_sorted(units.begin(), units.end(), dearer))
    std::stable_sort(units.begin(), units.end(), dearer);
}

namespace {

// Whether heads that are read one after another would read memory with gaps: a call's keys and values are
// more than caches hold (below, taking turns is level in fp32 and costs up to a tenth in bf16), and all heads
// of an event lie together.
bool better_together(const Attention& a) {
  const int64_t events = a.kv_offsets[a.users];
  return a.kv_heads > 1 && a.value.data && a.key.head_stride == a.head_dim &&
         a.value.head_stride == a.head_dim &&
         2 * events * a.kv_heads * a.head_dim * element_bytes(a.element) > int64_t{16} << 20;
}

}  // namespace

std::vector<Unit> plan_units(const Attention& a, int64_t rows_together) {
  // A unit's running values should stay in L2 beside the packed events: 128 KiB of them.
  const int64_t most_rows = std::clamp<int64_t>(131072 / (a.head_dim * 4), 64, 512);
  const int64_t fewest_rows = 64;  // below, packing the events again for each unit shows
  const int group = a.key_bias ? 1 : a.heads / a.kv_heads;
  const int64_t threads = torch::stable::get_num_threads();

  double total = 0;
  for (int64_t b = 0; b < a.users; b++) {
    total +=
        static_cast<double>(a.q_offsets[b + 1] - a.q_offsets[b]) * static_cast<double>(a.events(b)) * a.heads;
  }
  const double fair = threads > 1 ? total / static_cast<double>(threads * 4) : total;

  std::vector<Unit> units;
  const bool together = rows_together > 0 && better_together(a);
  for (int64_t b = 0; b < a.users; b++) {
    const int64_t first = a.q_offsets[b], candidates = a.q_offsets[b + 1] - first;
    if (candidates == 0) continue;
    const double user_cost = static_cast<double>(candidates) * static_cast<double>(a.events(b)) * a.heads;
    if (together && candidates * group <= rows_together && user_cost <= fair) {
      units.push_back({b, first, static_cast<int>(candidates * group), group, 0, 0, 0, INT64_MAX,
                       a.heads / group, user_cost / group});
      continue;
    }
    const double events = std::max<double>(1, static_cast<double>(a.events(b)));
    const int64_t fair_rows = static_cast<int64_t>(std::min(fair / events, 1e9));
    const int64_t rows = std::clamp(fair_rows, fewest_rows, most_rows);
    const int64_t pieces = std::max<int64_t>(1, (candidates * group + rows - 1) / rows);
    for (int head = 0; head < a.heads; head += group) {
      for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t begin = candidates * piece / pieces, end = candidates * (piece + 1) / pieces;
        if (begin == end) continue;
        units.push_back({b, first + begin, static_cast<int>((end - begin) * group), group, head,
                         head / (a.heads / a.kv_heads), 0, INT64_MAX, 1,
                         static_cast<double>(end - begin) * events});
      }
    }
  }
  dearest_first(units);
  return units;
}

}  // namespace attnrec::cpu
