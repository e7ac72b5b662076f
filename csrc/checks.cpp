#include "checks.h"

#include <cmath>

namespace attnrec {
namespace {

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  ATTNREC_CHECK(tensor.device() == like.device(), op, name,
                " must be on the device of the op's first argument, as all are");
}

}  // namespace

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

void check_floating(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return;
    default:
      ATTNREC_CHECK(false, op, name, " must be float32, bfloat16, float16 or float64, got ",
                    name_of(tensor.scalar_type()));
  }
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, int64_t rank, ScalarType dtype,
                  const Tensor& like) {
  check_device(op, name, tensor, like);
  ATTNREC_CHECK(tensor.dim() == rank, op, name, " must have ", rank, " dimensions, got shape ",
                shape_of(tensor));
  ATTNREC_CHECK(tensor.scalar_type() == dtype, op, name, " must have dtype ", name_of(dtype), ", got ",
                name_of(tensor.scalar_type()));
}

void check_integers(const char* op, const char* name, const Tensor& tensor, int64_t count,
                    const Tensor& like) {
  check_device(op, name, tensor, like);
  ATTNREC_CHECK(tensor.dim() == 1, op, name, " must have 1 dimension, got shape ", shape_of(tensor));
  ATTNREC_CHECK(count < 0 || tensor.size(0) == count, op, name, " must have ", count, " elements, got shape ",
                shape_of(tensor));
  const ScalarType dtype = tensor.scalar_type();
  ATTNREC_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, op, name,
                " must be int32 or int64, got ", name_of(dtype));
}

void check_catalog(const char* op, const Tensor& users, const char* items_name, const Tensor& items,
                   double temperature) {
  check_floating(op, "users", users);
  check_tensor(op, "users", users, 2, users.scalar_type(), users);
  check_tensor(op, items_name, items, 2, users.scalar_type(), users);
  ATTNREC_CHECK(users.size(1) >= 1, op, "users must have a dim of at least 1, got shape ", shape_of(users));
  ATTNREC_CHECK(items.size(1) == users.size(1), op, items_name, " must have users' dim ", users.size(1),
                ", got shape ", shape_of(items));
  ATTNREC_CHECK(std::isfinite(temperature) && temperature > 0, op,
                "temperature must be above 0 and finite, got ", temperature);
}

void check_per_item(const char* op, const char* name, const Tensor& tensor, int64_t count,
                    const Tensor& users) {
  check_device(op, name, tensor, users);
  const ScalarType dtype = tensor.scalar_type();
  ATTNREC_CHECK(dtype == users.scalar_type() || dtype == ScalarType::Float, op, name,
                " must be float32 or have users' dtype, got ", name_of(dtype));
  ATTNREC_CHECK(tensor.dim() == 1 && tensor.size(0) == count, op, name, " must have shape [", count,
                "], got ", shape_of(tensor));
}

void check_catalog_topk(const char* op, const Tensor& users, const Tensor& catalog, int64_t k,
                        const OptionalTensor& exclude_ids, const OptionalTensor& exclude_offsets,
                        const OptionalTensor& bias, double temperature) {
  check_catalog(op, users, "catalog", catalog, temperature);
  const int64_t items = catalog.size(0);
  ATTNREC_CHECK(k >= 0 && k <= items, op, "k must be from 0 to the size of the catalogue N = ", items,
                ", got ", k);
  ATTNREC_CHECK(exclude_ids.has_value() == exclude_offsets.has_value(), op,
                exclude_ids ? "exclude_offsets" : "exclude_ids",
                " must be given: exclude is a pair (ids, offsets)");
  if (exclude_ids) {
    check_integers(op, "exclude_ids", *exclude_ids, -1, users);
    check_integers(op, "exclude_offsets", *exclude_offsets, users.size(0) + 1, users);
  }
  if (bias) check_per_item(op, "bias", *bias, items, users);
}

void check_softmax_score(const char* op, const Tensor& users, const Tensor& items, const Tensor& offsets,
                         double temperature, const OptionalTensor& bias) {
  check_catalog(op, users, "items", items, temperature);
  check_integers(op, "offsets", offsets, users.size(0) + 1, users);
  if (bias) check_per_item(op, "bias", *bias, items.size(0), users);
}

void check_cross_entropy(const char* op, const Tensor& users, const Tensor& table, const Tensor& target,
                         double temperature, const OptionalTensor& bias, const OptionalTensor& logq,
                         double label_smoothing, const OptionalTensor& negatives, bool in_batch) {
  check_catalog(op, users, "table", table, temperature);
  check_integers(op, "target", target, users.size(0), users);
  if (bias) check_per_item(op, "bias", *bias, table.size(0), users);
  if (logq) check_per_item(op, "logq", *logq, table.size(0), users);
  if (negatives) check_integers(op, "negatives", *negatives, -1, users);
  ATTNREC_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, "label_smoothing must be from 0 to 1, got ",
                label_smoothing);
  ATTNREC_CHECK(!negatives || label_smoothing == 0, op, "label_smoothing must be 0 with negatives, got ",
                label_smoothing);
  ATTNREC_CHECK(negatives || !in_batch, op, "negatives must be the targets where in_batch is set, got none");
}

void check_per_score(const char* op, const char* name, const Tensor& tensor, const Tensor& users,
                     const Tensor& items) {
  check_tensor(op, name, tensor, 1, users.scalar_type(), users);
  ATTNREC_CHECK(tensor.size(0) == items.size(0), op, name, " must have shape [", items.size(0), "], got ",
                shape_of(tensor));
}

void check_attention_outputs(const char* op, const Tensor& grad_out, const OptionalTensor& grad_lse,
                             const Tensor& query, const Tensor& out, const Tensor& lse, ScalarType wide) {
  const auto check_like = [&](const char* name, const Tensor& tensor, int64_t rank, ScalarType dtype) {
    check_tensor(op, name, tensor, rank, dtype, query);
    bool same = true;
    for (int64_t i = 0; i < rank; i++) same &= tensor.size(i) == query.size(i);
    const std::string last = rank == 3 ? ", " + std::to_string(query.size(2)) : "";
    ATTNREC_CHECK(same, op, name, " must have shape [", query.size(0), ", ", query.size(1), last, "], got ",
                  shape_of(tensor));
  };
  check_like("grad_out", grad_out, 3, query.scalar_type());
  check_like("out", out, 3, query.scalar_type());
  check_like("lse", lse, 2, wide);
  if (grad_lse) check_like("grad_lse", *grad_lse, 2, wide);
}

void check_attention(const char* op, const Tensor& query, const Tensor& key, const Tensor* value,
                     const Tensor& q_offsets, const Tensor& kv_offsets, std::optional<double> scale,
                     const OptionalTensor& kv_lengths, const OptionalTensor& visible,
                     const OptionalTensor& self_key, const OptionalTensor* self_value,
                     const OptionalTensor& key_bias) {
  check_floating(op, "query", query);
  const ScalarType dtype = query.scalar_type();
  check_tensor(op, "query", query, 3, dtype, query);
  check_tensor(op, "key", key, 3, dtype, query);
  const int64_t rows = query.size(0), events = key.size(0), D = query.size(2);
  ATTNREC_CHECK(D >= 1 && D <= 256, op, "query must have a head dim of 1 to 256, got shape ",
                shape_of(query));
  ATTNREC_CHECK(key.size(2) == D, op, "key must have query's head dim ", D, ", got shape ", shape_of(key));
  ATTNREC_CHECK(key.size(1) > 0 && query.size(1) > 0 && query.size(1) % key.size(1) == 0, op,
                "query's heads must be one or more, and a multiple of key's (", key.size(1), "), got ",
                query.size(1));
  ATTNREC_CHECK(!scale || std::isfinite(*scale), op, "scale must be finite, got ", *scale);
  if (value) {
    check_tensor(op, "value", *value, 3, dtype, query);
    ATTNREC_CHECK(value->size(0) == events && value->size(1) == key.size(1) && value->size(2) == D, op,
                  "value must have key's shape ", shape_of(key), ", got ", shape_of(*value));
  }
  check_integers(op, "q_offsets", q_offsets, -1, query);
  ATTNREC_CHECK(q_offsets.size(0) > 0, op, "q_offsets must have users + 1 elements, got none");
  check_integers(op, "kv_offsets", kv_offsets, -1, query);
  ATTNREC_CHECK(q_offsets.size(0) == kv_offsets.size(0), op,
                "kv_offsets must have as many elements as q_offsets (", q_offsets.size(0), "), got ",
                kv_offsets.size(0));
  if (kv_lengths) check_integers(op, "kv_lengths", *kv_lengths, q_offsets.size(0) - 1, query);
  if (visible) check_integers(op, "visible", *visible, rows, query);
  const auto check_self = [&](const char* name, const Tensor& tensor) {
    check_tensor(op, name, tensor, 3, dtype, query);
    ATTNREC_CHECK(tensor.size(0) == rows && tensor.size(1) == key.size(1) && tensor.size(2) == D, op, name,
                  " must have shape [", rows, ", ", key.size(1), ", ", D, "], got ", shape_of(tensor));
  };
  if (self_value) {
    ATTNREC_CHECK(self_key.has_value() == self_value->has_value(), op,
                  "self_value must be given with self_key, and only then");
    if (*self_value) check_self("self_value", **self_value);
  }
  if (self_key) check_self("self_key", *self_key);
  if (key_bias) {
    check_device(op, "key_bias", *key_bias, query);
    ATTNREC_CHECK(key_bias->scalar_type() == dtype || key_bias->scalar_type() == ScalarType::Float, op,
                  "key_bias must be float32 or have query's dtype, got ", name_of(key_bias->scalar_type()));
    ATTNREC_CHECK(key_bias->dim() == 2 && key_bias->size(0) == events && key_bias->size(1) == query.size(1),
                  op, "key_bias must have shape [", events, ", ", query.size(1), "], got ",
                  shape_of(*key_bias));
  }
}

}  // namespace attnrec
