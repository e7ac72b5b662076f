// Kernels for the tests of the CUDA front end, with ordinary host launchers.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>

// ---------------------------------------------------------------- row softmax with warp shuffles
__global__ void softmax_kernel(const float* __restrict__ x, float* __restrict__ y, int n) {
  extern __shared__ float row[];
  __shared__ float part[32];
  int t = threadIdx.x, warps = blockDim.x / 32;
  const float* in = x + (size_t)blockIdx.x * n;
  float m = -INFINITY;
  for (int i = t; i < n; i += blockDim.x) m = fmaxf(m, row[i] = in[i]);
  for (int s = 16; s; s /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, s));
  if (t % 32 == 0) part[t / 32] = m;
  __syncthreads();
  for (int w = 0; w < warps; w++) m = fmaxf(m, part[w]);
  __syncthreads();
  float sum = 0;
  for (int i = t; i < n; i += blockDim.x) sum += row[i] = __expf(row[i] - m);
  for (int s = 16; s; s /= 2) sum += __shfl_xor_sync(~0u, sum, s);
  if (t % 32 == 0) part[t / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < warps; w++) sum += part[w];
  for (int i = t; i < n; i += blockDim.x) y[(size_t)blockIdx.x * n + i] = row[i] / sum;
}
extern "C" int softmax(const float* x, float* y, int rows, int n, int threads, cudaStream_t stream) {
  if (n * sizeof(float) > 48 * 1024) {
    cudaError_t e =
        cudaFuncSetAttribute(softmax_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n * sizeof(float));
    if (e != cudaSuccess) return e;
  }
  softmax_kernel<<<rows, threads, n * sizeof(float), stream>>>(x, y, n);
  return cudaGetLastError();
}
extern "C" int softmax_without_opt_in(const float* x, float* y, int rows, int n) {
  softmax_kernel<<<rows, 128, n * sizeof(float)>>>(x, y, n);
  return cudaGetLastError();
}

// ---------------------------------------------------------------- attention: cp.async, ldmatrix, mma.sync
// One warp per 16 queries, 4 warps; keys and values in tiles of 32, double-buffered. D = 64, bf16.
constexpr int D = 64, BN = 32, PAD = D + 8;
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void copy16(void* to, const void* from, bool there) {
  int n = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(n));
}
__device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p)));
}
__device__ __forceinline__ void ldmatrix4_trans(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p)));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&v);
}
struct Jagged {
  const __nv_bfloat16 *q, *k, *v;
  __nv_bfloat16* o;
  const int64_t *q_offsets, *k_offsets;
  float scale;
};
__global__ void __launch_bounds__(128) attention_kernel(Jagged a) {
  __shared__ __align__(16) __nv_bfloat16 ks[2][BN][PAD], vs[2][BN][PAD];
  int64_t q0 = a.q_offsets[blockIdx.y], k0 = a.k_offsets[blockIdx.y];
  int nq = a.q_offsets[blockIdx.y + 1] - q0, nk = a.k_offsets[blockIdx.y + 1] - k0;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * 64 + warp * 16;
  if (blockIdx.x * 64 >= nq) return;
  auto fetch = [&](int stage, int tile) {
    for (int i = threadIdx.x; i < BN * D / 8; i += 128) {
      int r = i / (D / 8), c = i % (D / 8) * 8, key = tile * BN + r;
      bool there = key < nk;
      copy16(&ks[stage][r][c], a.k + (k0 + (there ? key : 0)) * D + c, there);
      copy16(&vs[stage][r][c], a.v + (k0 + (there ? key : 0)) * D + c, there);
    }
    asm volatile("cp.async.commit_group;\n");
  };
  int tiles = (nk + BN - 1) / BN;
  if (tiles) fetch(0, 0);
  int g = lane / 4, t = lane % 4;
  uint32_t qf[D / 16][4];
  for (int c = 0; c < D / 16; c++)
    for (int i = 0; i < 4; i++) {
      int row = first + g + 8 * (i % 2), col = c * 16 + 2 * t + 8 * (i / 2);
      qf[c][i] = row < nq ? *reinterpret_cast<const uint32_t*>(a.q + (q0 + row) * D + col) : 0;
    }
  float o[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, log2e = a.scale * 1.44269504f;
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) fetch((tile + 1) & 1, tile + 1);
    if (tile + 1 < tiles)
      asm volatile("cp.async.wait_group 1;\n");
    else
      asm volatile("cp.async.wait_group 0;\n");
    __syncthreads();
    auto& K = ks[tile & 1];
    auto& V = vs[tile & 1];
    float s[BN / 8][4] = {};
    for (int c = 0; c < D / 16; c++)
      for (int n = 0; n < BN / 16; n++) {
        uint32_t b[4];  // two 8-key groups, both halves of 16 features
        ldmatrix4(b, &K[n * 16 + lane % 8 + lane / 16 * 8][c * 16 + lane / 8 % 2 * 8]);
        mma(s[2 * n], qf[c], b[0], b[1]);
        mma(s[2 * n + 1], qf[c], b[2], b[3]);
      }
    for (int h = 0; h < 2; h++) {
      float top = m[h];
      for (int n = 0; n < BN / 8; n++)
        for (int e = 0; e < 2; e++) {
          float& v = s[n][2 * h + e];
          v = tile * BN + n * 8 + 2 * t + e < nk ? v * log2e : -INFINITY;
          top = fmaxf(top, v);
        }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      float old = exp2f(m[h] - top);
      m[h] = top;
      l[h] *= old;
      for (int n = 0; n < D / 8; n++) o[n][2 * h] *= old, o[n][2 * h + 1] *= old;
      for (int n = 0; n < BN / 8; n++)
        for (int e = 0; e < 2; e++) l[h] += s[n][2 * h + e] = exp2f(s[n][2 * h + e] - top);
    }
    for (int c = 0; c < BN / 16; c++) {
      uint32_t p[4] = {pack(s[2 * c][0], s[2 * c][1]), pack(s[2 * c][2], s[2 * c][3]),
                       pack(s[2 * c + 1][0], s[2 * c + 1][1]), pack(s[2 * c + 1][2], s[2 * c + 1][3])};
      for (int n = 0; n < D / 16; n++) {
        uint32_t b[4];
        ldmatrix4_trans(b, &V[c * 16 + lane % 16][n * 16 + lane / 16 * 8]);
        mma(o[2 * n], p, b[0], b[1]);
        mma(o[2 * n + 1], p, b[2], b[3]);
      }
    }
    __syncthreads();
  }
  for (int h = 0; h < 2; h++) {
    l[h] += __shfl_xor_sync(~0u, l[h], 1);
    l[h] += __shfl_xor_sync(~0u, l[h], 2);
    int row = first + g + 8 * h;
    float inv = l[h] > 0 ? 1 / l[h] : 0;
    if (row < nq)
      for (int n = 0; n < D / 8; n++)
        *reinterpret_cast<uint32_t*>(a.o + (q0 + row) * D + n * 8 + 2 * t) =
            pack(o[n][2 * h] * inv, o[n][2 * h + 1] * inv);
  }
}
extern "C" int attention(const void* q, const void* k, const void* v, void* o, const int64_t* qo,
                         const int64_t* ko, int users, int longest, float scale) {
  Jagged a{(const __nv_bfloat16*)q,
           (const __nv_bfloat16*)k,
           (const __nv_bfloat16*)v,
           (__nv_bfloat16*)o,
           qo,
           ko,
           scale};
  attention_kernel<<<dim3((longest + 63) / 64, users), 128>>>(a);
  return cudaGetLastError();
}

// ---------------------------------------------------------------- top-k with shared memory and ballots
// One block per row: radix select on the bits of the order-preserving key, ties by the lower id.
__device__ __forceinline__ uint32_t order_key(float f) {
  uint32_t u = __float_as_uint(f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
template <int K>
__global__ void topk_kernel(const float* __restrict__ x, float* values, int* ids, int n) {
  __shared__ int histogram[256], taken;
  __shared__ uint32_t prefix;
  __shared__ int remaining;
  __shared__ float top[K];
  __shared__ int top_id[K];
  const float* row = x + (size_t)blockIdx.x * n;
  if (threadIdx.x == 0) prefix = 0, remaining = K, taken = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
    uint32_t want = prefix, mask = shift == 24 ? 0 : ~0u << (shift + 8);
    for (int i = threadIdx.x; i < n; i += 256) {
      uint32_t key = order_key(row[i]);
      if ((key & mask) == want) atomicAdd(&histogram[key >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int left = remaining, b = 255;
      while (histogram[b] < left) left -= histogram[b--];
      remaining = left;
      prefix = want | (uint32_t)b << shift;
    }
    __syncthreads();
  }
  uint32_t limit = prefix;
  int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {  // one warp collects in order: larger ones, then as many equal ones as are left
    int equal_left = remaining;
    for (int base = 0; base < n; base += 32) {
      int i = base + lane;
      uint32_t key = i < n ? order_key(row[i]) : 0;
      bool equal = i < n && key == limit;
      unsigned eq = __ballot_sync(~0u, equal), below = (1u << lane) - 1;
      bool take = i < n && (key > limit || (equal && __popc(eq & below) < equal_left));
      unsigned who = __ballot_sync(~0u, take);
      if (take) {
        int at = taken + __popc(who & below);
        top[at] = row[i];
        top_id[at] = i;
      }
      __syncwarp();
      if (lane == 0) taken += __popc(who);
      equal_left -= min(equal_left, __popc(eq));
      __syncwarp();
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < K; i += 256) {  // rank by counting
    int rank = 0;
    for (int j = 0; j < K; j++) rank += top[j] > top[i] || (top[j] == top[i] && top_id[j] < top_id[i]);
    values[blockIdx.x * K + rank] = top[i];
    ids[blockIdx.x * K + rank] = top_id[i];
  }
}
extern "C" int topk(const float* x, float* values, int* ids, int rows, int n, int k) {
  if (k == 8)
    topk_kernel<8><<<rows, 256>>>(x, values, ids, n);
  else if (k == 64)
    topk_kernel<64><<<rows, 256>>>(x, values, ids, n);
  else
    return cudaErrorInvalidValue;
  return cudaGetLastError();
}

// ---------------------------------------------------------------- odds and ends that compilers emit
__constant__ float weights[4];
__device__ int launches = 5;
__device__ __noinline__ float horner(float x, const float* c) {
  return ((c[0] * x + c[1]) * x + c[2]) * x + c[3];
}
struct Mixed {
  char a;
  double b;
  short c[3];
  const int* p;
};
__global__ void mixed_kernel(Mixed s, double* d, long long* ll, float* f, __half2* h, __nv_bfloat162* b,
                             int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int table[24];
  for (int j = 0; j < 24; j++) table[j] = j * j + i;
  long long v = (long long)s.p[i] * 1000003ll;
  ll[i] = v / (s.a + i) + v % 97 + table[(i * 7) % 24] + __popcll(v) + __ffs(i) + __clz(i) + __brev(i) +
          __mulhi(i * 77777777, 12345678);
  d[i] = sqrt(fabs(d[i])) * s.b + exp(-d[i] * d[i]) + s.c[i % 3] + log(1 + d[i] * d[i]);
  f[i] = horner(f[i], weights) + sinf(f[i]) + expf(f[i]) + logf(fabsf(f[i]) + 1) + tanhf(f[i]) +
         powf(fabsf(f[i]), 1.5f) + erff(f[i]) + rsqrtf(f[i] * f[i] + 1) + f[i] / 3.0f;
  h[i] = __hfma2(h[i], h[i], __float2half2_rn(0.5f));
  b[i] = __hmul2(__hadd2(b[i], b[i]), __floats2bfloat162_rn(1.5f, -2.f));
  if (i == 0) atomicAdd(&launches, 1);
}
extern "C" int mixed(const int* p, double* d, long long* ll, float* f, void* h, void* b, int n,
                     const float* w) {
  Mixed s{3, 1.25, {1, -2, 3}, p};
  cudaMemcpyToSymbol(weights, w, sizeof weights);
  mixed_kernel<<<(n + 63) / 64, 64>>>(s, d, ll, f, (__half2*)h, (__nv_bfloat162*)b, n);
  int count = 0;
  cudaMemcpyFromSymbol(&count, launches, sizeof count);
  return cudaGetLastError() ? -1 : count;
}
__global__ void groups_kernel(const int* x, int* o) {
  namespace cg = cooperative_groups;
  auto tile = cg::tiled_partition<8>(cg::this_thread_block());
  int t = threadIdx.x, v = x[t];
  o[t] = cg::reduce(tile, v, cg::plus<int>());
  o[64 + t] = tile.shfl_up(v, 1);
  o[128 + t] = __reduce_max_sync(~0u, v);
  o[192 + t] = __syncthreads_count(v & 1);
  unsigned peers = __match_any_sync(~0u, v & 3);
  o[256 + t] = __popc(peers);
  if (v & 1) {
    auto active = cg::coalesced_threads();
    o[320 + t] = active.thread_rank() + 100 * active.size();
  } else
    o[320 + t] = -1;
  if (t < 2) printf("thread %d has %d and %.2f %s\n", t, v, v * 0.5, "text");
}
extern "C" int groups(const int* x, int* o) {
  groups_kernel<<<1, 64>>>(x, o);
  return cudaGetLastError();
}
extern "C" int more_shared_memory_than_there_is() {
  return cudaFuncSetAttribute(softmax_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024);
}
