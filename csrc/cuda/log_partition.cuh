// log_partition.cuh: the running importance-sampling estimate of Z per prompt, in log space.
//
// A block per prompt looks at all prompts' ids and adds up the weights of its own, a thread the few
// that it meets, a warp what the threads have; the order is fixed, but not the CPU's, so the last
// bits may differ from its and from a batch in two parts.
//   bytes:  per block 8 B read (all of them from the L2 cache but once), 8 per own sample, 48 of
//           state
//   floor:  a launch
#pragma once

#include "device.cuh"
//
#include "fdpg/fdiv_weights.h"  // EffectiveSize: sum and sum of squares of log weights
#include "fdpg/params.h"
#include "whole.cuh"

namespace fdpg::cuda {
namespace {

constexpr int kPartitionThreads = 256;

// The weights of some samples of one prompt.
struct PromptWeights {
  EffectiveSize weights;
  double count = 0;
};

// log(e^a + e^b sum), of a state and what a batch has added relative to b; NaN stays.
__device__ __forceinline__ double add_in_log_space(double a, double b, double sum) {
  return sum == 0 ? a : log_add_exp(a, b + std::log(sum));
}

// Block g: prompt g.
__global__ void __launch_bounds__(kPartitionThreads) add_weights(LogPartitionParams p) {
  constexpr int kAtOnce = 16;  // ids in flight per thread
  alignas(16) __shared__ unsigned char storage[kPartitionThreads * sizeof(PromptWeights)];
  PromptWeights* threads = reinterpret_cast<PromptWeights*>(storage);
  const int t = threadIdx.x;
  after_previous();
  double* state = p.state + 3 * static_cast<int64_t>(blockIdx.x);
  const double before = t < 3 ? state[t] : 0;  // asked for here, that nobody waits for it below
  PromptWeights mine;
  bool bad = false;
  for (int64_t first = t; first < p.sequences; first += kAtOnce * kPartitionThreads) {
    int64_t prompts[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = first + k * kPartitionThreads;
      prompts[k] = i < p.sequences ? p.prompt[i] : 0;
    }
    unsigned own = 0;  // bit k: id k is this prompt's
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      bad |= prompts[k] < 0 || prompts[k] >= p.prompts;
      const bool exists = first + k * kPartitionThreads < p.sequences;
      own |= static_cast<unsigned>(exists && prompts[k] == blockIdx.x) << k;
    }
    for (; own != 0; own &= own - 1) {
      const int k = __ffs(static_cast<int>(own)) - 1;
      mine.weights.add(p.log_weight[first + k * kPartitionThreads]);
      mine.count += 1;
    }
  }
  threads[t] = mine;
  if (__syncthreads_or(bad)) {  // a prompt that does not exist: no state may seem an estimate
    if (t < 3) state[t] = NAN;
    return;
  }
  if (t >= kWarp) return;
  EffectiveSize whole;
  take_whole(kPartitionThreads, [&](int64_t k) { return threads[k].weights; }, whole);
  double count = 0;
  for (int k = t; k < kPartitionThreads; k += kWarp) count += threads[k].count;
  count = warp_sum(count);
  if (t < 2) {  // the sum and, of twice the logarithms, the sum of squares
    state[t] = add_in_log_space(before, (t + 1) * whole.largest, t ? whole.squares : whole.sum);
  }
  if (t == 2) state[t] = before + count;
}

}  // namespace
}  // namespace fdpg::cuda
