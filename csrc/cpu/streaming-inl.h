// The streaming softmax: one loop over a unit's rows and events that every op shares. It packs events,
// computes tiles of scores, and hands each tile to a readout (the weighted value, the log-sum-exp, the
// weights, the heaviest, ...).
//
// One order of summation, whatever else is in the batch: a score is a chain of FMAs over d; events come in
// blocks of kKeys; a row's sums over events are chains in event order. Rows share loads, never arithmetic, so
// that a row's bits do not depend on its neighbours (the contract's batch invariance).
#pragma once

#include "cpu/tiers/prelude.h"

namespace attnrec::cpu {
namespace {

constexpr int kMostHeadDim = 256;
constexpr int kKeys = 128;  // events of a tile: rows x kKeys scores stay in L1
constexpr int kPrefetchEvents = 32;
constexpr int kChain = 64;  // products of a score in one chain

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Hands out pieces of a thread's scratch memory, each on a cache line of its own. With no memory it only
// counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

template <class V>
constexpr int padded(int head_dim) {
  return (head_dim + V::kWidth - 1) / V::kWidth * V::kWidth;
}

// Calls function(pointer of the stored type). Float64 is only ever seen by the double tier, float32 by the
// others.
template <class V, class Function>
ATTNREC_INLINE void with_element(Element element, const void* data, Function&& function) {
  if (element == Element::kBFloat16) {
    function(static_cast<const BFloat16*>(data));
  } else if (element == Element::kFloat16) {
    function(static_cast<const Half*>(data));
  } else {
    function(static_cast<const typename V::Real*>(data));
  }
}

template <class V, class Stored>
ATTNREC_INLINE typename V::Reg load_part(const Stored* p, int n) {
  if (n >= V::kWidth) return V::load(p);
  Stored part[V::kWidth] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  return V::load(part);
}

// One vector of D elements, converted, times `factor`, to `row`, which is padded with zeros to whole
// registers.
template <class V>
ATTNREC_INLINE void load_row(const void* data, Element element, int head_dim, typename V::Real factor,
                             typename V::Real* row) {
  with_element<V>(element, data, [&](auto* from) __attribute__((always_inline)) {
    for (int d = 0; d < head_dim; d += V::kWidth) {
      V::store(row + d, V::mul(load_part<V>(from + d, head_dim - d), V::set1(factor)));
    }
  });
}

template <class V>
ATTNREC_INLINE void store_row(const typename V::Real* row, int head_dim, Element element, void* data) {
  with_element<V>(element, data, [&](auto* typed) __attribute__((always_inline)) {
    auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>*>(typed);
    int d = 0;
    for (; d + V::kWidth <= head_dim; d += V::kWidth) V::store(to + d, V::load(row + d));
    if (d < head_dim) {
      std::remove_reference_t<decltype(*to)> part[V::kWidth];
      V::store(part, V::load(row + d));
      for (int i = 0; d + i < head_dim; i++) to[d + i] = part[i];
    }
  });
}

// Events 0 … n of `from` (row stride in elements) into panels of 2 registers of events: panel[d][event].
// Events from n to the end of the last panel, and those with hide[event] = -inf, become zeros: nothing of
// them is computed with.
template <class V>
void pack_panels(const void* data, Element element, int64_t stride, int n, int head_dim,
                 const typename V::Real* hide, typename V::Real* panels) {
  constexpr int W = V::kWidth;
  with_element<V>(element, data, [&](auto* from) __attribute__((always_inline)) {
    for (int event = 0; event < round_up(n, 2 * W); event += W) {
      typename V::Real* to =
          panels + static_cast<int64_t>(event / (2 * W)) * 2 * W * head_dim + event % (2 * W);
      for (int d = 0; d < head_dim; d += W) {
        typename V::Reg r[W];
        for (int i = 0; i < W; i++) __builtin_prefetch(from + (event + i + kPrefetchEvents) * stride + d);
        for (int i = 0; i < W; i++) {
          const bool seen =
              event + i < n && !(hide && hide[event + i] == -std::numeric_limits<float>::infinity());
          r[i] = seen ? load_part<V>(from + (event + i) * stride + d, head_dim - d) : V::zero();
        }
        V::transpose(r);
        for (int i = 0; i < W && d + i < head_dim; i++) V::store(to + (d + i) * 2 * W, r[i]);
      }
    }
  });
}

// Rows of events 0 … n as working numbers, in place where they can be read so (the returned pointer and
// stride), else copied to `copy`, which has room for n rows of padded D.
template <class V>
const typename V::Real* event_rows(const void* data, Element element, int64_t stride, int n, int head_dim,
                                   const typename V::Real* hide, bool copy_anyway, typename V::Real* copy,
                                   int64_t* row_stride) {
  const bool native = element == Element::kFloat32 || element == Element::kFloat64;
  if (native && !hide && !copy_anyway && head_dim % V::kWidth == 0) {
    *row_stride = stride;
    const auto* rows = static_cast<const typename V::Real*>(data);
    for (int i = 0; i < n; i++) {
      for (int d = 0; d < head_dim; d += 64 / static_cast<int>(sizeof(*rows)))
        __builtin_prefetch(rows + i * stride + d);
    }
    return rows;
  }
  const int width = padded<V>(head_dim);
  *row_stride = width;
  for (int i = 0; i < n; i++) {
    typename V::Real* row = copy + static_cast<int64_t>(i) * width;
    if (hide && hide[i] == -std::numeric_limits<float>::infinity()) {
      for (int d = 0; d < width; d += V::kWidth) V::store(row + d, V::zero());
    } else {
      load_row<V>(static_cast<const char*>(data) + i * stride * element_bytes(element), element, head_dim, 1,
                  row);
    }
  }
  return copy;
}

// scores[r][event] = Σ_d rows[d][r] · panel[d][event] for M rows and the events of `panels` panels.
template <class V, int M>
void score_block(const typename V::Real* rows, const typename V::Real* panel, int panels, int head_dim,
                 typename V::Real* scores) {
  constexpr int W = V::kWidth;
  for (int p = 0; p < panels; p++, panel += static_cast<int64_t>(2 * W) * head_dim, scores += 2 * W) {
    // Chains of at most kChain products, added up: with D = 256 in one chain the error was 3 times a GEMM's.
    for (int begin = 0; begin < head_dim; begin += kChain) {
      typename V::Reg sum[M][2];
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) sum[r][0] = sum[r][1] = V::zero();
      const int end = head_dim - begin < kChain ? head_dim : begin + kChain;
#pragma GCC unroll 4
      for (int d = begin; d < end; d++) {
        const typename V::Reg k0 = V::load(panel + d * 2 * W), k1 = V::load(panel + d * 2 * W + W);
#pragma GCC unroll 8
        for (int r = 0; r < M; r++) {
          const typename V::Reg q = V::set1(rows[d * V::kRows + r]);
          sum[r][0] = V::fma(q, k0, sum[r][0]);
          sum[r][1] = V::fma(q, k1, sum[r][1]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        typename V::Real* to = scores + r * kKeys;
        V::store(to, begin ? V::add(V::load(to), sum[r][0]) : sum[r][0]);
        V::store(to + W, begin ? V::add(V::load(to + W), sum[r][1]) : sum[r][1]);
      }
    }
  }
}

// out[r][:] += Σ_i factor[r * factor_row + i * factor_step] · values[i][:], i in order, for M rows of `width`
// numbers: summed apart and then added, or as one chain with what `out` has. Sums over thousands of events
// are made of parts, so that their rounding errors stay those of short sums (a chain of 4096 has 4 times
// plain PyTorch's error).
template <class V, int M, bool kApart = true>
void accumulate_block(const typename V::Real* factor, int factor_row, int factor_step,
                      const typename V::Real* values, int64_t value_stride, int n, int width,
                      typename V::Real* out, int64_t out_stride) {
  using Real = typename V::Real;
  constexpr int W = V::kWidth;
  int d = 0;
  for (; d + 2 * W <= width; d += 2 * W) {
    typename V::Reg sum[M][2];
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      sum[r][0] = kApart ? V::zero() : V::load(out + r * out_stride + d);
      sum[r][1] = kApart ? V::zero() : V::load(out + r * out_stride + d + W);
    }
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) {
      const typename V::Reg v0 = V::load(values + i * value_stride + d);
      const typename V::Reg v1 = V::load(values + i * value_stride + d + W);
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        const typename V::Reg f = V::set1(factor[r * factor_row + i * factor_step]);
        sum[r][0] = V::fma(f, v0, sum[r][0]);
        sum[r][1] = V::fma(f, v1, sum[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      Real* to = out + r * out_stride + d;
      V::store(to, kApart ? V::add(V::load(to), sum[r][0]) : sum[r][0]);
      V::store(to + W, kApart ? V::add(V::load(to + W), sum[r][1]) : sum[r][1]);
    }
  }
  if (d < width) {
    typename V::Reg sum[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) sum[r] = kApart ? V::zero() : V::load(out + r * out_stride + d);
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
      const typename V::Reg v = V::load(values + i * value_stride + d);
#pragma GCC unroll 8
      for (int r = 0; r < M; r++)
        sum[r] = V::fma(V::set1(factor[r * factor_row + i * factor_step]), v, sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      Real* to = out + r * out_stride + d;
      V::store(to, kApart ? V::add(V::load(to), sum[r]) : sum[r]);
    }
  }
}

// Turns a run-time number of rows (1 … V::kRows) into the template's.
template <class V, int M = V::kRows, class... Arguments>
ATTNREC_INLINE void scores(int rows, Arguments... arguments) {
  if constexpr (M > 1) {
    if (rows < M) return scores<V, M - 1>(rows, arguments...);
  }
  score_block<V, M>(arguments...);
}

template <class V, bool kApart = true, int M = V::kRows, class... Arguments>
ATTNREC_INLINE void accumulate(int rows, Arguments... arguments) {
  if constexpr (M > 1) {
    if (rows < M) return accumulate<V, kApart, M - 1>(rows, arguments...);
  }
  accumulate_block<V, M, kApart>(arguments...);
}

// `accumulate` of a tile for rows that see different numbers of its events: what all see together, the rest
// row by row. A row's sum is the same chain either way.
template <class V>
void accumulate_seen(int rows, const int* seen, const typename V::Real* factor,
                     const typename V::Real* values, int64_t value_stride, int width, typename V::Real* out,
                     int64_t out_stride) {
  int fewest = seen[0], most = seen[0];
  for (int r = 1; r < rows; r++) {
    fewest = seen[r] < fewest ? seen[r] : fewest;
    most = seen[r] > most ? seen[r] : most;
  }
  if (fewest == most) {
    if (most > 0) accumulate<V>(rows, factor, kKeys, 1, values, value_stride, most, width, out, out_stride);
    return;
  }
  typename V::Real sums[V::kRows * kMostHeadDim];
  for (int i = 0; i < rows * width; i += V::kWidth) V::store(sums + i, V::zero());
  if (fewest > 0) {
    accumulate<V, false>(rows, factor, kKeys, 1, values, value_stride, fewest, width, sums, int64_t{width});
  }
  for (int r = 0; r < rows; r++) {
    if (seen[r] == 0) continue;
    typename V::Real *sum = sums + r * width, *to = out + r * out_stride;
    accumulate_block<V, 1, false>(factor + r * kKeys + fewest, kKeys, 1, values + fewest * value_stride,
                                  value_stride, seen[r] - fewest, width, sum, width);
    for (int d = 0; d < width; d += V::kWidth) V::store(to + d, V::add(V::load(to + d), V::load(sum + d)));
  }
}

// M rows of working numbers as rows[d][r], the layout that `scores` reads.
template <class V>
ATTNREC_INLINE void interleave_row(const typename V::Real* row, int head_dim, int r, typename V::Real* rows) {
  for (int d = 0; d < head_dim; d++) rows[d * V::kRows + r] = row[d];
}

// How many of its user's events a row sees, of those up to the unit's last.
inline int64_t seen_events(const Attention& a, const Unit& unit, int row) {
  const int64_t events = least(a.events(unit.user), unit.last_event);
  return a.visible ? least(events, a.visible[unit.candidate(row)]) : events;
}

// Events packed at once. What is packed for more rows than a block should stay in L2 (256 KiB for keys and
// values); for a single block of rows there is nothing to reuse, so a tile at a time in L1.
template <class V>
int packed_events(int rows, int head_dim) {
  if (rows <= V::kRows) return kKeys;
  const int64_t fit = 262144 / (2 * head_dim * static_cast<int64_t>(sizeof(typename V::Real)));
  return static_cast<int>(fit >= 1024 ? 1024 : fit <= kKeys ? kKeys : fit / kKeys * kKeys);
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

template <class V>
struct StreamScratch {
  int span;  // events packed at once, a multiple of kKeys
  typename V::Real *panels, *bias, *row, *rows, *scores;

  StreamScratch(Arena& arena, int packed, int head_dim)
      : span(packed),
        panels(arena.take<typename V::Real>(static_cast<int64_t>(span) * head_dim)),
        bias(arena.take<typename V::Real>(span)),
        row(arena.take<typename V::Real>(padded<V>(head_dim))),
        rows(arena.take<typename V::Real>(V::kRows * head_dim)),
        scores(arena.take<typename V::Real>(V::kRows * kKeys)) {}
};

// Runs one unit. `readout.pack(first_event, n, hide)` prepares whatever else the readout needs of the packed
// events (values), `readout.tile(Tile)` reads a tile of scores out. With a key_bias a unit holds one head
// only.
template <class V, class Readout>
void stream(const Attention& a, const Unit& unit, const StreamScratch<V>& scratch, Readout& readout) {
  using Real = typename V::Real;
  constexpr int W = V::kWidth;
  const int D = a.head_dim, span = scratch.span;
  const int64_t event0 = a.kv_offsets[unit.user];
  const Real factor = static_cast<Real>(a.scale * a.units);
  int64_t longest = 0;
  for (int r = 0; r < unit.rows; r += unit.group) longest = greatest(longest, seen_events(a, unit, r));

  for (int64_t packed = unit.first_event; packed < longest; packed += span) {
    const int n = static_cast<int>(least(span, longest - packed));
    const Real* bias = nullptr;
    if (a.key_bias) {
      bias = scratch.bias;
      for (int i = 0; i < n; i++) {
        const int64_t index = (event0 + packed + i) * a.bias_row_stride + unit.head * a.bias_head_stride;
        scratch.bias[i] = load_element<Real>(a.key_bias, index, a.bias_element) * static_cast<Real>(a.units);
      }
    }
    pack_panels<V>(a.key.at(event0 + packed, unit.kv_head, a.element), a.element, a.key.row_stride, n, D,
                   bias, scratch.panels);
    readout.pack(packed, n, bias);

    for (int row = 0; row < unit.rows; row += V::kRows) {
      const int rows = static_cast<int>(least(V::kRows, unit.rows - row));
      int64_t seen_by[V::kRows], most = 0;
      for (int r = 0; r < rows; r++) {
        seen_by[r] = seen_events(a, unit, row + r);
        most = greatest(most, seen_by[r]);
        load_row<V>(a.query.at(unit.candidate(row + r), unit.query_head(row + r), a.element), a.element, D,
                    factor, scratch.row);
        interleave_row<V>(scratch.row, D, r, scratch.rows);
      }
      for (int begin = 0; begin < n && packed + begin < most; begin += kKeys) {
        int seen[V::kRows];
        for (int r = 0; r < rows; r++) {
          seen[r] =
              static_cast<int>(greatest(0, least(least(kKeys, n - begin), seen_by[r] - packed - begin)));
        }
        const int count = static_cast<int>(least(least(kKeys, n - begin), most - packed - begin));
        scores<V>(rows, scratch.rows, scratch.panels + static_cast<int64_t>(begin) * D,
                  (count + 2 * W - 1) / (2 * W), D, scratch.scores);
        for (int r = 0; r < rows; r++) {
          Real* s = scratch.scores + r * kKeys;
          if (bias) {
            for (int i = 0; i < seen[r]; i += W) {
              V::store(s + i, V::add(V::load(s + i), load_part<V>(bias + begin + i, seen[r] - i)));
            }
          }
          const int tail = seen[r] / W * W;
          if (tail < seen[r]) {
            V::store(s + tail,
                     V::first(V::load(s + tail), seen[r] - tail, -std::numeric_limits<float>::infinity()));
          }
        }
        readout.tile(Tile<V>{row, rows, packed + begin, begin, seen, scratch.scores});
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

// The running maximum and sum of each row's softmax. `lanes` holds the sum in V::kWidth parts. Scores come in
// base 2, or with kNatural as they are: a multiplication more, but a maximum that is a result's own number,
// so that what is later taken from it cancels exactly.
template <class V, bool kNatural = false>
struct RunningSoftmax {
  typename V::Real *maximum, *lanes;

  RunningSoftmax(Arena& arena, int rows)
      : maximum(arena.take<typename V::Real>(rows)),
        lanes(arena.take<typename V::Real>(static_cast<int64_t>(rows) * V::kWidth)) {}

  void clear(int rows) {
    for (int r = 0; r < rows; r++) start(r, -std::numeric_limits<float>::infinity(), 0);
  }
  // Starts a row from one score with the given weight: the self slot, or nothing.
  void start(int row, typename V::Real score, typename V::Real weight) {
    maximum[row] = score;
    V::store(lanes + static_cast<int64_t>(row) * V::kWidth, V::zero());
    lanes[static_cast<int64_t>(row) * V::kWidth] = weight;
  }
  ATTNREC_INLINE typename V::Reg power(typename V::Reg x) {
    if constexpr (kNatural) return exp_of<V>(x);
    return V::exp2(x);
  }
  // Takes in seen >= 1 scores and turns them into exp2(score - maximum). Returns the factor by which all that
  // was summed before has to be multiplied; 1 where the maximum stayed.
  ATTNREC_INLINE typename V::Real step(RunningSoftmax& self, int row, int seen, typename V::Real* scores) {
    using Real = typename V::Real;
    constexpr int W = V::kWidth;
    Real* sum = self.lanes + static_cast<int64_t>(row) * W;
    typename V::Reg top = V::load(scores);
    for (int i = W; i < seen; i += W) top = V::max(top, V::load(scores + i));
    const Real before = self.maximum[row], highest = V::maximum(top);
    Real rescale = 1;
    typename V::Reg total = V::load(sum);
    if (highest > before) {
      self.maximum[row] = highest;
      Real factor[W];
      V::store(factor, power(V::set1(before - highest)));
      rescale = factor[0];
      total = V::mul(total, V::set1(rescale));
    }
    const typename V::Reg base = V::set1(self.base(row));
    for (int i = 0; i < seen; i += W) {
      const typename V::Reg p = power(V::sub(V::load(scores + i), base));
      V::store(scores + i, p);
      total = V::add(total, p);
    }
    V::store(sum, total);
    return rescale;
  }
  // The maximum, or 0 where all is hidden so far: exp2(-inf - 0) is 0, where -inf - -inf would be NaN.
  typename V::Real base(int row) const {
    return maximum[row] == -std::numeric_limits<typename V::Real>::infinity() ? 0 : maximum[row];
  }
  typename V::Real sum(int row) const {
    return V::sum(V::load(lanes + static_cast<int64_t>(row) * V::kWidth));
  }
  typename V::Real inverse_sum(int row) const {
    const typename V::Real total = sum(row);
    return total == 0 ? 0 : 1 / total;
  }
  // In nats; -inf for a row that has seen nothing. In double, so that it is rounded once: what is recomputed
  // from it, exp(s - lse), is off by that rounding.
  typename V::Real lse(int row) const {
    const double total = sum(row), unit = kNatural ? 1 : kLn2;
    return static_cast<typename V::Real>(total == 0 ? -std::numeric_limits<double>::infinity()
                                                    : maximum[row] * unit + std::log(total));
  }
};

// Σ_d a[d]·b[d] of two padded rows, the order that self slots use.
template <class V>
ATTNREC_INLINE typename V::Real dot(const typename V::Real* a, const typename V::Real* b, int width) {
  typename V::Reg sum = V::zero();
  for (int d = 0; d < width; d += V::kWidth) sum = V::fma(V::load(a + d), V::load(b + d), sum);
  return V::sum(sum);
}

// The score of row r's self slot, in base 2 as a tile's scores are.
template <class V>
typename V::Real self_score(const Attention& a, const Unit& unit, int r, const StreamScratch<V>& scratch) {
  const int64_t c = unit.candidate(r);
  load_row<V>(a.query.at(c, unit.query_head(r), a.element), a.element, a.head_dim,
              static_cast<typename V::Real>(a.scale * a.units), scratch.row);
  load_row<V>(a.self_key.at(c, unit.kv_head, a.element), a.element, a.head_dim, 1, scratch.scores);
  return dot<V>(scratch.row, scratch.scores, padded<V>(a.head_dim));
}

// The softmax of a unit's rows before their first event: nothing, or the self slot with maximum = its score,
// sum = 1.
template <class V>
void start_softmax(const Attention& a, const Unit& unit, const StreamScratch<V>& scratch,
                   RunningSoftmax<V>& softmax) {
  softmax.clear(unit.rows);
  if (!a.self_key.data) return;
  for (int r = 0; r < unit.rows; r++) {
    const typename V::Real score = self_score<V>(a, unit, r, scratch);
    softmax.start(r, score,
                  score - score + 1);  // 1, but NaN where the score is: no event may come to bring it in
  }
}

}  // namespace
}  // namespace attnrec::cpu
