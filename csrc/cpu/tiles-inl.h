// Products of bf16 numbers by tiles (AMX): a block is two tiles of rows, and one instruction multiplies 16
// rows of 32 numbers with 16 columns of them. Only the tiers with `V::kTiles` have it. Both products are the
// same few lines: packed keys and values lie as `Pairs` packs them, which is what the instruction reads.
//
// A block of 32 x 32 scores over 32 numbers takes 4 products, 4 loads and 4 stores, at 16, 8 and 16 cycles
// each: an estimate, for it has been timed nowhere.
#pragma once

#include "cpu/pairs-inl.h"

namespace attnrec::cpu {
namespace {

template <class V>
struct Tiles : Pairs<V> {
  using Real = typename V::Real;
  using Item = uint32_t;
  using WithVectors = Pairs<V>;
  static constexpr int W = V::kWidth;
  static constexpr bool kInRegisters = false;
  static constexpr int kTile = 16;         // rows of a tile, and items of a row
  static constexpr int kRows = 2 * kTile;  // of a block: each tile of keys or values serves two of rows
  static constexpr int kItem = sizeof(Item);

  // A score is summed over chunks of at most 16 pairs, all of one size, so that zeros fill a few pairs at
  // most.
  static int chunks(int head_dim) { return (WithVectors::depth(head_dim) + kTile - 1) / kTile; }
  static int chunk(int head_dim) {
    return (WithVectors::depth(head_dim) + chunks(head_dim) - 1) / chunks(head_dim);
  }
  static int depth(int head_dim) { return chunks(head_dim) * chunk(head_dim); }

  // A block of rows lies row by row. Whole registers are stored, so that the last one needs room.
  static int64_t items(int depth) { return int64_t{kRows} * depth + W; }
  static int place(int r, int d, int depth) { return r * depth + d; }

  static void pack_keys(const void* data, Element, int64_t stride, int n, int head_dim, const Real* hide,
                        Item* panels, Ahead ahead = {}) {
    WithVectors::pack_panels_of(depth(head_dim), data, stride, n, head_dim, hide, panels, ahead);
  }

  static void scores(int rows, const Item* block, const Item* panels, int registers, int head_dim,
                     Real factor, const Real* bias, Real* to) {
    const int size = chunk(head_dim), pairs = depth(head_dim);
    configure(rows, size);
    for (int i = 0; i < registers; i += 2) {
      const Factor a{block, pairs * kItem, size};
      const Factor b{panels + int64_t{i} * W * pairs, 2 * W * kItem, int64_t{size} * 2 * W};
      const int columns = static_cast<int>(least(2, registers - i));
      if (size == kTile) {
        columns_of<Together>(rows, columns, a, b, chunks(head_dim), false, to + i * W, kKeys);
      } else {
        columns_of<ScoresApart>(rows, columns, a, b, chunks(head_dim), false, to + i * W, kKeys);
      }
    }
    if (factor == 1 && !bias) return;
    for (int r = 0; r < rows; r++) {
      Real* row = to + r * kKeys;
      for (int i = 0; i < registers * W; i += W) {
        const typename V::Reg s = WithVectors::scaled(V::load(row + i), factor);
        V::store(row + i, bias ? V::add(s, V::load(bias + i)) : s);
      }
    }
  }

  struct Values : WithVectors::Values {
    Values(Arena& arena, int span, int head_dim)
        : WithVectors::Values(arena, span, head_dim, kRows), score_chunk(chunk(head_dim)) {}

    // Zeros fill the last tile.
    void pack(const void* data, Element element, int64_t stride, int n, int head_dim, const Real* hide,
              bool copy_anyway, Ahead ahead = {}) {
      WithVectors::Values::pack(data, element, stride, n, head_dim, hide, copy_anyway, ahead);
      Item* end = items + round_up(n, 2 * kTile) / 2 * width;
      for (Item* p = items + round_up(n, 2) / 2 * width; p < end; p += W) V::store_pairs(p, V::zero());
    }

    void accumulate_seen(int rows, const int* seen, const Real*, int packed_event, Real* out,
                         int64_t out_stride) {
      int most = 0;
      for (int r = 0; r < rows; r++) most = seen[r] > most ? seen[r] : most;
      for (int r = 0; r < rows; r++) {
        Item *row = weights + r * (kKeys / 2), *end = row + round_up(most, 2 * kTile) / 2;
        for (Item* p = row + round_up(seen[r], W) / 2; p < end; p++) *p = 0;
      }
      const Item* from = items + static_cast<int64_t>(packed_event / 2) * width;
      if (finite[packed_event / kKeys]) {  // what a row does not see has weight 0, which adds nothing
        for (int d = 0; d < width; d += 2 * kTile) sum(0, rows, most, from + d, width, d, out, out_stride);
        return;
      }
      // Rows that see alike go together, with zeros for what they do not see: the same sums.
      for (int r = 0, end; r < rows; r = end) {
        for (end = r + 1; end < rows && seen[end] == seen[r];) end++;
        for (int d = 0; seen[r] && d < width; d += 2 * kTile) {
          Item visible[kKeys / 2 * 2 * kTile];
          for (int p = 0; p < round_up(seen[r], 2 * kTile) / 2; p++) {
            const Item kept = seen[r] >= 2 * p + 2 ? ~Item{0} : seen[r] > 2 * p ? WithVectors::kFirst : 0;
            for (int i = 0; i < 2 * kTile && d + i < width; i++)
              visible[p * 2 * kTile + i] = from[int64_t{p} * width + d + i] & kept;
          }
          sum(r, end, seen[r], visible, 2 * kTile, d, out, out_stride);
        }
      }
    }

    using WithVectors::Values::finite, WithVectors::Values::items, WithVectors::Values::weights,
        WithVectors::Values::width;
    const int score_chunk;

   private:
    // Adds the products of rows first … last with columns d … of `events` values at `from` to `out`.
    void sum(int first, int last, int events, const Item* from, int64_t stride, int d, Real* out,
             int64_t out_stride) {
      if (events == 0) return;
      configure(last - first, score_chunk);
      const Factor a{weights + first * (kKeys / 2), kKeys / 2 * kItem, kTile};
      const Factor b{from, stride * kItem, kTile * stride};
      const int columns = static_cast<int>(least(2, (width - d) / kTile)),
                steps = (events + 2 * kTile - 1) / (2 * kTile);
      Real* to = out + first * out_stride + d;
      if (score_chunk == kTile) {
        columns_of<Together>(last - first, columns, a, b, steps, true, to, out_stride);
      } else {
        columns_of<WeightsApart>(last - first, columns, a, b, steps, true, to, out_stride);
      }
    }
  };

  // Sums over rows go over multiples of 32 rows, with zeros behind the last.
  static int rows_read(int count) { return static_cast<int>(round_up(count, kRows)); }
  static void prepare(Real* rows, int count, int width) {
    WithVectors::prepare(rows, count, width);
    for (int64_t r = round_up(count, 2); r < rows_read(count); r += 2) {
      for (int d = 0; d < width; d += W)
        V::store_pairs(WithVectors::as_items(rows + r * width + d), V::zero());
    }
  }

  // Of up to kRows events over up to kRowsHeld rows. Weights are turned, so that events become a tile's rows.
  template <bool kApart>
  static void sum_rows(int events, const Real* weights, const Real* rows, int first, int last, int width,
                       Real* to) {
    static_assert(kApart && kRows == 2 * kTile);
    constexpr int kPairs = kRowsHeld / 2;
    Item turned[kRows * kPairs];
    const int from = first / kRows * kRows, steps = (last - from + kRows - 1) / kRows;
    for (int step = 0; step < steps; step++) {
      for (int e = 0; e < events; e += W) {
        typename V::Reg r[W];
        for (int i = 0; i < W; i++)
          r[i] = V::load_pairs(WithVectors::as_items(weights + (from + step * kRows + 2 * i) * kKeys) + e);
        V::transpose(r);
        for (int i = 0; i < W; i++) V::store_pairs(turned + (e + i) * kPairs + step * kTile, r[i]);
      }
    }
    configure(events, kTile);
    const Factor a{turned, kPairs * kItem, kTile};
    for (int d = 0; d < width; d += 2 * kTile) {
      const Factor b{WithVectors::as_items(rows + int64_t{from} * width) + d, 2 * width * kItem,
                     int64_t{kRows} * width};
      columns_of<Together>(events, static_cast<int>(least(2, (width - d) / kTile)), a, b, steps, true, to + d,
                           width);
    }
  }

  // To run a unit's products: a thread's tiles are configured by the first of them, stay so from block to
  // block, and are given back here. Left in use, they would be saved at each switch of threads, and keep a
  // core from its deeper states of sleep.
  class InUse {
   public:
    InUse() = default;
    InUse(const InUse&) = delete;
    ~InUse() {
      if (configured().rows == 0) return;
      V::tile_release();
      configured() = {};
    }
  };

 private:
  // Which tiles hold sums (from 0 on: by rows, then by columns), factors a and b. Where a chunk of a score is
  // as wide as one of weights, 32 events, the same tiles serve both products, with four sums at once; else
  // each has its own and two sums, as changing the configuration would take longer than that loses.
  template <int kFirstA, int kFirstB, int kSumsOfARow>
  struct Registers {
    static constexpr int kA = kFirstA, kB = kFirstB, kColumns = kSumsOfARow;
  };
  using Together = Registers<4, 6, 2>;
  using ScoresApart = Registers<2, 4, 1>;
  using WeightsApart = Registers<5, 7, 1>;

  struct Shape {
    int rows = 0, chunk = 0;
  };
  static Shape& configured() {
    static thread_local Shape of_thread;
    return of_thread;
  }

  // For blocks of `rows` rows, and scores in chunks of `chunk` pairs.
  static void configure(int rows, int chunk) {
    Shape& now = configured();
    if (now.rows == rows && now.chunk == chunk) return;
    now = {rows, chunk};
    const int first = rows < kTile ? rows : kTile, second = rows - first;
    typename V::Config config;
    const auto set = [&](int tile, int tile_rows, int items_of_row) {
      if (tile_rows == 0) return;
      config.rows[tile] = static_cast<uint8_t>(tile_rows);
      config.row_bytes[tile] = static_cast<uint16_t>(items_of_row * kItem);
    };
    const auto set_registers = [&](auto registers, int items_of_row) {
      using R = decltype(registers);
      for (int j = 0; j < R::kColumns; j++) {
        set(j, first, kTile);
        set(R::kColumns + j, second, kTile);
        set(R::kB + j, items_of_row, kTile);
      }
      set(R::kA, first, items_of_row);
      set(R::kA + 1, second, items_of_row);
    };
    if (chunk == kTile) {
      set_registers(Together(), kTile);
    } else {
      set_registers(ScoresApart(), chunk);
      set_registers(WeightsApart(), kTile);
    }
    V::tile_configure(config);
  }

  // A factor's first tile: how far its rows are apart, and how far the next chunk's tile is (in items). A
  // second tile is the next 16 rows of a, the next 16 items of b.
  struct Factor {
    const Item* data;
    int64_t row_bytes, step;
  };

  // One or two tiles of columns of a product.
  template <class R>
  ATTNREC_INLINE void columns_of(int rows, int columns, const Factor& a, const Factor& b, int steps, bool add,
                                 Real* to, int64_t stride) {
    for (int j = 0; j < columns; j += R::kColumns) {
      const Factor from{b.data + j * kTile, b.row_bytes, b.step};
      if (R::kColumns == 2 && columns == 2) {
        rows_of<R, R::kColumns>(rows, a, from, steps, add, to + j * kTile, stride);
      } else {
        rows_of<R, 1>(rows, a, from, steps, add, to + j * kTile, stride);
      }
    }
  }
  template <class R, int kColumns>
  ATTNREC_INLINE void rows_of(int rows, const Factor& a, const Factor& b, int steps, bool add, Real* to,
                              int64_t stride) {
    if (rows > kTile) {
      product<R, kColumns, true>(a, b, steps, add, to, stride);
    } else {
      product<R, kColumns, false>(a, b, steps, add, to, stride);
    }
  }

  // to (+)= Σ_step a[step] · b[step], in the order of steps; rows of `to` are `stride` numbers apart.
  template <class R, int kColumns, bool kTwo>
  static void product(const Factor& a, const Factor& b, int steps, bool add, Real* to, int64_t stride) {
    constexpr int kSecond = R::kColumns;  // the first sum of the second tile of rows
    const int64_t bytes = stride * static_cast<int64_t>(sizeof(Real));
    Real* below = to + kTile * stride;
    if (add) {
      V::template tile_load<0>(to, bytes);
      if constexpr (kColumns > 1) V::template tile_load<1>(to + kTile, bytes);
      if constexpr (kTwo) V::template tile_load<kSecond>(below, bytes);
      if constexpr (kTwo && kColumns > 1) V::template tile_load<kSecond + 1>(below + kTile, bytes);
    } else {
      V::template tile_zero<0>();
      if constexpr (kColumns > 1) V::template tile_zero<1>();
      if constexpr (kTwo) V::template tile_zero<kSecond>();
      if constexpr (kTwo && kColumns > 1) V::template tile_zero<kSecond + 1>();
    }
    for (int step = 0; step < steps; step++) {
      const Item *of_a = a.data + step * a.step, *of_b = b.data + step * b.step;
      V::template tile_load<R::kA>(of_a, a.row_bytes);
      V::template tile_load<R::kB>(of_b, b.row_bytes);
      V::template tile_dot<0, R::kA, R::kB>();
      if constexpr (kColumns > 1) {
        V::template tile_load<R::kB + 1>(of_b + kTile, b.row_bytes);
        V::template tile_dot<1, R::kA, R::kB + 1>();
      }
      if constexpr (kTwo) {
        V::template tile_load<R::kA + 1>(of_a + kTile * a.row_bytes / kItem, a.row_bytes);
        V::template tile_dot<kSecond, R::kA + 1, R::kB>();
      }
      if constexpr (kTwo && kColumns > 1) V::template tile_dot<kSecond + 1, R::kA + 1, R::kB + 1>();
    }
    V::template tile_store<0>(to, bytes);
    if constexpr (kColumns > 1) V::template tile_store<1>(to + kTile, bytes);
    if constexpr (kTwo) V::template tile_store<kSecond>(below, bytes);
    if constexpr (kTwo && kColumns > 1) V::template tile_store<kSecond + 1>(below + kTile, bytes);
  }
};

// Calls function(Numbers, Pairs or Tiles), whichever serves tensors of `element` best.
template <class V, class Function>
ATTNREC_INLINE auto with_products(Element element, Function&& function) {
  if constexpr (V::kTiles) {
    if (element == Element::kBFloat16) {
      const typename Tiles<V>::InUse in_use;
      return function(Tiles<V>());
    }
  } else if constexpr (V::kPairs) {
    if (element == Element::kBFloat16) return function(Pairs<V>());
  }
  return function(Numbers<V>());
}

}  // namespace
}  // namespace attnrec::cpu
