// catalog_topk: the readout that keeps each row's best items beside its running softmax.
#pragma once

#include "cpu/catalog_topk.h"
#include "cpu/hidden_events-inl.h"
#include "cpu/target_attention_top-inl.h"

namespace attnrec::cpu {
namespace {

// Products of n items (up to whole registers) as logits; `added` is their bias, or null, and `hidden` says
// whether it hides some of them.
template <class V>
void finish_logits(double divisor, const typename V::Real* added, bool hidden, int n, typename V::Real* z) {
  using Real = typename V::Real;
  constexpr int W = V::kWidth;
  if (divisor != 1) {
    const typename V::Reg temperature = V::set1(static_cast<Real>(divisor));
    for (int i = 0; i < n; i += W) V::store(z + i, V::load(z + i) / temperature);
  }
  if (!added) return;
  for (int i = 0; i < n; i += W) V::store(z + i, V::add(V::load(z + i), V::load(added + i)));
  // What a bias hides is not looked at: a NaN there plus -inf would be NaN.
  for (int i = 0; hidden && i < n; i++) {
    if (added[i] == -std::numeric_limits<Real>::infinity()) z[i] = added[i];
  }
}

template <class V>
struct TopkReadout {
  using Real = typename V::Real;
  static constexpr int W = V::kWidth;

  TopkReadout(Arena& arena, const Attention& attention, const Unit& u, int span, const TopkOptions& of)
      : a(attention),
        unit(u),
        options(of),
        softmax(arena, u.rows),
        best(arena, u.rows, of.k),
        infinite(arena.take<bool>(u.rows)) {
    if (of.bias) bias = arena.take<Real>(span);
  }

  void begin() {
    softmax.clear(unit.rows);
    best.clear(unit.rows);
    for (int r = 0; r < unit.rows; r++) infinite[r] = false;
  }

  void pack(int64_t first_event, int n, const Real*) {
    // The table comes from memory, once for each unit: to L2 with what is packed next, while this is computed
    // with. N = 1e6, D = 64: 19 to 14 ms for one user, 35 to 28 for 16.
    const int64_t end = least(first_event + 2 * n, unit.last_event);
    for (int64_t i = first_event + n; i < end; i++) {
      const char* row = static_cast<const char*>(a.key.at(i, 0, a.element));
      for (int byte = 0; byte < a.head_dim * element_bytes(a.element); byte += 64)
        __builtin_prefetch(row + byte, 0, 2);
    }
    hidden = false;
    if (!bias) return;
    for (int i = 0; i < round_up(n, W); i++) {
      bias[i] = i < n ? load_element<Real>(options.bias, (first_event + i) * options.bias_stride,
                                           options.bias_element)
                      : Real{0};
      hidden |= bias[i] == -std::numeric_limits<Real>::infinity();
    }
  }

  void tile(const Tile<V>& t) {
    for (int r = 0; r < t.rows; r++) {
      Real* z = t.scores + r * kKeys;
      const int n = t.seen[r];
      finish_logits<V>(options.temperature, bias ? bias + t.packed_event : nullptr, hidden, n, z);
      if (options.excluded) {
        const int64_t* of_row = options.exclude_offsets + unit.first + t.first_row + r;
        hide_listed(options.excluded + of_row[0], options.excluded + of_row[1], t.first_event, n, z);
      }
      const int64_t row = unit.first + t.first_row + r;
      const Real least = options.out_of_reach ? static_cast<Real>(options.out_of_reach[row]) : -kInfinity;
      if (options.k > 0) best.take(t.first_row + r, t.first_event, n, z, least);
      infinite[t.first_row + r] |= hide_infinite(n, z);
      softmax.step(softmax, t.first_row + r, n, z);
    }
  }

  void finish(const TopkParts& parts) {
    for (int r = 0; r < unit.rows; r++) {
      const double sum = softmax.sum(r);
      parts.maximum[r] = infinite[r] ? kInfinity : softmax.maximum[r];
      parts.sum[r] = infinite[r] && sum == sum ? 1 : sum;
      parts.counts[r] = best.counts[r];
      for (int64_t i = 0; i < best.counts[r]; i++) {
        parts.scores[r * options.k + i] = best.of(r)[i].score;
        parts.ids[r * options.k + i] = best.of(r)[i].event;
      }
    }
  }

  // Scores of +inf are no part of the running softmax: inf - inf would make its sum NaN, as only a NaN
  // should. Says whether there are some.
  static bool hide_infinite(int n, Real* z) {
    uint32_t some = 0;
    for (int i = 0; i < n; i += W) some |= V::above(V::load(z + i), std::numeric_limits<Real>::max());
    if (!some) return false;
    for (int i = 0; i < n; i++) {
      if (z[i] == kInfinity) z[i] = -kInfinity;
    }
    return true;
  }

  static constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  const Attention& a;
  const Unit& unit;
  const TopkOptions& options;
  RunningSoftmax<V, true> softmax;
  Heaviest<V> best;
  Real* bias = nullptr;
  bool* infinite;       // of each row, whether some score is +inf
  bool hidden = false;  // some item of the packed ones by its bias
};

template <class V>
int64_t catalog_topk_unit(const Attention& a, const Unit& unit, void* memory, const TopkOptions& options,
                          const TopkParts& parts) {
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    const int span = packed_events<V, Products>(unit.rows, a.head_dim);
    Arena arena(memory);
    StreamScratch<V, Products> scratch(arena, span, a.head_dim);
    TopkReadout<V> readout(arena, a, unit, span, options);
    if (!memory) return arena.used();
    readout.begin();
    stream(a, unit, scratch, readout);
    readout.finish(parts);
    return arena.used();
  });
}

// scores[i] = one user's logit of item ids[i], bit for bit what the streaming core gives: the same products
// of rows that are gathered first.
template <class V>
int64_t catalog_topk_rescore(const Attention& a, void* memory, const TopkOptions& options, int64_t user,
                             const int64_t* ids, int64_t count, double* scores) {
  using Real = typename V::Real;
  constexpr int W = V::kWidth;
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    Arena arena(memory);
    StreamScratch<V, Products> scratch(arena, kKeys, a.head_dim);
    const int64_t bytes = static_cast<int64_t>(a.head_dim) * element_bytes(a.element);
    char* rows = arena.take<char>(kKeys * bytes);
    if (!memory) return arena.used();
    load_block<V, Products>(
        1, [&](int) { return a.query.at(user, 0, a.element); }, a.element, a.head_dim, Real{1}, scratch.rows);
    for (int64_t first = 0; first < count; first += kKeys) {
      const int n = static_cast<int>(least(kKeys, count - first));
      bool hidden = false;
      for (int i = 0; i < n; i++) {
        const int64_t ahead = first + i + kPrefetchEvents;
        for (int64_t byte = 0; ahead < count && byte < bytes; byte += 64)
          __builtin_prefetch(static_cast<const char*>(a.key.at(ids[ahead], 0, a.element)) + byte);
        std::memcpy(rows + i * bytes, a.key.at(ids[first + i], 0, a.element), static_cast<size_t>(bytes));
      }
      for (int i = 0; options.bias && i < round_up(n, W); i++) {
        scratch.bias[i] = i < n ? load_element<Real>(options.bias, ids[first + i] * options.bias_stride,
                                                     options.bias_element)
                                : Real{0};
        hidden |= scratch.bias[i] == -std::numeric_limits<Real>::infinity();
      }
      Products::pack_keys(rows, a.element, a.head_dim, n, a.head_dim, nullptr, scratch.panels);
      Products::scores(1, scratch.rows, scratch.panels, (n + W - 1) / W, a.head_dim, Real{1}, nullptr,
                       scratch.scores);
      finish_logits<V>(options.temperature, options.bias ? scratch.bias : nullptr, hidden, n, scratch.scores);
      for (int i = 0; i < n; i++) scores[first + i] = scratch.scores[i];
    }
    return arena.used();
  });
}

}  // namespace
}  // namespace attnrec::cpu
