// vec.cuh: rows of any alignment, sixteen bytes at a time. A stretch of a row is a head of single
// elements up to the first 16-byte boundary, whole vectors, and a tail. Elements are aligned to
// their own size, which is all that is assumed.
#pragma once

#include "device.cuh"

namespace fdpg::cuda {
namespace {

template <class T>
inline constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));

// How far `p` is past a 16-byte boundary, in elements.
template <class T>
__device__ __forceinline__ int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kVectorBytes / sizeof(T));
}

// The head, the vectors and the tail of n elements at p.
struct Stretch {
  int head, vectors, tail;

  template <class T>
  __device__ __forceinline__ Stretch(const T* p, int n) {
    head = min(n, (kPerVector<T> - misalignment(p)) % kPerVector<T>);
    vectors = (n - head) / kPerVector<T>;
    tail = n - head - vectors * kPerVector<T>;
  }
};

// Sixteen bytes in registers.
template <class T>
struct Vector {
  T element[kPerVector<T>];

  __device__ __forceinline__ static Vector read(const T* p) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    Vector v;
    memcpy(v.element, &raw, kVectorBytes);
    return v;
  }
  __device__ __forceinline__ void write(T* p) const {
    uint4 raw;
    memcpy(&raw, element, kVectorBytes);
    __stwb(reinterpret_cast<uint4*>(p), raw);  // nvcc 13.0 makes four stores of a plain assignment
  }
};

// Copies n elements at `from` to shared memory, all of a thread's copies in flight at once. `stage`
// is aligned to 16 bytes and has room for n + kPerVector<T> elements; returns where element 0 is,
// which is as misaligned as `from`. The block may read it after the barrier that this ends with.
template <class T>
__device__ __forceinline__ const T* stage_in_shared(T* stage, const T* from, int n) {
  T* to = stage + misalignment(from);
  const Stretch s(from, n);
  const int t = threadIdx.x, threads = blockDim.x;
  const int end = s.head + s.vectors * kPerVector<T>, step = threads * kPerVector<T>;
  int i = s.head + t * kPerVector<T>;
  for (; i + 3 * step < end; i += 4 * step) {  // half the instructions of one at a time
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      __pipeline_memcpy_async(to + i + k * step, from + i + k * step, kVectorBytes);
    }
  }
  for (; i < end; i += step) __pipeline_memcpy_async(to + i, from + i, kVectorBytes);
  __pipeline_commit();
  if (t < s.head) to[t] = from[t];
  const int tail = s.head + s.vectors * kPerVector<T>;
  if (t < s.tail) to[tail + t] = from[tail + t];
  __pipeline_wait_prior(0);
  __syncthreads();
  return to;
}

// Copies n elements from shared memory, where they are as misaligned as `to`.
template <class T>
__device__ __forceinline__ void write_from_shared(T* to, const T* from, int n) {
  const Stretch s(to, n);
  const int t = threadIdx.x, threads = blockDim.x;
  for (int v = t; v < s.vectors; v += threads) {
    const int i = s.head + v * kPerVector<T>;
    Vector<T>::read(from + i).write(to + i);
  }
  if (t < s.head) to[t] = from[t];
  const int tail = s.head + s.vectors * kPerVector<T>;
  if (t < s.tail) to[tail + t] = from[tail + t];
}

}  // namespace
}  // namespace fdpg::cuda
