// target_attention, forward: the readout of the streaming softmax that adds up values.
#pragma once

#include "cpu/streaming-inl.h"

namespace attnrec::cpu {
namespace {

// With more rows than this, values are copied to dense rows first; below, the copy costs more than strided
// reads.
constexpr int kRowsWorthACopy = 16;

template <class V>
struct WeightedValue {
  using Real = typename V::Real;

  WeightedValue(Arena& arena, const Attention& attention, int rows)
      : a(attention),
        width(padded<V>(attention.head_dim)),
        softmax(arena, rows),
        sums(arena.take<Real>(static_cast<int64_t>(rows) * width)),
        copied(arena.take<Real>(static_cast<int64_t>(packed_events<V>(rows, a.head_dim)) * width)) {}

  // Where there is a self slot, its value is the first state of the sums.
  void begin(const Unit& u, const StreamScratch<V>& scratch) {
    unit = u;
    start_softmax<V>(a, unit, scratch, softmax);
    for (int r = 0; r < unit.rows; r++) {
      Real* sum = sums + static_cast<int64_t>(r) * width;
      if (a.self_value.data) {
        load_row<V>(a.self_value.at(unit.candidate(r), unit.kv_head, a.element), a.element, a.head_dim, 1,
                    sum);
      } else {
        for (int d = 0; d < width; d += V::kWidth) V::store(sum + d, V::zero());
      }
    }
  }

  void pack(int64_t first_event, int n, const Real* hide) {
    const void* data = a.value.at(a.kv_offsets[unit.user] + first_event, unit.kv_head, a.element);
    values = event_rows<V>(data, a.element, a.value.row_stride, n, a.head_dim, hide,
                           unit.rows > kRowsWorthACopy, copied, &value_stride);
  }

  void tile(const Tile<V>& t) {
    for (int r = 0; r < t.rows; r++) {
      if (t.seen[r] == 0) continue;
      const Real rescale = softmax.step(softmax, t.first_row + r, t.seen[r], t.scores + r * kKeys);
      if (rescale == 1) continue;
      Real* sum = sums + static_cast<int64_t>(t.first_row + r) * width;
      for (int d = 0; d < width; d += V::kWidth)
        V::store(sum + d, V::mul(V::load(sum + d), V::set1(rescale)));
    }
    accumulate_seen<V>(t.rows, t.seen, t.scores, values + t.packed_event * value_stride, value_stride, width,
                       sums + static_cast<int64_t>(t.first_row) * width, width);
  }

  // `out` [T_c, H, D] and `lse` [T_c, H] are contiguous.
  void finish(void* out, Real* lse) {
    for (int r = 0; r < unit.rows; r++) {
      const int64_t row = unit.candidate(r) * a.heads + unit.query_head(r);
      const typename V::Reg inverse = V::set1(softmax.inverse_sum(r));
      Real* sum = sums + static_cast<int64_t>(r) * width;
      for (int d = 0; d < width; d += V::kWidth) V::store(sum + d, V::mul(V::load(sum + d), inverse));
      store_row<V>(sum, a.head_dim, a.element,
                   static_cast<char*>(out) + row * a.head_dim * element_bytes(a.element));
      lse[row] = softmax.lse(r);
    }
  }

  const Attention& a;
  const int width;
  RunningSoftmax<V> softmax;
  Real *sums, *copied;
  const Real* values = nullptr;
  int64_t value_stride = 0;
  Unit unit;
};

template <class V>
int64_t target_attention_unit(const Attention& a, const Unit& unit, void* memory, void* out, void* lse) {
  Arena arena(memory);
  StreamScratch<V> scratch(arena, packed_events<V>(unit.rows, a.head_dim), a.head_dim);
  WeightedValue<V> readout(arena, a, unit.rows);
  if (!memory) return arena.used();
  readout.begin(unit, scratch);
  stream<V>(a, unit, scratch, readout);
  readout.finish(out, static_cast<typename V::Real*>(lse));
  return arena.used();
}

}  // namespace
}  // namespace attnrec::cpu
