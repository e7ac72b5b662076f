// attnrec::catalog_topk on the CPU.
#include "cpu/catalog_topk.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cpu/catalog_topk_filtered.h"

namespace attnrec::cpu {
namespace {

constexpr int64_t kUnits = 16;          // enough for the threads; each more starts its lists of the best anew
constexpr int64_t kMostRows = 256;      // of a unit
constexpr int64_t kFewestItems = 1024;  // likewise
constexpr int64_t kListBytes = 8 << 20;    // of a unit's lists
constexpr int64_t kPartsBytes = 64 << 20;  // of all units' lists

struct Best {
  double score;
  int64_t id;
};

// Sorts each user's excluded ids.
std::vector<int64_t> sorted_exclusions(const char* op, const Tensor& ids, const std::vector<int64_t>& offsets,
                                       int64_t items) {
  std::vector<int64_t> excluded = integers(op, "exclude_ids", ids, -1, ids);
  for (size_t i = 0; i < excluded.size(); i++) {
    ATTNREC_CHECK(excluded[i] >= 0 && excluded[i] < items, op,
                  "exclude_ids must be ids of the catalogue, from 0 to ", items - 1, ", got ", excluded[i],
                  " at ", i);
  }
  for (size_t b = 0; b + 1 < offsets.size(); b++) {
    std::sort(excluded.begin() + offsets[b], excluded.begin() + offsets[b + 1]);
  }
  return excluded;
}

// Users' rows and exclusions side by side, where they are not all of the batch.
struct Gathered {
  std::vector<char> rows;
  std::vector<int64_t> excluded, offsets;

  Gathered(Attention& a, TopkOptions& options, const std::vector<int64_t>& users) {
    const int64_t bytes = static_cast<int64_t>(a.head_dim) * element_bytes(a.element);
    rows.resize(users.size() * bytes);
    for (size_t b = 0; b < users.size(); b++)
      std::memcpy(rows.data() + b * bytes, a.query.at(users[b], 0, a.element), bytes);
    a.query = {rows.data(), a.head_dim, 0};
    if (!options.excluded) return;
    offsets.push_back(0);
    for (int64_t user : users) {
      excluded.insert(excluded.end(), options.excluded + options.exclude_offsets[user],
                      options.excluded + options.exclude_offsets[user + 1]);
      offsets.push_back(static_cast<int64_t>(excluded.size()));
    }
    options.excluded = excluded.data();
    options.exclude_offsets = offsets.data();
  }
};

// Scores of the rows as given, for these users, rising.
void catalog_topk_unfiltered(Attention a, int64_t items, TopkOptions options, const TopkResults& results,
                             const Unserved& unserved, int64_t all) {
  const std::vector<int64_t>& users = unserved.users;
  options.out_of_reach = unserved.out_of_reach.data();
  const int64_t batch = static_cast<int64_t>(users.size()), k = results.k;
  std::optional<Gathered> gathered;
  if (batch < all) gathered.emplace(a, options, users);

  // How rows and items are cut depends on the sizes alone. Which items are best does not depend on it at all,
  // and lse only by rounding.
  const int64_t entry = static_cast<int64_t>(sizeof(Best));
  const int64_t rows = std::clamp<int64_t>(kListBytes / (entry * std::max<int64_t>(k, 1)), 8, kMostRows);
  const int64_t groups = (batch + rows - 1) / rows;
  const int64_t fit = kPartsBytes / (entry * std::max<int64_t>(k * batch, 1));
  const int64_t wanted = (kUnits + groups - 1) / std::max<int64_t>(groups, 1);
  const std::vector<int64_t> bounds =
      chunk_bounds(items, std::max(kFewestItems, 4 * k), std::max<int64_t>(1, std::min(wanted, fit)));
  const int64_t chunks = static_cast<int64_t>(bounds.size()) - 1;
  options.k = chunks > 0 ? std::min(k, bounds[1]) : 0;

  std::vector<double> scores(chunks * batch * options.k), maximum(chunks * batch), sum(chunks * batch);
  std::vector<int64_t> ids(scores.size()), counts(chunks * batch);
  const Kernels& tier = kernels(a.element);
  for_each_unit(chunks * groups, [&](int64_t i) {
    const int64_t chunk = i / groups, first = i % groups * rows, at = chunk * batch + first;
    Unit unit;
    unit.first = first;
    unit.rows = static_cast<int>(std::min(rows, batch - first));
    unit.first_event = bounds[chunk];
    unit.last_event = bounds[chunk + 1];
    const TopkParts parts{scores.data() + at * options.k, ids.data() + at * options.k, &counts[at],
                          &maximum[at], &sum[at]};
    void* memory = thread_scratch(tier.catalog_topk(a, unit, nullptr, options, parts));
    tier.catalog_topk(a, unit, memory, options, parts);
  });

  for_each_unit(batch, [&](int64_t b) {
    std::vector<Best> best;
    SoftmaxParts softmax;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t at = chunk * batch + b;
      softmax.add(maximum[at], sum[at]);
      for (int64_t i = 0; i < counts[at]; i++)
        best.push_back({scores[at * options.k + i], ids[at * options.k + i]});
    }
    const auto before = [](const Best& x, const Best& y) {
      return x.score > y.score || (x.score == y.score && x.id < y.id);
    };
    const int64_t found = std::min<int64_t>(k, static_cast<int64_t>(best.size()));
    std::nth_element(best.begin(), best.begin() + found, best.end(), before);
    std::sort(best.begin(), best.begin() + found, before);
    for (int64_t i = 0; i < k; i++) {
      const double score = i < found ? best[i].score : -std::numeric_limits<double>::infinity();
      store_element<double>(results.scores, users[b] * k + i, results.working, score);
      results.ids[users[b] * k + i] = i < found ? best[i].id : -1;
    }
    store_element<double>(results.lse, users[b], results.working, softmax.lse());
  });
}

// Scores are exact for the table as given: fp32 products and sums, whatever the batch. An item whose score is
// NaN is never returned, as if it came last; lse is NaN then.
std::tuple<Tensor, Tensor, Tensor> catalog_topk(Tensor users, Tensor catalog, int64_t k,
                                                OptionalTensor exclude_ids, OptionalTensor exclude_offsets,
                                                OptionalTensor bias, double temperature,
                                                OptionalTensor filter, OptionalTensor filter_scale,
                                                OptionalTensor filter_error) {
  const char* op = "catalog_topk";
  check_catalog_topk(op, users, catalog, k, exclude_ids, exclude_offsets, bias, temperature);
  CatalogArguments arguments(op, users, "catalog", catalog, temperature);
  Attention& a = arguments.attention;
  const int64_t batch = users.size(0), items = catalog.size(0);
  const std::vector<int64_t> kv_offsets{0, items};
  a.kv_offsets = kv_offsets.data();
  a.scale = 1;
  TopkOptions options;
  options.temperature = temperature;
  std::vector<int64_t> offsets, excluded;
  if (exclude_ids) {
    offsets = offsets_of(op, "exclude_offsets", *exclude_offsets, *exclude_ids, "exclude_ids");
    excluded = sorted_exclusions(op, *exclude_ids, offsets, items);
    options.excluded = excluded.data();
    options.exclude_offsets = offsets.data();
  }
  if (bias) {
    options.bias_element = element_of(op, "bias", *bias);
    options.bias = bias->const_data_ptr();
    options.bias_stride = bias->stride(0);
  }

  CatalogFilter rounded;
  check_filter(op, catalog, filter, filter_scale, filter_error, &rounded);

  Tensor scores = new_empty(users, {batch, k}, working_dtype(a.element));
  Tensor ids = new_empty(users, {batch, k}, ScalarType::Long);
  Tensor lse = new_empty(users, {batch}, working_dtype(a.element));
  const TopkResults results{scores.mutable_data_ptr(), static_cast<int64_t*>(ids.mutable_data_ptr()),
                            lse.mutable_data_ptr(),
                            a.element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32, k};
  const Unserved others = catalog_topk_filtered(a, batch, rounded, options, results);
  if (!others.users.empty()) catalog_topk_unfiltered(a, items, options, results, others, batch);
  return {scores, ids, lse};
}

}  // namespace
}  // namespace attnrec::cpu

STABLE_TORCH_LIBRARY_IMPL(attnrec, CPU, m) { m.impl("catalog_topk", TORCH_BOX(&attnrec::cpu::catalog_topk)); }
