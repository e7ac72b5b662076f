// Scores of a filter's rounded rows, panel by panel, from codes in place. A loop of its own: the streaming
// core packs rows of numbers and hands out tiles of scores through memory, while here panels lie ready, byte
// products are integers until they are scaled item by item, and a score is compared and its exponential taken
// while it is in a register.
#pragma once

#include "cpu/catalog_filter_rows-inl.h"

namespace attnrec::cpu {
namespace {

// Scores M rows, those from `row` on, against a span: readout.take<M>(row, p, scores), scores being a panel's
// registers of each row.
template <class V, Code kCode, int kParts, int M, class Readout>
void score_panels(const CatalogFilter& filter, const FilterRows& rows, int row, const FilterSpan& span,
                  Readout& readout) {
  using Products = CodeProducts<V, kCode>;
  constexpr int W = V::kWidth, kRegisters = kPanelItems / W;
  const int depth = rows.depth;
  for (int p = 0; p < span.count; p++) {
    const uint32_t *item_codes = filter.codes + span.panels[p] * depth * kPanelItems,
                   *user_codes = rows.codes + static_cast<int64_t>(row) * kParts * depth;
    typename V::Reg sum[kParts * M][kRegisters];
#pragma GCC unroll 8
    for (int r = 0; r < kParts * M; r++) {
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters; j++) sum[r][j] = Products::start(rows.start[row * kParts + r]);
    }
#pragma GCC unroll 4
    for (int d = 0; d < depth; d++, item_codes += kPanelItems, user_codes += kParts * M) {
      typename V::Reg item[kRegisters];
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters; j++) item[j] = V::load_pairs(item_codes + j * W);
#pragma GCC unroll 8
      for (int r = 0; r < kParts * M; r++) {
        const typename V::Reg user = V::set1_pairs(user_codes[r]);
#pragma GCC unroll 8
        for (int j = 0; j < kRegisters; j++) sum[r][j] = Products::multiply_add(item[j], user, sum[r][j]);
      }
    }
    typename V::Reg score[M][kRegisters];
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      const typename V::Reg unit = V::set1(rows.unit[row + r]);
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters; j++) {
        const typename V::Reg number =
            Products::template number<kParts>(&sum[kParts * r][j], kRegisters, span.scale[p] + j * W);
        score[r][j] = V::fma(number, unit, V::load(span.bias[p] + j * W));
      }
    }
    readout.template take<M>(row, p, score);
  }
}

template <class V, Code kCode, int kParts, class Readout>
void score_block(const CatalogFilter& filter, const FilterRows& rows, int row, int m, const FilterSpan& span,
                 Readout& readout) {
  if (m == 1) return score_panels<V, kCode, kParts, 1>(filter, rows, row, span, readout);
  if (m == 2) return score_panels<V, kCode, kParts, 2>(filter, rows, row, span, readout);
  if (m == 4) return score_panels<V, kCode, kParts, 4>(filter, rows, row, span, readout);
  if constexpr (kParts == 1) score_panels<V, kCode, 1, 8>(filter, rows, row, span, readout);
}

// What both readouts know: which items of a panel are not to be counted for a row, and how far a panel's
// scores may be off.
template <class V>
struct FilterReadout {
  static constexpr int W = V::kWidth, kRegisters = kPanelItems / W;
  using Reg = typename V::Reg;
  const CatalogFilter& filter;
  const FilterUsers& users;
  const FilterUnit& unit;
  FilterRows& rows;
  FilterSpan& span;

  template <int M>
  ATTNREC_MEMBER void reaches(int row, int p, float (&reach)[M]) {
    const float error = span.error[p], norm = span.norm[p], beyond = span.beyond[p];
    for (int r = 0; r < M; r++)
      reach[r] = rows.per_error[row + r] * error + rows.per_norm[row + r] * norm + beyond;
  }
  // Hides the excluded ones and those past the last: their bits, where there are some.
  template <int M>
  ATTNREC_MEMBER void hide(int row, int p, Reg (&scores)[M][kRegisters], uint32_t (&hidden)[M]) {
    const int64_t end = (span.panels[p] + 1) * kPanelItems;
    for (int r = 0; r < M; r++) hidden[r] = 0;
    if (__builtin_expect(end <= filter.items && rows.next_excluded[row / rows.together] >= end, 1)) return;
    float lanes[M][kPanelItems];
    store<M>(scores, lanes);
    listed(row, M, p, lanes[0], hidden);
    for (int r = 0; r < M; r++) {
      for (int j = 0; j < kRegisters; j++) scores[r][j] = V::load(lanes[r] + j * W);
    }
  }
  template <int M>
  ATTNREC_MEMBER void store(const Reg (&scores)[M][kRegisters], float (&lanes)[M][kPanelItems]) {
    for (int r = 0; r < M; r++) {
      for (int j = 0; j < kRegisters; j++) V::store(lanes[r] + j * W, scores[r][j]);
    }
  }
  __attribute__((noinline)) void listed(int row, int count, int p, float* lanes, uint32_t* hidden) {
    const int64_t first = span.panels[p] * kPanelItems, end = first + kPanelItems;
    int64_t next = INT64_MAX;
    for (int r = 0; r < count; r++, lanes += kPanelItems) {
      uint32_t bits = end <= filter.items ? 0 : ~uint32_t{0} << (filter.items - first);
      int64_t& of_row = rows.next_of_row[row + r];
      if (of_row < end) of_row = listed_of(unit.user(row + r), first, end, bits);
      next = of_row < next ? of_row : next;
      hidden[r] = bits;
      for (; bits; bits &= bits - 1) lanes[__builtin_ctz(bits)] = kHiddenScore;
    }
    rows.next_excluded[row / rows.together] = next;
  }
  // Adds the bits of a user's excluded items, and returns the first one behind them.
  int64_t listed_of(int64_t user, int64_t first, int64_t end, uint32_t& bits) {
    const int64_t *id = users.excluded + users.exclude_offsets[user],
                  *last = users.excluded + users.exclude_offsets[user + 1];
    for (int64_t n = last - id; n > 0;) {
      const int64_t half = n / 2;
      const bool before = id[half] < first;
      id += before ? half + 1 : 0;
      n = before ? n - half - 1 : half;
    }
    for (; id != last && *id < end; id++) bits |= uint32_t{1} << (*id - first);
    return id == last ? INT64_MAX : *id;
  }
};

// A floor from a sample: the best score that is sure, of each of many groups of items. Where the k-th best of
// these is, k items or more reach it.
template <class V>
struct SampleReadout : FilterReadout<V> {
  using Base = FilterReadout<V>;
  float* best;  // [rows][stride], of which `groups` are this unit's
  int64_t stride, groups, first = 0;

  template <int M>
  ATTNREC_MEMBER void take(int row, int p, typename V::Reg (&scores)[M][Base::kRegisters]) {
    uint32_t hidden[M];
    Base::template hide<M>(row, p, scores, hidden);
    float reach[M];
    Base::template reaches<M>(row, p, reach);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      if (row + r >= Base::unit.rows) return;  // of a block that is not full
      float* to = best + (row + r) * stride + (first + p) * kPanelItems % groups;
      const typename V::Reg less = V::set1(reach[r]);
#pragma GCC unroll 8
      for (int j = 0; j < Base::kRegisters; j++) {
        const typename V::Reg sure = V::sub(scores[r][j], less);
        V::store(to + j * V::kWidth, V::max(sure, V::load(to + j * V::kWidth)));
      }
    }
  }
};

// Candidates, and the sum of the exponentials of all other items. Users in two parts are those whose
// log-sum-exp is hard to know: theirs are no rough exponentials, and each item counts with its own reach.
template <class V, int kParts>
struct ScanReadout : FilterReadout<V> {
  using Base = FilterReadout<V>;
  using Reg = typename V::Reg;
  static constexpr bool kClose = kParts == 2;
  // In steps of a number's last bit, as exp2_rough takes its exponent.
  static constexpr float kSlope = static_cast<float>(kClose ? kLog2E : kLog2E * 0x1p23);
  static constexpr float kShift = kClose ? 0 : V::kExp2RoughShift;
  const CandidateSink& sink;
  Candidate* buffers;  // [rows][kFilterBuffer + kPanelItems]
  int* counts;
  float *least_score, *base;  // a candidate's is above `least_score` - reach; exponents are x·kSlope + base
  float* totals;              // [rows][W]
  float* weighted;            // likewise, each exponential times its reach; where kClose

  void begin() {
    for (int r = 0; r < Base::rows.count; r++) {
      counts[r] = 0;
      const float floor = Base::rows.floor[r];
      base[r] = kShift - (floor < kLargestBound ? floor * kSlope : 0);
      raise(r, floor);
      V::store(totals + r * V::kWidth, V::zero());
      if constexpr (kClose) V::store(weighted + r * V::kWidth, V::zero());
    }
  }
  void raise(int row, float floor) {
    const float size = floor < 0 ? -floor : floor;
    least_score[row] = size < kLargestBound ? floor - size * 0x1p-20f : floor;
  }
  ATTNREC_MEMBER Reg exponential(int row, Reg score) {
    const Reg exponent = V::fma(score, V::set1(kSlope), V::set1(base[row]));
    if constexpr (kClose) return V::exp2_short(exponent);
    return V::exp2_rough(exponent);
  }

  // Branches once for all rows: one panel in three has a candidate of one of 8 users, k = 100 in a million.
  template <int M>
  ATTNREC_MEMBER void take(int row, int p, Reg (&scores)[M][Base::kRegisters]) {
    uint32_t hidden[M];
    Base::template hide<M>(row, p, scores, hidden);
    float reach[M], above[M];
    Base::template reaches<M>(row, p, reach);
    for (int r = 0; r < M; r++) above[r] = least_score[row + r] - reach[r];
    typename V::Mask none = V::all_lanes();
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      Reg total = V::load(totals + (row + r) * V::kWidth), weights, per_error, other;
      if constexpr (kClose) {
        weights = V::load(weighted + (row + r) * V::kWidth);
        per_error = V::set1(Base::rows.per_error[row + r]);
        // What its items' reaches have in common. (Nothing is added of a panel where it is not finite.)
        const float shared = Base::rows.per_norm[row + r] * Base::span.norm[p] + Base::span.beyond[p];
        other = V::set1(shared < kLargestBound ? shared : 0);
      }
#pragma GCC unroll 8
      for (int j = 0; j < Base::kRegisters; j++) {
        // None where a score is NaN or -inf: codes of an item that is not bounded may be anything.
        const typename V::Mask below = V::below(scores[r][j], above[r]);
        const Reg power = exponential(row + r, scores[r][j]);
        total = V::add_where(below, total, power);
        if constexpr (kClose) {
          const Reg error = V::load(Base::span.errors + p * kPanelItems + j * V::kWidth);
          weights = V::add_where(below, weights, V::mul(power, V::fma(error, per_error, other)));
        }
        none = V::both(none, below);
      }
      V::store(totals + (row + r) * V::kWidth, total);
      if constexpr (kClose) V::store(weighted + (row + r) * V::kWidth, weights);
    }
    if (__builtin_expect(V::all(none), 1)) return;
    float lanes[M][kPanelItems];
    Base::template store<M>(scores, lanes);
    for (int r = 0; r < M; r++) {
      uint32_t below = hidden[r];
      for (int j = 0; j < Base::kRegisters; j++)
        below |= V::lanes(V::below(scores[r][j], above[r])) << (j * V::kWidth);
      hidden[r] = below;
    }
    for (int r = 0; r < M; r++) {
      if (~hidden[r]) keep(row + r, p, ~hidden[r], lanes[r]);
    }
  }

  // Takes candidates among `lanes`. The bound of an item by itself is narrower than that of its panel: what
  // it rules out goes to the sum.
  __attribute__((noinline)) void keep(int row, int p, uint32_t lanes, const float* score) {
    const int64_t first = Base::span.panels[p] * kPanelItems;
    Candidate* buffer = buffers + static_cast<int64_t>(row) * (kFilterBuffer + kPanelItems);
    float rest[kPanelItems], reaches[kPanelItems] = {};
    bool some = false;
    for (int j = 0; j < Base::kRegisters; j++) V::store(rest + j * V::kWidth, V::set1(kHiddenScore));
    for (; lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      const BFloat16* error = Base::filter.error + 2 * (first + i);
      const float reach = Base::rows.per_error[row] * to_float(error[0]) +
                          Base::rows.per_norm[row] * to_float(error[1]) + Base::span.beyond[p];
      const bool bounded = reach < kLargestBound;
      if (bounded ? !(score[i] > least_score[row] - reach) : row >= Base::unit.rows) {
        rest[i] = score[i];
        reaches[i] = bounded ? reach : 0;
        some = true;
      } else {
        buffer[counts[row]++] = {bounded ? score[i] : 0, reach, first + i};
      }
    }
    if (some) {
      Reg total = V::load(totals + row * V::kWidth), weights = V::zero();
      for (int j = 0; j < Base::kRegisters; j++) {
        const Reg power = exponential(row, V::load(rest + j * V::kWidth));
        total = V::add(total, power);
        if constexpr (kClose) weights = V::fma(power, V::load(reaches + j * V::kWidth), weights);
      }
      V::store(totals + row * V::kWidth, total);
      float* to = weighted + row * V::kWidth;
      if constexpr (kClose) V::store(to, V::add(weights, V::load(to)));
    }
    if (counts[row] > kFilterBuffer) flush(row);
  }
  void flush(int row) {
    raise(row, sink.take(sink.context, row,
                         buffers + static_cast<int64_t>(row) * (kFilterBuffer + kPanelItems), counts[row]));
    counts[row] = 0;
  }
  void finish(FilterSums& sums) {
    for (int r = 0; r < Base::unit.rows; r++) {
      flush(r);
      // Exponents have no room for scores that far above where the floor was.
      const bool room = !(least_score[r] - Base::rows.floor[r] > 80);
      sums.sum[r] = room ? V::sum(V::load(totals + r * V::kWidth)) : std::numeric_limits<double>::infinity();
      if constexpr (kClose) sums.reach[r] = V::sum(V::load(weighted + r * V::kWidth));
    }
  }
};

// Runs the unit's panels past its rows.
template <class V, int kParts, class Readout, class BeforeSpan>
void score_unit(const CatalogFilter& filter, const FilterUnit& unit, FilterRows& rows, FilterSpan& span,
                FilterSums& sums, Readout& readout, BeforeSpan&& before_span) {
  span.clear();
  for (int64_t panel = unit.first_panel; panel < unit.last_panel; panel += kFilterSpan) {
    const bool early = panel / kEarlyRun % kEarly == 0;
    if (unit.spans != FilterUnit::Spans::kAll && early != (unit.spans == FilterUnit::Spans::kEarly)) continue;
    span.count = static_cast<int>(least(kFilterSpan, unit.last_panel - panel));
    for (int p = 0; p < span.count; p++) span.panels[p] = unit.listed ? unit.listed[panel + p] : panel + p;
    span.load(filter, sums, kParts == 2);
    before_span(panel);
    // Panels in a row the processor fetches ahead by itself (asking for them cost 20 to 60 %), others not.
    for (int64_t next = panel + kFilterSpan;
         unit.listed && next < least(panel + 2 * kFilterSpan, unit.last_panel); next++) {
      const uint32_t* codes = filter.codes + unit.listed[next] * rows.depth * kPanelItems;
      for (int d = 0; d < rows.depth * kPanelItems; d += 16) __builtin_prefetch(codes + d, 0, 2);
    }
    const bool bytes = filter.code == Code::kInt8;
    for (int row = 0; row < unit.rows; row += rows.together) {
      const int m = FilterRows::block_rows(static_cast<int>(least(rows.together, unit.rows - row)));
      if (bytes) score_block<V, Code::kInt8, kParts>(filter, rows, row, m, span, readout);
      if (!bytes) score_block<V, Code::kBFloat16, kParts>(filter, rows, row, m, span, readout);
    }
  }
}

template <class V>
int64_t catalog_filter_sample(const CatalogFilter& filter, const FilterUsers& users, const FilterUnit& unit,
                              void* memory, float* best, int64_t stride, int64_t groups) {
  Arena arena(memory);
  FilterRows rows(arena, unit, filter);
  FilterSpan span(arena);
  if (!memory) return arena.used();
  rows.load(users, unit);
  FilterSums sums;
  SampleReadout<V> readout{{filter, users, unit, rows, span}, best, stride, groups};
  score_unit<V, 1>(filter, unit, rows, span, sums, readout,
                   [&](int64_t panel) { readout.first = panel - unit.first_panel; });
  return arena.used();
}

template <class V, int kParts>
int64_t filter_scan_of(const CatalogFilter& filter, const FilterUsers& users, const FilterUnit& unit,
                       void* memory, const CandidateSink& sink, FilterSums& sums) {
  Arena arena(memory);
  FilterRows rows(arena, unit, filter);
  FilterSpan span(arena);
  auto* buffers = arena.take<Candidate>(static_cast<int64_t>(rows.count) * (kFilterBuffer + kPanelItems));
  int* counts = arena.take<int>(rows.count);
  float *least_score = arena.take<float>(rows.count), *base = arena.take<float>(rows.count);
  float* totals = arena.take<float>(static_cast<int64_t>(rows.count) * V::kWidth);
  float* weighted = arena.take<float>(kParts == 2 ? static_cast<int64_t>(rows.count) * V::kWidth : 0);
  if (!memory) return arena.used();
  rows.load(users, unit);
  ScanReadout<V, kParts> readout{
      {filter, users, unit, rows, span}, sink, buffers, counts, least_score, base, totals, weighted};
  readout.begin();
  score_unit<V, kParts>(filter, unit, rows, span, sums, readout, [](int64_t) {});
  readout.finish(sums);
  return arena.used();
}

template <class V>
int64_t catalog_filter_scan(const CatalogFilter& filter, const FilterUsers& users, const FilterUnit& unit,
                            void* memory, const CandidateSink& sink, FilterSums& sums) {
  return unit.parts == 2 ? filter_scan_of<V, 2>(filter, users, unit, memory, sink, sums)
                         : filter_scan_of<V, 1>(filter, users, unit, memory, sink, sums);
}

}  // namespace
}  // namespace attnrec::cpu
