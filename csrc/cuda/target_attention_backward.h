// attnrec::target_attention_backward on CUDA: two passes, each with its launch plan and launcher.
#pragma once

#include "cuda/attention.h"

namespace attnrec::cuda {

struct AttentionGradient {
  Vectors grad_out, out;  // [rows, heads, D], query's dtype
  Vectors lse, grad_lse;  // [rows, heads], fp32; grad_lse may be absent
  // Results, contiguous, in the dtypes of what they are gradients of; those of self slots and bias are null
  // where there are none.
  void *grad_query = nullptr, *grad_key = nullptr, *grad_value = nullptr;
  void *grad_self_key = nullptr, *grad_self_value = nullptr, *grad_key_bias = nullptr;
  float* states = nullptr;  // [kStates, heads, rows]: what the rows' pass leaves to the others of each row
};

// A row's -lse in units of log2, -inf where it sees nothing; its shift; a factor that makes its weights sum
// to 1; as an int, how many events it sees. These are read beside each tile of rows. And P and dS of its self
// slot: computed again in another order, they would not be those that the factor was found with.
enum { kMinusLse, kShift, kNorm, kSeen, kStatesOfTile, kSelfWeight = kStatesOfTile, kSelfChange, kStates };

// Heads of a group whose rows the events' pass runs over together; with a bias, one: it differs by head.
inline int heads_of_sweep(const Attention& a) { return a.key_bias ? 1 : a.heads / a.kv_heads; }

// How a pass is launched: a pure function of a call's sizes.
struct GradRowsPlan {
  int warps;       // of a block
  int pack;        // heads of a group that share a tile of rows
  int candidates;  // of a tile
  int64_t tiles;   // of candidates, at most
  int head_tiles;  // of heads
  int64_t shared_bytes;
};

struct GradEventsPlan {
  int warps;      // of a block
  int events;     // of a tile
  int64_t tiles;  // of events, at most
  int64_t shared_bytes;
};

GradRowsPlan plan_grad_rows(const Attention& a);
GradEventsPlan plan_grad_events(const Attention& a);

// The gradients of query, self_key and self_value, and `states`.
cudaError_t launch_grad_rows(const Attention& a, const AttentionGradient& g, const GradRowsPlan& plan,
                             cudaStream_t stream);

// The gradients of key, value and key_bias, after the rows' pass.
cudaError_t launch_grad_events(const Attention& a, const AttentionGradient& g, const GradEventsPlan& plan,
                               cudaStream_t stream);

}  // namespace attnrec::cuda
