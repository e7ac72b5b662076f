// A stand-in for libcudart: kernel launches of host code compiled by nvcc go to
// hooks that Python sets; memory is host memory; the device is described as an A100.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

struct Hooks {
  int (*launch)(int library, const char* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                unsigned by, unsigned bz, size_t shared, size_t max_dynamic, void** args);
  void* (*allocate)(size_t bytes);
  int (*release)(void*);
  void* (*symbol)(int library, const char* name);
  int (*static_shared)(int library, const char* kernel);
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
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  for (unsigned i = 0; i < c->numAttrs; i++)  // thread-block clusters do not exist on sm_80
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) return result(cudaErrorNotSupported);
  return launch(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes);
}

// ---- functions and the device
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int value) {
  auto it = functions.find(f);
  if (it == functions.end()) return result(cudaErrorInvalidDeviceFunction);
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > 163 * 1024) return result(cudaErrorInvalidValue);
    it->second.max_dynamic = value;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* f) {
  auto it = functions.find(f);
  if (it == functions.end()) return result(cudaErrorInvalidDeviceFunction);
  memset(out, 0, sizeof *out);
  out->sharedSizeBytes = hooks.static_shared(it->second.library, it->second.name.c_str());
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 128;
  out->ptxVersion = out->binaryVersion = 80;
  out->maxDynamicSharedSizeBytes = it->second.max_dynamic;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* out, const void* f, int threads,
                                                                   size_t shared, unsigned) {
  auto it = functions.find(f);
  if (it == functions.end() || threads <= 0) return result(cudaErrorInvalidValue);
  size_t used = shared + hooks.static_shared(it->second.library, it->second.name.c_str()) + 1024;
  int n = 2048 / ((threads + 31) / 32 * 32), by_shared = (int)(164 * 1024 / used);
  *out = n < by_shared ? (n < 32 ? n : 32) : by_shared;  // registers are not known: not counted
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* out, const void* f, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(out, f, threads, shared, 0);
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *v = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      *v = 2147483647;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *v = 65535;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = 163 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *v = 164 * 1024;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *v = 108;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *v = 2048;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *v = 32;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *v = 65536;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = 0;
      break;
    case cudaDevAttrL2CacheSize:
      *v = 40 << 20;
      break;
    case cudaDevAttrClockRate:
      *v = 1410000;
      break;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCooperativeLaunch:
      *v = 1;
      break;
    default:
      *v = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "ptxemu sm_80");
  p->major = 8, p->minor = 0, p->multiProcessorCount = 108, p->warpSize = 32;
  p->sharedMemPerBlock = 48 * 1024, p->sharedMemPerBlockOptin = 163 * 1024,
  p->sharedMemPerMultiprocessor = 164 * 1024;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->regsPerBlock = 65536;
  p->l2CacheSize = 40 << 20, p->totalGlobalMem = (size_t)40 << 30;
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
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure (ptxemu keeps the reason)";
    default:
      return "error of the stand-in runtime";
  }
}
const char* cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }

// ---- memory and streams: everything is done at once, in order
cudaError_t cudaMalloc(void** p, size_t n) {
  return result((*p = hooks.allocate(n)) ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFree(void* p) { return p ? result((cudaError_t)hooks.release(p)) : cudaSuccess; }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaMemset(void* p, int v, size_t n) { return memset(p, v, n), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { return memset(p, v, n), cudaSuccess; }
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
  return memcpy(d, s, n), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) {
  return memcpy(d, s, n), cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void* s) {
  return result((*p = symbol(s)) ? cudaSuccess : cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void* s, const void* from, size_t n, size_t offset, cudaMemcpyKind) {
  char* p = (char*)symbol(s);
  return p ? (memcpy(p + offset, from, n), cudaSuccess) : result(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* s, const void* from, size_t n, size_t offset,
                                    cudaMemcpyKind k, cudaStream_t) {
  return cudaMemcpyToSymbol(s, from, n, offset, k);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* s, size_t n, size_t offset, cudaMemcpyKind) {
  char* p = (char*)symbol(s);
  return p ? (memcpy(to, p + offset, n), cudaSuccess) : result(cudaErrorInvalidSymbol);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
}
