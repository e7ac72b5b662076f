#include "cpu/catalog_arguments.h"

#include <algorithm>

namespace attnrec::cpu {
namespace {

constexpr int64_t kTile = 128;  // a whole number of the tiers' tiles

}  // namespace

CatalogArguments::CatalogArguments(const char* op, const Tensor& users, const char* items_name,
                                   const Tensor& items, double temperature) {
  check_catalog(op, users, items_name, items, temperature);
  Attention& a = attention;
  a.element = element_of(op, "users", users);
  a.head_dim = static_cast<int>(users.size(1));
  a.heads = a.kv_heads = 1;
  a.users = 1;
  a.scale = 1 / temperature;
  a.units = 1;
  a.query = vectors_of(users, kept);
  a.key = vectors_of(items, kept);
}

std::vector<int64_t> chunk_bounds(int64_t items, int64_t fewest, int64_t most) {
  const int64_t fair = std::max(fewest, (items + most - 1) / most);
  const int64_t size = (fair + kTile - 1) / kTile * kTile;
  std::vector<int64_t> bounds{0};
  while (bounds.back() < items) bounds.push_back(std::min(items, bounds.back() + size));
  return bounds;
}

}  // namespace attnrec::cpu
