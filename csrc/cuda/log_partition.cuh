// log_partition.cuh: the running importance-sampling estimate of Z per prompt, in log space.
//
// A block looks at the prompts' ids of all samples and adds up the weights of one prompt, a thread
// the few that it meets, a warp what the threads have; the order is fixed, but not the CPU's, so
// the last bits may differ from its and from a batch in two parts. There are as many blocks as
// prompts; or, in a run of more prompts than the batch has samples, as samples: then the first of
// each prompt adds up, and the others have nothing to do.
//   bytes:  per block that adds up 8 B a sample read (all of them from the L2 cache but once), 8
//           per own sample, 48 of state
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

// Whether there is a block for each sample, not for each prompt.
__host__ __device__ __forceinline__ bool is_by_sample(const LogPartitionParams& p) {
  return p.prompts > p.sequences;
}

// Block g: prompt g, or that of sample g.
__global__ void __launch_bounds__(kPartitionThreads) add_weights(LogPartitionParams p) {
  constexpr int kAtOnce = 16;  // ids in flight per thread
  alignas(16) __shared__ unsigned char storage[kPartitionThreads * sizeof(PromptWeights)];
  PromptWeights* threads = reinterpret_cast<PromptWeights*>(storage);
  const int t = threadIdx.x;
  after_previous();
  let_next_begin();
  const int64_t block = blockIdx.x;
  const bool of_sample = is_by_sample(p);
  const int64_t prompt = of_sample ? p.prompt[block] : block;
  // As a rule the samples of a prompt stand together. Block 0 stays.
  if (of_sample && block > 0 && p.prompt[block - 1] == prompt) return;
  double* state = p.state + 3 * prompt;
  // Asked for here, if it is known to be there, that nobody waits for it below.
  double before = t < 3 && !of_sample ? state[t] : 0;
  PromptWeights mine;
  bool bad = false, earlier = false;  // is there a prompt out of range; a sample for this before
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
      const int64_t i = first + k * kPartitionThreads;
      const bool is_own = i < p.sequences && prompts[k] == prompt;
      own |= static_cast<unsigned>(is_own) << k;
      earlier |= is_own && i < block;
    }
    for (; own != 0; own &= own - 1) {
      const int k = __ffs(static_cast<int>(own)) - 1;
      mine.weights.add(p.log_weight[first + k * kPartitionThreads]);
      mine.count += 1;
    }
  }
  threads[t] = mine;
  if (__syncthreads_or(bad)) {  // a prompt that does not exist: no state may seem an estimate
    double* states = of_sample ? p.state : state;
    const int64_t count = !of_sample ? 3 : block == 0 ? 3 * p.prompts : 0;
    for (int64_t k = t; k < count; k += kPartitionThreads) states[k] = NAN;
    return;
  }
  if (of_sample) {
    if (__syncthreads_or(earlier)) return;
    if (t < 3) before = state[t];
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
