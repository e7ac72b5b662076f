// AVX-512 vectors with products of bf16 pairs (AVX512_BF16). An item, 32 bits, is two bf16 numbers.
#pragma once

#include "cpu/tiers/vector_avx512.h"

namespace attnrec::cpu {
namespace {

struct Avx512Bf16Vector : Avx512Vector {
  static constexpr bool kPairs = true;

  ATTNREC_INLINE Reg set1_pairs(uint32_t item) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(item)));
  }
  ATTNREC_INLINE Reg load_pairs(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  ATTNREC_INLINE void store_pairs(uint32_t* p, Reg r) { _mm512_storeu_si512(p, _mm512_castps_si512(r)); }
  // The first n numbers at p, at most 32, and zeros.
  ATTNREC_INLINE Reg load_pairs(const BFloat16* p, int n) { return _mm512_castsi512_ps(part_of_32(p, n)); }
  // sum + a·b for each lane's two pairs of numbers, in fp32.
  ATTNREC_INLINE Reg dot(Reg sum, Reg a, Reg b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  // sum + a·b for each lane's four pairs of an unsigned and a signed byte, lanes being int32 (AVX512_VNNI).
  ATTNREC_INLINE Reg dot_bytes(Reg sum, Reg a, Reg b) {
    return _mm512_castsi512_ps(
        _mm512_dpbusd_epi32(_mm512_castps_si512(sum), _mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  ATTNREC_INLINE Reg from_int32(Reg lanes) { return _mm512_cvtepi32_ps(_mm512_castps_si512(lanes)); }
  // 16 numbers, rounded, to 8 items.
  ATTNREC_INLINE void round_to_pairs(uint32_t* to, Reg numbers) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(numbers));
  }
  // 32 numbers to 16 items, as fast as 16 numbers.
  ATTNREC_INLINE void round_to_pairs(uint32_t* to, Reg first, Reg second) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
  // Subnormal numbers become 0, which the store of plain AVX-512 keeps in ten instructions.
  using Avx512Vector::store;
  ATTNREC_INLINE void store(BFloat16* p, Reg r) {
    _mm256_storeu_si256(sixteen(p), (__m256i)_mm512_cvtneps_pbh(r));
  }
  ATTNREC_INLINE void store(BFloat16* p, Reg r, int n) {
    _mm256_mask_storeu_epi16(p, lanes_before(n), (__m256i)_mm512_cvtneps_pbh(r));
  }
  // Items (a, b) of 16 numbers each, rounded.
  ATTNREC_INLINE Reg pair(Reg a, Reg b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                           7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a)));
  }
  // `count` rows of n numbers in pairs: to[i / 2 * width + d] is the item (row i [d], row i + 1 [d]) of an
  // even i, with zeros where there is no such row, and to the next whole register. Row i's 32 numbers (or as
  // many as it has) from the d-th on are at numbers(i, d). Says whether all numbers are finite.
  template <class Numbers>
  ATTNREC_INLINE bool interleave(int count, Numbers&& numbers, int n, uint32_t* to, int64_t width) {
    const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39,
                                           7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i largest = _mm512_setzero_si512();
    for (int d = 0; d < n; d += 32) {
      const __mmask32 there = first_of_32(n - d);
      const auto part = [&](int i) ATTNREC_LAMBDA {
        const __m512i x = _mm512_maskz_loadu_epi16(there, numbers(i, d));
        largest = _mm512_max_epu16(largest, _mm512_and_si512(x, magnitude));
        return x;
      };
      uint32_t* items = to + d;
      for (int i = 0; i < count; i += 2, items += width) {
        const __m512i x = part(i), y = i + 1 < count ? part(i + 1) : _mm512_setzero_si512();
        _mm512_storeu_si512(items, _mm512_permutex2var_epi16(x, lower, y));
        if (d + 16 < n) _mm512_storeu_si512(items + 16, _mm512_permutex2var_epi16(x, upper, y));
      }
    }
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
  }
  // 2^x to 3e-6: minimax as kExp2UpCoefficients, two powers less. On Zen 4 one set of pipes multiplies, and
  // another adds, rounds, scales and converts: the subtraction is given to the first. With two registers
  // rounded to bf16 at once 16 weights take 5.6 cycles, the sum and the rounding among them (8.0 with
  // clamping, a subtraction that subtracts, and one register at a time).
  ATTNREC_INLINE Reg exp2_short(Reg x) {
    const Reg f = fma(floor(x), set1(-1.0f), x);
    Reg p = fma(set1(1.34266838e-2f), f, set1(5.22424728e-2f));
    p = fma(p, f, set1(2.41280198e-1f));
    p = fma(p, f, set1(6.93044841e-1f));
    return _mm512_scalef_ps(fma(p, f, set1(1.0f)), x);
  }
  // 2^(x / 2^23 - 127) to 3 % for an x below 2^31, 0 below 0: x as the bits of a number. What has
  // kExp2RoughShift in place of 127 · 2^23 is too large as often as it is too small.
  static constexpr float kExp2RoughShift = (127 - 0.0437f) * 0x1p23f;
  ATTNREC_INLINE Reg exp2_rough(Reg x) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_cvtps_epi32(x), _mm512_setzero_si512()));
  }

 private:
  ATTNREC_INLINE __m512i part_of_32(const BFloat16* p, int n) {
    return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first_of_32(n), p);
  }
  ATTNREC_INLINE __mmask32 first_of_32(int n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }
};

}  // namespace
}  // namespace attnrec::cpu
