// reduce.cuh: one value per thread -> one per block, in a fixed order; and which block is the last.
// A value is any trivially copyable struct with `void merge(const S& later)`; thread t's value
// counts as before thread t + 1's. Two runs give the same bits.
#pragma once

#include "device.cuh"
//
#include "instructions.cuh"

namespace fdpg::cuda {
namespace {

// The value of the lane `delta` above; garbage where there is none.
template <class S>
__device__ __forceinline__ S shuffle_down(const S& mine, int delta) {
  static_assert(sizeof(S) % 4 == 0);
  constexpr int kWords = sizeof(S) / 4;
  uint32_t words[kWords];
  memcpy(words, &mine, sizeof(S));
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = __shfl_down_sync(0xffffffffu, words[w], delta);
  S theirs;
  memcpy(&theirs, words, sizeof(S));
  return theirs;
}

// All lanes get the largest number, and the sum, of the warp's; fp32 or fp64.
template <class A>
__device__ __forceinline__ A warp_max(A mine) {
#pragma unroll
  for (int reach = 1; reach < kWarp; reach *= 2) {
    mine = larger_number(mine, __shfl_xor_sync(0xffffffffu, mine, reach));
  }
  return mine;
}
template <class A>
__device__ __forceinline__ A warp_sum(A mine) {
#pragma unroll
  for (int reach = 1; reach < kWarp; reach *= 2) {
    mine += __shfl_xor_sync(0xffffffffu, mine, reach);
  }
  return mine;
}

// Lane 0 gets all 32 values, merged as a balanced tree over neighbours.
template <class S>
__device__ __forceinline__ S warp_merge(S mine) {
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) mine.merge(shuffle_down(mine, delta));
  return mine;
}

// Thread 0 gets all values of the block; the other threads' results mean nothing. At most 1024
// threads, a multiple of 32. Ends with a barrier, so it can be called again at once.
template <class S>
__device__ S block_merge(S mine) {
  alignas(16) __shared__ unsigned char storage[32 * sizeof(S)];  // bytes: S has a constructor
  S* warps = reinterpret_cast<S*>(storage);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  mine = warp_merge(mine);
  if (lane == 0) warps[warp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x / kWarp); ++w) mine.merge(warps[w]);
  }
  __syncthreads();  // `storage` may be written again
  return mine;
}

// Whether this block is the last of `blocks` to get here, which then reads what the others have
// written before. `arrived`: how many have; 0 at first and, once all have, again.
__device__ __forceinline__ bool last_to_arrive(unsigned* arrived, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(arrived, blocks - 1) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace
}  // namespace fdpg::cuda
