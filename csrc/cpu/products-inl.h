// What the streaming softmax is made of: the two products, rows times events and weights times events.
#pragma once

#include "cpu/rows-inl.h"

namespace attnrec::cpu {
namespace {

constexpr int kChain = 64;     // products of a score in one chain
constexpr int kRowsHeld = 64;  // at most, before their weights are multiplied into what events get

// How a tier multiplies: `Item` is what packed keys, query rows, weights and values are made of in the two
// products, and up to `kRows` rows are a block. `Numbers` takes every element as a working number, `Pairs`
// (pairs-inl.h) two bf16 ones at once, `Tiles` (tiles-inl.h) the same by whole tiles.
template <class V>
struct Numbers;

// Scores of a tile, kKeys apart, as they come: what `scores` does with them if it is told nothing else.
template <class V>
struct KeepScores {
  typename V::Real* to;

  template <class... Registers>
  ATTNREC_MEMBER void operator()(int r, int event, Registers... scores) const {
    ((V::store(to + r * kKeys + event, scores), event += V::kWidth), ...);
  }
};

// Products in vector registers. A block of rows lies as [chain][r][kChain items], at strides that the
// compiler knows. (Interleaved, [d][r], it took 14 % of a small call to make.)
template <class V, class Products>
struct RegisterBlock {
  using Real = typename V::Real;
  static constexpr int kRows = V::kRows;
  static constexpr bool kInRegisters = V::kRoom;  // scores are best used before they are stored

  static int64_t items(int depth) { return kRows * round_up(depth, kChain); }
  static int place(int r, int d, int) { return (d / kChain * kRows + r) * kChain + d % kChain; }

  // The scores of a block's rows against registers of packed events, times `factor` where rows have not had
  // it, with the events' bias (or null), to sink(r, event, a panel's one or two registers). What is too deep
  // for one chain is summed in `partial`, a tile of scores.
  template <class Item, class Sink>
  ATTNREC_INLINE void scores(int rows, const Item* block, const Item* panels, int registers, int head_dim,
                             Real factor, const Real* bias, Real* partial, Sink sink) {
    scores_of<V, Products>(rows, block, panels, registers, head_dim, factor, bias, partial, sink);
  }
  // The same, to a tile of scores.
  template <class Item>
  ATTNREC_INLINE void scores(int rows, const Item* block, const Item* panels, int registers, int head_dim,
                             Real factor, const Real* bias, Real* to) {
    scores(rows, block, panels, registers, head_dim, factor, bias, to, KeepScores<V>{to});
  }
};

// sum[r][j] = Σ_d rows[r][d] · panel[d][register j] for M rows and the first N registers of a panel's events,
// over at most kChain items d of a row.
template <class V, class Products, int M, int N>
ATTNREC_INLINE void score_chain(const typename Products::Item* rows, const typename Products::Item* panel,
                                int items, typename V::Reg (&sum)[M][N]) {
  constexpr int W = V::kWidth;
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) {
    for (int j = 0; j < N; j++) sum[r][j] = V::zero();
  }
#pragma GCC unroll 4
  for (int d = 0; d < items; d++) {
    typename V::Reg k[N];
    for (int j = 0; j < N; j++) k[j] = Products::load(panel + d * 2 * W + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      const typename V::Reg q = Products::set1(rows[r * kChain + d]);
      for (int j = 0; j < N; j++) sum[r][j] = Products::multiply_add(q, k[j], sum[r][j]);
    }
  }
}

// Hands sink(r, event, scores), N registers of them at a time, of M rows and the events of a panel's first N
// registers, the first of which is number `event`: Σ_d rows[r][d] · panel[d][event …] + bias[event …] (null:
// 0). Rows lie as `load_block` leaves them.
template <class V, class Products, int M, int N, class Sink>
ATTNREC_INLINE void score_panel(const typename Products::Item* rows, const typename Products::Item* panel,
                                int depth, typename V::Real factor, const typename V::Real* bias, int event,
                                typename V::Real* partial, Sink& sink) {
  constexpr int W = V::kWidth;
  typename V::Reg sum[M][N];
  score_chain<V, Products>(rows, panel, depth < kChain ? depth : kChain, sum);
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) {
    for (int j = 0; j < N; j++) sum[r][j] = Products::scaled(sum[r][j], factor);
  }
  // The pipes that add have nothing else to do here: as a pass of its own the bias took 2 to 18 % of a call.
  if (bias) {
    typename V::Reg b[N];
    for (int j = 0; j < N; j++) b[j] = V::load(bias + event + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      for (int j = 0; j < N; j++) sum[r][j] = V::add(sum[r][j], b[j]);
    }
  }
  // Chains of at most kChain products, added up in memory: with D = 256 in one chain the error was 3 times a
  // GEMM's.
  for (int begin = kChain; begin < depth; begin += kChain) {
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      for (int j = 0; j < N; j++) V::store(partial + r * kKeys + event + j * W, sum[r][j]);
    }
    rows += V::kRows * kChain;
    panel += kChain * 2 * W;
    score_chain<V, Products>(rows, panel, depth - begin < kChain ? depth - begin : kChain, sum);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      for (int j = 0; j < N; j++) {
        const typename V::Reg before = V::load(partial + r * kKeys + event + j * W);
        sum[r][j] = V::add(before, Products::scaled(sum[r][j], factor));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) {
    if constexpr (N == 2)
      sink(r, event, sum[r][0], sum[r][1]);
    else
      sink(r, event, sum[r][0]);
  }
}

// The scores of M rows and `registers` registers of events, in panels of 2.
template <class V, class Products, int M, class Sink>
void score_block(const typename Products::Item* rows, const typename Products::Item* panel, int registers,
                 int head_dim, typename V::Real factor, const typename V::Real* bias,
                 typename V::Real* partial, Sink sink) {
  constexpr int W = V::kWidth;
  const int depth = Products::depth(head_dim);
  int event = 0;
  for (; registers > 1; registers -= 2, event += 2 * W, panel += static_cast<int64_t>(2 * W) * depth)
    score_panel<V, Products, M, 2>(rows, panel, depth, factor, bias, event, partial, sink);
  if (registers > 0) score_panel<V, Products, M, 1>(rows, panel, depth, factor, bias, event, partial, sink);
}

// out[r][:] += Σ_i factor[r * factor_row + i * factor_step] · values[i][:], i in order, for M rows of `width`
// numbers: summed apart and then added, or as one chain with what `out` has. Sums over thousands of events
// are made of parts, so that their rounding errors stay those of short sums (a chain of 4096 has 4 times
// plain PyTorch's error).
template <class V, int M, bool kApart = true, class Products = Numbers<V>>
void accumulate_block(const typename Products::Item* factor, int factor_row, int factor_step,
                      const typename Products::Item* values, int64_t value_stride, int n, int width,
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
      const typename V::Reg v0 = Products::load(values + i * value_stride + d);
      const typename V::Reg v1 = Products::load(values + i * value_stride + d + W);
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        const typename V::Reg f = Products::set1(factor[r * factor_row + i * factor_step]);
        sum[r][0] = Products::multiply_add(f, v0, sum[r][0]);
        sum[r][1] = Products::multiply_add(f, v1, sum[r][1]);
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
      const typename V::Reg v = Products::load(values + i * value_stride + d);
#pragma GCC unroll 8
      for (int r = 0; r < M; r++)
        sum[r] = Products::multiply_add(Products::set1(factor[r * factor_row + i * factor_step]), v, sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      Real* to = out + r * out_stride + d;
      V::store(to, kApart ? V::add(V::load(to), sum[r]) : sum[r]);
    }
  }
}

// Turns a run-time number of rows (1 … V::kRows) into the template's.
template <class V, class Products, int M = V::kRows, class... Arguments>
ATTNREC_INLINE void scores_of(int rows, Arguments... arguments) {
  if constexpr (M > 1) {
    if (rows < M) return scores_of<V, Products, M - 1>(rows, arguments...);
  }
  score_block<V, Products, M>(arguments...);
}

template <class V, bool kApart = true, class Products = Numbers<V>, int M = V::kRows, class... Arguments>
ATTNREC_INLINE void accumulate(int rows, Arguments... arguments) {
  if constexpr (M > 1) {
    if (rows < M) return accumulate<V, kApart, Products, M - 1>(rows, arguments...);
  }
  accumulate_block<V, M, kApart, Products>(arguments...);
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

// A block of `count` rows, found by at(r) (null: zeros), as `Products::scores` reads it.
template <class V, class Products, class At>
void load_block(int count, At&& at, Element element, int head_dim, typename V::Real factor,
                typename Products::Item* to) {
  const int depth = Products::depth(head_dim);
  for (int r = 0; r < count; r++) {
    const void* row = at(r);
    for (int d = 0; d < depth; d += V::kWidth) {
      Products::store(to + Products::place(r, d, depth),
                      row ? Products::load_part(row, element, d, head_dim, factor) : V::zero());
    }
  }
}

// Σ_d a[d]·b[d] of two padded rows, the order that self slots use.
template <class V>
ATTNREC_INLINE typename V::Real dot(const typename V::Real* a, const typename V::Real* b, int width) {
  typename V::Reg sum = V::zero();
  for (int d = 0; d < width; d += V::kWidth) sum = V::fma(V::load(a + d), V::load(b + d), sum);
  return V::sum(sum);
}

template <class V>
struct Numbers : RegisterBlock<V, Numbers<V>> {
  using Real = typename V::Real;
  using Item = Real;
  static constexpr bool kShortExp = false;

  ATTNREC_INLINE typename V::Reg load(const Item* p) { return V::load(p); }
  ATTNREC_INLINE typename V::Reg set1(Item x) { return V::set1(x); }
  ATTNREC_INLINE typename V::Reg multiply_add(typename V::Reg a, typename V::Reg b, typename V::Reg sum) {
    return V::fma(a, b, sum);
  }
  // The scale came in with the query.
  ATTNREC_INLINE typename V::Reg scaled(typename V::Reg score, Real) { return score; }

  static int depth(int head_dim) { return head_dim; }

  static void pack_keys(const void* data, Element element, int64_t stride, int n, int head_dim,
                        const Real* hide, Item* panels, Ahead ahead = {}) {
    pack_panels<V>(data, element, stride, n, head_dim, hide, panels, ahead);
  }

  // A register of a row's items from the d-th on.
  ATTNREC_INLINE typename V::Reg load_part(const void* data, Element element, int d, int head_dim,
                                           Real factor) {
    typename V::Reg part;
    with_element<V>(element, data, [&](auto* from) __attribute__((always_inline)) {
      part = V::mul(cpu::load_part<V>(from + d, head_dim - d), V::set1(factor));
    });
    return part;
  }
  ATTNREC_INLINE void store(Item* p, typename V::Reg r) { V::store(p, r); }

  // Values of packed events.
  struct Values {
    Values(Arena& arena, int span, int head_dim)
        : width(padded<V>(head_dim)), copied(arena.take<Real>(static_cast<int64_t>(span) * width)) {}

    void pack(const void* data, Element element, int64_t stride, int n, int head_dim, const Real* hide,
              bool copy_anyway, Ahead ahead = {}) {
      values =
          event_rows<V>(data, element, stride, n, head_dim, hide, copy_anyway, copied, &value_stride, ahead);
    }

    // Takes in weights i … of a tile's row r, one or two registers of them.
    template <class... Registers>
    ATTNREC_MEMBER void keep(int r, int i, Real* scores, Registers... weights) {
      ((V::store(scores + r * kKeys + i, weights), i += V::kWidth), ...);
    }

    // out += weights · values for a tile of a block's rows.
    void accumulate_seen(int rows, const int* seen, const Real* scores, int packed_event, Real* out,
                         int64_t out_stride) {
      attnrec::cpu::accumulate_seen<V>(rows, seen, scores, values + packed_event * value_stride, value_stride,
                                       width, out, out_stride);
    }

    int width;
    Real* copied;
    const Real* values = nullptr;
    int64_t value_stride = 0;
  };

  // Sums over rows into events, to[event] += Σ_r weights[r][event] · rows[r], of rows that `prepare` has
  // prepared in place. Rows of weights are kKeys apart.
  static void prepare(Real*, int, int) {}
  static int rows_read(int count) { return count; }  // of `count` rows; those behind have to be zeros
  // Keeps a register of each of two rows of weights, the first of which has its place at `to`.
  ATTNREC_INLINE void keep_rows(Real* to, typename V::Reg first, typename V::Reg second) {
    V::store(to, first);
    V::store(to + kKeys, second);
  }
  template <bool kApart>
  static void sum_rows(int events, const Real* weights, const Real* rows, int first, int last, int width,
                       Real* to) {
    accumulate<V, kApart>(events, weights + first * kKeys, 1, kKeys, rows + int64_t{first} * width,
                          int64_t{width}, last - first, width, to, int64_t{width});
  }
  // Of one event, only over rows with seen[r] > event.
  static void sum_seen_rows(const int* seen, int event, const Real* weights, const Real* rows, int first,
                            int last, int width, Real* to) {
    for (int r = first; r < last; r++) {
      if (seen[r] > event) sum_rows<false>(1, weights, rows, r, r + 1, width, to);
    }
  }
};

}  // namespace
}  // namespace attnrec::cpu
