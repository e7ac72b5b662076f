// The baseline tier's vectors: the compiler's own vector extension, which becomes SSE2 on x86-64 and NEON on
// aarch64. `Real` is float, or double for float64 tensors.
#pragma once

namespace attnrec::cpu {
namespace {

template <class T>
struct PortableVector {
  using Real = T;
  static constexpr int kWidth = 4;
  static constexpr bool kPairs = false;  // no products of bf16 pairs
  static constexpr bool kTiles = false;  // nor of tiles of them
  static constexpr int kRows = 4;        // 4 x 2 accumulators leave room in 16 registers
  static constexpr bool kRoom = false;
  typedef T Reg __attribute__((vector_size(kWidth * sizeof(T))));

  ATTNREC_INLINE Reg set1(Real x) { return Reg{x, x, x, x}; }
  ATTNREC_INLINE Reg zero() { return Reg{}; }
  ATTNREC_INLINE Reg load(const Real* p) {
    Reg r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  template <class Stored>
  ATTNREC_INLINE Reg load(const Stored* p) {
    return Reg{static_cast<Real>(to_float(p[0])), static_cast<Real>(to_float(p[1])),
               static_cast<Real>(to_float(p[2])), static_cast<Real>(to_float(p[3]))};
  }
  ATTNREC_INLINE void store(Real* p, Reg r) { std::memcpy(p, &r, sizeof r); }
  ATTNREC_INLINE void store(BFloat16* p, Reg r) {
    for (int i = 0; i < kWidth; i++) p[i] = to_bfloat16(static_cast<float>(r[i]));
  }
  ATTNREC_INLINE void store(Half* p, Reg r) {
    for (int i = 0; i < kWidth; i++) p[i] = to_half(static_cast<float>(r[i]));
  }
  // Numbers that fill a line of 64 bytes, times `factor`; as any others, there is no way past the caches
  // here.
  template <class Stored>
  ATTNREC_INLINE void stream_line(Stored* to, const Real* from, Real factor) {
    for (int d = 0; d < static_cast<int>(64 / sizeof(Stored)); d += kWidth) {
      store(to + d, mul(load(from + d), set1(factor)));
    }
  }
  ATTNREC_INLINE Reg add(Reg a, Reg b) { return a + b; }
  ATTNREC_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  ATTNREC_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  // Two roundings: there is no fused product at this level.
  ATTNREC_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  ATTNREC_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }  // b where either is NaN, as on x86
  ATTNREC_INLINE Real sum(Reg r) { return (r[0] + r[1]) + (r[2] + r[3]); }
  ATTNREC_INLINE Real maximum(Reg r) {
    Real m = r[0];
    for (int i = 1; i < kWidth; i++) m = r[i] > m ? r[i] : m;
    return m;
  }
  // A bit for each lane that is above x, none where NaN.
  ATTNREC_INLINE uint32_t above(Reg r, Real x) {
    uint32_t lanes = 0;
    for (int i = 0; i < kWidth; i++) lanes |= uint32_t{r[i] > x} << i;
    return lanes;
  }
  // The first n lanes of r, `fill` in the others.
  ATTNREC_INLINE Reg first(Reg r, int n, Real fill) {
    for (int i = 0; i < kWidth; i++) r[i] = i < n ? r[i] : fill;
    return r;
  }
  // a and b become the first and the second half of a[0], b[0], a[1], b[1] ...
  ATTNREC_INLINE void zip(Reg& a, Reg& b) {
    const Reg second{a[2], b[2], a[3], b[3]};
    a = Reg{a[0], b[0], a[1], b[1]};
    b = second;
  }
  ATTNREC_INLINE void transpose(Reg (&r)[kWidth]) {
    Reg t[kWidth];
    for (int i = 0; i < kWidth; i++) t[i] = Reg{r[0][i], r[1][i], r[2][i], r[3][i]};
    for (int i = 0; i < kWidth; i++) r[i] = t[i];
  }
  // Lane i becomes the sum of r[i].
  ATTNREC_INLINE Reg sums(const Reg (&r)[kWidth]) { return Reg{sum(r[0]), sum(r[1]), sum(r[2]), sum(r[3])}; }
  ATTNREC_INLINE Reg exp2(Reg x) {
    if constexpr (std::is_same_v<Real, double>) {
      return Reg{std::exp2(x[0]), std::exp2(x[1]), std::exp2(x[2]), std::exp2(x[3])};
    } else {
      typedef int32_t Bits __attribute__((vector_size(kWidth * sizeof(int32_t))));
      const Reg magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
      // NaN stays NaN. The exponent's field becomes 0 at -127, a power of 0, and 255 at 128, one of infinity;
      // beyond, it would wrap round.
      const Reg above = max(set1(-127.0f), x), clamped = above > set1(128.0f) ? set1(128.0f) : above;
      const Reg rounded = clamped + magic, f = clamped - (rounded - magic);
      Reg p = set1(kExp2Coefficients[0]);
      for (int i = 1; i < kExp2Terms; i++) p = p * f + set1(kExp2Coefficients[i]);
      Bits n;
      std::memcpy(&n, &rounded, sizeof n);
      const Bits exponent = (n + 127) << 23;
      Reg power;
      std::memcpy(&power, &exponent, sizeof power);
      return p * power;
    }
  }
};

}  // namespace
}  // namespace attnrec::cpu
