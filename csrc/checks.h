// What shapes, dtypes and devices tell of a call's arguments: checked by the bindings of every device before
// memory is touched. Values are another matter: only the CPU's binding reads them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

// Every message reads "attnrec: <op>: <argument> must …, got …".
#define ATTNREC_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, "attnrec: ", op, ": ", __VA_ARGS__)

namespace attnrec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// "[3, 4, 16]"
std::string shape_of(const Tensor& tensor);
inline const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

// A floating dtype that some kernel takes.
void check_floating(const char* op, const char* name, const Tensor& tensor);

// `rank` dimensions, this dtype, on the device of `like`, the op's first argument.
void check_tensor(const char* op, const char* name, const Tensor& tensor, int64_t rank, ScalarType dtype,
                  const Tensor& like);

// An int32 or int64 vector of `count` numbers (any number where count < 0).
void check_integers(const char* op, const char* name, const Tensor& tensor, int64_t count,
                    const Tensor& like);

// `users [rows, D]` and `items [N, D]`.
void check_catalog(const char* op, const Tensor& users, const char* items_name, const Tensor& items,
                   double temperature);

// A vector of `count` numbers, float32 or of users' dtype.
void check_per_item(const char* op, const char* name, const Tensor& tensor, int64_t count,
                    const Tensor& users);

void check_catalog_topk(const char* op, const Tensor& users, const Tensor& catalog, int64_t k,
                        const OptionalTensor& exclude_ids, const OptionalTensor& exclude_offsets,
                        const OptionalTensor& bias, double temperature);

void check_softmax_score(const char* op, const Tensor& users, const Tensor& items, const Tensor& offsets,
                         double temperature, const OptionalTensor& bias);

// Ids are not read.
void check_cross_entropy(const char* op, const Tensor& users, const Tensor& table, const Tensor& target,
                         double temperature, const OptionalTensor& bias, const OptionalTensor& logq,
                         double label_smoothing, const OptionalTensor& negatives, bool in_batch);

// A vector of a number for each item, in users' dtype: a gradient of softmax_score's result, or its result.
void check_per_score(const char* op, const char* name, const Tensor& tensor, const Tensor& users,
                     const Tensor& items);

// What attention's backward gets beside the forward's arguments; `wide` is the dtype of `lse` and `grad_lse`.
void check_attention_outputs(const char* op, const Tensor& grad_out, const OptionalTensor& grad_lse,
                             const Tensor& query, const Tensor& out, const Tensor& lse, ScalarType wide);

// `self_value` and `value` are null in ops that have no such argument.
void check_attention(const char* op, const Tensor& query, const Tensor& key, const Tensor* value,
                     const Tensor& q_offsets, const Tensor& kv_offsets, std::optional<double> scale,
                     const OptionalTensor& kv_lengths, const OptionalTensor& visible,
                     const OptionalTensor& self_key, const OptionalTensor* self_value,
                     const OptionalTensor& key_bias);

}  // namespace attnrec
