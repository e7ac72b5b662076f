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
  Attention& a = attention;
  a.element = element_of(op, "query", query);
  const ScalarType dtype = query.scalar_type();
  check_tensor(op, "query", query, 3, dtype);
  check_tensor(op, "key", key, 3, dtype);
  const int64_t rows = query.size(0), events = key.size(0), D = query.size(2);
  ATTNREC_CHECK(D >= 1 && D <= 256, op, "query must have a head dim of 1 to 256, got shape ",
                shape_of(query));
  ATTNREC_CHECK(key.size(2) == D, op, "key must have query's head dim ", D, ", got shape ", shape_of(key));
  ATTNREC_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0, op, "query's heads (", query.size(1),
                ") must be a multiple of key's (", key.size(1), ")");
  a.head_dim = static_cast<int>(D);
  a.heads = static_cast<int>(query.size(1));
  a.kv_heads = static_cast<int>(key.size(1));
  ATTNREC_CHECK(!scale || std::isfinite(*scale), op, "scale must be finite, got ", *scale);
  a.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(D)));
  a.query = vectors_of(query, kept);
  a.key = vectors_of(key, kept);
  if (value) {
    check_tensor(op, "value", *value, 3, dtype);
    ATTNREC_CHECK(value->size(0) == events && value->size(1) == key.size(1) && value->size(2) == D, op,
                  "value must have key's shape ", shape_of(key), ", got ", shape_of(*value));
    a.value = vectors_of(*value, kept);
  }

  q_offsets = offsets_of(op, "q_offsets", q_offsets_, rows, "query");
  kv_offsets = offsets_of(op, "kv_offsets", kv_offsets_, events, "key");
  ATTNREC_CHECK(q_offsets.size() == kv_offsets.size(), op,
                "kv_offsets must have as many elements as q_offsets (", q_offsets.size(), "), got ",
                kv_offsets.size());
  a.users = static_cast<int64_t>(q_offsets.size()) - 1;
  a.q_offsets = q_offsets.data();
  a.kv_offsets = kv_offsets.data();
  if (kv_lengths_) {
    kv_lengths = integers(op, "kv_lengths", *kv_lengths_, a.users);
    for (int64_t b = 0; b < a.users; b++) {
      const int64_t room = kv_offsets[b + 1] - kv_offsets[b];
      ATTNREC_CHECK(kv_lengths[b] >= 0 && kv_lengths[b] <= room, op,
                    "kv_lengths must be from 0 to the user's room ", room, ", got ", kv_lengths[b],
                    " at user ", b);
    }
    a.kv_lengths = kv_lengths.data();
  }
  if (visible_) {
    visible = integers(op, "visible", *visible_, rows);
    for (int64_t b = 0; b < a.users; b++) {
      const int64_t room = kv_offsets[b + 1] - kv_offsets[b];
      for (int64_t c = q_offsets[b]; c < q_offsets[b + 1]; c++) {
        ATTNREC_CHECK(visible[c] >= 0 && visible[c] <= room, op, "visible must be from 0 to the user's room ",
                      room, ", got ", visible[c], " at row ", c);
      }
    }
    a.visible = visible.data();
  }
  const auto self_slot = [&](const char* name, const Tensor& tensor) {
    check_tensor(op, name, tensor, 3, dtype);
    ATTNREC_CHECK(tensor.size(0) == rows && tensor.size(1) == key.size(1) && tensor.size(2) == D, op, name,
                  " must have shape [", rows, ", ", key.size(1), ", ", D, "], got ", shape_of(tensor));
    return vectors_of(tensor, kept);
  };
  if (self_value) {
    ATTNREC_CHECK(self_key.has_value() == self_value->has_value(), op,
                  "self_value must be given with self_key, and only then");
    if (*self_value) a.self_value = self_slot("self_value", **self_value);
  }
  if (self_key) a.self_key = self_slot("self_key", *self_key);
  if (key_bias) {
    a.bias_element = element_of(op, "key_bias", *key_bias);
    const ScalarType bias_dtype = key_bias->scalar_type();
    ATTNREC_CHECK(bias_dtype == dtype || bias_dtype == ScalarType::Float, op,
                  "key_bias must be float32 or have query's dtype");
    ATTNREC_CHECK(key_bias->dim() == 2 && key_bias->size(0) == events && key_bias->size(1) == a.heads, op,
                  "key_bias must have shape [", events, ", ", a.heads, "], got ", shape_of(*key_bias));
    a.key_bias = key_bias->const_data_ptr();
    a.bias_row_stride = key_bias->stride(0);
    a.bias_head_stride = key_bias->stride(1);
  }
}

void dearest_first(std::vector<Unit>& units, const std::vector<double>& cost) {
  if (std::equal(cost.begin() + (cost.empty() ? 0 : 1), cost.end(), cost.begin())) return;
  std::vector<size_t> order(units.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return cost[i] > cost[j]; });
  std::vector<Unit> sorted;
  sorted.reserve(units.size());
  for (size_t i : order) sorted.push_back(units[i]);
  units.swap(sorted);
}

namespace {

// Whether heads that are read one after another would read memory with gaps: a call's keys and values are
// more than caches hold (below, reading them twice costs more than the gaps), and all heads of an event lie
// together.
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
  std::vector<double> cost;
  const bool together = rows_together > 0 && better_together(a);
  for (int64_t b = 0; b < a.users; b++) {
    const int64_t first = a.q_offsets[b], candidates = a.q_offsets[b + 1] - first;
    if (candidates == 0) continue;
    const double user_cost = static_cast<double>(candidates) * static_cast<double>(a.events(b)) * a.heads;
    if (together && candidates * group <= rows_together && user_cost <= fair) {
      units.push_back(
          {b, first, static_cast<int>(candidates * group), group, 0, 0, 0, INT64_MAX, a.heads / group});
      cost.push_back(user_cost / group);
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
                         head / (a.heads / a.kv_heads)});
        cost.push_back(static_cast<double>(end - begin) * events);
      }
    }
  }
  dearest_first(units, cost);
  return units;
}

}  // namespace attnrec::cpu
