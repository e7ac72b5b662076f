// The gradient of target_attention, the events' pass: a block has a tile of events, runs over the rows that
// see them and adds up dK, dV and dbias. Events along the rows of the products: so P and dS are operands
// where they are.
#pragma once

#include "cuda/target_attention_backward.cuh"

namespace attnrec::cuda {

// Columns of dK and of dV that a thread adds up. Beside 128 of each, what fp32 products keep in registers
// does not fit.
template <class Kind, int D>
constexpr int kEventColumns = sizeof(typename Kind::T) == 4 && D > 64 ? 64 : kColumns<D>;

// On an SM. A100, D = 32: 240 cycles a thousand scores, without a bound 283; a fourth spills, at 64 a third.
template <class Kind, int D>
constexpr int kGradEventsBlocks = sizeof(typename Kind::T) == 4 || D > 32 ? 1 : 3;

template <class Kind, int D>
struct GradEventsMemory {
  using T = typename Kind::T;
  static constexpr int kN = kStreamed<Kind, D>;
  static constexpr int kBeside = kStatesOfTile * kN * 4 / static_cast<int>(sizeof(T));  // in elements
  static constexpr int kStages = 2 * (2 * kTile<T, D, kN> + kBeside);

  static constexpr int64_t bytes(int blocks) {
    return (kStages + 2 * 16 * blocks * kStride<T, D>)*static_cast<int64_t>(sizeof(T)) +
           (2 * kKinds * D + 2) * 4;
  }
};

struct GradEventsLaunch : AttentionGradientLaunch {
  int events;        // of a tile
  Divisor by_heads;  // row r of a sweep is candidate r / sweep_heads
};

template <class Kind, int D>
__global__ __launch_bounds__(kMostThreads,
                             kGradEventsBlocks<Kind, D>) void grad_events_kernel(const Attention a,
                                                                                 const AttentionGradient g,
                                                                                 const GradEventsLaunch p) {
  using T = typename Kind::T;
  using Memory = GradEventsMemory<Kind, D>;
  constexpr int N = Memory::kN, V = kEventColumns<Kind, D>, kParts = D / V;
  const Tile tile = find_tile(blockIdx.x, a.kv_offsets, a.users, a.events, p.events);
  if (tile.rows.first >= tile.rows.end) return;
  const int kv_head = blockIdx.y, group = a.heads / a.kv_heads, sweeps = group / p.sweep_heads;
  const History history = history_of(a, tile.user);
  const Range candidates = user_range(a.q_offsets, tile.user, a.rows);
  const int first_event = static_cast<int>(tile.rows.first - history.begin);
  const int warp = threadIdx.x / kWarp, first_column = warp % kParts * V, t = lane() % 4;
  const int own_event = first_event + warp / kParts * 16;
  // Events of a warp that there are; a row sees all of them where it sees the last.
  const int last_event = min(own_event + 16, history.length) - 1;

  extern __shared__ __align__(16) char memory[];
  T* stages = reinterpret_cast<T*>(memory);
  T* keys = stages + Memory::kStages;
  T* values = keys + p.events * kStride<T, D>;
  int* bad_queries = reinterpret_cast<int*>(values + p.events * kStride<T, D>);
  int* bad_grad_outs = bad_queries + kKinds * D;
  int* bounds = bad_grad_outs + kKinds * D;

#pragma unroll 1
  for (int x = 0; x < 2; x++) {
    load_tile<T, D>(x ? values : keys, p.events, a.head_dim, p.set_vectors, [&](int n) {
      return first_event + n < history.length ? row_of<T>(x ? a.value : a.key, tile.rows.first + n, kv_head)
                                              : nullptr;
    });
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  Rows<Kind, D, 1, kHeldBoth<D>> key, value;
  key.load(keys + (own_event - first_event) * kStride<T, D>);
  value.load(values + (own_event - first_event) * kStride<T, D>);

  int event[2];
  bool exists[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    event[h] = own_event + 8 * h + lane() / 4;
    exists[h] = event[h] < history.length;
  }
  // Without events there is nothing to run over, but zeros to write.
  const int count =
      first_event < history.length ? static_cast<int>(candidates.end - candidates.first) * p.sweep_heads : 0;
  const NonFinite bad_query{bad_queries, D}, bad_grad_out{bad_grad_outs, D};
  float grad_key[1][V / 8][4], grad_value[1][V / 8][4];
  bool careful = false;

  // Adds what comes from the rows of `p.sweep_heads` heads from `head` on.
  const auto sweep = [&](int head) {
    const int64_t each = a.rows * a.heads;
    const float* states = g.states + state_of(a, p.sweep_heads, candidates.first, head);
    const Vectors of_rows[2] = {
        {row_of<T>(a.query, candidates.first, head), a.query.row_stride, a.query.head_stride},
        {row_of<T>(g.grad_out, candidates.first, head), g.grad_out.row_stride, g.grad_out.head_stride}};
    const Scoring scoring = scoring_of(a, p.factor, history, head);
    float bias[2] = {}, grad_bias[2] = {};
    int number[2];  // of an event; one that no row here sees is beyond all that rows see
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (scoring.bias) bias[h] = scoring.bias_at(event[h]) * kLog2e;
      number[h] = exists[h] && bias[h] != -infinity() ? event[h] : kNever;
    }

    // The rows that see an event of the tile, from a multiple of N on.
    int first = 0, last = count;
    if (a.visible.data) {
      if (threadIdx.x == 0) bounds[0] = count, bounds[1] = 0;
      __syncthreads();
      for (int r = threadIdx.x; r < count; r += blockDim.x) {
        if (__float_as_int(states[kSeen * each + r]) <= first_event) continue;
        atomicMin(&bounds[0], r);
        atomicMax(&bounds[1], r + 1);
      }
      __syncthreads();
      first = bounds[0] / N * N, last = bounds[1];
    }
    if (careful) {
      for (int i = threadIdx.x; i < 2 * kKinds * D; i += blockDim.x) bad_queries[i] = kNever;
      __syncthreads();
    }

    stream_tiles<T, D, D, N, Memory::kBeside>(
        stages, first, last, {a.head_dim, a.head_dim}, p.rows_vectors,
        [&](int x, int r) {
          const T* of_head = row_behind(static_cast<const T*>(of_rows[x].data), of_rows[x].head_stride,
                                        p.by_heads.remainder(r));
          return row_behind(of_head, of_rows[x].row_stride, p.by_heads.quotient(r));
        },
        [](int, int) { return true; },
        // Rows that do not exist see nothing.
        [&](int r, T* to) {
          for (int i = threadIdx.x; i < kStatesOfTile * N; i += blockDim.x) {
            const bool there = r + i % N < last;
            ptx::cp_async_word(reinterpret_cast<float*>(to) + i,
                               states + (there ? i / N * each + r + i % N : 0), there);
          }
        },
        [&](int, T* queries, T* grad_outs) {
          const float* of_tile = reinterpret_cast<const float*>(grad_outs + kTile<T, D, N>);
          const auto state = [&](int which, int j, int c) { return of_tile[which * N + column_of(j, c)]; };
          const auto seen = [&](int n) { return __float_as_int(of_tile[kSeen * N + n]); };
          float s[1][N / 8][4], ds[1][N / 8][4];
          scores<Kind, D, N, 1>(s, key, queries);
          if (scoring.bias) {
            for_each_score(s[0], [&](float& x, int, int c) { x = fmaf(x, p.factor, bias[c / 2]); });
          }
          const float unit = scoring.bias ? 1.0f : p.factor;
          for_each_score(s[0], [&](float& x, int j, int c) { x = fmaf(x, unit, state(kMinusLse, j, c)); });
          if (careful || !__all_sync(kAll, lane() >= N || seen(lane()) > last_event)) {
            for_each_score(s[0], [&](float& x, int j, int c) {
              if (number[c / 2] >= seen(column_of(j, c))) x = -infinity();
            });
          }
          for_each_score(s[0], [&](float& x, int j, int c) {
            x = ptx::exp2(x);
            if constexpr (sizeof(T) == 4) x *= state(kNorm, j, c);
          });
          scores<Kind, D, N, 1>(ds, value, grad_outs);
          for_each_score(ds[0], [&](float& x, int j, int c) { x = s[0][j][c] * (x - state(kShift, j, c)); });
          if (careful) {
            for_each_score(ds[0], [&](float& x, int j, int c) {
              if (number[c / 2] >= seen(column_of(j, c))) x = 0.0f;
            });
            __syncthreads();
            take_out_non_finite<Kind, D, N>(queries, bad_query, [&](int n) { return -seen(n); });
            take_out_non_finite<Kind, D, N>(grad_outs, bad_grad_out, [&](int n) { return -seen(n); });
            __syncthreads();
          }
          if (scoring.bias) for_each_score(ds[0], [&](float& x, int, int c) { grad_bias[c / 2] += x; });
          weigh<Kind, V, N, 1, D>(grad_value, s, grad_outs + first_column);
          weigh<Kind, V, N, 1, D>(grad_key, ds, queries + first_column);
        });

    if (careful) {
      // What was taken out comes back where it is seen: by event n where a row with it sees more than n.
      const auto found = [&](const int* bad, int kind, int j, int c) {
        return bad[kind * D + first_column + column_of(j, c)] < -number[c / 2];
      };
      for_each_score(grad_key[0], [&](float& x, int j, int c) {
        for (int kind = 0; kind < kKinds; kind++) {
          if (found(bad_queries, kind, j, c)) x = not_a_number();
        }
      });
      for_each_score(grad_value[0], [&](float& x, int j, int c) {
        if (found(bad_grad_outs, kPlus, j, c)) x += infinity();
        if (found(bad_grad_outs, kMinus, j, c)) x -= infinity();
        if (found(bad_grad_outs, kNan, j, c)) x = not_a_number();
      });
      __syncthreads();
    }
    if (!g.grad_key_bias) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float sum = of_row(grad_bias[h]);
      const int64_t row = history.begin + event[h];
      if (t == 0 && first_column == 0 && row < tile.rows.end) {
        store_element(g.grad_key_bias, row * a.heads + head, a.bias_element, exists[h] ? sum : 0.0f);
      }
    }
  };

  while (true) {
    clear(grad_key[0]);
    clear(grad_value[0]);
    for (int i = 0; i < sweeps; i++) sweep(kv_head * group + i * p.sweep_heads);
    const bool failed = non_finite(grad_key[0], exists) || non_finite(grad_value[0], exists);
    if (careful || !(a.visible.data || a.key_bias) || !__syncthreads_or(failed)) break;
    careful = true;
  }

#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int64_t row = history.begin + event[h];
    if (row >= tile.rows.end) continue;
    const int dim = min(a.head_dim - first_column, V);
    const int64_t at = (row * a.kv_heads + kv_head) * a.head_dim + first_column;
#pragma unroll
    for (int d = 0; d < V / 8; d++) {
      const auto store = [&](void* to, const float (&x)[4], float factor) {
        store_pair<Kind>(static_cast<T*>(to) + at, 8 * d + 2 * t, dim, a.head_dim % 2 == 0,
                         exists[h] ? x[2 * h] * factor : 0.0f, exists[h] ? x[2 * h + 1] * factor : 0.0f);
      };
      store(g.grad_key, grad_key[0][d], p.scale);
      store(g.grad_value, grad_value[0][d], 1.0f);
    }
  }
}

}  // namespace attnrec::cuda
