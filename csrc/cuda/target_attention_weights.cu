// attnrec::target_attention_weights on CUDA: launch plan and launchers.
#include "cuda/target_attention_weights.cuh"

namespace attnrec::cuda {

RowsPlan plan_target_attention_weights(const Attention& a) { return plan_rows(a); }

cudaError_t launch_pair_offsets(const Attention& a, int64_t* offsets, cudaStream_t stream) {
  return launch_kernel(pair_offsets_kernel, dim3(1), kOffsetThreads, 0, stream, a, offsets);
}

cudaError_t read_pairs(const Attention& a, const int64_t* offsets, int64_t* pairs, cudaStream_t stream) {
  const cudaError_t error =
      cudaMemcpyAsync(pairs, offsets + a.users, sizeof(int64_t), cudaMemcpyDeviceToHost, stream);
  return error != cudaSuccess ? error : cudaStreamSynchronize(stream);
}

cudaError_t launch_target_attention_weights(const Attention& a, const RowsPlan& plan, const int64_t* offsets,
                                            int64_t pairs, void* weights, float* parts, cudaStream_t stream) {
  if (pairs == 0 || a.heads == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(plan.tiles), plan.head_tiles, plan.apart ? plan.chunks : 1);
  WeightsLaunch launch{rows_launch(a, plan, parts), Pass::kBoth, offsets, pairs, weights};
  return for_kind_and_dim(a.element, a.tf32, a.head_dim, [&](auto kind, auto dim) {
    const auto run = [&](Pass pass) {
      launch.pass = pass;
      return launch_kernel(target_attention_weights_kernel<decltype(kind), decltype(dim)::value>, grid,
                           kWarp * plan.warps, plan.shared_bytes, stream, a, launch);
    };
    if (!plan.apart) return run(Pass::kBoth);
    const cudaError_t error = run(Pass::kSums);
    return error != cudaSuccess ? error : run(Pass::kWeights);
  });
}

}  // namespace attnrec::cuda
