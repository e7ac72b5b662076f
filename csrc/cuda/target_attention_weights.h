// attnrec::target_attention_weights on CUDA: the launchers.
#pragma once

#include "cuda/attention_rows.h"

namespace attnrec::cuda {

RowsPlan plan_target_attention_weights(const Attention& a);

// offsets [users + 1]: where each user's weights begin, candidates times room apart.
cudaError_t launch_pair_offsets(const Attention& a, int64_t* offsets, cudaStream_t stream);

// Their last one, a value on the device: waits for it.
cudaError_t read_pairs(const Attention& a, const int64_t* offsets, int64_t* pairs, cudaStream_t stream);

// weights [pairs, heads] in a's dtype; `parts` as the plan says.
cudaError_t launch_target_attention_weights(const Attention& a, const RowsPlan& plan, const int64_t* offsets,
                                            int64_t pairs, void* weights, float* parts, cudaStream_t stream);

}  // namespace attnrec::cuda
