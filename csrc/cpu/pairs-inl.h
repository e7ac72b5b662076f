// Products of bf16 numbers as they are: two in an item, multiplied and added up in fp32 by one instruction
// (`V::dot`), at twice the rate of fp32. Only the tiers with `V::kPairs` have it.
#pragma once

#include "cpu/products-inl.h"

namespace attnrec::cpu {
namespace {

template <class V>
struct Pairs : RegisterBlock<V, Pairs<V>> {
  using Real = typename V::Real;
  using Item = uint32_t;  // elements 2i and 2i + 1
  static constexpr int W = V::kWidth;
  // Weights are rounded to bf16: 4e-6 in the exponential are nothing beside 2^-9.
  static constexpr bool kShortExp = true;

  ATTNREC_INLINE typename V::Reg load(const Item* p) { return V::load_pairs(p); }
  ATTNREC_INLINE typename V::Reg set1(Item item) { return V::set1_pairs(item); }
  ATTNREC_INLINE typename V::Reg multiply_add(typename V::Reg a, typename V::Reg b, typename V::Reg sum) {
    return V::dot(sum, a, b);
  }
  ATTNREC_INLINE typename V::Reg scaled(typename V::Reg score, Real factor) {
    return V::mul(score, V::set1(factor));
  }

  static constexpr Item kFirst = 0xffffu, kSecond = 0xffff0000u;  // of the two elements

  static int depth(int head_dim) { return (head_dim + 1) / 2; }

  static void pack_keys(const void* data, Element, int64_t stride, int n, int head_dim, const Real* hide,
                        Item* panels, Ahead ahead = {}) {
    pack_panels_of(depth(head_dim), data, stride, n, head_dim, hide, panels, ahead);
  }

  // As `pack_panels`: panel[pair of d][event], with zeros for pairs beyond the head dim.
  static void pack_panels_of(int pairs, const void* data, int64_t stride, int n, int head_dim,
                             const Real* hide, Item* panels, Ahead ahead = {}) {
    const auto* from = static_cast<const BFloat16*>(data);
    for (int event = 0; event < round_up(n, 2 * W); event += W) {
      Item* to = panels + static_cast<int64_t>(event / (2 * W)) * 2 * W * pairs + event % (2 * W);
      for (int p = 0; p < pairs; p += W) {
        typename V::Reg r[W];
        ahead.prefetch(from + (event + kPrefetchEvents) * stride + 2 * p, stride, W);
        // 16 events that are all there take no questions: 12 to 9 cycles an event at D = 32.
        const int left = head_dim - 2 * p;
        if (event + W <= n && !hide) {
          for (int i = 0; i < W; i++) r[i] = V::load_pairs(from + (event + i) * stride + 2 * p, left);
        } else {
          for (int i = 0; i < W; i++) {
            r[i] = event + i < n && !hidden(hide, event + i)
                       ? V::load_pairs(from + (event + i) * stride + 2 * p, left)
                       : V::zero();
          }
        }
        V::transpose(r);
        for (int i = 0; i < W && p + i < pairs; i++) V::store_pairs(to + (p + i) * 2 * W, r[i]);
      }
    }
  }

  // A register of a row's items from the i-th on. The scale comes in with `scaled`.
  ATTNREC_INLINE typename V::Reg load_part(const void* data, Element, int i, int head_dim, Real) {
    return V::load_pairs(static_cast<const BFloat16*>(data) + 2 * i, head_dim - 2 * i);
  }
  ATTNREC_INLINE void store(Item* p, typename V::Reg r) { V::store_pairs(p, r); }

  template <bool kApart, class... Arguments>
  ATTNREC_INLINE void sum(int rows, const Item* weight, int row_step, int pair_step, const Item* from,
                          Arguments... rest) {
    accumulate<V, kApart, Pairs>(rows, weight, row_step, pair_step, from, rest...);
  }

  // Values of packed events, values[pair of events][d], and by tile whether all of them are finite.
  struct Values {
    Values(Arena& arena, int span, int head_dim, int rows = V::kRows)
        : width(padded<V>(head_dim)),
          items(arena.take<Item>(static_cast<int64_t>(span / 2) * width)),
          finite(arena.take<bool>(span / kKeys)),
          weights(arena.take<Item>(rows * (kKeys / 2))) {}

    void pack(const void* data, Element, int64_t stride, int n, int head_dim, const Real* hide, bool,
              Ahead ahead = {}) {
      const auto* from = static_cast<const BFloat16*>(data);
      for (int tile = 0; tile < n; tile += kKeys) {
        const int count = static_cast<int>(least(kKeys, n - tile));
        const auto numbers = [&](int i, int d) ATTNREC_LAMBDA {
          const BFloat16* there = from + (tile + i) * stride + d;
          ahead.prefetch(there + kPrefetchEvents * stride, 0, 1);
          return hidden(hide, tile + i) ? kZeros : there;
        };
        finite[tile / kKeys] =
            V::interleave(count, numbers, head_dim, items + static_cast<int64_t>(tile / 2) * width, width);
      }
    }

    template <class... Registers>
    ATTNREC_MEMBER void keep(int r, int i, Real*, Registers... numbers) {
      V::round_to_pairs(weights + (r * kKeys + i) / 2, numbers...);
    }

    void accumulate_seen(int rows, const int* seen, const Real*, int packed_event, Real* out,
                         int64_t out_stride) {
      int most = 0;
      bool alike = true;
      for (int r = 0; r < rows; r++) {
        most = seen[r] > most ? seen[r] : most;
        alike &= seen[r] == seen[0];
      }
      const int pairs = (most + 1) / 2;
      for (int r = 0; !alike && r < rows; r++) {
        for (int64_t p = round_up(seen[r], W) / 2; p < pairs; p++) weights[r * (kKeys / 2) + p] = 0;
      }
      const Item* from = items + static_cast<int64_t>(packed_event / 2) * width;
      if (finite[packed_event / kKeys]) {  // what a row does not see has weight 0, which adds nothing
        if (pairs > 0)
          sum<true>(rows, weights, kKeys / 2, 1, from, int64_t{width}, pairs, width, out, out_stride);
        return;
      }
      for (int r = 0; r < rows; r++) {
        const Item* row = weights + r * (kKeys / 2);
        for (int c = 0; seen[r] && c < width; c += kMostHeadDim) {
          const int columns = static_cast<int>(least(width - c, kMostHeadDim));
          Real total[kMostHeadDim];
          Item last[kMostHeadDim];
          for (int d = 0; d < columns; d += W) V::store(total + d, V::zero());
          if (seen[r] / 2 > 0) {
            sum<false>(1, row, 0, 1, from + c, int64_t{width}, seen[r] / 2, columns, total, int64_t{0});
          }
          if (seen[r] % 2) {
            const Item* pair = from + static_cast<int64_t>(seen[r] / 2) * width + c;
            for (int d = 0; d < columns; d++) last[d] = pair[d] & kFirst;
            sum<false>(1, row + seen[r] / 2, 0, 0, last, int64_t{0}, 1, columns, total, int64_t{0});
          }
          Real* to = out + r * out_stride + c;
          for (int d = 0; d < columns; d += W) V::store(to + d, V::add(V::load(to + d), V::load(total + d)));
        }
      }
    }

    static constexpr BFloat16 kZeros[32] = {};
    int width;
    Item* items;
    bool* finite;
    Item* weights;  // of a block's rows, rounded
  };

  // Rows of numbers, `width` apart, rounded to items of rows 2i and 2i + 1, in the place of row 2i.
  static void prepare(Real* rows, int count, int width) {
    for (int r = 0; r < count; r += 2) {
      Real *a = rows + int64_t{r} * width, *b = a + width;
      for (int d = 0; d < width; d += W) {
        const typename V::Reg second = r + 1 < count ? V::load(b + d) : V::zero();
        V::store_pairs(as_items(a + d), V::pair(V::load(a + d), second));
      }
    }
  }

  static int rows_read(int count) { return count; }

  // A register of each of two rows of weights, in the place of the first of them.
  ATTNREC_INLINE void keep_rows(Real* to, typename V::Reg first, typename V::Reg second) {
    V::store_pairs(as_items(to), V::pair(first, second));
  }

  template <bool kApart>
  static void sum_rows(int events, const Real* weights, const Real* rows, int first, int last, int width,
                       Real* to) {
    const int from = first / 2 * 2;
    sum<kApart>(events, as_items(weights + from * kKeys), 1, 2 * kKeys,
                as_items(rows + int64_t{from} * width), int64_t{2} * width, (last - from + 1) / 2, width, to,
                int64_t{width});
  }

  static void sum_seen_rows(const int* seen, int event, const Real* weights, const Real* rows, int first,
                            int last, int width, Real* to) {
    for (int r = first / 2 * 2; r < last; r += 2) {
      const bool both[] = {seen[r] > event, r + 1 < last && seen[r + 1] > event};
      if (!both[0] && !both[1]) continue;
      const Item* pair = as_items(rows + int64_t{r} * width);
      Item seen_ones[kMostHeadDim];
      for (int d = 0; d < width; d++)
        seen_ones[d] = pair[d] & ((both[0] ? kFirst : 0) | (both[1] ? kSecond : 0));
      sum<false>(1, as_items(weights + r * kKeys), 0, 0, seen_ones, int64_t{width}, 1, width, to,
                 int64_t{width});
    }
  }

 protected:
  static Item* as_items(Real* numbers) { return reinterpret_cast<Item*>(numbers); }
  static const Item* as_items(const Real* numbers) { return reinterpret_cast<const Item*>(numbers); }
  static bool hidden(const Real* hide, int event) {
    return hide && hide[event] == -std::numeric_limits<float>::infinity();
  }
};

}  // namespace
}  // namespace attnrec::cpu
