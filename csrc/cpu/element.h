// Element types of the tensors that kernels read and write, and their conversions to the working type.
#pragma once

#include <cstdint>
#include <cstring>

namespace attnrec::cpu {

enum class Element : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

inline int element_bytes(Element element) {
  switch (element) {
    case Element::kFloat64:
      return 8;
    case Element::kFloat32:
      return 4;
    default:
      return 2;
  }
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Everything below has internal linkage: each tier compiles its own copy with its own instruction set, and
// the linker must never merge them.
namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(BFloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

inline float to_float(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  const bool finite = magnitude < 0x7c00u;
  if (!finite) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // A half's exponent and mantissa, read as a float's, are 2^112 too small; the product is exact, subnormals
  // too.
  return float_from_bits(sign | bits_from_float(float_from_bits(magnitude << 13) * 0x1p112f));
}

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_from_float(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  // Round to nearest, ties to even.
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline Half to_half(float value) {
  const uint32_t bits = bits_from_float(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded value in the low bits of the sum.
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

template <class Real>
inline Real load_element(const void* data, int64_t index, Element element) {
  switch (element) {
    case Element::kFloat32:
      return static_cast<Real>(static_cast<const float*>(data)[index]);
    case Element::kFloat64:
      return static_cast<Real>(static_cast<const double*>(data)[index]);
    case Element::kBFloat16:
      return static_cast<Real>(to_float(static_cast<const BFloat16*>(data)[index]));
    default:
      return static_cast<Real>(to_float(static_cast<const Half*>(data)[index]));
  }
}

template <class Real>
inline void store_element(void* data, int64_t index, Element element, Real value) {
  switch (element) {
    case Element::kFloat32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case Element::kFloat64:
      static_cast<double*>(data)[index] = static_cast<double>(value);
      break;
    case Element::kBFloat16:
      static_cast<BFloat16*>(data)[index] = to_bfloat16(static_cast<float>(value));
      break;
    default:
      static_cast<Half*>(data)[index] = to_half(static_cast<float>(value));
  }
}

}  // namespace
}  // namespace attnrec::cpu
