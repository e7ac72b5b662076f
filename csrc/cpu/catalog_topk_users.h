// The users of catalog_topk through a filter.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/catalog_filter.h"
#include "cpu/catalog_topk.h"
#include "cpu/element.h"

namespace attnrec::cpu {

// Users' side of the filter, rounded, and what the rounding may do to a score.
struct Users {
  std::vector<uint32_t> codes;  // [users][kUserParts][depth]
  std::vector<int32_t> start;   // [users][kUserParts]
  std::vector<float> unit, per_error, floor;
  std::vector<float> per_norm[kUserParts];  // of one part, and of both

  Users(int64_t count, int depth)
      : codes(count * kUserParts * depth),
        start(count * kUserParts),
        unit(count),
        per_error(count),
        floor(count),
        per_norm{std::vector<float>(count), std::vector<float>(count)} {}

  // False for a user that is not finite, or too large to bound.
  bool round(const Attention& a, const CatalogFilter& filter, double temperature, int64_t user, int64_t at) {
    const int dim = a.head_dim;
    std::vector<double> left(dim);
    double largest = 0, squares = 0;
    for (int d = 0; d < dim; d++) {
      left[d] = load_element<double>(a.query.at(user, 0, a.element), d, a.element);
      largest = std::max(largest, std::abs(left[d]));
      squares += left[d] * left[d];
    }
    if (!(std::sqrt(squares) / temperature < kTooLarge)) return false;  // nor where one is NaN
    const bool bytes = filter.code == Code::kInt8;
    const float scale = !bytes ? 1.0f : largest < 1e-30 ? 0.0f : static_cast<float>(largest / 127);
    // The filter's score and the exact one are sums in fp32, each within (D + 16)·2^-24·|u|·|e| of its terms.
    const double sums = (dim + 32) * 0x1p-23 * std::sqrt(squares) + dim * 0x1p-120;
    const double up = 1 + 1e-6;
    double rounded = 0;
    for (int part = 0; part < kUserParts; part++) {
      uint32_t* to = &codes[(at * kUserParts + part) * filter.depth()];
      const double step = part == 0 ? scale : static_cast<double>(scale) * kFineStep;
      start[at * kUserParts + part] = bytes ? -128 * take_bytes(left, step, to) : 0;
      if (!bytes) take_bf16(left, to);
      double lost = 0;
      for (double x : left) lost += x * x;
      per_norm[part][at] = static_cast<float>((std::sqrt(lost) + sums) / temperature * up + 1e-37);
      if (part == 0) rounded = std::sqrt(squares) + std::sqrt(lost);  // of one part or of both: no longer
    }
    unit[at] = static_cast<float>(scale / temperature);
    per_error[at] = static_cast<float>(std::max(rounded / temperature * up, 1e-37));
    return true;
  }

  FilterUsers view(const TopkOptions& options, int parts) const {
    return {codes.data(),
            start.data(),
            unit.data(),
            per_error.data(),
            per_norm[parts - 1].data(),
            floor.data(),
            options.excluded,
            options.exclude_offsets};
  }

 private:
  static constexpr double kTooLarge = 1e18;

  // Rounds numbers to whole steps in a byte, and leaves what is lost. Returns the sum of the bytes.
  static int32_t take_bytes(std::vector<double>& numbers, double step, uint32_t* to) {
    int32_t sum = 0;
    for (size_t d = 0; d < numbers.size(); d++) {
      const double code = step > 0 ? std::nearbyint(numbers[d] / step) : 0;
      const auto byte = static_cast<int32_t>(std::clamp(code, -127.0, 127.0));
      numbers[d] -= byte * step;
      to[d / 4] |= static_cast<uint32_t>(byte & 0xff) << (d % 4 * 8);
      sum += byte;
    }
    return sum;
  }
  // The same to bf16.
  static void take_bf16(std::vector<double>& numbers, uint32_t* to) {
    for (size_t d = 0; d < numbers.size(); d++) {
      if (std::abs(numbers[d]) < 1e-30) continue;
      const BFloat16 number = to_bfloat16(static_cast<float>(numbers[d]));
      numbers[d] -= to_float(number);
      to[d / 2] |= static_cast<uint32_t>(number.bits) << (d % 2 * 16);
    }
  }
};

}  // namespace attnrec::cpu
