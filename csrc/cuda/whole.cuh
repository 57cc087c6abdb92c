// whole.cuh: a statistic of a batch (fdpg/fdiv_weights.h) from those of disjoint parts of it,
// part(0) ... part(count - 1), by a warp. Totals by a tree over the lanes, then what is relative to
// them by another: no chain of merges, and nothing divides but for the mean. All lanes get it.
#pragma once

#include "device.cuh"
//
#include "fdpg/fdiv_weights.h"
#include "reduce.cuh"

namespace fdpg::cuda {
namespace {

// The larger of two of the lanes of a warp, and so on: NaN if there is one.
__device__ __forceinline__ double warp_larger(double x) {
#pragma unroll
  for (int reach = 1; reach < kWarp; reach *= 2) {
    x = larger(x, __shfl_xor_sync(0xffffffffu, x, reach));
  }
  return x;
}

template <class Part>
__device__ void take_whole(int64_t count, const Part& part, Moments& whole) {
  whole = {};
  for (int64_t k = threadIdx.x % kWarp; k < count; k += kWarp) {
    const Moments mine = part(k);
    whole.n += mine.n;
    whole.sum += mine.sum;
  }
  whole.n = warp_sum(whole.n);
  whole.sum = warp_sum(whole.sum);
  whole.centre = whole.mean();
  for (int64_t k = threadIdx.x % kWarp; k < count; k += kWarp) {
    whole.square += part(k).square_about(whole.centre);
  }
  whole.square = warp_sum(whole.square);
}

template <class Part>
__device__ void take_whole(int64_t count, const Part& part, EffectiveSize& whole) {
  whole = {};
  for (int64_t k = threadIdx.x % kWarp; k < count; k += kWarp) {
    whole.largest = larger(whole.largest, part(k).largest);
  }
  whole.largest = warp_larger(whole.largest);
  for (int64_t k = threadIdx.x % kWarp; k < count; k += kWarp) {
    const EffectiveSize mine = part(k);
    const double scale = mine.scale_in(whole.largest);
    whole.sum += scale * mine.sum;
    whole.squares += scale * scale * mine.squares;
  }
  whole.sum = warp_sum(whole.sum);
  whole.squares = warp_sum(whole.squares);
}

}  // namespace
}  // namespace fdpg::cuda
