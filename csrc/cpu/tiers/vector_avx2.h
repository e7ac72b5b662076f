// AVX2 + FMA + F16C vectors.
#pragma once

namespace attnrec::cpu {
namespace {

struct Avx2Vector {
  using Real = float;
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static constexpr bool kPairs = false;  // no products of bf16 pairs
  static constexpr bool kTiles = false;  // nor of tiles of them
  static constexpr int kRows = 6;        // 6 x 2 accumulators, 2 keys, 1 broadcast: 15 of 16 registers
  static constexpr bool kRoom = false;

  ATTNREC_INLINE Reg set1(float x) { return _mm256_set1_ps(x); }
  ATTNREC_INLINE Reg zero() { return _mm256_setzero_ps(); }
  ATTNREC_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  ATTNREC_INLINE Reg load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  ATTNREC_INLINE Reg load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  ATTNREC_INLINE void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  ATTNREC_INLINE void store(BFloat16* p, Reg r) {
    const __m256i bits = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  ATTNREC_INLINE void store(Half* p, Reg r) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT));
  }
  // Numbers that fill a line of 64 bytes, times `factor`, past the caches, to an address that is a multiple
  // of them.
  template <class Stored>
  ATTNREC_INLINE void stream_line(Stored* to, const float* from, float factor) {
    alignas(32) Stored line[64 / sizeof(Stored)];
    for (int d = 0; d < static_cast<int>(64 / sizeof(Stored)); d += kWidth) {
      store(line + d, mul(load(from + d), set1(factor)));
    }
    const auto* half = reinterpret_cast<const __m256i*>(line);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), half[0]);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, half[1]);
  }
  ATTNREC_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  ATTNREC_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  ATTNREC_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  ATTNREC_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  ATTNREC_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  ATTNREC_INLINE float sum(Reg r) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  ATTNREC_INLINE float maximum(Reg r) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
  }
  // A bit for each lane that is above x, none where NaN.
  ATTNREC_INLINE uint32_t above(Reg r, float x) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(r, set1(x), _CMP_GT_OQ)));
  }
  // The first n lanes of r, `fill` in the others.
  ATTNREC_INLINE Reg first(Reg r, int n, float fill) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(set1(fill), r,
                            _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
  }
  // a and b become the first and the second half of a[0], b[0], a[1], b[1] ...
  ATTNREC_INLINE void zip(Reg& a, Reg& b) {
    const Reg low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
  }
  ATTNREC_INLINE void transpose(Reg (&r)[kWidth]) {
    Reg t[8];
    for (int i = 0; i < 4; i++) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) r[i] = t[i];
  }
  // Lane i becomes the sum of r[i].
  ATTNREC_INLINE Reg sums(const Reg (&r)[kWidth]) {
    Reg u[4];
    for (int k = 0; k < 4; k++) {
      u[k] = add(_mm256_permute2f128_ps(r[k], r[4 + k], 0x20), _mm256_permute2f128_ps(r[k], r[4 + k], 0x31));
    }
    const Reg a = add(_mm256_shuffle_ps(u[0], u[1], 0x44), _mm256_shuffle_ps(u[0], u[1], 0xee));
    const Reg b = add(_mm256_shuffle_ps(u[2], u[3], 0x44), _mm256_shuffle_ps(u[2], u[3], 0xee));
    return add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
  }
  ATTNREC_INLINE Reg exp2(Reg x) {
    const Reg magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    // NaN stays NaN. The exponent's field becomes 0 at -127, a power of 0, and 255 at 128, one of infinity;
    // beyond, it would wrap round.
    const Reg clamped = _mm256_min_ps(set1(128.0f), max(set1(-127.0f), x));
    const Reg rounded = add(clamped, magic), f = sub(clamped, sub(rounded, magic));
    Reg p = set1(kExp2Coefficients[0]);
    for (int i = 1; i < kExp2Terms; i++) p = fma(p, f, set1(kExp2Coefficients[i]));
    const __m256i exponent = _mm256_add_epi32(_mm256_castps_si256(rounded), _mm256_set1_epi32(127));
    return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
};

}  // namespace
}  // namespace attnrec::cpu
