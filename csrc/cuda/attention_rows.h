// How rows of the target_attention ops that read no values are divided among blocks.
#pragma once

#include "cuda/attention.h"

namespace attnrec::cuda {

// A pure function of a call's sizes.
struct RowsPlan {
  int warps;       // of a block, 16 rows each
  int pack;        // heads of a group that share a tile of rows
  int candidates;  // of a tile
  int64_t tiles;   // of candidates, at most
  int head_tiles;  // of heads
  int chunks;      // of a history, at most; 1: no history is longer
  bool apart;      // a block for each chunk
  int64_t shared_bytes;
  int64_t part_floats;  // of memory for the chunks' maxima and sums: [chunks, rows, heads, 2]
};

}  // namespace attnrec::cuda
