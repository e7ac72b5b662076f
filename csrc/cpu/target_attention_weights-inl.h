// target_attention_weights: two readouts of the streaming softmax, each a pass over the events. The first
// finds a row's maximum and sum, the second its weights; no scores are kept between them.
#pragma once

#include "cpu/streaming-inl.h"

namespace attnrec::cpu {
namespace {

template <class V>
struct LogSumExp {
  using Real = typename V::Real;

  LogSumExp(Arena& arena, const Attention& attention, int rows) : a(attention), softmax(arena, rows) {}

  void begin(const Unit& unit) {
    start_softmax<V>(a, unit, softmax, [](int, Real) {});
  }
  void pack(int64_t, int, const Real*) {}
  void tile(const Tile<V>& t) {
    for (int r = 0; r < t.rows; r++) {
      if (t.seen[r] == 0) continue;
      softmax.raise(softmax, t.first_row + r, t.seen[r], t.scores + r * kKeys);
      softmax.add(softmax, t.first_row + r, t.seen[r], t.scores + r * kKeys, [](int, auto...) {});
    }
  }

  // What it keeps of the rows from `row` on.
  LogSumExp from(int64_t row) const {
    LogSumExp rows = *this;
    rows.softmax = softmax.from(row);
    return rows;
  }

  const Attention& a;
  RunningSoftmax<V> softmax;
};

// The weights of a tile of events, in all heads of a unit's candidates. The result, [pair, heads], has the
// heads innermost: written head by head, every line of it went to memory and back once a head (8 users, 4
// heads, 256 candidates, 200 events, two threads: 4.0 ms against 2.9).
template <class V>
struct Weights {
  using Real = typename V::Real;

  Weights(Arena& arena, const Attention& attention, const Unit& u)
      : a(attention),
        unit(u),
        rows(int64_t{u.rows} * u.parts),
        base(arena.take<Real>(rows)),
        inverse(arena.take<Real>(rows)),
        tiles(arena.take<Real>(rows * kKeys)) {}

  // Takes the softmax of a part's rows, which stand from `row` on.
  void take(const RunningSoftmax<V>& softmax, int64_t row) {
    for (int r = 0; r < unit.rows; r++) {
      base[row + r] = softmax.base(r);
      inverse[row + r] = softmax.inverse(softmax.sum(r));
    }
  }
  // The tile from `event` on, of the part whose rows stand from `row` on.
  void begin(const Unit& part, int64_t row, int64_t event) {
    part_row = row;
    for (int r = 0; r < unit.rows; r++) {
      if (seen_events(a, part, r) >= event + kKeys) continue;
      Real* to = tiles + (row + r) * kKeys;
      for (int i = 0; i < kKeys; i += V::kWidth) V::store(to + i, V::zero());
    }
  }
  void pack(int64_t, int, const Real*) {}
  void tile(const Tile<V>& t) {
    for (int r = 0; r < t.rows; r++) {
      const int64_t row = part_row + t.first_row + r;
      const typename V::Reg start = V::set1(base[row]), factor = V::set1(inverse[row]);
      for (int i = 0; i < t.seen[r]; i += V::kWidth) {
        const typename V::Reg p = V::mul(V::exp2(V::sub(V::load(t.scores + r * kKeys + i), start)), factor);
        V::store(tiles + row * kKeys + i, V::first(p, t.seen[r] - i, 0));
      }
    }
  }
  // Writes the tile from `event` on: the pairs of user b begin at offsets[b], candidate by candidate, event
  // by event.
  void write(int64_t event, const int64_t* offsets, void* weights) const {
    const int64_t room = a.room(unit.user), first = unit.first - a.q_offsets[unit.user];
    const int n = static_cast<int>(least(kKeys, room - event));
    with_element<V>(a.element, weights, [&](auto* typed) __attribute__((always_inline)) {
      using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
      for (int c = 0; c < unit.rows / unit.group; c++) {
        const int64_t pair = offsets[unit.user] + (first + c) * room + event;
        Stored* to = const_cast<Stored*>(typed) + pair * a.heads;
        if (!write_zipped_if<1, 2, 4, 8, 16>(c, n, to)) write_head_by_head(c, n, to);
      }
    });
  }

  // A tile's weights of the c-th candidate in a head.
  const Real* of_head(int c, int head) const {
    return tiles + (int64_t{head / unit.group} * unit.rows + c * unit.group + head % unit.group) * kKeys;
  }
  // Where there are as many heads as one of kSome.
  template <int... kSome, class Stored>
  bool write_zipped_if(int c, int n, Stored* to) const {
    return ((a.heads == kSome && (write_zipped<kSome>(c, n, to), true)) || ...);
  }
  // n events in kHeads heads, the heads innermost, by log2(kHeads) steps of zipping. Element by element it
  // took half of the op's time.
  template <int kHeads, class Stored>
  void write_zipped(int c, int n, Stored* to) const {
    for (int i = 0; i < n; i += V::kWidth, to += V::kWidth * kHeads) {
      typename V::Reg r[kHeads];
      for (int head = 0; head < kHeads; head++) r[head] = V::load(of_head(c, head) + i);
      for (int step = 1; step < kHeads; step *= 2) {
        typename V::Reg zipped[kHeads];
        for (int j = 0; j < kHeads / 2; j++) {
          zipped[2 * j] = r[j];
          zipped[2 * j + 1] = r[j + kHeads / 2];
          V::zip(zipped[2 * j], zipped[2 * j + 1]);
        }
        for (int j = 0; j < kHeads; j++) r[j] = zipped[j];
      }
      const bool whole = i + V::kWidth <= n;
      Stored part[V::kWidth * kHeads], *there = whole ? to : part;
      for (int j = 0; j < kHeads; j++) V::store(there + j * V::kWidth, r[j]);
      if (!whole) std::memcpy(to, part, static_cast<size_t>((n - i) * kHeads) * sizeof(Stored));
    }
  }
  template <class Stored>
  void write_head_by_head(int c, int n, Stored* to) const {
    for (int head = 0; head < a.heads; head++) {
      for (int i = 0; i < n; i += V::kWidth) {
        Stored part[V::kWidth];
        V::store(part, V::load(of_head(c, head) + i));
        const int lanes = static_cast<int>(least(V::kWidth, n - i));
        for (int lane = 0; lane < lanes; lane++) to[int64_t{i + lane} * a.heads + head] = part[lane];
      }
    }
  }

  const Attention& a;
  const Unit unit;
  const int64_t rows;
  Real *base, *inverse;  // weight = exp2(score - base) * inverse
  Real* tiles;           // [rows, kKeys]
  int64_t part_row = 0;
};

// The unit is of all heads, in parts as target_attention's.
template <class V>
int64_t target_attention_weights_unit(const Attention& a, const Unit& unit, void* memory,
                                      const int64_t* offsets, void* weights) {
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    Arena arena(memory);
    StreamScratch<V, Products> scratch(arena, packed_events<V, Products>(unit.rows, a.head_dim), a.head_dim);
    LogSumExp<V> total(arena, a, unit.rows * unit.parts);
    Weights<V> readout(arena, a, unit);
    if (!memory) return arena.used();
    for (int p = 0; p < unit.parts; p++) {
      const Unit part = part_of(a, unit, p);
      LogSumExp<V> of_part = total.from(int64_t{p} * unit.rows);
      of_part.begin(part);
      stream(a, part, scratch, of_part);
      readout.take(of_part.softmax, int64_t{p} * unit.rows);
    }
    for (int64_t event = 0; event < a.room(unit.user); event += kKeys) {
      for (int p = 0; p < unit.parts; p++) {
        Unit part = part_of(a, unit, p);
        readout.begin(part, int64_t{p} * unit.rows, event);
        part.first_event = event;
        part.last_event = event + kKeys;
        stream(a, part, scratch, readout);
      }
      readout.write(event, offsets, weights);
    }
    return arena.used();
  });
}

}  // namespace
}  // namespace attnrec::cpu
