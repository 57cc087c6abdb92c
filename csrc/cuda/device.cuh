// device.cuh: the first include of every kernel header. Under nvcc it is CUDA; under g++ it is the
// emulator of tests/csrc/simt, which runs the same kernels on the CPU. So kernels here are plain
// CUDA, in an anonymous namespace (the emulator's sanitizer builds need that), without
// cooperative_groups and CUB, and every launch goes through launch().
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#ifdef __CUDACC__
#include <cuda_pipeline_primitives.h>  // __pipeline_memcpy_async: cp.async
#include <cuda_runtime.h>
// Dynamic shared memory. One symbol for all kernels: instances of templates cannot clash on its
// type.
#define FDPG_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fdpg_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fdpg_dynamic_shared)
#else
#include "simt.h"
#define FDPG_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(simt::dynamic_shared())
#endif

namespace fdpg::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kVectorBytes = 16;  // the widest load and store of one thread

// Grids are one-dimensional: x is the only dimension that may pass 65535.
inline constexpr int64_t kMaxBlocks = 0x7fffffff;

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Of the current device's L2 cache.
inline int64_t cache_bytes() {
  int bytes = 0;
#ifdef __CUDACC__
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device);
  }
#endif
  return bytes;
}

// When a kernel begins: when the one before it in the stream has ended; or, on GPUs that can (9.0),
// when all blocks of that one have said let_next_begin() or ended, so that getting there costs no
// time. It then calls after_previous() before it reads what that one wrote, or writes at all; and
// let_next_begin() only after that, for the next to know that all before this one has ended.
enum class Begin { kAfterPrevious, kEarly };

__device__ __forceinline__ void let_next_begin() {
#ifndef __CUDACC__
  simt::let_next_begin();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void after_previous() {
#ifndef __CUDACC__
  simt::after_previous();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

#ifdef __CUDACC__
// Whether the code of kernels that the current device runs has these two: not what the driver has
// made of code for an older GPU.
inline bool has_early_begin(const void* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not yet; all kernels are compiled alike
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  signed char found = known[device].load(std::memory_order_relaxed);
  if (found == 0) {
    cudaFuncAttributes attributes{};
    const bool told = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    if (!told) static_cast<void>(cudaGetLastError());  // the launch will say it
    const bool can = told && attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
    found = can ? 1 : -1;
    known[device].store(found, std::memory_order_relaxed);
  }
  return found > 0;
}
#endif

// Enqueues kernel<<<blocks, threads, shared_bytes, stream>>>(args...). No blocks is no launch.
template <Begin kBegin = Begin::kAfterPrevious, class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, std::size_t shared_bytes,
                   cudaStream_t stream, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "launch: wrong number of kernel arguments");
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
#ifdef __CUDACC__
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute early{};
  if (kBegin == Begin::kEarly && has_early_begin(reinterpret_cast<const void*>(kernel))) {
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
#else
  static_cast<void>(stream);
  return simt::launch(kernel, grid, block, shared_bytes, kBegin == Begin::kEarly,
                      std::tuple<Params...>(static_cast<Params>(std::forward<Args>(args))...));
#endif
}

}  // namespace fdpg::cuda
