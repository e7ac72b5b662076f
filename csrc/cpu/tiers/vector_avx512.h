// AVX-512 (F, BW, VL, DQ) vectors.
#pragma once

namespace attnrec::cpu {
namespace {

struct Avx512Vector {
  using Real = float;
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr bool kPairs = false;  // no products of bf16 pairs
  static constexpr bool kTiles = false;  // nor of tiles of them
  // 8 x 2 accumulators hide the latency of 2 FMA pipes; broadcasts come from memory.
  static constexpr int kRows = 8;
  static constexpr bool kRoom = true;  // in registers, beside the accumulators: 16 of 32

  // Numbers of 16 bits from and to those of 32; the pointer says only which.
  ATTNREC_INLINE Reg numbers(const BFloat16*, __m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  ATTNREC_INLINE Reg numbers(const Half*, __m256i bits) { return _mm512_cvtph_ps(bits); }
  ATTNREC_INLINE __m256i rounded(const BFloat16*, Reg r) {
    const __m512i bits = _mm512_castps_si512(r);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  ATTNREC_INLINE __m256i rounded(const Half*, Reg r) { return _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT); }
  ATTNREC_INLINE const __m256i* sixteen(const void* p) { return static_cast<const __m256i*>(p); }
  ATTNREC_INLINE __m256i* sixteen(void* p) { return static_cast<__m256i*>(p); }
  // 0 <= n < 16
  ATTNREC_INLINE __mmask16 lanes_before(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  ATTNREC_INLINE Reg set1(float x) { return _mm512_set1_ps(x); }
  ATTNREC_INLINE Reg zero() { return _mm512_setzero_ps(); }
  ATTNREC_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  ATTNREC_INLINE Reg load(const BFloat16* p) { return numbers(p, _mm256_loadu_si256(sixteen(p))); }
  ATTNREC_INLINE Reg load(const Half* p) { return numbers(p, _mm256_loadu_si256(sixteen(p))); }
  ATTNREC_INLINE void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  template <class Stored>
  ATTNREC_INLINE void store(Stored* p, Reg r) {
    _mm256_storeu_si256(sixteen(p), rounded(p, r));
  }
  // The first n of them; in the other lanes zeros.
  ATTNREC_INLINE Reg load(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes_before(n), p); }
  template <class Stored>
  ATTNREC_INLINE Reg load(const Stored* p, int n) {
    return numbers(p, _mm256_maskz_loadu_epi16(lanes_before(n), p));
  }
  ATTNREC_INLINE void store(float* p, Reg r, int n) { _mm512_mask_storeu_ps(p, lanes_before(n), r); }
  template <class Stored>
  ATTNREC_INLINE void store(Stored* p, Reg r, int n) {
    _mm256_mask_storeu_epi16(p, lanes_before(n), rounded(p, r));
  }
  // Numbers that fill a line of 64 bytes, times `factor`, past the caches, to an address that is a multiple
  // of them.
  ATTNREC_INLINE void stream_line(float* to, const float* from, float factor) {
    _mm512_stream_ps(to, mul(load(from), set1(factor)));
  }
  template <class Stored>
  ATTNREC_INLINE void stream_line(Stored* to, const float* from, float factor) {
    alignas(32) Stored line[32];
    store(line, mul(load(from), set1(factor)));
    store(line + 16, mul(load(from + 16), set1(factor)));
    const auto* half = reinterpret_cast<const __m256i*>(line);
    const __m512i whole = _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), whole);
  }
  ATTNREC_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  ATTNREC_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  ATTNREC_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  ATTNREC_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  ATTNREC_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  ATTNREC_INLINE float sum(Reg r) { return _mm512_reduce_add_ps(r); }
  ATTNREC_INLINE float maximum(Reg r) { return _mm512_reduce_max_ps(r); }
  // A bit for each lane that is above x, none where NaN.
  ATTNREC_INLINE uint32_t above(Reg r, float x) { return _mm512_cmp_ps_mask(r, set1(x), _CMP_GT_OQ); }
  // Sets of lanes. `below` has none where NaN.
  using Mask = __mmask16;
  ATTNREC_INLINE Mask all_lanes() { return 0xffff; }
  ATTNREC_INLINE Mask below(Reg r, float x) { return _mm512_cmp_ps_mask(r, set1(x), _CMP_LT_OQ); }
  ATTNREC_INLINE Mask both(Mask a, Mask b) { return _kand_mask16(a, b); }
  ATTNREC_INLINE bool all(Mask m) { return _kortestc_mask16_u8(m, m); }
  ATTNREC_INLINE uint32_t lanes(Mask m) { return m; }
  ATTNREC_INLINE Reg add_where(Mask m, Reg a, Reg b) { return _mm512_mask_add_ps(a, m, a, b); }
  // The first n lanes of r, `fill` in the others.
  ATTNREC_INLINE Reg first(Reg r, int n, float fill) {
    const __mmask16 mask = n >= 16 ? 0xffff : n <= 0 ? 0 : lanes_before(n);
    return _mm512_mask_blend_ps(mask, set1(fill), r);
  }
  // a and b become the first and the second half of a[0], b[0], a[1], b[1] ...
  ATTNREC_INLINE void zip(Reg& a, Reg& b) {
    const __m512i halves = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const Reg second = _mm512_permutex2var_ps(a, _mm512_add_epi32(halves, _mm512_set1_epi32(8)), b);
    a = _mm512_permutex2var_ps(a, halves, b);
    b = second;
  }
  ATTNREC_INLINE void transpose(Reg (&r)[kWidth]) {
    Reg t[16];
    for (int i = 0; i < 8; i++) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
      r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
      r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    }
  }
  // Lane i becomes the sum of r[i]: half as many shuffles as a transposition and a sum of its rows.
  ATTNREC_INLINE Reg sums(const Reg (&r)[kWidth]) {
    Reg u[4];
    for (int k = 0; k < 4; k++) {
      const auto halves = [](Reg a, Reg b) ATTNREC_LAMBDA {
        return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
      };
      const Reg a = halves(r[k], r[4 + k]), b = halves(r[8 + k], r[12 + k]);
      u[k] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    const Reg a = add(_mm512_shuffle_ps(u[0], u[1], 0x44), _mm512_shuffle_ps(u[0], u[1], 0xee));
    const Reg b = add(_mm512_shuffle_ps(u[2], u[3], 0x44), _mm512_shuffle_ps(u[2], u[3], 0xee));
    return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }
  ATTNREC_INLINE Reg floor(Reg x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  // `scalef` multiplies by 2^floor(x), and where x is infinite its result is 0 or infinity, whatever the NaN
  // that inf - inf makes of p: nothing is clamped. (`reduce`, which is x - floor(x), waits on Zen 4 for what
  // its register had before: 29 cycles instead of 6.)
  ATTNREC_INLINE Reg exp2(Reg x) {
    const Reg f = sub(x, floor(x));
    Reg p = set1(kExp2UpCoefficients[0]);
    for (int i = 1; i < kExp2Terms; i++) p = fma(p, f, set1(kExp2UpCoefficients[i]));
    return _mm512_scalef_ps(p, x);
  }
};

}  // namespace
}  // namespace attnrec::cpu
