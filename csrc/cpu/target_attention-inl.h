// target_attention, forward: the readout of the streaming softmax that adds up values.
#pragma once

#include "cpu/streaming-inl.h"

namespace attnrec::cpu {
namespace {

// With more rows than this, values are copied to dense rows first; below, the copy costs more than strided
// reads.
constexpr int kRowsWorthACopy = 16;

template <class V, class Products, Base kBase>
struct WeightedValue {
  using Real = typename V::Real;

  WeightedValue(Arena& arena, const Attention& attention, int rows)
      : a(attention),
        width(padded<V>(attention.head_dim)),
        softmax(arena, rows),
        sums(arena.take<Real>(static_cast<int64_t>(rows) * width)),
        values(arena, packed_events<V>(rows, a.head_dim), a.head_dim) {}

  // Where there is a self slot, its value is the first state of the sums.
  void begin(const Unit& u, const StreamScratch<V, Products>& scratch) {
    unit = u;
    start_softmax(a, unit, scratch, softmax);
    for (int r = 0; r < unit.rows; r++) {
      Real* sum = sums + static_cast<int64_t>(r) * width;
      if (a.self_value.data) {
        load_row<V>(a.self_value.at(unit.candidate(r), unit.kv_head, a.element), a.element, a.head_dim,
                    softmax.sum(r), sum);
      } else {
        for (int d = 0; d < width; d += V::kWidth) V::store(sum + d, V::zero());
      }
    }
  }

  void pack(int64_t first_event, int n, const Real* hide) {
    const void* data = a.value.at(a.kv_offsets[unit.user] + first_event, unit.kv_head, a.element);
    values.pack(data, a.element, a.value.row_stride, n, a.head_dim, hide, unit.rows > kRowsWorthACopy);
  }

  void tile(const Tile<V>& t) {
    for (int r = 0; r < t.rows; r++) {
      if (t.seen[r] == 0) continue;
      Real* scores = t.scores + r * kKeys;
      const Real rescale = softmax.raise(softmax, t.first_row + r, t.seen[r], scores);
      softmax.add(softmax, t.first_row + r, t.seen[r], scores,
                  [&](int i, typename V::Reg p) ATTNREC_LAMBDA { values.keep(r, i, p, t.scores); });
      if (rescale == 1) continue;
      Real* sum = sums + static_cast<int64_t>(t.first_row + r) * width;
      for (int d = 0; d < width; d += V::kWidth)
        V::store(sum + d, V::mul(V::load(sum + d), V::set1(rescale)));
    }
    values.accumulate_seen(t.rows, t.seen, t.scores, t.packed_event,
                           sums + static_cast<int64_t>(t.first_row) * width, width);
  }

  // `out` [T_c, H, D] and `lse` [T_c, H] are contiguous. Rows that are done already stay as they are, and
  // those whose sum is not in range are left to be done. Returns how many these are.
  int finish(bool* done, void* out, Real* lse) {
    int left = 0;
    for (int r = 0; r < unit.rows; r++) {
      if (done[r]) continue;
      done[r] = softmax.in_range(r);
      left += !done[r];
      if (!done[r]) continue;
      const int64_t row = unit.candidate(r) * a.heads + unit.query_head(r);
      const typename V::Reg inverse = V::set1(softmax.inverse_sum(r));
      Real* sum = sums + static_cast<int64_t>(r) * width;
      for (int d = 0; d < width; d += V::kWidth) V::store(sum + d, V::mul(V::load(sum + d), inverse));
      store_row<V>(sum, a.head_dim, a.element,
                   static_cast<char*>(out) + row * a.head_dim * element_bytes(a.element));
      lse[row] = softmax.lse(r);
    }
    return left;
  }

  const Attention& a;
  const int width;
  RunningSoftmax<V, false, kBase, Products::kShortExp> softmax;
  Real* sums;
  typename Products::Values values;
  Unit unit;
};

// One pass over a unit's events. Returns how many rows are left to be done.
template <class V, class Products, Base kBase>
int attend(const Attention& a, const Unit& unit, Arena& arena, bool* done, void* out, void* lse) {
  StreamScratch<V, Products> scratch(arena, packed_events<V>(unit.rows, a.head_dim), a.head_dim);
  WeightedValue<V, Products, kBase> readout(arena, a, unit.rows);
  if (!done) return 0;
  readout.begin(unit, scratch);
  stream(a, unit, scratch, readout);
  return readout.finish(done, out, static_cast<typename V::Real*>(lse));
}

template <class V>
int64_t target_attention_unit(const Attention& a, const Unit& unit, void* memory, void* out, void* lse) {
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    Arena arena(memory);
    bool* done = arena.take<bool>(unit.rows);
    for (int r = 0; done && r < unit.rows; r++) done[r] = false;
    Arena again = arena;  // both passes use the same memory
    if (attend<V, Products, Base::kNothing>(a, unit, arena, done, out, lse) > 0)
      attend<V, Products, Base::kRunningMaximum>(a, unit, again, done, out, lse);
    return arena.used();
  });
}

}  // namespace
}  // namespace attnrec::cpu
