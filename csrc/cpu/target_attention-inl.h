// target_attention, forward: the readout of the streaming softmax that adds up values.
#pragma once

#include "cpu/streaming-inl.h"

namespace attnrec::cpu {
namespace {

// With more rows than this, values are copied to dense rows first; below, the copy costs more than strided
// reads (20 rows: 7 to 11 %). It matters where rows are a power of two apart: with 64 rows 4 KiB apart 18 %.
constexpr int kRowsWorthACopy = 32;

template <class V, class Products, Base kBase>
struct WeightedValue {
  using Real = typename V::Real;

  WeightedValue(Arena& arena, const Attention& attention, int rows, int parts)
      : a(attention),
        width(padded<V>(attention.head_dim)),
        softmax(arena, rows * parts),
        sums(arena.take<Real>(static_cast<int64_t>(rows) * parts * width)),
        values(arena, packed_events<V, Products>(rows, a.head_dim), a.head_dim) {}

  // What it keeps for unit `u`, whose rows stand from `row` on.
  WeightedValue of(const Unit& u, int64_t row) const {
    WeightedValue rows = *this;
    rows.unit = u;
    rows.softmax = softmax.from(row);
    rows.sums += row * width;
    return rows;
  }

  // Where there is a self slot, its value is the first state of the sums.
  void begin() {
    start_softmax<V>(a, unit, softmax, [&](int r, Real weight) {
      load_row<V>(a.self_value.at(unit.candidate(r), unit.kv_head, a.element), a.element, a.head_dim, weight,
                  sums + static_cast<int64_t>(r) * width);
    });
    if (a.self_key.data) return;
    for (int64_t i = 0; i < static_cast<int64_t>(unit.rows) * width; i += V::kWidth)
      V::store(sums + i, V::zero());
  }

  void pack(int64_t first_event, int n, const Real* hide) {
    const void* data = a.value.at(a.kv_offsets[unit.user] + first_event, unit.kv_head, a.element);
    values.pack(data, a.element, a.value.row_stride, n, a.head_dim, hide, unit.rows > kRowsWorthACopy, ahead);
  }

  // Scores that need no maximum are used in the registers that they were summed in: bf16 on AVX-512 takes 3 %
  // less time, 9 % where there are few rows. With AVX2's 16 registers it took 4 % more.
  static constexpr bool kTakesRegisters = kBase == Base::kNothing && Products::kInRegisters;
  template <class... Registers>
  ATTNREC_MEMBER void take(const Tile<V>& t, int r, int event, Registers... scores) {
    softmax.add_registers(
        softmax, t.first_row + r,
        [&](auto... powers) ATTNREC_LAMBDA { values.keep(r, event, t.scores, powers...); }, scores...);
  }

  void tile(const Tile<V>& t) {
    for (int r = 0; !kTakesRegisters && r < t.rows; r++) {
      if (t.seen[r] == 0) continue;
      Real* scores = t.scores + r * kKeys;
      const Real rescale = softmax.raise(softmax, t.first_row + r, t.seen[r], scores);
      softmax.add(softmax, t.first_row + r, t.seen[r], scores,
                  [&](int i, auto... powers) ATTNREC_LAMBDA { values.keep(r, i, t.scores, powers...); });
      if (rescale == 1) continue;
      Real* sum = sums + static_cast<int64_t>(t.first_row + r) * width;
      for (int d = 0; d < width; d += V::kWidth)
        V::store(sum + d, V::mul(V::load(sum + d), V::set1(rescale)));
    }
    values.accumulate_seen(t.rows, t.seen, t.scores, t.packed_event,
                           sums + static_cast<int64_t>(t.first_row) * width, width);
  }

  // `out` [T_c, H, D] and `lse` [T_c, H] are contiguous. Rows that are done already stay as they are, and
  // those whose sum is not in range, or whose values with such weights are not finite, are left to be done.
  // Returns how many these are.
  int finish(bool* done, void* out, Real* lse) {
    int left = 0;
    for (int r = 0; r < unit.rows; r++) {
      if (done[r]) continue;
      const Real total = softmax.sum(r);
      Real* sum = sums + static_cast<int64_t>(r) * width;
      done[r] = kBase == Base::kRunningMaximum || (softmax.in_range(total) && is_finite(sum));
      left += !done[r];
      if (!done[r]) continue;
      const int64_t row = unit.candidate(r) * a.heads + unit.query_head(r);
      const typename V::Reg inverse = V::set1(softmax.inverse(total));
      for (int d = 0; d < width; d += V::kWidth) V::store(sum + d, V::mul(V::load(sum + d), inverse));
      store_row<V>(sum, 1, a.head_dim, a.element,
                   static_cast<char*>(out) + row * a.head_dim * element_bytes(a.element));
      lse[row] = softmax.lse(r, total);
    }
    return left;
  }

  bool is_finite(const Real* sum) const {
    typename V::Reg zeros = V::zero();
    for (int d = 0; d < width; d += V::kWidth) zeros = V::fma(V::load(sum + d), V::zero(), zeros);
    return V::sum(zeros) == 0;
  }

  const Attention& a;
  const int width;
  RunningSoftmax<V, false, kBase, Products::kShortExp> softmax;
  Real* sums;
  typename Products::Values values;
  Unit unit;
  Ahead ahead;  // of the values
};

// The p-th part of the lines that events first … last have in all heads.
inline Ahead lines_of(const Vectors& of, const Attention& a, int64_t first, int64_t last, int p, int parts) {
  const auto row = [&](int64_t event) {
    return static_cast<const char*>(of.at(first + event, 0, a.element));
  };
  const int bytes = element_bytes(a.element);
  return {row((last - first) * p / parts), row((last - first) * (p + 1) / parts), of.row_stride * bytes,
          int64_t{a.kv_heads} * a.head_dim * bytes};
}

// Reads a byte of every line that events first … last have in all heads, in the order of addresses.
inline void touch(const Vectors& of, const Attention& a, int64_t first, int64_t last) {
  const int bytes = a.kv_heads * a.head_dim * element_bytes(a.element);
  for (int64_t event = first; event < last; event++) {
    const auto* row = static_cast<const volatile char*>(of.at(event, 0, a.element));
    for (int byte = 0; byte < bytes; byte += 64) (void)row[byte];
  }
}

// One pass over a unit's events. Returns how many rows are left to be done.
//
// Where a unit has several parts, which are all heads, they take turns tile by tile. What a head reads has
// gaps, the other heads, and prefetching its own lines did not make up for that. So the first tile is read in
// order, and while a tile is packed from L2, head by head, the next is prefetched in order, a line for each
// that is packed. 16 users with one candidate and 10,000 events, two threads: 46 GB/s in fp32 and 49 in bf16;
// 32 and 30 where each tile was read first and then packed. All lines of a head's share at once wait for each
// other: 10 % less.
template <class V, class Products, Base kBase>
int attend(const Attention& a, const Unit& unit, Arena& arena, bool* done, void* out, void* lse) {
  StreamScratch<V, Products> scratch(arena, packed_events<V, Products>(unit.rows, a.head_dim), a.head_dim);
  WeightedValue<V, Products, kBase> state(arena, a, unit.rows, unit.parts);
  if (!done) return 0;
  for (int p = 0; p < unit.parts; p++) state.of(part_of(a, unit, p), p * unit.rows).begin();
  const int64_t events = a.events(unit.user), event0 = a.kv_offsets[unit.user];
  const int64_t step = unit.parts > 1 ? kKeys : events;
  if (unit.parts > 1) {
    touch(a.key, a, event0, event0 + least(events, step));
    touch(a.value, a, event0, event0 + least(events, step));
  }
  for (int64_t event = 0; event < events; event += step) {
    const int64_t end = least(events, event + step);
    for (int p = 0; p < unit.parts; p++) {
      Unit part = part_of(a, unit, p);
      part.first_event = event;
      part.last_event = end;
      auto readout = state.of(part, p * unit.rows);
      Ahead keys;
      if (unit.parts > 1) {
        const int64_t first = event0 + end, last = event0 + least(events, end + step);
        keys = lines_of(a.key, a, first, last, p, unit.parts);
        readout.ahead = lines_of(a.value, a, first, last, p, unit.parts);
      }
      stream(a, part, scratch, readout, keys);
    }
  }
  int left = 0;
  for (int p = 0; p < unit.parts; p++)
    left += state.of(part_of(a, unit, p), p * unit.rows)
                .finish(done + p * unit.rows, out, static_cast<typename V::Real*>(lse));
  return left;
}

template <class V>
int64_t target_attention_unit(const Attention& a, const Unit& unit, void* memory, void* out, void* lse) {
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    Arena arena(memory);
    const int rows = unit.rows * unit.parts;
    bool* done = arena.take<bool>(rows);
    for (int r = 0; done && r < rows; r++) done[r] = false;
    Arena again = arena;  // both passes use the same memory
    if (attend<V, Products, Base::kNothing>(a, unit, arena, done, out, lse) > 0)
      attend<V, Products, Base::kRunningMaximum>(a, unit, again, done, out, lse);
    return arena.used();
  });
}

}  // namespace
}  // namespace attnrec::cpu
