// softmax_score: a user's softmax over its own items, and its gradient.
//
// One row an item set, so that each item is read once and for one product: there is nothing to pack it for,
// as the streaming core does, and a sum in lanes is both faster and more exact than its chain over d (at
// logits of 30 the probabilities' error is a quarter).
#pragma once

#include "cpu/softmax_score.h"
#include "cpu/streaming-inl.h"

namespace attnrec::cpu {
namespace {

// dots[i] = Σ_d row[d] · items[i][d] for n items; whole registers are written. Items with hide[i] = -inf are
// not read.
template <class V>
void dot_items(const typename V::Real* row, const void* data, Element element, int64_t stride, int n,
               int head_dim, const typename V::Real* hide, typename V::Real* dots) {
  constexpr int W = V::kWidth;
  with_element<V>(element, data, [&](auto* items) __attribute__((always_inline)) {
    for (int first = 0; first < n; first += W) {
      typename V::Reg sums[W];
      for (int i = 0; i < W; i++) sums[i] = V::zero();
      if (first + W <= n && !hide && head_dim % W == 0) {
        // Without a question for each item: 1.3 times as fast from caches.
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
          const auto* item = items + (first + i) * stride;
          for (int d = 0; d < head_dim; d += W) {
            __builtin_prefetch(item + kPrefetchEvents * stride + d);
            sums[i] = V::fma(V::load(item + d), V::load(row + d), sums[i]);
          }
        }
      } else {
        for (int i = 0; i < W && first + i < n; i++) {
          if (hide && hide[first + i] == -std::numeric_limits<float>::infinity()) continue;
          const auto* item = items + (first + i) * stride;
          for (int d = 0; d < head_dim; d += W) {
            sums[i] = V::fma(load_part<V>(item + d, head_dim - d), V::load(row + d), sums[i]);
          }
        }
      }
      V::store(dots + first, V::sums(sums));
    }
  });
}

// The biases of n items from item `first` on, as the kernels' numbers; null where there are none.
template <class V>
const typename V::Real* biases(const Attention& a, int64_t first, int n, typename V::Real* to) {
  if (!a.key_bias) return nullptr;
  for (int i = 0; i < n; i++) {
    to[i] = load_element<typename V::Real>(a.key_bias, (first + i) * a.bias_row_stride, a.bias_element);
  }
  return to;
}

// Logits of a unit, a user's one row, to `logits` (the whole batch's, [T_c]); their maximum and sum beside.
template <class V>
int64_t softmax_score_unit(const Attention& a, const Unit& unit, void* memory, void* logits, double* maximum,
                           double* sum) {
  using Real = typename V::Real;
  constexpr int W = V::kWidth;
  Arena arena(memory);
  RunningSoftmax<V, true> softmax(arena, 1);
  Real* user = arena.take<Real>(padded<V>(a.head_dim));
  Real* bias = arena.take<Real>(kKeys);
  Real* z = arena.take<Real>(kKeys);
  if (!memory) return arena.used();
  softmax.clear(1);
  load_row<V>(a.query.at(unit.first, 0, a.element), a.element, a.head_dim, 1, user);
  // Divided by and not multiplied with the reciprocal: a rounding less, which large logits make visible.
  const typename V::Reg temperature = V::set1(static_cast<Real>(1 / a.scale));
  for (int64_t begin = unit.first_event; begin < unit.last_event; begin += kKeys) {
    const int n = static_cast<int>(least(kKeys, unit.last_event - begin));
    const int64_t first = a.kv_offsets[unit.user] + begin;
    const Real* added = biases<V>(a, first, n, bias);
    dot_items<V>(user, a.key.at(first, 0, a.element), a.element, a.key.row_stride, n, a.head_dim, added, z);
    for (int i = 0; i < n; i += W) {
      const typename V::Reg logit = V::load(z + i) / temperature;
      const typename V::Reg biased = added ? V::add(logit, load_part<V>(added + i, n - i)) : logit;
      V::store(z + i, V::first(biased, n - i, -std::numeric_limits<Real>::infinity()));
    }
    std::memcpy(static_cast<Real*>(logits) + first, z, n * sizeof(Real));
    softmax.step(softmax, 0, n, z);
  }
  *maximum = softmax.maximum[0];
  *sum = softmax.sum(0);
  return arena.used();
}

// Probabilities of n logits, given the maximum and the sum of all that the user has; may run in place.
template <class V>
void softmax_score_normalize(const void* logits, int64_t n, double maximum, double sum, Element element,
                             void* probabilities) {
  using Real = typename V::Real;
  const Real lowest = -std::numeric_limits<Real>::infinity();
  const typename V::Reg base = V::set1(maximum == lowest ? 0 : static_cast<Real>(maximum));
  const typename V::Reg total = V::set1(sum == 0 ? 1 : static_cast<Real>(sum));
  Real part[kKeys];
  for (int64_t begin = 0; begin < n; begin += kKeys) {
    const int count = static_cast<int>(least(kKeys, n - begin));
    const Real* z = static_cast<const Real*>(logits) + begin;
    for (int i = 0; i < count; i += V::kWidth) {
      const typename V::Reg x = V::sub(load_part<V>(z + i, count - i), base);
      V::store(part + i, exp_of<V>(x) / total);
    }
    store_row<V>(part, 1, count, element, static_cast<char*>(probabilities) + begin * element_bytes(element));
  }
}

// With d = p · (grad - Σ grad · p): d to the bias, d / temperature · user to an item, Σ d / temperature ·
// item to the user. An item that the bias hides is not read, and gets zeros.
template <class V>
int64_t softmax_score_backward_unit(const Attention& a, const Unit& unit, void* memory,
                                    const SoftmaxScoreGradient& gradient) {
  using Real = typename V::Real;
  constexpr int W = V::kWidth;
  const int D = a.head_dim, width = padded<V>(D), bytes = element_bytes(a.element);
  Arena arena(memory);
  Real* user = arena.take<Real>(width);
  Real* item = arena.take<Real>(width);
  Real* total = arena.take<Real>(width);
  Real* bias = arena.take<Real>(kKeys);
  Real* p = arena.take<Real>(kKeys);
  Real* d = arena.take<Real>(kKeys);
  Real* copied = arena.take<Real>(static_cast<int64_t>(kKeys) * width);
  if (!memory) return arena.used();

  load_row<V>(a.query.at(unit.first, 0, a.element), a.element, D, 1, user);
  for (int i = 0; i < width; i += W) V::store(total + i, V::zero());
  const typename V::Reg mean = V::set1(static_cast<Real>(gradient.weighted_grad));
  const typename V::Reg scale = V::set1(static_cast<Real>(a.scale));
  for (int64_t begin = unit.first_event; begin < unit.last_event; begin += kKeys) {
    const int n = static_cast<int>(least(kKeys, unit.last_event - begin));
    const int64_t first = a.kv_offsets[unit.user] + begin;
    const Real* hide = biases<V>(a, first, n, bias);
    load_row<V>(static_cast<const char*>(gradient.grad) + first * bytes, a.element, n, 1, d);
    load_row<V>(static_cast<const Real*>(gradient.probabilities) + first,
                sizeof(Real) == 8 ? Element::kFloat64 : Element::kFloat32, n, 1, p);
    for (int i = 0; i < n; i += W) V::store(d + i, V::mul(V::load(p + i), V::sub(V::load(d + i), mean)));
    for (int i = 0; hide && i < n; i++) {
      if (hide[i] == -std::numeric_limits<Real>::infinity()) d[i] = 0;
      store_element(gradient.grad_bias, first + i, a.bias_element, d[i]);
    }
    for (int i = 0; i < n; i += W) V::store(d + i, V::mul(V::load(d + i), scale));
    for (int i = 0; i < n; i++) {
      const bool hidden = hide && hide[i] == -std::numeric_limits<Real>::infinity();
      for (int k = 0; k < width; k += W) {
        V::store(item + k, hidden ? V::zero() : V::mul(V::set1(d[i]), V::load(user + k)));
      }
      store_row<V>(item, 1, D, a.element, static_cast<char*>(gradient.grad_items) + (first + i) * D * bytes);
    }
    int64_t stride = 0;
    const Real* items = event_rows<V>(a.key.at(first, 0, a.element), a.element, a.key.row_stride, n, D, hide,
                                      false, copied, &stride);
    accumulate_block<V, 1>(d, 0, 1, items, stride, n, width, total, width);
  }
  std::memcpy(gradient.grad_user, total, D * sizeof(Real));
  return arena.used();
}

}  // namespace
}  // namespace attnrec::cpu
