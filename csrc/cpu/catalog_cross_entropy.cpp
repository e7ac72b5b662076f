// attnrec::catalog_cross_entropy and its gradient on the CPU.
#include "cpu/catalog_cross_entropy.h"

#include <algorithm>
#include <tuple>

#include "cpu/catalog_arguments.h"

namespace attnrec::cpu {
namespace {

// The table is cut into at most this many chunks, and the rows into groups, one group after the other: enough
// units for the threads, and no more than kMostChunks · kRowGroup · D partial sums in memory.
constexpr int64_t kMostChunks = 32, kFewestItems = 128, kRowGroup = 1024;

int64_t round_up_to_16(int64_t n) { return (n + 15) / 16 * 16; }

// Runs function(r) for rows 0 … count on all threads, some rows at a time.
template <class Function>
void for_each_row(int64_t count, const Function& function) {
  constexpr int64_t kRows = 64;
  for_each_unit((count + kRows - 1) / kRows, [&](int64_t i) {
    for (int64_t r = i * kRows; r < std::min(count, (i + 1) * kRows); r++) function(r);
  });
}

// Rows `ids` of `vectors` as a contiguous tensor.
Tensor gather(const Tensor& like, const Vectors& vectors, Element element, const std::vector<int64_t>& ids) {
  const int64_t bytes = like.size(1) * element_bytes(element);
  Tensor gathered = new_empty(like, {static_cast<int64_t>(ids.size()), like.size(1)});
  char* to = static_cast<char*>(gathered.mutable_data_ptr());
  for (size_t i = 0; i < ids.size(); i++) std::memcpy(to + i * bytes, vectors.at(ids[i], 0, element), bytes);
  return gathered;
}

// An optional number for each item; 0 where it is not given.
class PerItem {
 public:
  PerItem(const char* op, const char* name, const OptionalTensor& given) {
    if (!given) return;
    element_ = element_of(op, name, *given);
    data_ = given->const_data_ptr();
    stride_ = given->stride(0);
  }
  double operator[](int64_t id) const {
    return data_ ? load_element<double>(data_, id * stride_, element_) : 0;
  }

 private:
  Element element_ = Element::kFloat32;
  const void* data_ = nullptr;
  int64_t stride_ = 0;
};

struct CrossEntropyArguments : CatalogArguments {
  bool sampled = false;            // with negatives
  std::vector<int64_t> kept_rows;  // those that are not ignored; only they are computed with
  std::vector<int64_t> target;     // of the kept rows
  std::vector<int64_t> negatives;
  std::vector<double> target_bias;  // of the kept rows, with negatives
  Vectors target_items;             // likewise
  std::vector<int64_t> hits, hit_begin, hit_end;
  std::vector<int64_t> kv_offsets, chunks;
  CrossEntropyRows rows;
  Tensor item_bias;                          // bias - logq of the events
  Element bias_element = Element::kFloat32;  // of the bias as given
  int64_t classes = 0;

  CrossEntropyArguments(const char* op, const Tensor& users, const Tensor& table, const Tensor& target_,
                        double temperature, const OptionalTensor& bias, const OptionalTensor& logq,
                        double label_smoothing, int64_t ignore_index, const OptionalTensor& negatives_,
                        bool in_batch)
      : CatalogArguments(op, users, "table", table, temperature) {
    classes = table.size(0);
    sampled = negatives_.has_value();
    check_cross_entropy(op, users, table, target_, temperature, bias, logq, label_smoothing, negatives_,
                        in_batch);
    const auto check_id = [&](const char* name, int64_t id, size_t place) {
      ATTNREC_CHECK(id >= 0 && id < classes, op, name, " must be ids of the table, from 0 to ", classes - 1,
                    ", got ", id, " at ", place);
    };
    const std::vector<int64_t> targets = integers(op, "target", target_, users.size(0), users);
    for (size_t r = 0; r < targets.size(); r++) {
      if (targets[r] == ignore_index) continue;
      check_id("target", targets[r], r);
      kept_rows.push_back(static_cast<int64_t>(r));
      target.push_back(targets[r]);
    }
    if (sampled) {
      for (int64_t id : integers(op, "negatives", *negatives_, -1, users)) {
        if (in_batch && id == ignore_index) continue;
        check_id("negatives", id, negatives.size());
        negatives.push_back(id);
      }
    }
    const PerItem bias_of(op, "bias", bias), logq_of(op, "logq", logq);

    if (bias) bias_element = element_of(op, "bias", *bias);

    Attention& a = attention;
    if (kept_rows.size() < targets.size()) {
      kept.push_back(gather(users, a.query, a.element, kept_rows));
      a.query = {kept.back().const_data_ptr(), a.head_dim, 0};
    }
    const int64_t events = sampled ? static_cast<int64_t>(negatives.size()) : classes;
    if (bias || logq) {
      item_bias = new_empty(users, {events}, working_dtype(a.element));
      a.bias_element = a.element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32;
      a.key_bias = item_bias.const_data_ptr();
      a.bias_row_stride = 1;
      for (int64_t i = 0; i < events; i++) {
        const int64_t id = sampled ? negatives[i] : i;
        store_element<double>(item_bias.mutable_data_ptr(), i, a.bias_element, bias_of[id] - logq_of[id]);
      }
    }
    if (sampled) {
      for (int64_t id : target) target_bias.push_back(bias_of[id] - logq_of[id]);
      kept.push_back(gather(table, a.key, a.element, target));
      target_items = {kept.back().const_data_ptr(), a.head_dim, 0};
      kept.push_back(gather(table, a.key, a.element, negatives));
      a.key = {kept.back().const_data_ptr(), a.head_dim, 0};
      find_hits();
    } else {
      rows.target = target.data();
    }
    kv_offsets = {0, events};
    a.kv_offsets = kv_offsets.data();
    chunks = chunk_bounds(events, kFewestItems, kMostChunks);
  }

  int64_t row_count() const { return static_cast<int64_t>(target.size()); }
  int64_t events() const { return kv_offsets.back(); }
  int64_t chunk_count() const { return static_cast<int64_t>(chunks.size()) - 1; }

  // Calls function(chunk, unit) for `count` rows from `first` on against each chunk, on all threads.
  template <class Function>
  void for_each_chunk(int64_t first, int64_t count, const Function& function) const {
    for_each_unit(chunk_count(), [&](int64_t chunk) {
      Unit unit;
      unit.first = first;
      unit.rows = static_cast<int>(count);
      unit.first_event = chunks[chunk];
      unit.last_event = chunks[chunk + 1];
      function(chunk, unit);
    });
  }

  // The logits of the kept rows' targets, where these stand outside the events.
  void find_target_logits(int64_t first, int64_t count, double* logits) const {
    const Kernels& tier = kernels(attention.element);
    constexpr int64_t kRows = 128;
    for_each_unit((count + kRows - 1) / kRows, [&](int64_t i) {
      const int64_t begin = i * kRows;
      void* memory =
          thread_scratch(2 * round_up_to_16(attention.head_dim) * static_cast<int64_t>(sizeof(double)));
      tier.catalog_cross_entropy_target_logits(attention, target_items, target_bias.data(), first + begin,
                                               std::min(kRows, count - begin), memory, logits + begin);
    });
  }

 private:
  // Where each row's own target is among the negatives.
  void find_hits() {
    hits.resize(negatives.size());
    for (size_t i = 0; i < hits.size(); i++) hits[i] = static_cast<int64_t>(i);
    std::stable_sort(hits.begin(), hits.end(),
                     [&](int64_t i, int64_t j) { return negatives[i] < negatives[j]; });
    for (int64_t id : target) {
      const auto begin = std::lower_bound(hits.begin(), hits.end(), id,
                                          [&](int64_t i, int64_t value) { return negatives[i] < value; });
      const auto end = std::upper_bound(begin, hits.end(), id,
                                        [&](int64_t value, int64_t i) { return value < negatives[i]; });
      hit_begin.push_back(begin - hits.begin());
      hit_end.push_back(end - hits.begin());
    }
    rows.hits = hits.data();
    rows.hit_begin = hit_begin.data();
    rows.hit_end = hit_end.data();
  }
};

std::tuple<Tensor, Tensor> catalog_cross_entropy(Tensor users, Tensor table, Tensor target,
                                                 double temperature, OptionalTensor bias, OptionalTensor logq,
                                                 double label_smoothing, int64_t ignore_index,
                                                 OptionalTensor negatives, bool in_batch) {
  const CrossEntropyArguments arguments("catalog_cross_entropy", users, table, target, temperature, bias,
                                        logq, label_smoothing, ignore_index, negatives, in_batch);
  const Attention& a = arguments.attention;
  const Kernels& tier = kernels(a.element);
  Tensor loss = new_empty(users, {users.size(0)}, working_dtype(a.element));
  Tensor lse = new_empty(users, {users.size(0)}, working_dtype(a.element));
  torch::stable::fill_(loss, 0);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  const int64_t chunks = arguments.chunk_count(), group = std::min(kRowGroup, arguments.row_count());
  std::vector<double> maximum(chunks * group), sum(maximum.size()),
      total(label_smoothing > 0 ? sum.size() : 0);
  std::vector<double> target_logit(group);

  for (int64_t first = 0; first < arguments.row_count(); first += kRowGroup) {
    const int64_t count = std::min(kRowGroup, arguments.row_count() - first);
    arguments.for_each_chunk(first, count, [&](int64_t chunk, const Unit& unit) {
      const int64_t at = chunk * group;
      const CrossEntropyParts parts{&maximum[at], &sum[at], target_logit.data(),
                                    total.empty() ? nullptr : &total[at]};
      void* memory = thread_scratch(tier.catalog_cross_entropy(a, unit, nullptr, arguments.rows, parts));
      tier.catalog_cross_entropy(a, unit, memory, arguments.rows, parts);
    });
    if (arguments.sampled) arguments.find_target_logits(first, count, target_logit.data());
    for_each_row(count, [&](int64_t r) {
      SoftmaxParts softmax;
      double all = 0;
      if (arguments.sampled) softmax.add(target_logit[r], 1);
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        softmax.add(maximum[chunk * group + r], sum[chunk * group + r]);
        if (!total.empty()) all += total[chunk * group + r];
      }
      double aim = target_logit[r];
      if (label_smoothing > 0) {
        const double mean = all / static_cast<double>(arguments.classes);
        aim = (1 - label_smoothing) * aim + label_smoothing * mean;
      }
      const int64_t row = arguments.kept_rows[first + r];
      const Element working = a.element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32;
      store_element<double>(loss.mutable_data_ptr(), row, working, softmax.lse() - aim);
      store_element<double>(lse.mutable_data_ptr(), row, working, softmax.lse());
    });
  }
  return {loss, lse};
}

// Adds up, item by item, what the negatives and the rows' targets among them give to the table and to the
// bias. An item may stand among them many times: its terms are summed in order, negatives first, and stored
// once.
template <class Real>
void scatter_to_items(const CrossEntropyArguments& arguments, const std::vector<double>& target_grad,
                      const Real* of_negatives, const std::vector<Real>& bias_of_negatives, void* table,
                      void* bias, Element bias_element) {
  const Attention& a = arguments.attention;
  const int64_t M = arguments.events(), D = a.head_dim;
  const auto id_of = [&](int64_t i) { return i < M ? arguments.negatives[i] : arguments.target[i - M]; };
  std::vector<int64_t> order(M + arguments.row_count()), starts;
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return id_of(i) < id_of(j); });
  for (size_t i = 0; i < order.size(); i++) {
    if (i == 0 || id_of(order[i]) != id_of(order[i - 1])) starts.push_back(static_cast<int64_t>(i));
  }
  starts.push_back(static_cast<int64_t>(order.size()));
  for_each_unit(static_cast<int64_t>(starts.size()) - 1, [&](int64_t s) {
    const int64_t id = id_of(order[starts[s]]);
    Real* sum = static_cast<Real*>(thread_scratch(D * static_cast<int64_t>(sizeof(Real))));
    std::fill_n(sum, D, Real{0});
    double bias_sum = 0;
    for (int64_t i = starts[s]; i < starts[s + 1]; i++) {
      const int64_t row = order[i] - M;
      if (bias) bias_sum += row < 0 ? bias_of_negatives[order[i]] : target_grad[row];
      if (!table) continue;
      if (row < 0) {
        const Real* of_negative = of_negatives + order[i] * D;
        for (int64_t d = 0; d < D; d++) sum[d] += of_negative[d];
      } else {
        const Real factor = static_cast<Real>(target_grad[row] * a.scale);
        const void* user = a.query.at(row, 0, a.element);
        for (int64_t d = 0; d < D; d++) sum[d] += factor * load_element<Real>(user, d, a.element);
      }
    }
    for (int64_t d = 0; table && d < D; d++) store_element(table, id * D + d, a.element, sum[d]);
    if (bias) store_element(bias, id, bias_element, bias_sum);
  });
}

std::tuple<Tensor, Tensor, Tensor> catalog_cross_entropy_backward(
    Tensor grad_loss, Tensor users, Tensor table, Tensor target, Tensor lse, double temperature,
    OptionalTensor bias, OptionalTensor logq, double label_smoothing, int64_t ignore_index,
    OptionalTensor negatives, bool in_batch, bool needs_users, bool needs_table) {
  const char* op = "catalog_cross_entropy_backward";
  const CrossEntropyArguments arguments(op, users, table, target, temperature, bias, logq, label_smoothing,
                                        ignore_index, negatives, in_batch);
  const Attention& a = arguments.attention;
  const Kernels& tier = kernels(a.element);
  const Element grad_element = element_of(op, "grad_loss", grad_loss);
  check_tensor(op, "grad_loss", grad_loss, 1, grad_loss.scalar_type(), users);
  check_tensor(op, "lse", lse, 1, working_dtype(a.element), users);
  for (const auto& [name, tensor] : {std::pair{"grad_loss", &grad_loss}, std::pair{"lse", &lse}}) {
    ATTNREC_CHECK(tensor->size(0) == users.size(0), op, name, " must have shape [", users.size(0), "], got ",
                  shape_of(*tensor));
  }
  const int64_t rows = arguments.row_count(), events = arguments.events(), D = a.head_dim;
  const int64_t width = round_up_to_16(D);
  const Element working = a.element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32;
  std::vector<double> row_lse(rows), row_grad(rows), target_grad(arguments.sampled ? rows : 0);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t row = arguments.kept_rows[r];
    row_lse[r] = load_element<double>(lse.const_data_ptr(), row * lse.stride(0), working);
    row_grad[r] = load_element<double>(grad_loss.const_data_ptr(), row * grad_loss.stride(0), grad_element);
  }

  // Rows that are ignored, items that are neither target nor negative: zeros.
  const bool all_users = rows == users.size(0), all_items = !arguments.sampled && rows > 0;
  Tensor grad_users = new_empty(users, {needs_users ? users.size(0) : 0, needs_users ? D : 0});
  Tensor grad_table = new_empty(table, {needs_table ? table.size(0) : 0, needs_table ? D : 0});
  Tensor grad_bias = new_empty(bias ? *bias : users, {bias ? table.size(0) : 0});
  if (!all_users) torch::stable::fill_(grad_users, 0);
  if (!all_items) torch::stable::fill_(grad_table, 0);
  if (!all_items) torch::stable::fill_(grad_bias, 0);

  with_real(a.element, [&](auto real) {
    using Real = decltype(real);
    // Of the users' gradient: what each chunk adds, after what the rows' own targets add where these stand
    // outside the chunks.
    const int64_t own = arguments.sampled ? 1 : 0, parts = own + arguments.chunk_count();
    const int64_t group = std::min(kRowGroup, rows);
    Tensor partial = new_empty(users, {needs_users ? parts : 0, group, width}, working_dtype(a.element));
    const auto part = [&](int64_t i) {
      return static_cast<Real*>(partial.mutable_data_ptr()) + i * group * width;
    };
    std::vector<Real> bias_sums(bias ? events : 0);
    // The sums over the rows so far stand in working numbers; the last group of rows stores the result.
    const Element stored = arguments.sampled ? working : a.element;
    Tensor item_grad = arguments.sampled
                           ? new_empty(table, {needs_table ? events : 0, D}, working_dtype(a.element))
                           : grad_table;
    Tensor item_sums = item_grad;
    if (needs_table && stored != working && rows > kRowGroup) {
      item_sums = new_empty(table, {events, D}, working_dtype(a.element));
    }
    for (int64_t first = 0; first < rows; first += kRowGroup) {
      const int64_t count = std::min(kRowGroup, rows - first);
      const bool last = first + count == rows;
      arguments.for_each_chunk(first, count, [&](int64_t chunk, const Unit& unit) {
        CrossEntropyGradient gradient;
        gradient.lse = row_lse.data();
        gradient.grad = row_grad.data();
        gradient.smoothing = label_smoothing;
        gradient.classes = arguments.classes;
        gradient.users = needs_users ? part(own + chunk) : nullptr;
        gradient.users_row_stride = width;
        if (needs_table) {
          gradient.table = last ? item_grad.mutable_data_ptr() : item_sums.mutable_data_ptr();
          gradient.table_element = last ? stored : working;
          gradient.table_so_far = first > 0 ? item_sums.const_data_ptr() : nullptr;
        }
        gradient.bias = bias ? bias_sums.data() : nullptr;
        void* memory =
            thread_scratch(tier.catalog_cross_entropy_backward(a, unit, nullptr, arguments.rows, gradient));
        tier.catalog_cross_entropy_backward(a, unit, memory, arguments.rows, gradient);
      });
      if (arguments.sampled) {
        double* grad = target_grad.data() + first;
        arguments.find_target_logits(first, count, grad);
        for (int64_t r = 0; r < count; r++)
          grad[r] = row_grad[first + r] * (std::exp(grad[r] - row_lse[first + r]) - 1);
      }
      if (!needs_users) continue;
      for_each_row(count, [&](int64_t r) {
        for (int64_t d = 0; arguments.sampled && d < D; d++) {
          part(0)[r * width + d] =
              static_cast<Real>(target_grad[first + r] * a.scale) *
              load_element<Real>(arguments.target_items.at(first + r, 0, a.element), d, a.element);
        }
        char* to = static_cast<char*>(grad_users.mutable_data_ptr());
        tier.target_attention_backward_add(
            part(0) + r * width, parts, group * width, D, a.element,
            to + arguments.kept_rows[first + r] * D * element_bytes(a.element));
      });
    }
    if (arguments.sampled && rows > 0) {
      scatter_to_items<Real>(arguments, target_grad, static_cast<const Real*>(item_grad.const_data_ptr()),
                             bias_sums, needs_table ? grad_table.mutable_data_ptr() : nullptr,
                             bias ? grad_bias.mutable_data_ptr() : nullptr, arguments.bias_element);
    } else if (bias && all_items) {
      for (int64_t i = 0; i < events; i++) {
        store_element(grad_bias.mutable_data_ptr(), i, arguments.bias_element, bias_sums[i]);
      }
    }
  });
  const auto given = [&](const Tensor& grad, bool needed) { return needed ? grad : new_empty(users, {0}); };
  return {given(grad_users, needs_users), given(grad_table, needs_table), grad_bias};
}

}  // namespace
}  // namespace attnrec::cpu

STABLE_TORCH_LIBRARY_IMPL(attnrec, CPU, m) {
  m.impl("catalog_cross_entropy", TORCH_BOX(&attnrec::cpu::catalog_cross_entropy));
  m.impl("catalog_cross_entropy_backward", TORCH_BOX(&attnrec::cpu::catalog_cross_entropy_backward));
}
