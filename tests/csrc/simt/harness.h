// harness.h: how a test of CUDA kernels gets memory and runs a launcher, on the emulator (g++) and,
// with FDPG_TEST_ON_GPU, on a real device (nvcc): the same test source is compiled for both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../check.h"

#ifdef FDPG_TEST_ON_GPU
#include <cuda_runtime.h>
#else
#include "simt.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#endif

// A buffer from this size on is left as it comes: most of its pages are never touched.
inline constexpr std::size_t kSparse = std::size_t{1} << 30;

// n elements that a kernel may read and write, at `offset` elements past a 16-byte boundary, and
// not one byte more: what follows is a red zone in the AddressSanitizer build.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n, int offset = 0) : size_(n) {
    const std::size_t bytes = static_cast<std::size_t>(n + offset) * sizeof(T);
#ifdef FDPG_TEST_ON_GPU
    void* p = nullptr;
    if (cudaMallocManaged(&p, bytes ? bytes : 16) != cudaSuccess) std::abort();
    base_ = p;
#else
    if (posix_memalign(&base_, 16, bytes ? bytes : 1) != 0) std::abort();
#endif
    if (bytes < kSparse) std::memset(base_, 0xff, bytes);  // NaN, -1
    data_ = static_cast<T*>(base_) + offset;
  }
  Buffer(const std::vector<T>& values, int offset = 0)
      : Buffer(static_cast<int64_t>(values.size()), offset) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = values[i];
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    allow(0, size_);
#ifdef FDPG_TEST_ON_GPU
    cudaFree(base_);
#else
    std::free(base_);
#endif
  }

  T* data() { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

  // Elements [begin, begin + n) are out of bounds (padding): seen by AddressSanitizer.
  void forbid(int64_t begin, int64_t n) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(data_ + begin, n * sizeof(T));
#else
    static_cast<void>(begin), static_cast<void>(n);
#endif
  }
  void allow(int64_t begin, int64_t n) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(data_ + begin, n * sizeof(T));
#else
    static_cast<void>(begin), static_cast<void>(n);
#endif
  }

 private:
  void* base_ = nullptr;
  T* data_ = nullptr;
  int64_t size_;
};

// Runs `launch`, which returns a status, and waits for it.
template <class Launch>
void run_on_device(Launch&& launch) {
  CHECK(launch() == 0);
#ifdef FDPG_TEST_ON_GPU
  const cudaError_t status = cudaDeviceSynchronize();
  if (status != cudaSuccess) {
    std::printf("the device reports: %s\n", cudaGetErrorString(status));
    std::exit(1);  // it will say so of every later call too
  }
#endif
}

// Calls body(schedule) for each order in which the emulator can run threads and blocks, or twice on
// a device. The body compares with what the first call gave: bit for bit.
template <class Body>
void for_each_schedule(Body&& body) {
#ifdef FDPG_TEST_ON_GPU
  for (int schedule = 0; schedule < 2; ++schedule) body(schedule);
#else
  for (int schedule = 0; schedule < 3; ++schedule) {
    simt::set_schedule(static_cast<unsigned>(schedule));
    body(schedule);
  }
  simt::set_schedule(0);
#endif
}

template <class T>
bool same_bits(const Buffer<T>& a, const std::vector<T>& b) {
  return b.empty() || std::memcmp(&a[0], b.data(), b.size() * sizeof(T)) == 0;
}

// The body of a test program: prints what the emulator caught, and fails.
template <class Body>
int run_tests(Body&& body) {
#ifdef FDPG_TEST_ON_GPU
  body();
#else
  try {
    body();
  } catch (const simt::Error& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
#endif
  return test_result();
}
