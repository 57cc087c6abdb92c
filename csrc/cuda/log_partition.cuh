// log_partition.cuh: the running importance-sampling estimate of Z per prompt, in log space.
//
// A block per prompt looks at all prompts' ids and adds up the weights of its own; the order is
// fixed, but not the CPU's, so the last bits may differ from its and from a batch in two parts.
//   bytes:  per block 8 B read (all of them from the L2 cache but once), 8 per own sample, 48 of
//   state floor:  a launch
#pragma once

#include "device.cuh"
//
#include "fdpg/fdiv_weights.h"  // EffectiveSize: sum and sum of squares of log weights
#include "fdpg/params.h"
#include "reduce.cuh"

namespace fdpg::cuda {
namespace {

constexpr int kPartitionThreads = 256;

// The weights of some samples of one prompt, and of the batch whether all prompts exist.
struct PromptWeights {
  EffectiveSize weights;
  double count = 0;
  int64_t bad = 0;

  __device__ void merge(const PromptWeights& later) {
    weights.merge(later.weights);
    count += later.count;
    bad |= later.bad;
  }
};

// log(e^a + e^b sum), of a state and what a batch has added relative to b; NaN stays.
__device__ __forceinline__ double add_in_log_space(double a, double b, double sum) {
  return sum == 0 ? a : log_add_exp(a, b + std::log(sum));
}

// Block g: prompt g.
__global__ void __launch_bounds__(kPartitionThreads) add_weights(LogPartitionParams p) {
  constexpr int kAtOnce = 8;  // ids in flight per thread
  PromptWeights mine;
  for (int64_t first = threadIdx.x; first < p.sequences; first += kAtOnce * kPartitionThreads) {
    int64_t prompts[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = first + k * kPartitionThreads;
      prompts[k] = i < p.sequences ? p.prompt[i] : 0;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = first + k * kPartitionThreads;
      if (prompts[k] < 0 || prompts[k] >= p.prompts) mine.bad = 1;
      if (i >= p.sequences || prompts[k] != blockIdx.x) continue;
      mine.weights.add(p.log_weight[i]);
      mine.count += 1;
    }
  }
  mine = block_merge(mine);
  if (threadIdx.x != 0) return;
  double* state = p.state + 3 * static_cast<int64_t>(blockIdx.x);
  if (mine.bad) {  // a prompt that does not exist: no state may be mistaken for an estimate
    for (int k = 0; k < 3; ++k) state[k] = NAN;
    return;
  }
  const EffectiveSize& w = mine.weights;
  state[0] = add_in_log_space(state[0], w.largest, w.sum);
  state[1] = add_in_log_space(state[1], 2 * w.largest, w.squares);
  state[2] += mine.count;
}

}  // namespace
}  // namespace fdpg::cuda
