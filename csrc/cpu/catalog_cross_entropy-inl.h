// catalog_cross_entropy: readouts of the streaming softmax with users as rows and the item table as events. A
// unit is some rows against one chunk of the table; what the chunks find is added up in their order.
//
// Forward 2·T·N·D operations (a multiplication and an addition each count), backward 6: the scores again,
// once, and from them both gradients. To take the users' gradient from the forward pass, as attention's
// output, would save nothing: the table's needs the scores again either way. The floor is 8.
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

// The softmax over a unit's events, its target's logit and the sum of its logits. Scores are in nats, so that
// the maximum is a result's own number (see RunningSoftmax).
template <class V, class Products>
struct CrossEntropyReadout {
  using Real = typename V::Real;
  using Softmax = RunningSoftmax<V, true, Base::kRunningMaximum, Products::kShortExp>;
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
      softmax.raise(softmax, row, t.seen[r], z);
      softmax.add(softmax, row, t.seen[r], z, [](int, auto...) ATTNREC_LAMBDA {});
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
  Softmax softmax;
  Real* totals = nullptr;
};

template <class V>
int64_t catalog_cross_entropy_unit(const Attention& a, const Unit& unit, void* memory,
                                   const CrossEntropyRows& rows, const CrossEntropyParts& parts) {
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    Arena arena(memory);
    StreamScratch<V, Products> scratch(arena, packed_events<V, Products>(unit.rows, a.head_dim), a.head_dim);
    CrossEntropyReadout<V, Products> readout(arena, unit, rows, parts);
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
template <class V, class Products>
struct CrossEntropyGradientReadout {
  using Real = typename V::Real;
  static constexpr int W = V::kWidth;
  // Rows whose d are held before they are multiplied into the table's: its sums move so much less often.
  static constexpr int kHeldRows = kRowsHeld / Products::kRows * Products::kRows;

  CrossEntropyGradientReadout(Arena& arena, const Attention& attention, const Unit& u, int span,
                              const CrossEntropyRows& of_rows, const CrossEntropyGradient& to)
      : a(attention),
        unit(u),
        rows(of_rows),
        gradient(to),
        width(padded<V>(attention.head_dim)),
        items(arena, to.users ? span : 0, attention.head_dim) {
    held = arena.take<Real>(int64_t{kHeldRows} * span);
    if (to.table) {
      user_rows = arena.take<Real>(int64_t{kHeldRows} * width);
      item_sums = arena.take<Real>(static_cast<int64_t>(span) * width);
    }
    if (to.bias) bias_sums = arena.take<Real>(span);
  }

  void begin() {
    if (gradient.users) clear(user_sums(0), unit.rows * gradient.users_row_stride);
  }

  void pack(int64_t first_event, int n, const Real* hidden) {
    packed = n;
    first_packed = first_event;
    hide = hidden;
    if (gradient.users) {
      items.pack(a.key.at(a.kv_offsets[unit.user] + first_event, unit.kv_head, a.element), a.element,
                 a.key.row_stride, n, a.head_dim, hide, false);
    }
    if (gradient.table) clear(item_sums, static_cast<int64_t>(n) * width);
    if (gradient.bias) clear(bias_sums, n);
  }

  void tile(const Tile<V>& t) {
    hide_hits<V>(rows, unit, t);
    const int held_row = t.first_row % kHeldRows;
    Real* d = held + int64_t{t.packed_event} * kHeldRows + int64_t{held_row} * kKeys;
    for (int r = 0; r < t.rows; r++) score_gradient(t, r, d);
    if (gradient.users) {
      items.accumulate_seen(t.rows, t.seen, d, t.packed_event, user_sums(t.first_row),
                            gradient.users_row_stride);
    }
    for (int i = 0; gradient.bias && i < t.seen[0]; i += W) {
      Real* sum = bias_sums + t.packed_event + i;
      typename V::Reg total = V::zero();
      for (int r = 0; r < t.rows; r++) total = V::add(total, V::load(d + r * kKeys + i));
      V::store(sum, V::add(V::load(sum), total));
    }
    if (gradient.table) Products::prepare(d, t.rows, kKeys);
    const bool all_rows = t.first_row + t.rows == unit.rows;
    if (t.packed_event + t.seen[0] < packed || !(all_rows || held_row + t.rows == kHeldRows)) return;
    if (gradient.table) add_to_items(t.first_row - held_row, held_row + t.rows);
    if (all_rows) finish_items();
  }

  // To row r of the tile's `d`, times 1 / temperature, which users and table need; the bias gets it back at
  // the end.
  void score_gradient(const Tile<V>& t, int r, Real* d) {
    const Real* z = t.scores + r * kKeys;
    Real* to = d + r * kKeys;
    const int64_t row = unit.first + t.first_row + r;
    const double grad = gradient.grad[row] * a.scale;
    const Real lse = static_cast<Real>(gradient.lse[row]);
    const typename V::Reg factor = V::set1(static_cast<Real>(grad));
    const typename V::Reg even =
        V::set1(static_cast<Real>(-grad * gradient.smoothing / static_cast<double>(gradient.classes)));
    for (int i = 0; i < t.seen[r]; i += W) {
      const typename V::Reg of_score = V::fma(weight(V::load(z + i), lse), factor, even);
      V::store(to + i, of_score);
      items.keep(r, i, d, of_score);
    }
    const int64_t target = target_in_tile<V>(rows, unit, t, r);
    if (target < 0) return;
    // p - 1 before the factor, as it cancels.
    const double p = std::exp(z[target] - gradient.lse[row]);
    to[target] = static_cast<Real>(
        grad * (p - (1 - gradient.smoothing) - gradient.smoothing / static_cast<double>(gradient.classes)));
    const int i = static_cast<int>(target) / W * W;
    items.keep(r, i, d, V::load(to + i));
  }

  static ATTNREC_MEMBER typename V::Reg weight(typename V::Reg z, Real lse) {
    if constexpr (Products::kShortExp) {
      return V::exp2_short(
          V::fma(z, V::set1(static_cast<Real>(kLog2E)), V::set1(static_cast<Real>(-kLog2E * lse))));
    } else {
      return exp_of<V>(V::sub(z, V::set1(lse)));
    }
  }

  // Held rows, `count` from the unit's row `first` on, to the sums of the packed items.
  void add_to_items(int first, int count) {
    for (int r = 0; r < count; r++) {
      load_row<V>(a.query.at(unit.candidate(first + r), 0, a.element), a.element, a.head_dim, 1,
                  user_rows + static_cast<int64_t>(r) * width);
    }
    Products::prepare(user_rows, count, width);
    for (int begin = 0; begin < packed; begin += kKeys) {
      const Real* d = held + int64_t{begin} * kHeldRows;
      const int events = static_cast<int>(least(kKeys, packed - begin));
      for (int i = 0; i < events; i += Products::kRows) {
        Products::template sum_rows<true>(static_cast<int>(least(Products::kRows, events - i)), d + i,
                                          user_rows, 0, count, width, item_sums + int64_t{begin + i} * width);
      }
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
        clear(sum, width);
      } else if (gradient.table_so_far) {
        const Real* so_far = static_cast<const Real*>(gradient.table_so_far) + place;
        for (int d = 0; d < width; d += W) {
          V::store(sum + d, V::add(load_part<V>(so_far + d, a.head_dim - d), V::load(sum + d)));
        }
      }
      store_row<V>(sum, 1, a.head_dim, gradient.table_element,
                   static_cast<char*>(gradient.table) + place * element_bytes(gradient.table_element));
    }
  }

  static void clear(Real* p, int64_t n) {
    for (int64_t i = 0; i < n; i += W) V::store(p + i, V::zero());
  }
  Real* user_sums(int64_t row) const {
    return static_cast<Real*>(gradient.users) + row * gradient.users_row_stride;
  }

  const Attention& a;
  const Unit& unit;
  const CrossEntropyRows& rows;
  const CrossEntropyGradient& gradient;
  const int width;
  typename Products::Values items;  // of the packed ones
  int packed = 0;
  int64_t first_packed = 0;
  // d of the held rows as [tile][row][kKeys], prepared for the product; the rows themselves; sums of the
  // packed items.
  Real *held = nullptr, *user_rows = nullptr, *item_sums = nullptr, *bias_sums = nullptr;
  const Real* hide = nullptr;
};

template <class V>
int64_t catalog_cross_entropy_backward_unit(const Attention& a, const Unit& unit, void* memory,
                                            const CrossEntropyRows& rows,
                                            const CrossEntropyGradient& gradient) {
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    const int span = packed_events<V, Products>(unit.rows, a.head_dim);
    Arena arena(memory);
    StreamScratch<V, Products> scratch(arena, span, a.head_dim);
    CrossEntropyGradientReadout<V, Products> readout(arena, a, unit, span, rows, gradient);
    if (!memory) return arena.used();
    readout.begin();
    stream(a, unit, scratch, readout);
    return arena.used();
  });
}

}  // namespace
}  // namespace attnrec::cpu
