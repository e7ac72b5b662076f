// target_attention_top: a readout that keeps each row's heaviest events beside its running softmax, in one
// pass.
#pragma once

#include "cpu/target_attention_weights-inl.h"

namespace attnrec::cpu {
namespace {

// The `most` highest scores of each row, ties to the lower event. Events must come in rising order.
template <class V>
struct Heaviest {
  using Real = typename V::Real;
  struct Entry {
    Real score;
    int64_t event;
  };

  Heaviest(Arena& arena, int rows, int64_t n)
      : most(n), entries(arena.take<Entry>(rows * n)), counts(arena.take<int64_t>(rows)) {}

  void clear(int rows) {
    for (int r = 0; r < rows; r++) counts[r] = 0;
  }

  // Takes in the scores of the events first … first + n that are above `least`. They are -inf (never kept)
  // from n to the next whole register.
  void take(int row, int64_t first, int n, const Real* scores,
            Real least = -std::numeric_limits<Real>::infinity()) {
    Entry* kept = of(row);
    int64_t count = counts[row];
    // A later event loses a tie, so only a higher score enters where all places are taken.
    const Entry& last = kept[most <= kListed ? most - 1 : 0];
    Real threshold = count == most ? last.score : least;
    for (int i = 0; i < n; i += V::kWidth) {
      for (uint32_t lanes = V::above(V::load(scores + i), threshold); lanes; lanes &= lanes - 1) {
        const int at = i + __builtin_ctz(lanes);
        if (!(scores[at] > threshold)) continue;
        const Entry entry{scores[at], first + at};
        if (most <= kListed) {
          count += count < most;
          insert(kept, count - 1, entry);
        } else if (count < most) {
          rise(kept, count++, entry);
        } else {
          sink(kept, count, entry);
        }
        if (count == most) threshold = last.score;
      }
    }
    counts[row] = count;
  }

  // What is below the `most` heaviest of n scores: the highest in each lane are as many different ones, and
  // of these the one that `most` reach. Fewer scores then are kept for a while (of 200 normal ones, for the
  // 10 heaviest, 18 and not 39 on average), which is most of what a row costs.
  Real floor(int n, const Real* scores) const {
    constexpr Real kNone = -std::numeric_limits<Real>::infinity();
    if (most > V::kWidth || n <= 2 * V::kWidth) return kNone;
    typename V::Reg highest = V::load(scores);
    for (int i = V::kWidth; i < n; i += V::kWidth) highest = V::max(highest, V::load(scores + i));
    Real lanes[V::kWidth], floor = std::numeric_limits<Real>::infinity();
    V::store(lanes, highest);
    int numbers = 0;
    for (const Real x : lanes) {
      if (x != x) continue;
      numbers++;
      if (__builtin_popcount(V::above(highest, x)) < most && x < floor) floor = x;
    }
    if (numbers < most) return kNone;
    return std::nextafter(floor, kNone);
  }

  // Orders what was kept, the heaviest first. The row takes in nothing more.
  void sort(int row) {
    if (most <= kListed) return;
    Entry* heap = of(row);
    for (int64_t n = counts[row] - 1; n > 0; n--) {
      const Entry last = heap[n];
      heap[n] = heap[0];
      sink(heap, n, last);
    }
  }

  Entry* of(int row) const { return entries + row * most; }

  int64_t most;
  Entry* entries;
  int64_t* counts;

 private:
  // Up to so many are kept as a list, the heaviest first; more as a heap. 8,192 rows of 200 events, two
  // threads: the 50 heaviest take 21 ms as a heap and 14 as a list, the 10 heaviest 3.5 and 3.2.
  static constexpr int64_t kListed = 64;
  static void insert(Entry* list, int64_t at, const Entry& entry) {
    for (; at > 0 && list[at - 1].score < entry.score; at--) list[at] = list[at - 1];
    list[at] = entry;
  }
  static bool before(const Entry& a, const Entry& b) {
    return a.score > b.score || (a.score == b.score && a.event < b.event);
  }
  // A heap whose root is the entry to lose first: `rise` puts a new one in at its end, `sink` in the root's
  // place.
  static void rise(Entry* heap, int64_t at, const Entry& entry) {
    while (at > 0 && before(heap[(at - 1) / 2], entry)) {
      heap[at] = heap[(at - 1) / 2];
      at = (at - 1) / 2;
    }
    heap[at] = entry;
  }
  static void sink(Entry* heap, int64_t count, const Entry& entry) {
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
      if (child + 1 < count && before(heap[child], heap[child + 1])) child++;
      if (!before(entry, heap[child])) break;
      heap[at] = heap[child];
    }
    heap[at] = entry;
  }
};

template <class V>
struct Top {
  using Real = typename V::Real;

  Top(Arena& arena, const Attention& attention, int rows, int64_t n)
      : total(arena, attention, rows), heaviest(arena, rows, n) {}

  void begin(const Unit& unit) {
    total.begin(unit);
    heaviest.clear(unit.rows);
  }
  void pack(int64_t, int, const Real*) {}
  void tile(const Tile<V>& t) {
    for (int r = 0; r < t.rows; r++) {
      const Real* scores = t.scores + r * kKeys;
      heaviest.take(t.first_row + r, t.first_event, t.seen[r], scores,
                    heaviest.counts[t.first_row + r] == 0 ? heaviest.floor(t.seen[r], scores)
                                                          : -std::numeric_limits<Real>::infinity());
    }
    total.tile(t);  // overwrites the scores
  }

  LogSumExp<V> total;
  Heaviest<V> heaviest;
};

// `weights` and `events` are [T_c, heads, top], contiguous.
template <class V>
int64_t target_attention_top_unit(const Attention& a, const Unit& unit, void* memory, int64_t top,
                                  void* weights, int64_t* events) {
  using Real = typename V::Real;
  return with_products<V>(a.element, [&](auto products) {
    using Products = decltype(products);
    Arena arena(memory);
    StreamScratch<V, Products> scratch(arena, packed_events<V, Products>(unit.rows, a.head_dim), a.head_dim);
    Top<V> readout(arena, a, unit.rows, greatest(1, least(top, a.events(unit.user))));
    if (!memory) return arena.used();
    readout.begin(unit);
    stream(a, unit, scratch, readout);
    for (int r = 0; r < unit.rows; r++) {
      readout.heaviest.sort(r);
      const auto* entries = readout.heaviest.of(r);
      const Real base = readout.total.softmax.base(r),
                 inverse = readout.total.softmax.inverse(readout.total.softmax.sum(r));
      const int64_t to = (unit.candidate(r) * a.heads + unit.query_head(r)) * top;
      const int64_t kept = readout.heaviest.counts[r];
      for (int64_t first = 0; first < top; first += V::kWidth) {
        Real part[V::kWidth] = {};
        for (int64_t i = first; i < least(kept, first + V::kWidth); i++) part[i - first] = entries[i].score;
        V::store(part, V::mul(V::exp2(V::sub(V::load(part), V::set1(base))), V::set1(inverse)));
        for (int64_t i = first; i < least(top, first + V::kWidth); i++) {
          store_element<Real>(weights, to + i, a.element, i < kept ? part[i - first] : Real{0});
          events[to + i] = i < kept ? entries[i].event : -1;
        }
      }
    }
    return arena.used();
  });
}

}  // namespace
}  // namespace attnrec::cpu
