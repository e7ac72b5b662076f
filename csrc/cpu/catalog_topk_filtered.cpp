// catalog_topk through a filter: a floor for each user from a sample of the catalogue, one pass over the
// filter that keeps what may reach it, and exact scores of what may still be among the k best. Every step is
// cut by sizes alone, so that neither threads nor the batch change an id or a score.
#include "cpu/catalog_topk_filtered.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/catalog_topk_candidates.h"
#include "cpu/catalog_topk_users.h"

namespace attnrec::cpu {
namespace {

constexpr int64_t kFewestItems = 16384;  // below, and below kSampleItems * k, a filter saves nothing
constexpr int64_t kSampleItems = 32;     // to have of the catalogue for each of k
constexpr int64_t kKeptBySample = 2048;  // candidates a user to aim at
constexpr int64_t kGroupUsers = 256;     // whose candidates are in memory at once
constexpr int64_t kUnits = 16;           // of the sample
constexpr int64_t kChunks = 16;  // of the catalogue, each of kEarly units: a quarter of it goes first, which
                                 // raises the floor. B = 256, int8: 5,400 candidates a user become 2,000
constexpr double kLseError = 0.1;               // the contract's
constexpr double kSure = 0.8, kHopeless = 1.5;  // times kLseError: what a quarter of the catalogue foretells

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
    // Of each piece every so many, so that all have their share of a catalogue that is sorted.
    std::vector<int64_t> in_turn;
    for (int64_t piece = 0; piece < pieces; piece++) {
      piece_bounds.push_back(static_cast<int64_t>(in_turn.size()));
      for (size_t i = piece; i < panels.size(); i += pieces) in_turn.push_back(panels[i]);
    }
    piece_bounds.push_back(static_cast<int64_t>(in_turn.size()));
    panels = in_turn;
    make_units();
  }

  // Users first … first + n. Appends those it does not serve.
  void run(int64_t first, int64_t n, Unserved& others) {
    users.emplace(n, filter.depth());
    parts.assign(n, 1);
    for (int64_t i = 0; i < n; i++) {
      if (!users->round(a, filter, options.temperature, first + i, i)) parts[i] = 0;
    }
    of_group = options;
    if (options.excluded) of_group.exclude_offsets += first;
    find_floors(n);
    const int64_t count = static_cast<int64_t>(units.size());
    kept.assign(count * n, {});
    sums.assign(count * n, 0);
    mean_reach.assign(count * n, kInf);
    bounds.assign(count, {});
    taken = std::vector<std::atomic<int64_t>>(n);
    scan(with_parts(1), 1, [](int64_t chunk) { return early(chunk); });
    for_each_unit(n, [&](int64_t i) {
      if (parts[i]) look_ahead(i);
    });
    scan(with_parts(1), 1, [](int64_t chunk) { return !early(chunk); });
    std::vector<int64_t> of = with_parts(1);
    for_each_unit(static_cast<int64_t>(of.size()), [&](int64_t j) {
      if (!finish(first + of[j], of[j]) && parts[of[j]])
        take_both(of[j]);  // the early chunks promised too much
    });
    of = with_parts(2);
    scan(of, 2, [](int64_t) { return true; });
    for_each_unit(static_cast<int64_t>(of.size()), [&](int64_t j) {
      if (!finish(first + of[j], of[j])) give_up(of[j]);
    });
    for (int64_t i = 0; i < n; i++) {
      if (parts[i]) continue;
      others.users.push_back(first + i);
      others.out_of_reach.push_back(std::nextafter(sure_floor[i], -std::numeric_limits<float>::infinity()));
    }
  }

 private:
  void find_floors(int64_t n) {
    const int64_t stride = groups * pieces;
    std::vector<float> best(n * stride, -std::numeric_limits<float>::infinity());
    sure_floor.resize(n);
    FilterUsers view = users->view(of_group, 1);
    view.floor = nullptr;
    for_each_unit(pieces, [&](int64_t piece) {
      FilterUnit unit;
      unit.rows = static_cast<int>(n);
      unit.first_panel = piece_bounds[piece];
      unit.last_panel = piece_bounds[piece + 1];
      unit.listed = panels.data();
      float* to = best.data() + piece * groups;
      void* memory =
          thread_scratch(tier.catalog_filter_sample(filter, view, unit, nullptr, to, stride, groups));
      tier.catalog_filter_sample(filter, view, unit, memory, to, stride, groups);
    });
    for_each_unit(n, [&](int64_t i) {
      float* of_user = best.data() + i * stride;
      float floor = -std::numeric_limits<float>::infinity();
      if (k > 0) {
        std::nth_element(of_user, of_user + (k - 1), of_user + stride, std::greater<>());
        floor = of_user[k - 1];
      } else {
        floor = *std::max_element(of_user, of_user + stride);
      }
      if (!(floor > -1e29f && floor < 1e29f)) parts[i] = 0;  // hidden ones score -1e30
      sure_floor[i] = parts[i] && k > 0 ? floor : -std::numeric_limits<float>::infinity();
      users->floor[i] = floor;
    });
  }

  // A chunk's early unit has one in kEarly of its runs, which are as many as each of its other units has:
  // where a catalogue is sorted, the early ones must foretell the others.
  void make_units() {
    const std::vector<int64_t> chunks =
        chunk_bounds(filter.panels(), kEarly * kEarlyRun, kChunks);  // whole tiles of 128 panels
    for (size_t i = 0; i + 1 < chunks.size(); i++) {
      const int64_t first = chunks[i], last = chunks[i + 1], step = kEarly * kFilterSpan;
      units.push_back({first, last, FilterUnit::Spans::kEarly});
      for (int64_t late = 1, at = first; late < kEarly; late++) {
        const int64_t end =
            late + 1 < kEarly ? first + (last - first) * late / (kEarly - 1) / step * step : last;
        units.push_back({at, end, FilterUnit::Spans::kLate});
        at = end;
      }
    }
  }

  static bool early(int64_t unit) { return unit % kEarly == 0; }

  // Users whose scores are computed from so many parts.
  std::vector<int64_t> with_parts(int wanted) const {
    std::vector<int64_t> of;
    for (size_t i = 0; i < parts.size(); i++) {
      if (parts[i] == wanted) of.push_back(static_cast<int64_t>(i));
    }
    return of;
  }

  // What a scan's rows go to.
  struct Rows {
    Kept* kept;  // of all users
    const int64_t* users;
  };

  template <class Wanted>
  void scan(const std::vector<int64_t>& of, int with, const Wanted& wanted) {
    if (of.empty()) return;
    const int64_t n = static_cast<int64_t>(parts.size());
    const FilterUsers view = users->view(of_group, with);
    std::vector<int64_t> todo;
    for (int64_t chunk = 0; chunk < static_cast<int64_t>(units.size()); chunk++) {
      if (wanted(chunk)) todo.push_back(chunk);
    }
    for_each_unit(static_cast<int64_t>(todo.size()), [&](int64_t at) {
      const int64_t chunk = todo[at];
      Rows rows{&kept[chunk * n], of.data()};
      for (int64_t i : of) {
        Kept& row = rows.kept[i];
        row = {};
        row.base = row.floor = users->floor[i];
        row.k = k;
        row.most = 4 * k + 1024;
        row.limit = limit();
        row.taken = &taken[i];
      }
      FilterUnit unit;
      unit.rows = static_cast<int>(of.size());
      unit.parts = with;
      unit.users = of.data();
      unit.first_panel = units[chunk].first_panel;
      unit.last_panel = units[chunk].last_panel;
      unit.spans = units[chunk].spans;
      CandidateSink sink;
      sink.context = &rows;
      sink.take = [](void* context, int row, const Candidate* candidates, int found) {
        const Rows& to = *static_cast<const Rows*>(context);
        return to.kept[to.users[row]].take(candidates, found);
      };
      std::vector<double> found_sums(of.size()), found_reach(of.size());
      FilterSums& found = bounds[chunk];
      found.sum = found_sums.data();
      found.reach = found_reach.data();
      void* memory = thread_scratch(tier.catalog_filter_scan(filter, view, unit, nullptr, sink, found));
      tier.catalog_filter_scan(filter, view, unit, memory, sink, found);
      for (size_t row = 0; row < of.size(); row++) {
        sums[chunk * n + of[row]] = found_sums[row];
        if (with == 2) mean_reach[chunk * n + of[row]] = found_reach[row] / found_sums[row];
      }
    });
  }

  // What the early chunks say of a user: a higher floor, as far as lse can do without exact scores of what is
  // below; that lse needs both parts of the user, which go over the catalogue anew; or that the filter will
  // not do.
  void look_ahead(int64_t i) {
    const int64_t n = static_cast<int64_t>(parts.size());
    std::vector<Candidate> all;
    Around rest[kUserParts];
    for (int64_t chunk = 0; chunk < static_cast<int64_t>(units.size()); chunk += kEarly) {
      const Kept& part = kept[chunk * n + i];
      if (part.lost) return give_up(i);
      all.insert(all.end(), part.candidates.begin(), part.candidates.end());
      for (int with = 1; with <= kUserParts; with++) add_rest(chunk, i, with, rest[with - 1]);
    }
    const double sure = Kept::kth_sure(all, k);
    sure_floor[i] = std::max(sure_floor[i], Kept::below(sure));
    const auto middle =
        std::partition(all.begin(), all.end(), [&](const Candidate& c) { return Kept::reaches(c, sure); });
    SoftmaxParts best;
    best.add(highest(all), sum_exp(all.begin(), middle, highest(all)));
    const double below = middle == all.end() ? 0 : sum_exp(middle, all.end(), sure);
    SoftmaxParts candidates = best;
    candidates.add(sure, below);
    if (!(rest[0].lse_error(candidates) <= kSure * kLseError)) parts[i] = 2;
    Around& others = rest[parts[i] - 1];
    if (!(others.lse_error(candidates) <= kHopeless * kLseError)) return give_up(i);
    if (parts[i] == 2) take_both(i);
    // As high as lse allows: `from` is where those begin that lose their exact scores.
    const auto allows = [&](auto from) {
      Around with = others;
      with.add(sure, sum_exp(from, all.end(), sure), most_reach(i, kEarly));
      SoftmaxParts exact = best;
      exact.add(sure, sum_exp(middle, from, sure));
      return with.lse_error(exact) <= kSure * kLseError;
    };
    double floor = sure;
    if (!allows(middle)) {
      std::sort(middle, all.end(), [](const Candidate& x, const Candidate& y) { return x.score > y.score; });
      const int64_t step = std::max<int64_t>(32, (all.end() - middle) / 8);
      auto from = middle;
      do {
        if (all.end() - from <= step) return;
        from += step;
      } while (!allows(from));
      floor = std::min(sure, from->score + most_reach(i, kEarly));
    }
    if (floor > users->floor[i]) users->floor[i] = Kept::below(floor);
  }

  void give_up(int64_t i) { parts[i] = 0; }
  void take_both(int64_t i) {
    parts[i] = 2;
    taken[i] = 0;
  }

  // What a chunk has of a user beside candidates, its scores computed from so many parts.
  void add_rest(int64_t chunk, int64_t i, int with, Around& to) const {
    const int64_t at = chunk * static_cast<int64_t>(parts.size()) + i;
    const double most = reach(chunk, i, with), error = with == 2 ? kCloseError : kExpError;
    to.add(kept[at].base, sums[at], most, mean_reach[at], error);
    to.add(kept[at].dropped.maximum, kept[at].dropped.sum, most);
  }

  // The most by which a chunk's scores may be off for a user.
  double reach(int64_t chunk, int64_t i, int with) const {
    return users->per_error[i] * bounds[chunk].error + users->per_norm[with - 1][i] * bounds[chunk].norm;
  }

  // Of one in `every` chunks. (A candidate whose error is not bounded is among the best.)
  double most_reach(int64_t i, int64_t every) const {
    double most = 0;
    for (int64_t chunk = 0; chunk < static_cast<int64_t>(units.size()); chunk += every)
      most = std::max(most, reach(chunk, i, parts[i]));
    return most;
  }

  static double highest(const std::vector<Candidate>& of) {
    double most = -kInf;
    for (const Candidate& c : of) most = std::max<double>(most, c.score);
    return most;
  }

  // Candidates of a user beyond which reading all rows is cheaper than gathering some.
  int64_t limit() const { return std::max(16 * k, filter.items / 32) + 8192; }

  // Exact scores, the best of them, and lse: false where lse is not known well enough, and where the user is
  // given up.
  bool finish(int64_t user, int64_t i) {
    const int64_t count = static_cast<int64_t>(units.size()), n = static_cast<int64_t>(kept.size()) / count;
    Kept all = kept[i];
    Around rest;  // of all items without an exact score
    for (int64_t chunk = 0; chunk < count; chunk++) {
      const Kept& part = kept[chunk * n + i];
      if (part.lost) {
        give_up(i);
        return false;
      }
      if (chunk > 0)
        all.candidates.insert(all.candidates.end(), part.candidates.begin(), part.candidates.end());
      // The floor rose far above the unit's base.
      if (sums[chunk * n + i] > std::numeric_limits<float>::max()) return false;
      add_rest(chunk, i, parts[i], rest);
    }
    // Those that may be among the best come first. The others only make lse exact where it has to be.
    const double sure = Kept::kth_sure(all.candidates, k);
    const auto middle = std::partition(all.candidates.begin(), all.candidates.end(),
                                       [&](const Candidate& c) { return Kept::reaches(c, sure); });
    const int64_t first = middle - all.candidates.begin(),
                  count_all = static_cast<int64_t>(all.candidates.size());
    Exact exact(count_all);
    rescore(user, all.candidates, 0, first, exact);
    for (auto next = middle;;) {
      Around others = rest;
      if (next != all.candidates.end())
        others.add(sure, sum_exp(next, all.candidates.end(), sure), most_reach(i, 1));
      if (write(user, exact, others)) return true;
      if (next == all.candidates.end()) return false;
      const auto from = next;
      next += std::min<int64_t>(all.candidates.end() - from, std::max<int64_t>(256, (count_all - first) / 4));
      std::nth_element(from, next - 1, all.candidates.end(),
                       [](const Candidate& x, const Candidate& y) { return x.score > y.score; });
      rescore(user, all.candidates, from - all.candidates.begin(), next - all.candidates.begin(), exact);
    }
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
  struct Panels {
    int64_t first_panel, last_panel;
    FilterUnit::Spans spans;
  };
  std::vector<int64_t> panels, piece_bounds;
  std::vector<Panels> units;
  int64_t pieces = 1, groups = kPanelItems;
  std::optional<Users> users;
  TopkOptions of_group;
  std::vector<char> parts;        // of each user, that its scores are computed from; 0: it is not served
  std::vector<float> sure_floor;  // what k items of a user reach
  std::vector<Kept> kept;         // [chunks][users]
  std::vector<double> sums;       // likewise
  std::vector<double>
      mean_reach;  // likewise, of users in two parts: weighted by the exponentials; others: inf
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
