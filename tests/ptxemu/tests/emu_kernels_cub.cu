// Block- and warp-wide algorithms of CUB: code that its authors, not ours, wrote.
#include <cub/cub.cuh>

__global__ void cub_kernel(const float* x, float* sorted, int* ids, float* sums, int* scan, float* tops) {
  using Sort = cub::BlockRadixSort<float, 128, 4, int>;
  using Reduce = cub::BlockReduce<float, 128>;
  using Scan = cub::BlockScan<float, 128>;
  using WarpScan = cub::WarpScan<int>;
  using WarpReduce = cub::WarpReduce<float>;
  __shared__ union {
    typename Sort::TempStorage sort;
    typename Reduce::TempStorage reduce;
    typename Scan::TempStorage scan;
    typename WarpScan::TempStorage warp_scan[4];
    typename WarpReduce::TempStorage warp_reduce[4];
  } t;
  int w = threadIdx.x / 32, v[4], prefix;
  float k[4], s[4];
  for (int i = 0; i < 4; i++) k[i] = x[threadIdx.x * 4 + i], v[i] = threadIdx.x * 4 + i;
  Sort(t.sort).SortDescending(k, v);
  __syncthreads();
  for (int i = 0; i < 4; i++) sorted[threadIdx.x * 4 + i] = k[i], ids[threadIdx.x * 4 + i] = v[i];
  float total = Reduce(t.reduce).Sum(k);
  __syncthreads();
  if (threadIdx.x == 0) sums[512] = total;
  Scan(t.scan).InclusiveSum(k, s);
  __syncthreads();
  for (int i = 0; i < 4; i++) sums[threadIdx.x * 4 + i] = s[i];
  WarpScan(t.warp_scan[w]).ExclusiveSum(v[0], prefix);
  scan[threadIdx.x] = prefix;
  __syncthreads();
  float top = WarpReduce(t.warp_reduce[w]).Reduce(k[0], cuda::maximum<>{});
  if (threadIdx.x % 32 == 0) tops[w] = top;
}
extern "C" int run(const float* x, float* sorted, int* ids, float* sums, int* scan, float* tops) {
  cub_kernel<<<1, 128>>>(x, sorted, ids, sums, scan, tops);
  return cudaGetLastError();
}
