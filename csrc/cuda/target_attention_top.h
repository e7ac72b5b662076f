// attnrec::target_attention_top on CUDA: the launcher.
#pragma once

#include "cuda/attention_rows.h"

namespace attnrec::cuda {

struct TopPlan {
  RowsPlan rows;
  int64_t list_keys;  // of memory for the chunks' lists: [chunks, rows, heads, top] of 8 bytes
};

TopPlan plan_target_attention_top(const Attention& a, int64_t top);

// weights [rows, heads, top] in a's dtype, events alike; `parts`, `lists` as the plan says.
cudaError_t launch_target_attention_top(const Attention& a, const TopPlan& plan, int64_t top, void* weights,
                                        int64_t* events, float* parts, int64_t* lists, cudaStream_t stream);

}  // namespace attnrec::cuda
