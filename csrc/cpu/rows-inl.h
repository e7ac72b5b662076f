// What goes into the products and what comes out of them: scratch memory, and rows of stored elements to and
// from working numbers.
#pragma once

#include "cpu/tiers/prelude.h"

namespace attnrec::cpu {
namespace {

constexpr int kMostHeadDim = 256;
constexpr int kKeys = 128;           // events of a tile: rows x kKeys scores stay in L1
constexpr int kPrefetchEvents = 32;  // ahead of packing; 4.5 -> 3.8 ms on 256 users with one candidate each

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
  if constexpr (requires { V::load(p, n); }) return V::load(p, n);
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

template <class V, class Stored>
ATTNREC_INLINE void store_numbers(const typename V::Real* row, int n, typename V::Real factor, Stored* to) {
  const auto numbers = [&](int d) ATTNREC_LAMBDA { return V::mul(V::load(row + d), V::set1(factor)); };
  int d = 0;
  for (; d + V::kWidth <= n; d += V::kWidth) V::store(to + d, numbers(d));
  if (d == n) return;
  if constexpr (requires { V::store(to, numbers(d), n); }) return V::store(to + d, numbers(d), n - d);
  Stored part[V::kWidth];
  V::store(part, numbers(d));
  for (int i = 0; d + i < n; i++) to[d + i] = part[i];
}

// What packing prefetches, a line each time that it reads one: the same lines kPrefetchEvents later, or,
// where `row` is set, other rows up to `end`, in the order of addresses.
struct Ahead {
  const char *row = nullptr, *end = nullptr;
  int64_t row_stride = 0, row_bytes = 0, byte = 0;

  // Always inlined: GCC takes a function that only prefetches for one without effects, and drops calls of it.
  template <class Stored>
  ATTNREC_MEMBER void prefetch(const Stored* later, int64_t stride, int count) {
    for (int i = 0; !row && i < count; i++) __builtin_prefetch(later + i * stride);
    for (int i = 0; row != end && i < count; i++) {
      __builtin_prefetch(row + byte);
      byte += 64;
      if (byte < row_bytes) continue;
      byte = 0;
      row += row_stride;
    }
  }
};

// `load_row`'s inverse.
template <class V>
ATTNREC_INLINE void store_row(const typename V::Real* row, typename V::Real factor, int head_dim,
                              Element element, void* data) {
  with_element<V>(element, data, [&](auto* typed) __attribute__((always_inline)) {
    using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    store_numbers<V>(row, head_dim, factor, const_cast<Stored*>(typed));
  });
}

// Rows `row_stride` apart, times `factor`, to rows of `element` that are `stride` elements apart. With
// `past_caches` whole lines go past the caches, which pays where these will not hold the result: a usual
// store reads a line before it writes to it.
template <class V>
void store_rows(const typename V::Real* rows, int64_t row_stride, int64_t count, typename V::Real factor,
                int head_dim, Element element, void* data, int64_t stride, bool past_caches) {
  with_element<V>(element, data, [&](auto* typed) __attribute__((always_inline)) {
    using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    constexpr int kLine = 64 / sizeof(Stored);
    auto* to = const_cast<Stored*>(typed);
    const bool lines =
        head_dim % kLine == 0 && stride % kLine == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
    if (past_caches && lines) {
      for (int64_t i = 0; i < count; i++) {
        for (int d = 0; d < head_dim; d += kLine) {
          V::stream_line(to + i * stride + d, rows + i * row_stride + d, factor);
        }
      }
      return;
    }
    for (int64_t i = 0; i < count; i++)
      store_numbers<V>(rows + i * row_stride, head_dim, factor, to + i * stride);
  });
}

// Events 0 … n of `from` (row stride in elements) into panels of 2 registers of events: panel[d][event].
// Events from n to the end of the last panel, and those with hide[event] = -inf, become zeros: nothing of
// them is computed with.
template <class V>
void pack_panels(const void* data, Element element, int64_t stride, int n, int head_dim,
                 const typename V::Real* hide, typename V::Real* panels, Ahead ahead = {}) {
  constexpr int W = V::kWidth;
  with_element<V>(element, data, [&](auto* from) __attribute__((always_inline)) {
    for (int event = 0; event < round_up(n, 2 * W); event += W) {
      typename V::Real* to =
          panels + static_cast<int64_t>(event / (2 * W)) * 2 * W * head_dim + event % (2 * W);
      for (int d = 0; d < head_dim; d += W) {
        typename V::Reg r[W];
        const auto* rows = from + event * stride + d;
        ahead.prefetch(rows + kPrefetchEvents * stride, stride, W);
        // A register of events that are all there takes no questions.
        if (event + W <= n && d + W <= head_dim && !hide) {
          for (int i = 0; i < W; i++) r[i] = V::load(rows + i * stride);
          V::transpose(r);
          for (int i = 0; i < W; i++) V::store(to + (d + i) * 2 * W, r[i]);
          continue;
        }
        for (int i = 0; i < W; i++) {
          const bool seen =
              event + i < n && !(hide && hide[event + i] == -std::numeric_limits<float>::infinity());
          r[i] = seen ? load_part<V>(rows + i * stride, head_dim - d) : V::zero();
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
                                   int64_t* row_stride, Ahead ahead = {}) {
  const bool native = element == Element::kFloat32 || element == Element::kFloat64;
  if (native && !hide && !copy_anyway && head_dim % V::kWidth == 0) {
    *row_stride = stride;
    const auto* rows = static_cast<const typename V::Real*>(data);
    constexpr int kLine = 64 / sizeof(*rows);
    for (int d = 0; d < head_dim; d += kLine) ahead.prefetch(rows + d, stride, n);
    return rows;
  }
  const int width = padded<V>(head_dim);
  *row_stride = width;
  with_element<V>(element, data, [&](auto* from) __attribute__((always_inline)) {
    for (int i = 0; i < n; i++) {
      typename V::Real* row = copy + static_cast<int64_t>(i) * width;
      constexpr int kLine = 64 / sizeof(*from);
      ahead.prefetch(from + (i + kPrefetchEvents) * stride, kLine, (head_dim + kLine - 1) / kLine);
      const bool seen = !(hide && hide[i] == -std::numeric_limits<float>::infinity());
      for (int d = 0; d < width; d += V::kWidth) {
        V::store(row + d, seen ? load_part<V>(from + i * stride + d, head_dim - d) : V::zero());
      }
    }
  });
  return copy;
}

}  // namespace
}  // namespace attnrec::cpu
