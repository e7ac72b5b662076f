// What a loop over a filter's panels has before it: users as rows of codes, and the bounds, scales and biases
// of some panels' items.
#pragma once

#include "cpu/catalog_filter.h"
#include "cpu/rows-inl.h"

namespace attnrec::cpu {
namespace {

constexpr int kFilterRows = 8;     // of codes in a block: 8 x 2 accumulators
constexpr int kFilterBuffer = 64;  // candidates of a row, beside room for those of one panel
constexpr float kHiddenScore = -1e30f;
constexpr float kLargestBound = std::numeric_limits<float>::infinity();

// Products of codes: 2 bf16 numbers or 4 bytes at once. A tier with V::kPairs has both.
template <class V, Code kCode>
struct CodeProducts {
  ATTNREC_INLINE typename V::Reg start(int32_t x) {
    return kCode == Code::kInt8 ? V::set1_pairs(static_cast<uint32_t>(x)) : V::zero();
  }
  ATTNREC_INLINE typename V::Reg multiply_add(typename V::Reg item, typename V::Reg user,
                                              typename V::Reg sum) {
    return kCode == Code::kInt8 ? V::dot_bytes(sum, item, user) : V::dot(sum, item, user);
  }
  // From sums over a user's parts.
  template <int kParts>
  ATTNREC_INLINE typename V::Reg number(const typename V::Reg* sums, int step, const float* scale) {
    typename V::Reg number = kCode == Code::kInt8 ? V::from_int32(sums[0]) : sums[0];
    if constexpr (kParts == 2 && kCode == Code::kInt8)
      number = V::fma(V::from_int32(sums[step]), V::set1(kFineStep), number);
    if constexpr (kParts == 2 && kCode != Code::kInt8) number = V::add(number, sums[step]);
    return kCode == Code::kInt8 ? V::mul(number, V::load(scale)) : number;
  }
};

// A unit's rows, up to whole blocks: the last block has 1, 2, 4 or 8 rows, and the absent ones find nothing.
// Where users have two parts, a block has half as many.
struct FilterRows {
  int count, depth, parts, together;  // rows of a block that is full
  uint32_t* codes;                    // block by block [depth][rows of the block][parts]
  int32_t* start;                     // [rows][parts]
  float *unit, *per_error, *per_norm, *floor;
  int64_t* next_of_row;    // the first excluded one that no panel has had so far
  int64_t* next_excluded;  // the first of each block's

  FilterRows(Arena& arena, const FilterUnit& of, const CatalogFilter& filter)
      : count(static_cast<int>(round_up(of.rows, kFilterRows))),
        depth(filter.depth()),
        parts(of.parts),
        together(kFilterRows / parts),
        codes(arena.take<uint32_t>(static_cast<int64_t>(count) * depth * parts)),
        start(arena.take<int32_t>(count * parts)),
        unit(arena.take<float>(count)),
        per_error(arena.take<float>(count)),
        per_norm(arena.take<float>(count)),
        floor(arena.take<float>(count)),
        next_of_row(arena.take<int64_t>(count)),
        next_excluded(arena.take<int64_t>(count / together)) {}

  static int block_rows(int rows) { return rows > 4 ? 8 : rows > 2 ? 4 : rows; }

  void load(const FilterUsers& users, const FilterUnit& of) {
    for (int row = 0; row < of.rows; row += together) {
      const int m = block_rows(static_cast<int>(least(together, of.rows - row)));
      for (int r = row; r < row + m; r++) {
        const bool there = r < of.rows;
        const int64_t user = there ? of.user(r) : 0;
        for (int part = 0; part < parts; part++) {
          const uint32_t* from = users.codes + (user * kUserParts + part) * depth;
          uint32_t* to = codes + static_cast<int64_t>(row) * parts * depth + (r - row) * parts + part;
          for (int d = 0; d < depth; d++) to[d * m * parts] = there ? from[d] : 0;
          start[r * parts + part] = there ? users.start[user * kUserParts + part] : 0;
        }
        unit[r] = there ? users.unit[user] : 0;
        per_error[r] = there ? users.per_error[user] : 0;
        per_norm[r] = there ? users.per_norm[user] : 0;
        floor[r] = there && users.floor ? users.floor[user] : std::numeric_limits<float>::infinity();
      }
      next_excluded[row / together] = users.excluded ? -1 : INT64_MAX;
      for (int r = row; r < row + m; r++) next_of_row[r] = users.excluded && r < of.rows ? -1 : INT64_MAX;
    }
  }
};

// The largest of 32 pairs of numbers of at least 0, whose bits order as they do; and of the finite ones.
struct PairMaxima {
  typedef uint16_t Pairs __attribute__((vector_size(64)));  // 16 of them
  Pairs all = {}, finite = {};

  ATTNREC_MEMBER void take(const BFloat16* pairs) {
    Pairs x;
    std::memcpy(&x, pairs, sizeof x);
    all = x > all ? x : all;
    const Pairs kept = x & (x < 0x7f80);
    finite = kept > finite ? kept : finite;
  }
  static void reduce(const Pairs& x, float* first, float* second) {
    typedef uint16_t Half __attribute__((vector_size(32)));
    typedef uint16_t Quarter __attribute__((vector_size(16)));
    Half h[2];
    std::memcpy(h, &x, sizeof h);
    const Half of_two = h[0] > h[1] ? h[0] : h[1];
    Quarter q[2];
    std::memcpy(q, &of_two, sizeof q);
    Quarter most = q[0] > q[1] ? q[0] : q[1];
    Quarter other = __builtin_shufflevector(most, most, 4, 5, 6, 7, 0, 1, 2, 3);
    most = most > other ? most : other;
    other = __builtin_shufflevector(most, most, 2, 3, 0, 1, 6, 7, 4, 5);
    most = most > other ? most : other;
    *first = to_float(BFloat16{most[0]});
    *second = to_float(BFloat16{most[1]});
  }
};

// What is prepared of a span of panels. The panel that N cuts short is copied, so that nothing is read
// beyond.
struct FilterSpan {
  int count = 0;
  int64_t panels[kFilterSpan];
  float error[kFilterSpan], norm[kFilterSpan], beyond[kFilterSpan];  // the largest of a panel
  const float *scale[kFilterSpan], *bias[kFilterSpan];               // of a panel's items
  float *last_scale, *biases;
  float* errors;  // of each panel's items, 0 where not finite; where asked for

  explicit FilterSpan(Arena& arena)
      : last_scale(arena.take<float>(kPanelItems)),
        biases(arena.take<float>(kFilterSpan * kPanelItems)),
        errors(arena.take<float>(kFilterSpan * kPanelItems)) {}

  // Before the first.
  void clear() {
    for (int i = 0; i < kPanelItems; i++) last_scale[i] = 0;
    for (int i = 0; i < kFilterSpan * kPanelItems; i++) biases[i] = 0;
  }

  void load(const CatalogFilter& filter, FilterSums& sums, bool with_errors) {
    PairMaxima of_span;
    for (int p = 0; p < count; p++) {
      const int64_t first = panels[p] * kPanelItems;
      const int n = static_cast<int>(least(kPanelItems, filter.items - first));
      const BFloat16* of_items = filter.error + 2 * first;
      BFloat16 copied[2 * kPanelItems] = {};
      if (n < kPanelItems) {
        for (int i = 0; i < 2 * n; i++) copied[i] = of_items[i];
        for (int i = 0; filter.scale && i < n; i++) last_scale[i] = filter.scale[first + i];
        of_items = copied;
      }
      for (int i = 0; with_errors && i < kPanelItems; i++) {
        const float error_of_item = to_float(of_items[2 * i]);
        errors[p * kPanelItems + i] = error_of_item < kLargestBound ? error_of_item : 0;
      }
      PairMaxima of_panel;
      of_panel.take(of_items);
      of_panel.take(of_items + kPanelItems);
      PairMaxima::reduce(of_panel.all, &error[p], &norm[p]);
      of_span.finite = of_panel.finite > of_span.finite ? of_panel.finite : of_span.finite;
      scale[p] = n < kPanelItems || !filter.scale ? last_scale : filter.scale + first;
      // A score is rounded a few times more where the bias comes in; the rest keeps 0 apart from 0.
      beyond[p] = 4 * std::numeric_limits<float>::min();
      bias[p] = biases;
      if (filter.bias) {
        bias[p] = biases + p * kPanelItems;
        beyond[p] += load_bias(filter, first, n, biases + p * kPanelItems) * 0x1p-21f;
      }
    }
    float largest[2];
    PairMaxima::reduce(of_span.finite, &largest[0], &largest[1]);
    sums.error = largest[0] > sums.error ? largest[0] : sums.error;
    sums.norm = largest[1] > sums.norm ? largest[1] : sums.norm;
  }

 private:
  // Returns the largest |bias| that does not hide, inf where one is NaN.
  static float load_bias(const CatalogFilter& filter, int64_t first, int n, float* to) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float most = 0;
    if (filter.bias_element == Element::kFloat32 && filter.bias_stride == 1) {
      std::memcpy(to, static_cast<const float*>(filter.bias) + first, n * sizeof(float));
    } else {
      for (int i = 0; i < n; i++)
        to[i] = load_element<float>(filter.bias, (first + i) * filter.bias_stride, filter.bias_element);
    }
    for (int i = 0; i < n; i++) {
      const float size = to[i] < 0 ? -to[i] : to[i], large = size <= kInfinity ? size : kInfinity;
      const bool hides = to[i] <= kHiddenScore;
      to[i] = hides ? kHiddenScore : to[i];  // so that an exponential of it is 0, not NaN
      most = !hides && large > most ? large : most;
    }
    return most;
  }
};

}  // namespace
}  // namespace attnrec::cpu
