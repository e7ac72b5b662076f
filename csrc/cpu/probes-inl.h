// Roofline probes of a tier: what its vectors can do at best, to set a kernel's speed against.
#pragma once

#include "cpu/tiers/prelude.h"

namespace attnrec::cpu {
namespace {

// Each runs `rounds` rounds and returns what it did: floating-point operations, bytes, or exponentials. What
// it computed goes to `*sink`, so that the compiler must compute it.
template <class V>
double probe_fma(int64_t rounds, double* sink) {
  using Real = typename V::Real;
  constexpr int kChains = 2 * V::kRows;  // as the products' inner loop: enough to hide an FMA's latency
  typename V::Reg sums[kChains];
  for (int i = 0; i < kChains; i++) sums[i] = V::set1(static_cast<Real>(i));
  const auto factor = V::set1(static_cast<Real>(0.999)), term = V::set1(static_cast<Real>(0.001));
  for (int64_t round = 0; round < rounds; round++) {
    for (int i = 0; i < kChains; i++) sums[i] = V::fma(sums[i], factor, term);
  }
  for (int i = 0; i < kChains; i++) *sink += static_cast<double>(V::sum(sums[i]));
  return 2.0 * kChains * V::kWidth * static_cast<double>(rounds);
}

template <class V>
double probe_read(const void* memory, int64_t bytes, double* sink) {
  using Real = typename V::Real;
  constexpr int kChains = 4;
  const Real* data = static_cast<const Real*>(memory);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Real));
  typename V::Reg sums[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + kChains * V::kWidth <= count; i += kChains * V::kWidth) {
    for (int chain = 0; chain < kChains; chain++) {
      sums[chain] = V::add(sums[chain], V::load(data + i + chain * V::kWidth));
    }
  }
  for (int chain = 0; chain < kChains; chain++) *sink += static_cast<double>(V::sum(sums[chain]));
  return static_cast<double>(i) * sizeof(Real);
}

template <class V>
double probe_exp2(int64_t rounds, double* sink) {
  using Real = typename V::Real;
  constexpr int kNumbers = 64;  // of L1; each is 2^-x of the round before, so that no round can be left out
  Real numbers[kNumbers];
  for (int i = 0; i < kNumbers; i++) numbers[i] = static_cast<Real>(i) / kNumbers;
  for (int64_t round = 0; round < rounds; round++) {
    for (int i = 0; i < kNumbers; i += V::kWidth) {
      V::store(numbers + i, V::exp2(V::sub(V::zero(), V::load(numbers + i))));
    }
  }
  for (int i = 0; i < kNumbers; i++) *sink += static_cast<double>(numbers[i]);
  return static_cast<double>(kNumbers) * static_cast<double>(rounds);
}

}  // namespace
}  // namespace attnrec::cpu
