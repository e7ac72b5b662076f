// What the project's CUDA binding asks of a CUDA build of torch, for a CPU build: tensors are on the CPU, and
// everything is done at once, in order.
#include <cstdint>

extern "C" {
int32_t aoti_torch_create_cuda_guard(int32_t, void** guard) { return *guard = nullptr, 0; }
int32_t aoti_torch_delete_cuda_guard(void*) { return 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
}
