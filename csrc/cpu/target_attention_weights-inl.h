// target_attention_weights: two readouts of the streaming softmax, each a pass over the events. The first
// finds a row's maximum and sum, the second writes its weights; no scores are kept between them.
#pragma once

#include "cpu/streaming-inl.h"

namespace attnrec::cpu {
namespace {

template <class V>
struct LogSumExp {
  using Real = typename V::Real;

  LogSumExp(Arena& arena, const Attention& attention, int rows) : a(attention), softmax(arena, rows) {}

  template <class Products>
  void begin(const Unit& unit, const StreamScratch<V, Products>& scratch) {
    start_softmax(a, unit, scratch, softmax);
  }
  void pack(int64_t, int, const Real*) {}
  void tile(const Tile<V>& t) {
    for (int r = 0; r < t.rows; r++) {
      if (t.seen[r] > 0) softmax.step(softmax, t.first_row + r, t.seen[r], t.scores + r * kKeys);
    }
  }

  const Attention& a;
  RunningSoftmax<V> softmax;
};

// Writes [pair, heads]: the pairs of user b begin at offsets[b], candidate by candidate, event by event.
template <class V>
struct Weights {
  using Real = typename V::Real;

  Weights(Arena& arena, const Attention& attention, int rows)
      : a(attention), base(arena.take<Real>(rows)), inverse(arena.take<Real>(rows)) {}

  void begin(const Unit& u, const RunningSoftmax<V>& softmax, const int64_t* pair_offsets, void* to) {
    unit = u;
    offsets = pair_offsets;
    weights = static_cast<char*>(to);
    for (int r = 0; r < unit.rows; r++) {
      base[r] = softmax.base(r);
      inverse[r] = softmax.inverse_sum(r);
      for (int64_t i = seen_events(a, unit, r); i < a.room(unit.user); i++) {
        store_element<Real>(at(r, i), 0, a.element, 0);
      }
    }
  }
  void pack(int64_t, int, const Real*) {}
  void tile(const Tile<V>& t) {
    for (int r = 0; r < t.rows; r++) {
      const int row = t.first_row + r;
      const typename V::Reg start = V::set1(base[row]), factor = V::set1(inverse[row]);
      with_element<V>(a.element, at(row, t.first_event), [&](auto* typed) __attribute__((always_inline)) {
        using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
        auto* to = const_cast<Stored*>(typed);
        for (int i = 0; i < t.seen[r]; i += V::kWidth) {
          const typename V::Reg p = V::mul(V::exp2(V::sub(V::load(t.scores + r * kKeys + i), start)), factor);
          Stored part[V::kWidth];
          V::store(part, p);
          const int n = static_cast<int>(least(V::kWidth, t.seen[r] - i));
          for (int lane = 0; lane < n; lane++) to[static_cast<int64_t>(i + lane) * a.heads] = part[lane];
        }
      });
    }
  }

  char* at(int row, int64_t event) const {
    const int64_t c = unit.candidate(row) - a.q_offsets[unit.user];
    const int64_t pair = offsets[unit.user] + c * a.room(unit.user) + event;
    return weights + (pair * a.heads + unit.query_head(row)) * element_bytes(a.element);
  }

  const Attention& a;
  Real *base, *inverse;  // weight = exp2(score - base) * inverse
  const int64_t* offsets = nullptr;
  char* weights = nullptr;
  Unit unit;
};

template <class V>
int64_t target_attention_weights_unit(const Attention& a, const Unit& unit, void* memory,
                                      const int64_t* offsets, void* weights) {
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    Arena arena(memory);
    StreamScratch<V, Products> scratch(arena, packed_events<V, Products>(unit.rows, a.head_dim), a.head_dim);
    LogSumExp<V> total(arena, a, unit.rows);
    Weights<V> readout(arena, a, unit.rows);
    if (!memory) return arena.used();
    total.begin(unit, scratch);
    stream(a, unit, scratch, total);
    readout.begin(unit, total.softmax, offsets, weights);
    stream(a, unit, scratch, readout);
    return arena.used();
  });
}

}  // namespace
}  // namespace attnrec::cpu
