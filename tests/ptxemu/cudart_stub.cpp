// A stand-in for the part of libcudart that launchers need: kernel launches of host code compiled by nvcc go
// to hooks that Python sets, and memory is host memory.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

struct Hooks {
  int (*launch)(int library, const char* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                unsigned by, unsigned bz, size_t shared, size_t max_dynamic, void** args);
  void* (*symbol)(int library, const char* name);
};

namespace {
struct Function {
  int library;
  std::string name;
  size_t max_dynamic = 48 * 1024;
};
struct Config {
  dim3 grid, block;
  size_t shared = 0;
  void* stream = nullptr;
};
Hooks hooks;
int library = 0;  // being loaded
std::map<const void*, Function> functions;
std::map<const void*, std::pair<int, std::string>> variables;
Config config;
cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t e) {
  if (e != cudaSuccess) last_error = e;
  return e;
}
cudaError_t launch(const void* f, dim3 g, dim3 b, void** args, size_t shared) {
  auto it = functions.find(f);
  if (it == functions.end()) return result(cudaErrorInvalidDeviceFunction);
  Function& k = it->second;
  return result((cudaError_t)hooks.launch(k.library, k.name.c_str(), g.x, g.y, g.z, b.x, b.y, b.z, shared,
                                          k.max_dynamic, args));
}
void* symbol(const void* s) {
  auto it = variables.find(s);
  return it == variables.end() ? nullptr : hooks.symbol(it->second.first, it->second.second.c_str());
}
}  // namespace

extern "C" {
void ptxemu_set_hooks(const Hooks* h) { hooks = *h; }
void ptxemu_begin_library(int id) { library = id; }

// ---- what nvcc's host code calls
void** __cudaRegisterFatBinary(void*) { return new void*((void*)(intptr_t)library); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  functions[host] = Function{(int)(intptr_t)*handle, name};
}
void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int, int) {
  variables[host] = {(int)(intptr_t)*handle, name};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  config = Config{grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = config.grid, *block = config.block, *shared = config.shared, *(void**)stream = config.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* f) {
  *out = (cudaKernel_t)f;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t) {
  return launch((const void*)f, g, b, args, shared);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t) {
  return launch(f, g, b, args, shared);
}

// ---- functions
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int value) {
  auto it = functions.find(f);
  if (it == functions.end()) return result(cudaErrorInvalidDeviceFunction);
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > 163 * 1024) return result(cudaErrorInvalidValue);
    it->second.max_dynamic = value;
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure (ptxemu keeps the reason)";
    default:
      return "error of the stand-in runtime";
  }
}

// ---- memory and streams: everything is done at once, in order
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { return memset(p, v, n), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) {
  return memcpy(d, s, n), cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void* s, const void* from, size_t n, size_t offset, cudaMemcpyKind) {
  char* p = (char*)symbol(s);
  return p ? (memcpy(p + offset, from, n), cudaSuccess) : result(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* s, size_t n, size_t offset, cudaMemcpyKind) {
  char* p = (char*)symbol(s);
  return p ? (memcpy(to, p + offset, n), cudaSuccess) : result(cudaErrorInvalidSymbol);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
}
