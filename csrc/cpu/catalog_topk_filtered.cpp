// catalog_topk through a filter: a floor for each user from a sample of the catalogue, one pass over the
// filter that keeps what may reach it, and exact scores of what may still be among the k best. Every step is
// cut by sizes alone, so that neither threads nor the batch change an id or a score.
#include "cpu/catalog_topk_filtered.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

namespace attnrec::cpu {
namespace {

constexpr int64_t kFewestItems = 16384;  // below, and below kSampleItems * k, a filter saves nothing
constexpr int64_t kSampleItems = 32;     // to have of the catalogue for each of k
constexpr int64_t kKeptBySample = 2048;  // candidates a user to aim at
constexpr int64_t kGroupUsers = 256;     // whose candidates are in memory at once
constexpr int64_t kUnits = 16;           // of the sample
constexpr int64_t kChunks = 64;  // of the catalogue, of which one of kEarly goes first: it raises the floor
constexpr int64_t kEarly = 4;    // B = 256, int8: 5,400 candidates a user become 2,000, 103 ms 87
constexpr double kLseError = 0.1, kExpError = 0.03;  // the contract's, and that of exp2_rough
constexpr double kSure = 0.8, kHopeless = 3;  // times kLseError: what a quarter of the catalogue foretells
constexpr double kTooLarge = 1e18;
constexpr double kInf = std::numeric_limits<double>::infinity();

// A user's side of the filter, rounded, and what the rounding may do to a score.
struct Users {
  std::vector<uint32_t> codes;
  std::vector<int32_t> start;
  std::vector<float> unit, per_error, per_norm, floor;

  Users(int64_t count, int depth)
      : codes(count * depth), start(count), unit(count), per_error(count), per_norm(count), floor(count) {}

  // False for a user that is not finite, or too large to bound.
  bool round(const Attention& a, const CatalogFilter& filter, double temperature, int64_t user, int64_t at) {
    const int dim = a.head_dim;
    std::vector<double> exact(dim);
    double largest = 0, squares = 0, kept = 0, lost = 0;
    for (int d = 0; d < dim; d++) {
      exact[d] = load_element<double>(a.query.at(user, 0, a.element), d, a.element);
      largest = std::max(largest, std::abs(exact[d]));
      squares += exact[d] * exact[d];
    }
    if (!(std::sqrt(squares) / temperature < kTooLarge)) return false;  // nor where one is NaN
    uint32_t* to = &codes[at * filter.depth()];
    const bool bytes = filter.code == Code::kInt8;
    const float scale = !bytes ? 1.0f : largest < 1e-30 ? 0.0f : static_cast<float>(largest / 127);
    int32_t sum = 0;
    for (int d = 0; d < dim; d++) {
      double rounded = 0;
      if (bytes) {
        const double code = scale > 0 ? std::nearbyint(exact[d] / scale) : 0;
        const auto byte = static_cast<int32_t>(std::clamp(code, -127.0, 127.0));
        rounded = byte * static_cast<double>(scale);
        to[d / 4] |= static_cast<uint32_t>(byte & 0xff) << (d % 4 * 8);
        sum += byte;
      } else if (std::abs(exact[d]) >= 1e-30) {
        const BFloat16 number = to_bfloat16(static_cast<float>(exact[d]));
        rounded = to_float(number);
        to[d / 2] |= static_cast<uint32_t>(number.bits) << (d % 2 * 16);
      }
      kept += rounded * rounded;
      lost += (exact[d] - rounded) * (exact[d] - rounded);
    }
    // The filter's score and the exact one are sums in fp32, each within (D + 16)·2^-24·|u|·|e| of its terms.
    const double sums = (dim + 32) * 0x1p-23 * std::sqrt(squares) + dim * 0x1p-120;
    const double up = 1 + 1e-6;
    start[at] = -128 * sum;
    unit[at] = static_cast<float>(scale / temperature);
    per_error[at] = static_cast<float>(std::max(std::sqrt(kept) / temperature * up, 1e-37));
    per_norm[at] = static_cast<float>((std::sqrt(lost) + sums) / temperature * up + 1e-37);
    return true;
  }

  FilterUsers view(const TopkOptions& options) const {
    return {codes.data(),    start.data(), unit.data(),      per_error.data(),
            per_norm.data(), floor.data(), options.excluded, options.exclude_offsets};
  }
};

// A sum of exponentials that is known but for each one's `reach`, and by how much it may be too small.
struct Around {
  SoftmaxParts sum, excess;

  void add(double maximum, double part, double reach) {
    sum.add(maximum, part);
    excess.add(maximum + reach, part * (1 + kExpError - std::exp(-reach)));
  }
  // By how much the lse of all is off at most: too small rather than too large.
  double lse_error(const SoftmaxParts& exact) const {
    if (!(sum.sum > 0)) return 0;
    SoftmaxParts all = exact;
    all.add(sum.maximum, sum.sum);
    return std::log1p(std::exp(excess.lse() - all.lse()));
  }
};

// What one unit keeps of a row. Grown without bound it would be the catalogue: past `most` what can no longer
// be among the k best is dropped. The user is given up (`lost`) where all units together take too many.
struct Kept {
  std::vector<Candidate> candidates;
  SoftmaxParts dropped;
  float base = 0, floor = 0;
  int64_t k = 0, most = 0, limit = 0;
  std::atomic<int64_t>* taken = nullptr;  // by all units
  bool lost = false;

  float take(const Candidate* first, int n) {
    // Whether it ends above the limit does not depend on who counts first.
    if (lost || taken->fetch_add(n, std::memory_order_relaxed) + n > limit) {
      lost = true;
      candidates.clear();
      return floor = std::numeric_limits<float>::infinity();
    }
    candidates.insert(candidates.end(), first, first + n);
    if (static_cast<int64_t>(candidates.size()) > most) narrow();
    return floor;
  }

  // The k-th best score that is sure: what cannot reach it goes.
  void narrow() {
    const double sure = kth_sure(candidates, k);
    drop_below(sure);
    floor = std::max(floor, below(sure));
    most = std::max(most, 2 * static_cast<int64_t>(candidates.size()));
  }

  static bool reaches(const Candidate& c, double sure) {
    return static_cast<double>(c.score) + c.reach >= sure;
  }

  void drop_below(double sure) {
    size_t n = 0;
    for (const Candidate& c : candidates) {
      if (reaches(c, sure)) {
        candidates[n++] = c;
      } else {
        dropped.add(c.score, 1);
      }
    }
    candidates.resize(n);
  }

  static float below(double x) { return static_cast<float>(x - std::abs(x) * 1e-6); }

  static double kth_sure(const std::vector<Candidate>& candidates, int64_t k) {
    if (static_cast<int64_t>(candidates.size()) < k || k == 0) return -kInf;
    std::vector<float> sure;
    sure.reserve(candidates.size());
    for (const Candidate& c : candidates) sure.push_back(c.sure());
    std::nth_element(sure.begin(), sure.begin() + (k - 1), sure.end(), std::greater<>());
    return sure[k - 1];
  }
};

// Panels to sample: one of `every`, and none of a fixed period, which a catalogue may have too.
std::vector<int64_t> sampled_panels(int64_t whole_panels, int64_t every) {
  std::vector<int64_t> panels;
  for (int64_t i = 0; (i + 1) * every <= whole_panels; i++) {
    const uint64_t mixed = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
    panels.push_back(i * every + static_cast<int64_t>((mixed >> 33) % static_cast<uint64_t>(every)));
  }
  return panels;
}

class Search {
 public:
  Search(const Attention& attention, const CatalogFilter& of, const TopkOptions& given, const TopkResults& to)
      : a(attention), filter(of), options(given), results(to), tier(kernels(attention.element)), k(to.k) {
    const int64_t every = std::clamp<int64_t>(kKeptBySample / std::max<int64_t>(k, 1), 4, 32);
    panels = sampled_panels(filter.items / kPanelItems, every);
    pieces = std::clamp<int64_t>(static_cast<int64_t>(panels.size()) / 16, 1, kUnits);
    // Groups of the sample, whole panels of them for each piece: 8 and more for each of the k.
    groups = kPanelItems;
    while (groups * pieces < 8 * k) groups *= 2;
    chunks = chunk_bounds(filter.panels(), 128, kChunks);
  }

  // Users first … first + n. Appends those it does not serve.
  void run(int64_t first, int64_t n, Unserved& others) {
    users.emplace(n, filter.depth());
    std::vector<char> served(n, 1);
    for (int64_t i = 0; i < n; i++) {
      served[i] = users->round(a, filter, options.temperature, first + i, i);
    }
    TopkOptions of_group = options;
    if (options.excluded) of_group.exclude_offsets += first;
    view = users->view(of_group);
    find_floors(n, served);
    kept.assign((chunks.size() - 1) * n, {});
    sums.assign(kept.size(), 0);
    bounds.assign(chunks.size() - 1, {});
    taken = std::vector<std::atomic<int64_t>>(n);
    scan(n, served, true);
    raise_floors(n, served);
    scan(n, served, false);
    for_each_unit(n, [&](int64_t i) {
      if (served[i]) served[i] = finish(first + i, i);
    });
    for (int64_t i = 0; i < n; i++) {
      if (served[i]) continue;
      others.users.push_back(first + i);
      others.out_of_reach.push_back(std::nextafter(sure_floor[i], -std::numeric_limits<float>::infinity()));
    }
  }

 private:
  void find_floors(int64_t n, std::vector<char>& served) {
    const int64_t stride = groups * pieces;
    std::vector<float> best(n * stride, -std::numeric_limits<float>::infinity());
    sure_floor.resize(n);
    const float* none = view.floor;
    view.floor = nullptr;
    for_each_unit(pieces, [&](int64_t piece) {
      FilterUnit unit;
      unit.rows = static_cast<int>(n);
      const int64_t count = static_cast<int64_t>(panels.size());
      unit.first_panel = piece * count / pieces;
      unit.last_panel = (piece + 1) * count / pieces;
      unit.listed = panels.data();
      float* to = best.data() + piece * groups;
      void* memory =
          thread_scratch(tier.catalog_filter_sample(filter, view, unit, nullptr, to, stride, groups));
      tier.catalog_filter_sample(filter, view, unit, memory, to, stride, groups);
    });
    view.floor = none;
    for_each_unit(n, [&](int64_t i) {
      float* of_user = best.data() + i * stride;
      float floor = -std::numeric_limits<float>::infinity();
      if (k > 0) {
        std::nth_element(of_user, of_user + (k - 1), of_user + stride, std::greater<>());
        floor = of_user[k - 1];
      } else {
        floor = *std::max_element(of_user, of_user + stride);
      }
      served[i] = served[i] && floor > -1e29f && floor < 1e29f;  // hidden ones score -1e30
      sure_floor[i] = served[i] && k > 0 ? floor : -std::numeric_limits<float>::infinity();
      users->floor[i] = served[i] ? floor : std::numeric_limits<float>::infinity();
    });
  }

  static bool early(int64_t chunk) { return chunk % kEarly == 0; }

  void scan(int64_t n, const std::vector<char>& served, bool early_ones) {
    if (std::find(served.begin(), served.end(), 1) == served.end()) return;
    std::vector<int64_t> todo;
    for (int64_t chunk = 0; chunk + 1 < static_cast<int64_t>(chunks.size()); chunk++) {
      if (early(chunk) == early_ones) todo.push_back(chunk);
    }
    for_each_unit(static_cast<int64_t>(todo.size()), [&](int64_t at) {
      const int64_t chunk = todo[at];
      Kept* rows = &kept[chunk * n];
      for (int64_t i = 0; i < n; i++) {
        rows[i].base = rows[i].floor = users->floor[i];
        rows[i].k = k;
        rows[i].most = 4 * k + 1024;
        rows[i].limit = limit();
        rows[i].taken = &taken[i];
        rows[i].lost = !served[i];
      }
      FilterUnit unit;
      unit.rows = static_cast<int>(n);
      unit.first_panel = chunks[chunk];
      unit.last_panel = chunks[chunk + 1];
      CandidateSink sink;
      sink.context = rows;
      sink.take = [](void* context, int row, const Candidate* candidates, int found) {
        return static_cast<Kept*>(context)[row].take(candidates, found);
      };
      FilterSums& found = bounds[chunk];
      found.sum = &sums[chunk * n];
      void* memory = thread_scratch(tier.catalog_filter_scan(filter, view, unit, nullptr, sink, found));
      tier.catalog_filter_scan(filter, view, unit, memory, sink, found);
    });
  }

  // The floors that the early chunks' candidates give, as far as lse can do without exact scores of what is
  // below. Users whose lse will not come near its bound are given up.
  void raise_floors(int64_t n, std::vector<char>& served) {
    for_each_unit(n, [&](int64_t i) {
      if (!served[i]) return;
      std::vector<Candidate> all;
      Around rest;
      for (int64_t chunk = 0; chunk + 1 < static_cast<int64_t>(chunks.size()); chunk += kEarly) {
        const Kept& part = kept[chunk * n + i];
        if (part.lost) return give_up(i, served);
        all.insert(all.end(), part.candidates.begin(), part.candidates.end());
        rest.add(part.base, sums[chunk * n + i], reach(chunk, i));
        rest.add(part.dropped.maximum, part.dropped.sum, reach(chunk, i));
      }
      const double sure = Kept::kth_sure(all, k);
      sure_floor[i] = std::max(sure_floor[i], Kept::below(sure));
      SoftmaxParts best, candidates;
      Around others = rest;
      for (const Candidate& c : all) {
        candidates.add(c.score, 1);
        if (Kept::reaches(c, sure)) {
          best.add(c.score, 1);
        } else {
          others.add(c.score, 1, c.reach);
        }
      }
      if (rest.lse_error(candidates) > kHopeless * kLseError) return give_up(i, served);
      if (sure > users->floor[i] && others.lse_error(best) <= kSure * kLseError)
        users->floor[i] = Kept::below(sure);
    });
  }

  void give_up(int64_t i, std::vector<char>& served) {
    served[i] = 0;
    users->floor[i] = std::numeric_limits<float>::infinity();
  }

  // The most by which a chunk's scores may be off for a user.
  double reach(int64_t chunk, int64_t i) const {
    return users->per_error[i] * bounds[chunk].error + users->per_norm[i] * bounds[chunk].norm;
  }

  // Candidates of a user beyond which reading all rows is cheaper than gathering some.
  int64_t limit() const { return std::max(16 * k, filter.items / 32) + 8192; }

  // Exact scores, the best of them, and lse: false where the user has to be served without the filter.
  bool finish(int64_t user, int64_t i) {
    const int64_t count = static_cast<int64_t>(chunks.size()) - 1,
                  n = static_cast<int64_t>(kept.size()) / count;
    Kept all = kept[i];
    Around rest;  // of all items without an exact score
    for (int64_t chunk = 0; chunk < count; chunk++) {
      const Kept& part = kept[chunk * n + i];
      if (part.lost) return false;
      if (chunk > 0)
        all.candidates.insert(all.candidates.end(), part.candidates.begin(), part.candidates.end());
      const double sum = sums[chunk * n + i];
      if (sum > std::numeric_limits<float>::max()) return false;  // the floor rose far above the unit's base
      rest.add(part.base, sum, reach(chunk, i));
      rest.add(part.dropped.maximum, part.dropped.sum, reach(chunk, i));
    }
    // Those that may be among the best come first. The others only make lse exact where it has to be.
    const double sure = Kept::kth_sure(all.candidates, k);
    const auto middle = std::partition(all.candidates.begin(), all.candidates.end(),
                                       [&](const Candidate& c) { return Kept::reaches(c, sure); });
    const int64_t first = middle - all.candidates.begin(),
                  count_all = static_cast<int64_t>(all.candidates.size());
    Around with_others = rest;
    for (auto c = middle; c != all.candidates.end(); c++) with_others.add(c->score, 1, c->reach);
    Exact exact(count_all);
    rescore(user, all.candidates, 0, first, exact);
    if (write(user, exact, with_others)) return true;
    if (first == count_all) return false;
    rescore(user, all.candidates, first, count_all, exact);
    return write(user, exact, rest);
  }

  struct Exact {
    std::vector<int64_t> ids;
    std::vector<double> scores;

    explicit Exact(int64_t room) {
      ids.reserve(room);
      scores.reserve(room);
    }
  };

  // Appends exact scores of candidates first … last.
  void rescore(int64_t user, const std::vector<Candidate>& candidates, int64_t first, int64_t last,
               Exact& exact) {
    for (int64_t j = first; j < last; j++) exact.ids.push_back(candidates[j].id);
    exact.scores.resize(last);
    void* memory = thread_scratch(tier.catalog_topk_rescore(a, nullptr, options, user, nullptr, 0, nullptr));
    tier.catalog_topk_rescore(a, memory, options, user, &exact.ids[first], last - first,
                              &exact.scores[first]);
    if (!options.excluded) return;
    // An excluded item is a candidate only where its error is not bounded.
    const int64_t* excluded = options.excluded + options.exclude_offsets[user];
    const int64_t* end = options.excluded + options.exclude_offsets[user + 1];
    for (int64_t j = first; j < last; j++) {
      if (std::binary_search(excluded, end, exact.ids[j])) exact.scores[j] = -kInf;
    }
  }

  bool write(int64_t user, const Exact& of, const Around& rest) {
    const std::vector<int64_t>& ids = of.ids;
    const std::vector<double>& scores = of.scores;
    std::vector<int64_t> order;
    SoftmaxParts softmax;
    bool nan = false;
    for (size_t j = 0; j < ids.size(); j++) {
      nan |= scores[j] != scores[j];
      if (!(scores[j] > -kInf)) continue;
      order.push_back(static_cast<int64_t>(j));
      softmax.add(scores[j], 1);
    }
    const int64_t found = static_cast<int64_t>(order.size());
    if (found < k) return false;
    if (!nan && !(rest.lse_error(softmax) <= kLseError)) return false;
    softmax.add(rest.sum.maximum, rest.sum.sum);
    const auto before = [&](int64_t x, int64_t y) {
      return scores[x] > scores[y] || (scores[x] == scores[y] && ids[x] < ids[y]);
    };
    std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
    for (int64_t j = 0; j < k; j++) {
      store_element<double>(results.scores, user * k + j, results.working, scores[order[j]]);
      results.ids[user * k + j] = ids[order[j]];
    }
    store_element<double>(results.lse, user, results.working,
                          nan ? std::numeric_limits<double>::quiet_NaN() : softmax.lse());
    return true;
  }

  const Attention& a;
  const CatalogFilter& filter;
  const TopkOptions& options;
  const TopkResults& results;
  const Kernels& tier;
  const int64_t k;
  std::vector<int64_t> panels, chunks;
  int64_t pieces = 1, groups = kPanelItems;
  std::optional<Users> users;
  FilterUsers view;
  std::vector<float> sure_floor;            // what k items of a user reach
  std::vector<Kept> kept;                   // [chunks][users]
  std::vector<double> sums;                 // likewise
  std::vector<FilterSums> bounds;           // [chunks]
  std::vector<std::atomic<int64_t>> taken;  // candidates of each user
};

}  // namespace

void check_filter(const char* op, const Tensor& catalog, const OptionalTensor& filter,
                  const OptionalTensor& scale, const OptionalTensor& error, CatalogFilter* to) {
  if (!filter) {
    ATTNREC_CHECK(!scale && !error, op, scale ? "filter_scale" : "filter_error",
                  " must be left out where there is no filter");
    return;
  }
  const bool bytes = filter->scalar_type() == ScalarType::Byte;
  check_tensor(op, "filter", *filter, 4, bytes ? ScalarType::Byte : ScalarType::BFloat16, catalog);
  to->code = bytes ? Code::kInt8 : Code::kBFloat16;
  to->head_dim = static_cast<int>(catalog.size(1));
  to->items = catalog.size(0);
  const int64_t together = codes_together(to->code);
  ATTNREC_CHECK(filter->size(0) == to->panels() && filter->size(1) == to->depth() &&
                    filter->size(2) == kPanelItems && filter->size(3) == together,
                op, "filter must have shape [", to->panels(), ", ", to->depth(), ", ", kPanelItems, ", ",
                together, "] for this catalogue, got ", shape_of(*filter));
  ATTNREC_CHECK(filter->is_contiguous(), op, "filter must be contiguous");
  to->codes = static_cast<const uint32_t*>(filter->const_data_ptr());
  if (bytes) {
    ATTNREC_CHECK(scale.has_value(), op, "filter_scale must be given with a filter of bytes");
    check_tensor(op, "filter_scale", *scale, 1, ScalarType::Float, catalog);
    ATTNREC_CHECK(scale->size(0) == to->items && scale->is_contiguous(), op,
                  "filter_scale must be contiguous, [", to->items, "], got ", shape_of(*scale));
    to->scale = static_cast<const float*>(scale->const_data_ptr());
  } else {
    ATTNREC_CHECK(!scale || scale->numel() == 0, op,
                  "filter_scale must be left out with a filter in bfloat16");
  }
  ATTNREC_CHECK(error.has_value(), op, "filter_error must be given with a filter");
  check_tensor(op, "filter_error", *error, 2, ScalarType::BFloat16, catalog);
  ATTNREC_CHECK(error->size(0) == to->items && error->size(1) == 2 && error->is_contiguous(), op,
                "filter_error must be contiguous, [", to->items, ", 2], got ", shape_of(*error));
  to->error = static_cast<const BFloat16*>(error->const_data_ptr());
}

Unserved catalog_topk_filtered(const Attention& a, int64_t batch, const CatalogFilter& filter,
                               const TopkOptions& options, const TopkResults& results) {
  Unserved others;
  const Kernels& tier = kernels(a.element);
  if (!filter.codes || !tier.catalog_filter_scan || filter.items < kFewestItems ||
      filter.items < kSampleItems * results.k) {
    for (int64_t b = 0; b < batch; b++) others.users.push_back(b);
    others.out_of_reach.assign(batch, -std::numeric_limits<float>::infinity());
    return others;
  }
  CatalogFilter with_bias = filter;
  with_bias.bias = options.bias;
  with_bias.bias_element = options.bias_element;
  with_bias.bias_stride = options.bias_stride;
  Search search(a, with_bias, options, results);
  for (int64_t first = 0; first < batch; first += kGroupUsers)
    search.run(first, std::min(kGroupUsers, batch - first), others);
  return others;
}

}  // namespace attnrec::cpu
