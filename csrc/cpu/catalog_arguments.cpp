#include "cpu/catalog_arguments.h"

#include <algorithm>

namespace attnrec::cpu {
namespace {

constexpr int64_t kTile = 128;  // a whole number of the tiers' tiles

}  // namespace

CatalogArguments::CatalogArguments(const char* op, const Tensor& users, const char* items_name,
                                   const Tensor& items, double temperature) {
  Attention& a = attention;
  a.element = element_of(op, "users", users);
  check_tensor(op, "users", users, 2, users.scalar_type());
  check_tensor(op, items_name, items, 2, users.scalar_type());
  ATTNREC_CHECK(users.size(1) >= 1, op, "users must have a dim of at least 1, got shape ", shape_of(users));
  ATTNREC_CHECK(items.size(1) == users.size(1), op, items_name, " must have users' dim ", users.size(1),
                ", got shape ", shape_of(items));
  ATTNREC_CHECK(std::isfinite(temperature) && temperature > 0, op,
                "temperature must be above 0 and finite, got ", temperature);
  a.head_dim = static_cast<int>(users.size(1));
  a.heads = a.kv_heads = 1;
  a.users = 1;
  a.scale = 1 / temperature;
  a.units = 1;
  a.query = vectors_of(users, kept);
  a.key = vectors_of(items, kept);
}

Element check_per_item(const char* op, const char* name, const Tensor& tensor, int64_t count,
                       const Tensor& users) {
  const Element element = element_of(op, name, tensor);
  const ScalarType dtype = tensor.scalar_type();
  ATTNREC_CHECK(dtype == users.scalar_type() || dtype == ScalarType::Float, op, name,
                " must be float32 or have users' dtype, got ", torch::headeronly::toString(dtype));
  ATTNREC_CHECK(tensor.dim() == 1 && tensor.size(0) == count, op, name, " must have shape [", count,
                "], got ", shape_of(tensor));
  return element;
}

std::vector<int64_t> chunk_bounds(int64_t items, int64_t fewest, int64_t most) {
  const int64_t fair = std::max(fewest, (items + most - 1) / most);
  const int64_t size = (fair + kTile - 1) / kTile * kTile;
  std::vector<int64_t> bounds{0};
  while (bounds.back() < items) bounds.push_back(std::min(items, bounds.back() + size));
  return bounds;
}

}  // namespace attnrec::cpu
