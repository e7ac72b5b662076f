// The arguments that catalog_cross_entropy and its gradient share: checked and converted.
#pragma once

#include "cuda/binding.h"
#include "cuda/catalog_cross_entropy.h"

namespace attnrec::cuda {

// `kept` holds alive what it points to.
CrossEntropy cross_entropy_of(const char* op, const Tensor& users, const Tensor& table, const Tensor& target,
                              double temperature, const OptionalTensor& bias, const OptionalTensor& logq,
                              double label_smoothing, int64_t ignore_index, const OptionalTensor& negatives,
                              bool in_batch, std::vector<Tensor>& kept);

}  // namespace attnrec::cuda
