// target_attention, backward: a readout of the streaming softmax. With P = exp(s - lse) and delta = Σ_d
// dO·out,
//   dS = P ∘ (dO·Vᵀ - delta + grad_lse),  dQ = scale · dS·K,  dK = scale · dSᵀ·Q,  dV = Pᵀ·dO,  dbias =
//   Σ_rows dS
// (Dao et al. 2022, FlashAttention, algorithm 4). Scores are computed again, five products in all. A unit is
// all rows of a user and a kv head against a range of events, so that what events get is summed by one thread
// in row order.
#pragma once

#include "cpu/target_attention_backward.h"
#include "cpu/target_attention_top-inl.h"

namespace attnrec::cpu {
namespace {

template <class V, class Products>
struct Backward {
  using Real = typename V::Real;
  using Item = typename Products::Item;
  using Softmax = RunningSoftmax<V, false, Base::kNothing, Products::kShortExp>;  // its exponential
  static constexpr int W = V::kWidth;
  // Rows whose P and dS are kept before they are multiplied into dV and dK: long sums, and 2 x 64 KiB of L2.
  static constexpr int kChunk = kRowsHeld / Products::kRows * Products::kRows;

  // Keys and values of 256 events, their gradients, and a chunk's P and dS stay in L2 together.
  static int span(int head_dim) { return head_dim <= 64 ? 2 * kKeys : kKeys; }

  Backward(Arena& arena, const Attention& attention, const AttentionGradients& gradients, const Unit& unit)
      : a(attention),
        g(gradients),
        whole(unit),
        width(padded<V>(a.head_dim)),
        keys(arena, span(a.head_dim), a.head_dim) {
    const int64_t events = unit.last_event - unit.first_event;
    base = arena.take<Real>(unit.rows);
    base_rest = arena.take<Real>(unit.rows);
    shift = arena.take<Real>(unit.rows);
    self_weight = arena.take<Real>(unit.rows);
    self_grad = arena.take<Real>(unit.rows);
    grad_query = arena.take<Real>(static_cast<int64_t>(unit.rows) * width);
    grad_key = arena.take<Real>(events * width);
    grad_value = arena.take<Real>(events * width);
    grad_bias = arena.take<Real>(a.key_bias ? round_up(events, kKeys) : 0);
    grad_bias_chunk = arena.take<Real>(a.key_bias ? span(a.head_dim) : 0);
    value_panels = arena.take<Item>(static_cast<int64_t>(span(a.head_dim)) * Products::depth(a.head_dim));
    query = arena.take<Real>(int64_t{kChunk} * width);
    grad_out = arena.take<Real>(int64_t{kChunk} * width);
    grad_out_rows = arena.take<Item>(Products::items(Products::depth(a.head_dim)));
    grad_weight = arena.take<Real>(Products::kRows * kKeys);
    weight = arena.take<Real>(int64_t{kChunk} * span(a.head_dim));
    grad_score = arena.take<Real>(int64_t{kChunk} * span(a.head_dim));
    self = arena.take<Real>(3 * int64_t{width});
  }

  void begin() {
    const int64_t events = whole.last_event - whole.first_event;
    clear(grad_key, events * width);
    clear(grad_value, events * width);
    if (a.key_bias) {
      clear(grad_bias, round_up(events, kKeys));
      clear(grad_bias_chunk, span(a.head_dim));
    }
    for (int r = 0; r < whole.rows; r++) {
      const int64_t c = whole.candidate(r);
      const int h = whole.query_head(r);
      load_row<V>(g.grad_out.at(c, h, a.element), a.element, a.head_dim, 1, grad_out);
      load_row<V>(g.out.at(c, h, a.element), a.element, a.head_dim, 1, query);
      // In two numbers, so that the change to base 2 adds no rounding to that of the lse itself.
      const double lse2 = working(g.lse, c, h) * kLog2E;
      base[r] = static_cast<Real>(lse2);
      base_rest[r] = sees(r) ? static_cast<Real>(lse2 - base[r]) : 0;
      shift[r] = dot<V>(grad_out, query, width) - grad_lse(r);
      clear(grad_query + static_cast<int64_t>(r) * width, width);
      self_weight[r] = self_grad[r] = 0;
      if (with_self() && sees(r)) start_self_slot(r);
    }
  }

  // The heads of `unit` come next: all of the whole unit, or one where each has its own bias.
  void begin_heads(const Unit& u) {
    unit = u;
    row_step = whole.group / unit.group;
  }

  void pack(int64_t first, int n, const Real* hide) {
    flush();
    packed = first;
    block = -1;
    const int64_t event = a.kv_offsets[unit.user] + first;
    Products::pack_keys(a.value.at(event, unit.kv_head, a.element), a.element, a.value.row_stride, n,
                        a.head_dim, hide, value_panels);
    keys.pack(a.key.at(event, unit.kv_head, a.element), a.element, a.key.row_stride, n, a.head_dim, hide,
              false);
  }

  void tile(const Tile<V>& t) {
    if (t.first_row != block) start_block(t);
    Products::scores(t.rows, grad_out_rows,
                     value_panels + static_cast<int64_t>(t.packed_event) * Products::depth(a.head_dim),
                     (most(t.seen, t.rows) + W - 1) / W, a.head_dim, Real{1}, nullptr, grad_weight);
    const int64_t at = (int64_t{t.packed_event} * kChunk) + int64_t{place} * kKeys;
    int seen_here[Products::kRows + 1] = {};  // and none of a last row that has no other beside it
    for (int r = 0; r < t.rows; r++)
      seen_here[r] = static_cast<int>(greatest(0, least(t.seen[r], seen[place + r] - t.packed_event)));
    for (int r = 0; r < t.rows; r += 2) {
      const bool whole_here =
          t.first_event == 0 && (is_whole(t, r) || (r + 1 < t.rows && is_whole(t, r + 1)));
      if (whole_here) {
        weigh_whole(t, r, seen_here[r]);
        if (r + 1 < t.rows) weigh_whole(t, r + 1, seen_here[r + 1]);
        two_rows<true>(t, r, seen_here, at);
      } else {
        two_rows<false>(t, r, seen_here, at);
      }
    }
    keys.accumulate_seen(t.rows, seen_here, grad_score + at, t.packed_event,
                         grad_query + whole_row(t.first_row) * width, static_cast<int64_t>(row_step) * width);
  }

  void finish_heads() {
    flush();
    if (!a.key_bias) return;
    for (int64_t event = whole.first_event; event < stored_end(); event++) {
      Real* sum = grad_bias + (event - whole.first_event);
      const int64_t row = a.kv_offsets[unit.user] + event;
      const bool kept = event < whole.last_event && !hidden(event);
      store_element<Real>(g.grad_key_bias, row * a.heads + unit.head, a.bias_element, kept ? *sum : 0);
      if (event < whole.last_event) *sum = 0;
    }
  }

  void finish(const GradQuery& to) {
    const int D = a.head_dim;
    const Real scale = static_cast<Real>(a.scale);
    for (int r = 0; r < whole.rows; r++) {
      if (with_self()) finish_self_slot(r);
      const int64_t row = (whole.candidate(r) - whole.first) * a.heads + whole.query_head(r);
      store_row<V>(grad_query + static_cast<int64_t>(r) * width, scale, D, to.element,
                   static_cast<char*>(to.data) + row * D * element_bytes(to.element));
    }
    clear(self, width);  // what events beyond the last get
    const int64_t events = whole.last_event - whole.first_event, beyond = stored_end() - whole.last_event,
                  stride = int64_t{a.kv_heads} * D;
    const auto store = [&](const Real* rows, Real factor, void* gradient) {
      const int64_t first = (a.kv_offsets[whole.user] + whole.first_event) * stride + whole.kv_head * D;
      char* to = static_cast<char*>(gradient) + first * element_bytes(a.element);
      store_rows<V>(rows, width, events, factor, D, a.element, to, stride, g.past_caches);
      to += events * stride * element_bytes(a.element);
      store_rows<V>(self, 0, beyond, 1, D, a.element, to, stride, g.past_caches);
    };
    store(grad_key, scale, g.grad_key);
    store(grad_value, 1, g.grad_value);
  }

 private:
  // Weights from scores and a row's log-sum-exp, which is in two numbers.
  ATTNREC_INLINE typename V::Reg weights_of(typename V::Reg scores, typename V::Reg lse,
                                            typename V::Reg rest) {
    return Softmax::power(V::sub(V::sub(scores, lse), rest));
  }

  // Whether a tile with the first events has all that row r sees.
  bool is_whole(const Tile<V>& t, int r) const { return seen_events(a, unit, t.first_row + r) <= kKeys; }

  // Turns row r's scores into weights. The rounding of the lse makes all weights of a row wrong by one factor
  // near 1, that of `out` its delta. Where all its events are here, as with a short history, both are known
  // better: plain PyTorch, which keeps every weight, is nearly exact for the few heavy ones of such a row.
  void weigh_whole(const Tile<V>& t, int r, int n) {
    const int64_t row = whole_row(t.first_row + r);
    Real* weights = t.scores + r * kKeys;
    const typename V::Reg lse = V::set1(base[row]), rest = V::set1(base_rest[row]);
    typename V::Reg sum = V::zero(), weighted = V::zero();
    for (int i = 0; i < n; i += W) {
      const typename V::Reg exp = weights_of(V::load(weights + i), lse, rest);
      V::store(weights + i, exp);
      sum = V::add(sum, exp);
      weighted = V::fma(exp, V::first(V::load(grad_weight + r * kKeys + i), n - i, 0), weighted);
    }
    if (n == 0 || !is_whole(t, r)) return;
    const Real factor = 1 / (V::sum(sum) + self_weight[row]);
    shift[row] = (V::sum(weighted) + self_weight[row] * self_grad[row]) * factor - grad_lse(row);
    self_weight[row] *= factor;
    for (int i = 0; i < n; i += W) V::store(weights + i, V::mul(V::load(weights + i), V::set1(factor)));
  }

  // P and dS of rows r and r + 1 of a tile, whose scores are weights already (kWeights) or not.
  template <bool kWeights>
  void two_rows(const Tile<V>& t, int r, const int* seen_here, int64_t at) {
    const int n[] = {seen_here[r], seen_here[r + 1]};
    typename V::Reg lse[2], rest[2], less[2];
    for (int k = 0; k < 2; k++) {
      const int64_t row = n[k] > 0 ? whole_row(t.first_row + r + k) : 0;
      lse[k] = V::set1(base[row]), rest[k] = V::set1(base_rest[row]), less[k] = V::set1(shift[row]);
    }
    const auto step = [&](int i, auto all) ATTNREC_LAMBDA {
      typename V::Reg p[2], ds[2];
#pragma GCC unroll 2
      for (int k = 0; k < 2; k++) {
        p[k] = ds[k] = V::zero();
        if (!all && i >= n[k]) continue;
        const typename V::Reg score = V::load(t.scores + (r + k) * kKeys + i);
        p[k] = kWeights ? score : weights_of(score, lse[k], rest[k]);
        ds[k] = V::mul(p[k], V::sub(V::load(grad_weight + (r + k) * kKeys + i), less[k]));
        // The weight is 0 from there on, but not where the row's log-sum-exp is NaN, nor is 0 · NaN.
        if (!all) {
          p[k] = V::first(p[k], n[k] - i, 0);
          ds[k] = V::first(ds[k], n[k] - i, 0);
        }
        // For the product with keys; as numbers it is what `keep_rows` keeps.
        if constexpr (!std::is_same_v<Item, Real>) keys.keep(r + k, i, grad_score + at, ds[k]);
      }
      Products::keep_rows(weight + at + r * kKeys + i, p[0], p[1]);
      Products::keep_rows(grad_score + at + r * kKeys + i, ds[0], ds[1]);
      if (!a.key_bias) return;
      Real* sum = grad_bias_chunk + t.packed_event + i;
      V::store(sum, V::add(V::add(V::load(sum), ds[0]), ds[1]));
    };
    const int both = n[0] < n[1] ? n[0] : n[1], either = n[0] < n[1] ? n[1] : n[0];
    int i = 0;
    for (; i + W <= both; i += W) step(i, std::true_type());
    for (; i < either; i += W) step(i, std::false_type());
  }

  static void clear(Real* p, int64_t n) {
    for (int64_t i = 0; i < n; i += W) V::store(p + i, V::zero());
  }
  static int most(const int* counts, int n) {
    int highest = 0;
    for (int i = 0; i < n; i++) highest = counts[i] > highest ? counts[i] : highest;
    return highest;
  }
  static Real working(const Vectors& of, int64_t c, int h) {
    constexpr Element element = sizeof(Real) == 8 ? Element::kFloat64 : Element::kFloat32;
    return *static_cast<const Real*>(of.at(c, h, element));
  }
  Real grad_lse(int64_t r) const {
    const int row = static_cast<int>(r);
    return g.grad_lse.data ? working(g.grad_lse, whole.candidate(row), whole.query_head(row)) : 0;
  }
  // A row that sees nothing has lse = -inf and no gradients.
  bool sees(int64_t r) const { return base[r] != -std::numeric_limits<Real>::infinity(); }
  // The row of the whole unit that a row of the heads in work is.
  int64_t whole_row(int r) const { return int64_t{r} * row_step + (unit.head - whole.head); }
  bool hidden(int64_t event) const {
    if (!a.key_bias) return false;
    const int64_t row = a.kv_offsets[unit.user] + event;
    return load_element<Real>(a.key_bias, row * a.bias_row_stride + unit.head * a.bias_head_stride,
                              a.bias_element) == -std::numeric_limits<Real>::infinity();
  }
  // The unit with the last events also writes the zeros of the room after them.
  int64_t stored_end() const {
    return whole.last_event == a.events(whole.user) ? a.room(whole.user) : whole.last_event;
  }
  void add_scaled(Real factor, const Real* row, Real* to) const {
    for (int d = 0; d < width; d += W) {
      V::store(to + d, V::fma(V::set1(factor), V::load(row + d), V::load(to + d)));
    }
  }

  bool with_self() const { return a.self_key.data && whole.first_event == 0; }

  // `grad_out` holds row r's dO.
  void start_self_slot(int r) {
    load_row<V>(a.self_value.at(whole.candidate(r), whole.kv_head, a.element), a.element, a.head_dim, 1,
                self);
    self_grad[r] = dot<V>(grad_out, self, width);
    self_weight[r] = exp2_of<V>(self_score<V>(a, whole, r) - base[r] - base_rest[r]);
    if (seen_events(a, whole, r) > 0) return;
    self_weight[r] = self_weight[r] - self_weight[r] + 1;  // alone it has all the weight, but a NaN stays
    shift[r] = self_grad[r] - grad_lse(r);
  }

  // The gradients of row r's self slot. The heads of a candidate come one after another.
  void finish_self_slot(int r) {
    Real *key_here = self, *dk = self + width, *dv = self + 2 * width;
    const int64_t c = whole.candidate(r);
    if (r % whole.group == 0) clear(dk, 2 * int64_t{width});
    if (sees(r)) {
      const int h = whole.query_head(r);
      load_row<V>(g.grad_out.at(c, h, a.element), a.element, a.head_dim, 1, grad_out);
      load_row<V>(a.query.at(c, h, a.element), a.element, a.head_dim, 1, query);
      load_row<V>(a.self_key.at(c, whole.kv_head, a.element), a.element, a.head_dim, 1, key_here);
      const Real p = self_weight[r], ds = p * (self_grad[r] - shift[r]);
      add_scaled(p, grad_out, dv);
      add_scaled(ds, query, dk);
      add_scaled(ds, key_here, grad_query + static_cast<int64_t>(r) * width);
    }
    if ((r + 1) % whole.group == 0) {
      const int64_t byte = (c * a.kv_heads + whole.kv_head) * a.head_dim * element_bytes(a.element);
      store_row<V>(dk, static_cast<Real>(a.scale), a.head_dim, a.element,
                   static_cast<char*>(g.grad_self_key) + byte);
      store_row<V>(dv, 1, a.head_dim, a.element, static_cast<char*>(g.grad_self_value) + byte);
    }
  }

  // A new block of rows takes the next places of the chunk.
  void start_block(const Tile<V>& t) {
    if (filled + t.rows > kChunk) flush();
    block = t.first_row;
    place = filled;
    filled += t.rows;
    for (int r = 0; r < t.rows; r++) {
      const int64_t c = unit.candidate(block + r), row = whole_row(block + r);
      const int h = unit.query_head(block + r);
      Real *q = query + static_cast<int64_t>(place + r) * width,
           *d_out = grad_out + static_cast<int64_t>(place + r) * width;
      const bool blind = !sees(row);
      if (blind) {
        clear(q, width);
        clear(d_out, width);
      } else {
        load_row<V>(a.query.at(c, h, a.element), a.element, a.head_dim, 1, q);
        load_row<V>(g.grad_out.at(c, h, a.element), a.element, a.head_dim, 1, d_out);
        // Whatever of a row is not finite, its query, its dO or its self slot, makes one of these so.
        finite = finite && (base[row] + shift[row]) * 0 == 0;
      }
      const int64_t events = seen_events(a, unit, block + r) - packed;
      seen[place + r] = static_cast<int>(blind ? 0 : greatest(0, least(events, span(a.head_dim))));
    }
    load_block<V, Products>(
        t.rows,
        [&](int r) -> const void* {
          if (!sees(whole_row(block + r))) return nullptr;
          return g.grad_out.at(unit.candidate(block + r), unit.query_head(block + r), a.element);
        },
        a.element, a.head_dim, 1, grad_out_rows);
  }

  // Multiplies the chunk's P and dS into the gradients of the packed events.
  void flush() {
    const int all = most(seen, filled);
    Products::prepare(query, filled, width);
    Products::prepare(grad_out, filled, width);
    for (int begin = 0; begin < all; begin += kKeys) {
      const int count = static_cast<int>(least(kKeys, all - begin));
      Real *p = weight + int64_t{begin} * kChunk, *ds = grad_score + int64_t{begin} * kChunk;
      for (int r = 0; r < Products::rows_read(filled); r += 2) {
        const int either = r < filled ? most(seen + r, r + 1 < filled ? 2 : 1) : 0;
        const int64_t zeros = round_up(greatest(0, least(kKeys, either - begin)), W);
        for (int64_t i = zeros; i < count; i += W) {
          Products::keep_rows(p + r * kKeys + i, V::zero(), V::zero());
          Products::keep_rows(ds + r * kKeys + i, V::zero(), V::zero());
        }
      }
      for (int i = 0; a.key_bias && i < count; i += W) {
        Real *sum = grad_bias + (packed - whole.first_event) + begin + i,
             *chunk = grad_bias_chunk + begin + i;
        V::store(sum, V::add(V::load(sum), V::load(chunk)));
        V::store(chunk, V::zero());
      }
      // Rows that see none of these events are left out at both ends (visible = 1, 2, 3 …); between them they
      // have zeros, which would not do against a NaN: with one in the chunk, each event takes its own rows
      // only.
      for (int e = 0; e < count; e += finite ? Products::kRows : 1) {
        int first = 0, last = filled;
        while (first < last && seen[first] <= begin + e) first++;
        while (last > first && seen[last - 1] <= begin + e) last--;
        if (first == last) continue;
        const int64_t to = (packed - whole.first_event + begin + e) * width;
        if (finite) {
          const int events = static_cast<int>(least(Products::kRows, count - e));
          Products::template sum_rows<true>(events, p + e, grad_out, first, last, width, grad_value + to);
          Products::template sum_rows<true>(events, ds + e, query, first, last, width, grad_key + to);
        } else if (!hidden(packed + begin + e)) {
          clear(self, 2 * int64_t{width});
          Products::sum_seen_rows(seen, begin + e, p + e, grad_out, first, last, width, self);
          Products::sum_seen_rows(seen, begin + e, ds + e, query, first, last, width, self + width);
          add_scaled(1, self, grad_value + to);
          add_scaled(1, self + width, grad_key + to);
        }
      }
    }
    filled = 0;
    finite = true;
  }

  const Attention& a;
  const AttentionGradients& g;
  const Unit whole;
  const int width;
  // Of the whole unit's rows: lse in base 2 (in two parts), delta - grad_lse, P and dO·V of the self slot, dQ
  // / scale.
  Real *base, *base_rest, *shift, *self_weight, *self_grad, *grad_query;
  Real *grad_key, *grad_value, *grad_bias;       // of its events: dK / scale, dV, dbias
  Real* grad_bias_chunk;                         // of the packed events, from the rows of the chunk
  Item* value_panels;                            // of the packed events
  typename Products::Values keys;                // of the packed events
  Real *query, *grad_out, *weight, *grad_score;  // of the chunk's rows; P and dS as [tile][row][kKeys]
  Item* grad_out_rows;                           // of the block
  Real* grad_weight;                             // of the block
  Real* self;                                    // of one self slot; elsewhere rows for what passes

  Unit unit;
  int row_step = 1;
  int64_t packed = 0;
  int block = -1, place = 0, filled = 0;
  bool finite = true;
  int seen[kChunk] = {};  // of the packed events, by the rows of the chunk
};

template <class V>
int64_t target_attention_backward_unit(const Attention& a, const Unit& unit, void* memory,
                                       const AttentionGradients& g, const GradQuery& grad_query) {
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    Arena arena(memory);
    StreamScratch<V, Products> scratch(arena, Backward<V, Products>::span(a.head_dim), a.head_dim);
    Backward<V, Products> readout(arena, a, g, unit);
    if (!memory) return arena.used();
    readout.begin();
    const int group = a.key_bias ? 1 : unit.group;
    for (int head = 0; head < unit.group; head += group) {
      Unit heads = unit;
      heads.rows = unit.rows / unit.group * group;
      heads.group = group;
      heads.head = unit.head + head;
      readout.begin_heads(heads);
      stream(a, heads, scratch, readout);
      readout.finish_heads();
    }
    readout.finish(grad_query);
    return arena.used();
  });
}

// out[i] = Σ_p parts[p · stride + i], p in order, for n numbers.
template <class V>
void target_attention_backward_add(const void* parts, int64_t count, int64_t stride, int64_t n,
                                   Element element, void* out) {
  using Real = typename V::Real;
  for (int64_t i = 0; i < n; i += V::kWidth) {
    const int left = static_cast<int>(least(V::kWidth, n - i));
    typename V::Reg sum = V::zero();
    for (int64_t p = 0; p < count; p++) {
      sum = V::add(sum, load_part<V>(static_cast<const Real*>(parts) + p * stride + i, left));
    }
    Real row[V::kWidth];
    V::store(row, sum);
    store_row<V>(row, 1, left, element, static_cast<char*>(out) + i * element_bytes(element));
  }
}

}  // namespace
}  // namespace attnrec::cpu
