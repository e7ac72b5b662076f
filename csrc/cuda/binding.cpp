// The stable ABI's header declares its CUDA functions only for those who ask.
#ifndef USE_CUDA
#define USE_CUDA
#endif
#include "cuda/binding.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>

namespace attnrec::cuda {
namespace {

std::atomic<bool> tf32_allowed{false};

}  // namespace

void allow_tf32(bool allowed) { tf32_allowed = allowed; }
bool tf32_is_allowed() { return tf32_allowed; }

Launch::Launch(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  CUDAGuardHandle guard = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard));
  guard_ = guard;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
}

Launch::~Launch() { aoti_torch_delete_cuda_guard(static_cast<CUDAGuardHandle>(guard_)); }

void Launch::check(const char* op, cudaError_t error) {
  ATTNREC_CHECK(error == cudaSuccess, op, "the launch failed: ", cudaGetErrorString(error));
}

Element element_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      ATTNREC_CHECK(false, op, name, " must be float32, bfloat16 or float16 on a GPU, got ",
                    name_of(tensor.scalar_type()));
  }
}

Indices indices_of(const Tensor& tensor, std::vector<Tensor>& kept) {
  kept.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
  return {kept.back().const_data_ptr(), tensor.scalar_type() == ScalarType::Long};
}

}  // namespace attnrec::cuda

STABLE_TORCH_LIBRARY_IMPL(attnrec, CompositeExplicitAutograd, m) {
  m.impl("allow_tf32", TORCH_BOX(&attnrec::cuda::allow_tf32));
}
