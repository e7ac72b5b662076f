// The streaming softmax: one loop over a unit's rows and events that every op shares. It packs events,
// computes tiles of scores, and hands each tile to a readout (the weighted value, the log-sum-exp, the
// weights, the heaviest, ...).
//
// One order of summation, whatever else is in the batch: a score is summed over d, events come in tiles of
// kKeys, a tile's sum is a chain in event order, and tiles are added in their order. Rows share loads, never
// arithmetic, so that a row's bits do not depend on its neighbours (the contract's batch invariance).
#pragma once

#include "cpu/tiles-inl.h"

namespace attnrec::cpu {
namespace {

// How many of its user's events a row sees, of those up to the unit's last.
inline int64_t seen_events(const Attention& a, const Unit& unit, int row) {
  const int64_t events = least(a.events(unit.user), unit.last_event);
  return a.visible ? least(events, a.visible[unit.candidate(row)]) : events;
}

// Events packed at once. What is packed for more rows than a block should stay in L2 (256 KiB for keys and
// values); for a single block of rows there is nothing to reuse, so a tile at a time in L1.
template <class V, class Products>
int packed_events(int rows, int head_dim) {
  if (rows <= Products::kRows) return kKeys;
  const int64_t fit = 262144 / (2 * head_dim * static_cast<int64_t>(sizeof(typename V::Real)));
  return static_cast<int>(fit >= 1024 ? 1024 : fit <= kKeys ? kKeys : fit / kKeys * kKeys);
}

// The p-th part of a unit of several heads.
inline Unit part_of(const Attention& a, const Unit& unit, int p) {
  Unit part = unit;
  part.head += p * unit.group;
  part.kv_head = part.head / (a.heads / a.kv_heads);
  return part;
}

// A tile of scores as the readout gets it: row r of the block (row `first_row + r` of the unit) sees seen[r]
// of the events first_event … + kKeys; scores[r * kKeys + i] is (scale · q·k + bias) · units, and -inf where
// hidden, up to the next whole register after seen[r]. The readout may overwrite the scores.
template <class V>
struct Tile {
  int first_row, rows;
  int64_t first_event;  // counted within the user's history
  int packed_event;     // first_event within what is packed now
  const int* seen;
  typename V::Real* scores;
};

template <class V, class Products = Numbers<V>>
struct StreamScratch {
  int span;  // events packed at once, a multiple of kKeys
  typename Products::Item *panels, *rows;
  typename V::Real *bias, *scores;

  StreamScratch(Arena& arena, int packed, int head_dim)
      : span(packed),
        panels(arena.take<typename Products::Item>(static_cast<int64_t>(span) * Products::depth(head_dim))),
        rows(arena.take<typename Products::Item>(Products::items(Products::depth(head_dim)))),
        bias(arena.take<typename V::Real>(span)),
        scores(arena.take<typename V::Real>(Products::kRows * kKeys)) {}
};

// The biases of n events from row `first` on for a head, in the unit of scores. Returns whether one hides its
// event: packing goes around hidden events one by one, which cost a quarter of a call with one candidate a
// user.
template <class V>
bool load_bias(const Attention& a, int64_t first, int n, int head, typename V::Real* to) {
  using Real = typename V::Real;
  const int64_t at = first * a.bias_row_stride + head * a.bias_head_stride;
  if (a.bias_element == Element::kFloat32) {
    const float* from = static_cast<const float*>(a.key_bias) + at;
    for (int i = 0; i < n; i++, from += a.bias_row_stride) to[i] = *from;
  } else {
    for (int i = 0; i < n; i++)
      to[i] = load_element<Real>(a.key_bias, at + i * a.bias_row_stride, a.bias_element);
  }
  for (int i = n; i % V::kWidth; i++) to[i] = 0;
  const typename V::Reg units = V::set1(static_cast<Real>(a.units));
  typename V::Reg highest = V::zero();
  for (int i = 0; i < n; i += V::kWidth) {
    const typename V::Reg bias = V::mul(V::load(to + i), units);
    V::store(to + i, bias);
    highest = V::max(V::sub(V::zero(), bias), highest);
  }
  return V::maximum(highest) == std::numeric_limits<Real>::infinity();
}

// Whether a readout takes scores as they leave the product's registers, before they are a tile.
template <class Readout>
constexpr bool takes_registers() {
  if constexpr (requires { Readout::kTakesRegisters; }) return Readout::kTakesRegisters;
  return false;
}

// Runs one unit. `readout.pack(first_event, n, hide)` prepares whatever else the readout needs of the packed
// events (values), `readout.tile(Tile)` reads a tile of scores out. A readout that takes registers gets the
// scores before, by `readout.take(Tile, r, event, one or two registers of scores)`, those of hidden events
// among them, and then a tile without scores. With a key_bias a unit holds one head only.
template <class V, class Products, class Readout>
void stream(const Attention& a, const Unit& unit, const StreamScratch<V, Products>& scratch, Readout& readout,
            const Ahead& ahead = {}) {
  using Real = typename V::Real;
  constexpr int W = V::kWidth;
  const int D = a.head_dim, span = scratch.span;
  const int64_t event0 = a.kv_offsets[unit.user];
  const Real factor = static_cast<Real>(a.scale * a.units);
  int64_t longest = 0;
  for (int r = 0; r < unit.rows; r += unit.group) longest = greatest(longest, seen_events(a, unit, r));

  for (int64_t packed = unit.first_event; packed < longest; packed += span) {
    const int n = static_cast<int>(least(span, longest - packed));
    const Real *bias = a.key_bias ? scratch.bias : nullptr, *hide = nullptr;
    if (bias && load_bias<V>(a, event0 + packed, n, unit.head, scratch.bias)) hide = bias;
    Products::pack_keys(a.key.at(event0 + packed, unit.kv_head, a.element), a.element, a.key.row_stride, n, D,
                        hide, scratch.panels, ahead);
    readout.pack(packed, n, hide);

    for (int row = 0; row < unit.rows; row += Products::kRows) {
      const int rows = static_cast<int>(least(Products::kRows, unit.rows - row));
      int left[Products::kRows] = {}, most = 0;  // of the packed events, how many each row sees
      for (int r = 0; r < rows; r++) {
        left[r] = static_cast<int>(greatest(0, least(n, seen_events(a, unit, row + r) - packed)));
        most = left[r] > most ? left[r] : most;
      }
      load_block<V, Products>(
          rows,
          [&](int r) { return a.query.at(unit.candidate(row + r), unit.query_head(row + r), a.element); },
          a.element, D, factor, scratch.rows);
      for (int begin = 0; begin < most; begin += kKeys) {
        int seen[Products::kRows];
        for (int r = 0; r < Products::kRows; r++) {  // a constant number, so that it is one step of vectors
          const int here = left[r] - begin < kKeys ? left[r] - begin : kKeys;
          seen[r] = here > 0 ? here : 0;
        }
        const int count = static_cast<int>(least(kKeys, most - begin));
        const auto* panels = scratch.panels + static_cast<int64_t>(begin) * Products::depth(D);
        const int registers = (count + W - 1) / W;
        const Real* tile_bias = bias ? bias + begin : nullptr;
        const Tile<V> tile{row, rows, packed + begin, begin, seen, scratch.scores};
        if constexpr (takes_registers<Readout>()) {
          // What all rows see takes no questions.
          int fewest = seen[0];
          for (int r = 1; r < rows; r++) fewest = seen[r] < fewest ? seen[r] : fewest;
          const int whole = fewest / (2 * W) * 2;
          Products::scores(rows, scratch.rows, panels, whole, D, factor, tile_bias, scratch.scores,
                           [&](int r, int event, auto... scores)
                               ATTNREC_LAMBDA { readout.take(tile, r, event, scores...); });
          const int first = whole * W;
          Products::scores(rows, scratch.rows, panels + static_cast<int64_t>(first) * Products::depth(D),
                           registers - whole, D, factor, tile_bias ? tile_bias + first : nullptr,
                           scratch.scores + first, [&](int r, int event, auto... scores) ATTNREC_LAMBDA {
                             int left = seen[r] - first - event;
                             if (left <= 0) return;
                             const auto hide = [&](typename V::Reg& s) ATTNREC_LAMBDA {
                               s = V::first(s, left, -std::numeric_limits<float>::infinity());
                               left -= W;
                             };
                             (hide(scores), ...);
                             readout.take(tile, r, first + event, scores...);
                           });
        } else {
          Products::scores(rows, scratch.rows, panels, registers, D, factor, tile_bias, scratch.scores);
          for (int r = 0; r < rows; r++) {
            const int tail = seen[r] / W * W;
            if (tail == seen[r]) continue;
            Real* s = scratch.scores + r * kKeys + tail;
            V::store(s, V::first(V::load(s), seen[r] - tail, -std::numeric_limits<float>::infinity()));
          }
        }
        readout.tile(tile);
      }
    }
  }
}

// e^x for x <= 0. x times log2(e) is rounded, which at x = -8 is an error of 2.4e-7 of the result: what the
// rounding lost is put back. (Where a tier has no fused product nothing is seen to be lost.)
template <class V>
ATTNREC_INLINE typename V::Reg exp_of(typename V::Reg x) {
  using Real = typename V::Real;
  const typename V::Reg kept = V::max(V::set1(-1000), x);  // -inf would become NaN; 0 either way
  const typename V::Reg minus = V::mul(kept, V::set1(static_cast<Real>(-kLog2E)));
  const typename V::Reg lost = V::fma(kept, V::set1(static_cast<Real>(kLog2E)), minus);
  const typename V::Reg power = V::exp2(V::sub(V::zero(), minus));
  return V::fma(power, V::mul(lost, V::set1(static_cast<Real>(kLn2))), power);
}

template <class V>
typename V::Real exp2_of(typename V::Real x) {
  typename V::Real lanes[V::kWidth];
  V::store(lanes, V::exp2(V::set1(x)));
  return lanes[0];
}

// What exponentials are taken relative to. `kRunningMaximum` is safe for any score. `kNothing` saves finding
// the maximum and rescaling what was summed (7 to 16 % of a bf16 forward pass), and serves a row whose sum
// stays `in_range`.
enum class Base { kRunningMaximum, kNothing };

// The maximum and sum of each row's softmax so far. `lanes` holds the sum in V::kWidth parts. Scores come in
// base 2, or with kNatural as they are: a multiplication more, but a maximum that is a result's own number,
// so that what is later taken from it cancels exactly. With kShort exponentials are exact to 3e-6 only.
template <class V, bool kNatural = false, Base kBase = Base::kRunningMaximum, bool kShort = false>
struct RunningSoftmax {
  using Real = typename V::Real;
  static constexpr int W = V::kWidth;
  Real *maximum, *lanes;

  RunningSoftmax(Arena& arena, int rows)
      : maximum(arena.take<Real>(rows)), lanes(arena.take<Real>(static_cast<int64_t>(rows) * W)) {}

  // The rows from `row` on.
  RunningSoftmax from(int64_t row) const {
    RunningSoftmax rows = *this;
    rows.maximum += row;
    rows.lanes += row * W;
    return rows;
  }
  void clear(int rows) {
    const Real nothing = -std::numeric_limits<Real>::infinity();
    for (int r = 0; r < rows; r++) start(r, kBase == Base::kNothing ? 0 : nothing, 0);
  }
  void start(int row, Real highest, Real weight) {
    V::store(lanes + static_cast<int64_t>(row) * W, V::first(V::set1(weight), 1, 0));
    maximum[row] = highest;
  }
  // Starts n <= W rows, from `row` on, from a score each, that of the self slot, and puts what its value is
  // to be multiplied by in the score's place.
  void start_from(int row, int n, Real* scores) {
    if constexpr (kBase == Base::kNothing) {
      V::store(scores, power(V::load(scores)));
      for (int i = 0; i < n; i++) start(row + i, 0, scores[i]);
      return;
    }
    for (int i = 0; i < n; i++) {
      const Real score = scores[i];
      // 0 where the score is -inf, else 1, but NaN where it is: no event may come to bring it in.
      scores[i] = score == -std::numeric_limits<Real>::infinity() ? 0 : score - score + 1;
      start(row + i, score, scores[i]);
    }
  }
  ATTNREC_INLINE typename V::Reg power(typename V::Reg x) {
    if constexpr (kShort) {
      return V::exp2_short(kNatural ? V::mul(x, V::set1(static_cast<Real>(kLog2E))) : x);
    } else if constexpr (kNatural) {
      return exp_of<V>(x);
    } else {
      return V::exp2(x);
    }
  }
  // Takes in the maximum of seen >= 1 scores. Returns the factor by which all that was summed before has to
  // be multiplied; 1 where the maximum stayed.
  ATTNREC_INLINE Real raise(RunningSoftmax& self, int row, int seen, const Real* scores) {
    if constexpr (kBase == Base::kNothing) return 1;
    typename V::Reg top = V::load(scores);
    for (int i = W; i < seen; i += W) top = V::max(top, V::load(scores + i));
    const Real before = self.maximum[row];
    if (!V::above(top, before)) return 1;
    const Real highest = V::maximum(top);
    self.maximum[row] = highest;
    Real factor[W];
    V::store(factor, power(V::set1(before - highest)));
    Real* sum = self.lanes + static_cast<int64_t>(row) * W;
    V::store(sum, V::mul(V::load(sum), V::set1(factor[0])));
    return factor[0];
  }
  // Hands registers of exponentials to sink(powers ...) and adds them to a row's sum, one after the other.
  template <class Sink, class... Registers>
  ATTNREC_INLINE typename V::Reg add_powers(typename V::Reg total, Sink&& sink, Registers... powers) {
    sink(powers...);
    ((total = V::add(total, powers)), ...);
    return total;
  }
  // Adds up exp2(score - maximum) of `seen` scores, and hands their registers to sink(i, powers ...): two at
  // a time, the last one alone where their number is odd.
  template <class Sink>
  ATTNREC_INLINE void add(RunningSoftmax& self, int row, int seen, const Real* scores, Sink&& sink) {
    Real* sum = self.lanes + static_cast<int64_t>(row) * W;
    typename V::Reg total = V::load(sum);
    const typename V::Reg base = V::set1(self.base(row));
    const auto power_at = [&](int i) ATTNREC_LAMBDA {
      const typename V::Reg score = V::load(scores + i);
      return power(kBase == Base::kNothing ? score : V::sub(score, base));
    };
    int i = 0;
    const auto keep = [&](auto... powers) ATTNREC_LAMBDA { sink(i, powers...); };
    for (; i + W < seen; i += 2 * W) total = add_powers(total, keep, power_at(i), power_at(i + W));
    if (i < seen) total = add_powers(total, keep, power_at(i));
    V::store(sum, total);
  }
  // Adds up exp2(score) of one or two registers of scores, and hands their registers to sink(powers ...).
  template <class Sink, class... Registers>
  ATTNREC_INLINE void add_registers(RunningSoftmax& self, int row, Sink&& sink, Registers... scores) {
    static_assert(kBase == Base::kNothing);
    Real* sum = self.lanes + static_cast<int64_t>(row) * W;
    V::store(sum, add_powers(V::load(sum), sink, power(scores)...));
  }
  // Takes in seen >= 1 scores and turns them into exp2(score - maximum). Returns `raise`'s factor.
  ATTNREC_INLINE Real step(RunningSoftmax& self, int row, int seen, Real* scores) {
    const Real rescale = raise(self, row, seen, scores);
    add(self, row, seen, scores,
        [&](int i, auto... powers) ATTNREC_LAMBDA { ((V::store(scores + i, powers), i += W), ...); });
    return rescale;
  }
  // The maximum, or 0 where all is hidden so far: exp2(-inf - 0) is 0, where -inf - -inf would be NaN.
  Real base(int row) const {
    return maximum[row] == -std::numeric_limits<Real>::infinity() ? 0 : maximum[row];
  }
  Real sum(int row) const { return V::sum(V::load(lanes + static_cast<int64_t>(row) * W)); }
  // Of a row's sum relative to nothing, whether weights, and their products with values of usual size,
  // neither overflowed nor vanished.
  static bool in_range(Real total) { return total > Real{1e-20f} && total < Real{1e20f}; }
  static Real inverse(Real total) { return total == 0 ? 0 : 1 / total; }
  // In nats; -inf for a row that has seen nothing. In double, so that it is rounded once: what is recomputed
  // from it, exp(s - lse), is off by that rounding.
  Real lse(int row, Real total) const {
    const double unit = kNatural ? 1 : kLn2;
    return static_cast<Real>(total == 0 ? -std::numeric_limits<double>::infinity()
                                        : maximum[row] * unit + std::log(static_cast<double>(total)));
  }
};

// The scores of n self slots, of rows from `first` on, in base 2 as a tile's scores are, in lanes yet to be
// added up.
template <class V>
ATTNREC_INLINE void self_score_lanes(const Attention& a, const Unit& unit, int first, int n,
                                     typename V::Reg* scores) {
  using Real = typename V::Real;
  const typename V::Reg factor = V::set1(static_cast<Real>(a.scale * a.units));
  with_element<V>(a.element, a.query.data, [&](auto* queries) __attribute__((always_inline)) {
    const auto* keys =
        static_cast<decltype(queries)>(a.self_key.data) + unit.kv_head * a.self_key.head_stride;
    for (int i = 0; i < n; i++) {
      const int64_t c = unit.candidate(first + i);
      const auto* query = queries + c * a.query.row_stride + unit.query_head(first + i) * a.query.head_stride;
      const auto* key = keys + c * a.self_key.row_stride;
      typename V::Reg sum = V::zero();
      for (int d = 0; d < a.head_dim; d += V::kWidth) {
        const int left = a.head_dim - d;
        sum = V::fma(V::mul(load_part<V>(query + d, left), factor), load_part<V>(key + d, left), sum);
      }
      scores[i] = sum;
    }
  });
}

template <class V>
typename V::Real self_score(const Attention& a, const Unit& unit, int r) {
  typename V::Reg score;
  self_score_lanes<V>(a, unit, r, 1, &score);
  return V::sum(score);
}

// The softmax of a unit's rows before their first event: nothing, or the self slot, of which
// take(row, weight) is told what its value is to be multiplied by.
template <class V, class Softmax, class Take>
void start_softmax(const Attention& a, const Unit& unit, Softmax& softmax, Take&& take) {
  if (!a.self_key.data) return softmax.clear(unit.rows);
  // A register of rows at a time: a row alone took a whole register's exponential and a sum over lanes.
  constexpr int W = V::kWidth;
  for (int first = 0; first < unit.rows; first += W) {
    const int n = static_cast<int>(least(W, unit.rows - first));
    typename V::Reg sums[W];
    for (int i = n; i < W; i++) sums[i] = V::zero();
    self_score_lanes<V>(a, unit, first, n, sums);
    typename V::Real weights[W];
    V::store(weights, V::sums(sums));
    softmax.start_from(first, n, weights);
    for (int i = 0; i < n; i++) take(first + i, weights[i]);
  }
}

}  // namespace
}  // namespace attnrec::cpu
