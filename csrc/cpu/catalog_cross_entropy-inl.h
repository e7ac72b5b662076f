// catalog_cross_entropy: readouts of the streaming softmax with users as rows and the item table as events. A
// unit is some rows against one chunk of the table; what the chunks find is added up in their order.
//
// Forward 2·T·N·D operations (a multiplication and an addition each count), backward 6: the scores again,
// once, and from them both gradients. The floor is 8.
#pragma once

#include "cpu/catalog_cross_entropy.h"
#include "cpu/hidden_events-inl.h"
#include "cpu/streaming-inl.h"

namespace attnrec::cpu {
namespace {

template <class V>
void hide_hits(const CrossEntropyRows& rows, const Unit& unit, const Tile<V>& t) {
  if (!rows.hits) return;
  for (int r = 0; r < t.rows; r++) {
    const int64_t row = unit.first + t.first_row + r;
    hide_listed(rows.hits + rows.hit_begin[row], rows.hits + rows.hit_end[row], t.first_event, t.seen[r],
                t.scores + r * kKeys);
  }
}

// The place of row r's target within the tile, or -1.
template <class V>
ATTNREC_INLINE int64_t target_in_tile(const CrossEntropyRows& rows, const Unit& unit, const Tile<V>& t,
                                      int r) {
  if (!rows.target) return -1;
  const int64_t place = rows.target[unit.first + t.first_row + r] - t.first_event;
  return place >= 0 && place < t.seen[r] ? place : -1;
}

// The softmax over a unit's events, its target's logit and the sum of its logits.
template <class V>
struct CrossEntropyReadout {
  using Real = typename V::Real;
  static constexpr int W = V::kWidth;

  CrossEntropyReadout(Arena& arena, const Unit& u, const CrossEntropyRows& of_rows,
                      const CrossEntropyParts& to)
      : unit(u), rows(of_rows), parts(to), softmax(arena, u.rows) {
    if (to.total) totals = arena.take<Real>(static_cast<int64_t>(u.rows) * W);
  }

  void begin() {
    softmax.clear(unit.rows);
    for (int r = 0; totals && r < unit.rows; r++) V::store(totals + static_cast<int64_t>(r) * W, V::zero());
  }

  void pack(int64_t, int, const Real*) {}

  void tile(const Tile<V>& t) {
    hide_hits<V>(rows, unit, t);
    for (int r = 0; r < t.rows; r++) {
      Real* z = t.scores + r * kKeys;
      const int row = t.first_row + r;
      const int64_t target = target_in_tile<V>(rows, unit, t, r);
      if (target >= 0) parts.target_logit[row] = z[target];
      if (totals) {
        Real* total = totals + static_cast<int64_t>(row) * W;
        typename V::Reg sum = V::load(total);
        for (int i = 0; i < t.seen[r]; i += W) sum = V::add(sum, V::first(V::load(z + i), t.seen[r] - i, 0));
        V::store(total, sum);
      }
      softmax.step(softmax, row, t.seen[r], z);
    }
  }

  void finish() {
    for (int r = 0; r < unit.rows; r++) {
      parts.maximum[r] = softmax.maximum[r];
      parts.sum[r] = softmax.sum(r);
      if (totals) parts.total[r] = V::sum(V::load(totals + static_cast<int64_t>(r) * W));
    }
  }

  const Unit& unit;
  const CrossEntropyRows& rows;
  const CrossEntropyParts& parts;
  RunningSoftmax<V, true> softmax;
  Real* totals = nullptr;
};

template <class V>
int64_t catalog_cross_entropy_unit(const Attention& a, const Unit& unit, void* memory,
                                   const CrossEntropyRows& rows, const CrossEntropyParts& parts) {
  return with_products<V>(a.element, [&](auto products) {
    Arena arena(memory);
    StreamScratch<V, decltype(products)> scratch(arena, packed_events<V>(unit.rows, a.head_dim), a.head_dim);
    CrossEntropyReadout<V> readout(arena, unit, rows, parts);
    if (!memory) return arena.used();
    readout.begin();
    stream(a, unit, scratch, readout);
    readout.finish();
    return arena.used();
  });
}

// Logits of rows first … first + n for one item each, `items` having a row for each row: the targets, with
// negatives.
template <class V>
void catalog_cross_entropy_target_logits(const Attention& a, const Vectors& items, const double* bias,
                                         int64_t first, int64_t n, void* memory, double* logits) {
  using Real = typename V::Real;
  const int width = padded<V>(a.head_dim);
  Real* user = static_cast<Real*>(memory);
  Real* item = user + width;
  for (int64_t r = first; r < first + n; r++) {
    load_row<V>(a.query.at(r, 0, a.element), a.element, a.head_dim, static_cast<Real>(a.scale), user);
    load_row<V>(items.at(r, 0, a.element), a.element, a.head_dim, 1, item);
    logits[r - first] = dot<V>(user, item, width) + static_cast<Real>(bias[r]);
  }
}

// The gradient of the scores, d = grad · (softmax - target's share), and from it those of users, table and
// bias.
template <class V>
struct CrossEntropyGradientReadout {
  using Real = typename V::Real;
  static constexpr int W = V::kWidth;
  static constexpr int kRowBlocks =
      4;  // of rows between two additions to the table: its sums move a quarter as often
  static constexpr int kHeldRows = kRowBlocks * V::kRows;

  CrossEntropyGradientReadout(Arena& arena, const Attention& attention, const Unit& u, int span,
                              const CrossEntropyRows& of_rows, const CrossEntropyGradient& to)
      : a(attention), unit(u), rows(of_rows), gradient(to), width(padded<V>(attention.head_dim)) {
    stride = span + 16;  // not a power of two, or the rows would fight for the same lines of L1
    held = arena.take<Real>(static_cast<int64_t>(kHeldRows) * stride);
    if (to.users) copied = arena.take<Real>(static_cast<int64_t>(span) * width);
    if (to.table) {
      user_rows = arena.take<Real>(static_cast<int64_t>(kHeldRows) * width);
      item_sums = arena.take<Real>(static_cast<int64_t>(span) * width);
    }
    if (to.bias) bias_sums = arena.take<Real>(stride);
  }

  void begin() {
    if (!gradient.users) return;
    for (int r = 0; r < unit.rows; r++) {
      for (int d = 0; d < width; d += W) V::store(user_sums(r) + d, V::zero());
    }
  }

  void pack(int64_t first_event, int n, const Real* hidden) {
    packed = n;
    first_packed = first_event;
    hide = hidden;
    if (gradient.users) {
      items = event_rows<V>(a.key.at(a.kv_offsets[unit.user] + first_event, unit.kv_head, a.element),
                            a.element, a.key.row_stride, n, a.head_dim, hide, false, copied, &item_stride);
    }
    if (gradient.table) {
      for (int64_t i = 0; i < static_cast<int64_t>(n) * width; i += W) V::store(item_sums + i, V::zero());
    }
    if (gradient.bias) {
      for (int i = 0; i < n; i += W) V::store(bias_sums + i, V::zero());
    }
  }

  void tile(const Tile<V>& t) {
    hide_hits<V>(rows, unit, t);
    const int held_row = t.first_row % kHeldRows;
    Real* d = held + static_cast<int64_t>(held_row) * stride + t.packed_event;
    for (int r = 0; r < t.rows; r++) score_gradient(t, r, d + static_cast<int64_t>(r) * stride);
    if (gradient.users) {
      accumulate<V>(t.rows, d, stride, 1, items + t.packed_event * item_stride, item_stride, t.seen[0], width,
                    user_sums(t.first_row), gradient.users_row_stride);
    }
    const bool all_rows = t.first_row + t.rows == unit.rows;
    if (t.packed_event + t.seen[0] < packed || !(all_rows || held_row + t.rows == kHeldRows)) return;
    add_to_items(t.first_row - held_row, held_row + t.rows);
    if (all_rows) finish_items();
  }

  // To `d`, times 1 / temperature, which users and table need; the bias gets it back at the end.
  void score_gradient(const Tile<V>& t, int r, Real* d) {
    const Real* z = t.scores + r * kKeys;
    const int64_t row = unit.first + t.first_row + r;
    const double grad = gradient.grad[row] * a.scale;
    const typename V::Reg lse = V::set1(static_cast<Real>(gradient.lse[row]));
    const typename V::Reg factor = V::set1(static_cast<Real>(grad));
    const typename V::Reg even =
        V::set1(static_cast<Real>(-grad * gradient.smoothing / static_cast<double>(gradient.classes)));
    for (int i = 0; i < t.seen[r]; i += W) {
      const typename V::Reg p = exp_of<V>(V::sub(V::load(z + i), lse));
      V::store(d + i, V::fma(p, factor, even));
    }
    const int64_t target = target_in_tile<V>(rows, unit, t, r);
    if (target >= 0) {
      // p - 1 before the factor, as it cancels.
      const Real p = static_cast<Real>(std::exp(static_cast<double>(z[target]) - gradient.lse[row]));
      d[target] = static_cast<Real>(
          grad * (p - (1 - gradient.smoothing) - gradient.smoothing / static_cast<double>(gradient.classes)));
    }
  }

  // Held rows, `count` from the unit's row `first` on, to the sums of the packed items.
  void add_to_items(int first, int count) {
    for (int i = 0; gradient.bias && i < packed; i += W) {
      typename V::Reg sum = V::zero();
      for (int r = 0; r < count; r++) sum = V::add(sum, V::load(held + static_cast<int64_t>(r) * stride + i));
      V::store(bias_sums + i, V::add(V::load(bias_sums + i), sum));
    }
    if (!gradient.table) return;
    for (int r = 0; r < count; r++) {
      load_row<V>(a.query.at(unit.candidate(first + r), 0, a.element), a.element, a.head_dim, 1,
                  user_rows + static_cast<int64_t>(r) * width);
    }
    for (int i = 0; i < packed; i += V::kRows) {
      accumulate<V>(static_cast<int>(least(V::kRows, packed - i)), held + i, 1, stride, user_rows, width,
                    count, width, item_sums + static_cast<int64_t>(i) * width, width);
    }
  }

  void finish_items() {
    const int64_t first = a.kv_offsets[unit.user] + first_packed;
    for (int i = 0; gradient.bias && i < packed; i++) {
      static_cast<Real*>(gradient.bias)[first + i] += bias_sums[i] / static_cast<Real>(a.scale);
    }
    for (int i = 0; gradient.table && i < packed; i++) {
      Real* sum = item_sums + static_cast<int64_t>(i) * width;
      const int64_t place = (first + i) * a.head_dim;
      if (hide && hide[i] == -std::numeric_limits<Real>::infinity()) {
        for (int d = 0; d < width; d += W) V::store(sum + d, V::zero());
      } else if (gradient.table_so_far) {
        const Real* so_far = static_cast<const Real*>(gradient.table_so_far) + place;
        for (int d = 0; d < width; d += W) {
          V::store(sum + d, V::add(load_part<V>(so_far + d, a.head_dim - d), V::load(sum + d)));
        }
      }
      store_row<V>(sum, a.head_dim, gradient.table_element,
                   static_cast<char*>(gradient.table) + place * element_bytes(gradient.table_element));
    }
  }

  Real* user_sums(int64_t row) const {
    return static_cast<Real*>(gradient.users) + row * gradient.users_row_stride;
  }

  const Attention& a;
  const Unit& unit;
  const CrossEntropyRows& rows;
  const CrossEntropyGradient& gradient;
  const int width;
  int stride, packed = 0;
  int64_t first_packed = 0, item_stride = 0;
  Real *held = nullptr, *copied = nullptr, *user_rows = nullptr, *item_sums = nullptr, *bias_sums = nullptr;
  const Real *items = nullptr, *hide = nullptr;
};

template <class V>
int64_t catalog_cross_entropy_backward_unit(const Attention& a, const Unit& unit, void* memory,
                                            const CrossEntropyRows& rows,
                                            const CrossEntropyGradient& gradient) {
  const int span = packed_events<V>(unit.rows, a.head_dim);
  Arena arena(memory);
  StreamScratch<V> scratch(arena, span, a.head_dim);
  CrossEntropyGradientReadout<V> readout(arena, a, unit, span, rows, gradient);
  if (!memory) return arena.used();
  readout.begin();
  stream(a, unit, scratch, readout);
  return arena.used();
}

}  // namespace
}  // namespace attnrec::cpu
