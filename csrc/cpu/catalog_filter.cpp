// attnrec::catalog_filter on the CPU: what it gives is attnrec/reference.py's.
#include "cpu/catalog_filter.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "cpu/binding.h"

namespace attnrec::cpu {
namespace {

constexpr double kSmallest = 1e-30, kLargest = 1e18;  // the reference's

// A number of at least 0 as bfloat16 that is not smaller.
BFloat16 rounded_up(double x) {
  BFloat16 near = to_bfloat16(static_cast<float>(x));
  if (to_float(near) < x) near.bits++;
  return near;
}

// One row to its place in a panel: `to` is its first group of codes, kPanelItems groups apart.
void round_row(const double* row, int dim, Code code, uint32_t* to, float* scale, BFloat16* error) {
  const int together = codes_together(code), depth = (dim + together - 1) / together;
  double squares = 0, largest = 0, lost = 0;
  for (int d = 0; d < dim; d++) {
    const double x = row[d];
    squares += x * x;
    largest = std::max(largest, std::abs(x));
  }
  const double norm = std::sqrt(squares);
  const bool bounded = norm < kLargest;  // false where it is NaN
  const bool bytes = code == Code::kInt8;
  const double step = bytes && bounded && largest >= kSmallest ? static_cast<float>(largest / 127) : 0.0;
  for (int group = 0; group < depth; group++) {
    uint32_t bits = bytes ? 0x80808080u : 0;
    for (int i = 0; bounded && i < together && group * together + i < dim; i++) {
      const double x = row[group * together + i];
      double rounded = 0;
      if (bytes) {
        const double level = step > 0 ? std::clamp(std::nearbyint(x / step), -127.0, 127.0) : 0;
        rounded = level * step;
        bits = (bits & ~(0xffu << (8 * i))) | static_cast<uint32_t>(static_cast<int32_t>(level) + 128)
                                                  << (8 * i);
      } else if (std::abs(x) >= kSmallest) {
        const BFloat16 number = to_bfloat16(static_cast<float>(x));
        rounded = to_float(number);
        bits |= static_cast<uint32_t>(number.bits) << (16 * i);
      }
      lost += (x - rounded) * (x - rounded);
    }
    to[group * kPanelItems] = bits;
  }
  if (bytes) *scale = static_cast<float>(step);
  const BFloat16 unbounded{0x7f80};
  error[0] = bounded ? rounded_up(std::sqrt(lost)) : unbounded;
  error[1] = bounded ? rounded_up(norm) : unbounded;
}

std::tuple<Tensor, Tensor, Tensor> catalog_filter(Tensor rows, std::string dtype) {
  const char* op = "catalog_filter";
  const Element element = element_of(op, "rows", rows);
  check_tensor(op, "rows", rows, 2, rows.scalar_type(), rows);
  ATTNREC_CHECK(dtype == "bf16" || dtype == "int8", op, "dtype must be 'bf16' or 'int8', got '", dtype, "'");
  std::vector<Tensor> kept;
  CatalogFilter filter;
  filter.code = dtype == "int8" ? Code::kInt8 : Code::kBFloat16;
  filter.head_dim = static_cast<int>(rows.size(1));
  filter.items = rows.size(0);
  const bool bytes = filter.code == Code::kInt8;
  Tensor codes = new_empty(rows, {filter.panels(), filter.depth(), kPanelItems, codes_together(filter.code)},
                           bytes ? ScalarType::Byte : ScalarType::BFloat16);
  Tensor scale = new_empty(rows, {bytes ? filter.items : 0}, ScalarType::Float);
  Tensor error = new_empty(rows, {filter.items, 2}, ScalarType::BFloat16);
  if (filter.items == 0) return {codes, scale, error};
  const Vectors from = vectors_of(rows, kept);
  auto* to = static_cast<uint32_t*>(codes.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  auto* errors = static_cast<BFloat16*>(error.mutable_data_ptr());
  const int64_t at_once = 64;  // panels of a unit
  for_each_unit((filter.panels() + at_once - 1) / at_once, [&](int64_t unit) {
    std::vector<double> row(filter.head_dim);
    const int64_t end = std::min(filter.panels(), (unit + 1) * at_once) * kPanelItems;
    for (int64_t i = unit * at_once * kPanelItems; i < end; i++) {
      uint32_t* place = to + i / kPanelItems * filter.depth() * kPanelItems + i % kPanelItems;
      if (i >= filter.items) {
        for (int group = 0; group < filter.depth(); group++)
          place[group * kPanelItems] = bytes ? 0x80808080u : 0;
        continue;
      }
      for (int d = 0; d < filter.head_dim; d++)
        row[d] = load_element<double>(from.at(i, 0, element), d, element);
      round_row(row.data(), filter.head_dim, filter.code, place, scales + (bytes ? i : 0), errors + 2 * i);
    }
  });
  return {codes, scale, error};
}

}  // namespace
}  // namespace attnrec::cpu

STABLE_TORCH_LIBRARY_IMPL(attnrec, CPU, m) {
  m.impl("catalog_filter", TORCH_BOX(&attnrec::cpu::catalog_filter));
}
