// attnrec::target_attention on CUDA: the launcher.
#pragma once

#include "cuda/attention.h"

namespace attnrec::cuda {

// How a call is launched: a pure function of its sizes.
struct AttentionPlan {
  int warps;       // of a block
  int row_blocks;  // of 16 rows, to a warp
  int pack;        // heads of a group that share a tile of rows
  int candidates;  // of a tile
  int64_t tiles;   // of candidates, at most
  int head_tiles;  // of heads
  int chunks;      // of a history, at most; 1: no history is longer
  bool apart;      // a block for each chunk, merged afterwards
  int64_t shared_bytes;
  int64_t part_floats;  // of memory for the chunks' parts
};

AttentionPlan plan_target_attention(const Attention& a);

// out [rows, heads, D] in a's dtype, lse [rows, heads] fp32; `parts` as the plan says.
cudaError_t launch_target_attention(const Attention& a, const AttentionPlan& plan, void* out, float* lse,
                                    float* parts, cudaStream_t stream);

}  // namespace attnrec::cuda
