// fdiv_weights.cuh: the weight of each sample, and the statistics of the batch. The formulas are
// fdpg/fdiv_weights.h's, shared with the CPU; here is the walk.
//
// Fused: pseudo-reward, importance ratio, clipping, baseline, weights and every statistic that a
// run logs, in two launches. One thread per sample states what it knows of it (the transcendental
// functions, over the whole device), then one block ties the samples together.
//   bytes:  B (4 * 8 + 8) read, 8 B written; 72 B of workspace written and read again: 0.8 MB for
//           4096 samples, which stays in the L2 cache
//   floor:  two launches, about 4 us; the second block's chain of additions comes on top
//
// The leave-one-out baselines add what is before a sample to what is after it, as on the CPU:
// subtracting a sample from the whole would cancel where one importance ratio outweighs the rest.
// So they are two scans, from the left and from the right, that start anew at each prompt.
#pragma once

#include "device.cuh"
//
#include "fdpg/fdiv_weights.h"
#include "reduce.cuh"

namespace fdpg::cuda {
namespace {

constexpr int kRewardThreads = 128;
constexpr int kWeighThreads = 512;  // at most; fewer for a small batch

// Thread i of the grid: sample i. A prompt out of range is left to weigh_samples to report.
__global__ void __launch_bounds__(kRewardThreads)
    reward_samples(FdivWeightsParams p, SampleReward* samples) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.sequences) return;
  SampleReward sample;
  if (p.prompt[i] >= 0 && p.prompt[i] < p.prompts) {
    visit_divergence<double>(p.divergence, p.divergence_param, [&](const auto& divergence) {
      sample = sample_reward(p, divergence, i);
    });
  }
  samples[i] = sample;
}

// The sums over a stretch of samples since the last place where a group begins in it.
struct GroupSums {
  RewardSums sums;
  int64_t begins = 0;  // does one?

  __device__ void merge(const GroupSums& later) {
    if (later.begins) {
      *this = later;
    } else {
      sums.merge(later.sums);
    }
  }
};

// The values of the places before this thread's, merged in order: each thread of the block has one
// place, of a permutation of 0 ... blockDim.x - 1. Ends with a barrier.
__device__ GroupSums merge_before(const GroupSums& mine, int place) {
  alignas(16) __shared__ unsigned char storage[kWeighThreads * sizeof(GroupSums)];
  GroupSums* slots = reinterpret_cast<GroupSums*>(storage);
  slots[place] = mine;
  __syncthreads();
  for (int reach = 1; reach < static_cast<int>(blockDim.x); reach *= 2) {
    GroupSums merged;
    if (place >= reach) merged = slots[place - reach];
    merged.merge(slots[place]);
    __syncthreads();  // everybody has read
    slots[place] = merged;
    __syncthreads();
  }
  GroupSums before;
  if (place > 0) before = slots[place - 1];
  __syncthreads();  // `storage` may be written again
  return before;
}

// Samples [begin, end) of one thread. Threads have consecutive runs, so that merging by thread is
// merging by sample.
struct Run {
  int64_t begin, end;

  __device__ explicit Run(int64_t samples) {
    const int64_t each = divide_up(samples, blockDim.x);
    begin = min(samples, threadIdx.x * each);
    end = min(samples, begin + each);
  }
};

// others[i] = the sums over the samples of i's group but i. `same(i)`: is i in the group of i - 1?
template <class Same>
__device__ void leave_one_out(const Run& run, int64_t count,
                              const SampleReward* __restrict__ samples,
                              RewardSums* __restrict__ others, const Same& same) {
  const int t = threadIdx.x, last = blockDim.x - 1;
  auto add = [&](RewardSums& sums, int64_t i) {
    sums.add(samples[i].ratio_reward, samples[i].ratio);
  };

  // From the left: a group begins at i if i is not of the group before it.
  GroupSums mine;
  for (int64_t i = run.begin; i < run.end; ++i) {
    if (!same(i)) mine = {{}, 1};
    add(mine.sums, i);
  }
  RewardSums before = merge_before(mine, t).sums;
  for (int64_t i = run.begin; i < run.end; ++i) {
    if (!same(i)) before = {};
    others[i] = before;
    add(before, i);
  }

  // From the right: it begins at i if the next sample is not of i's group.
  auto same_as_next = [&](int64_t i) { return i + 1 < count && same(i + 1); };
  mine = {};
  for (int64_t i = run.end - 1; i >= run.begin; --i) {
    if (!same_as_next(i)) mine = {{}, 1};
    add(mine.sums, i);
  }
  RewardSums after = merge_before(mine, last - t).sums;
  for (int64_t i = run.end - 1; i >= run.begin; --i) {
    if (!same_as_next(i)) after = {};
    others[i].merge(after);
    add(after, i);
  }
}

// What a block makes of a batch whose samples are not grouped by prompt: nothing that could be
// mistaken for an answer.
__device__ void refuse(const FdivWeightsParams& p) {
  for (int64_t i = threadIdx.x; i < p.sequences; i += blockDim.x) p.weights[i] = NAN;
  for (int k = threadIdx.x; k < kStatistics; k += blockDim.x) p.statistics[k] = NAN;
}

// One block.
__global__ void __launch_bounds__(kWeighThreads)
    weigh_samples(FdivWeightsParams p, const SampleReward* __restrict__ samples,
                  RewardSums* __restrict__ others) {
  const Run run(p.sequences);
  bool bad = false;
  for (int64_t i = run.begin; i < run.end; ++i) {
    bad |= p.prompt[i] < (i > 0 ? p.prompt[i - 1] : 0) || p.prompt[i] >= p.prompts;
  }
  if (__syncthreads_or(bad)) return refuse(p);

  Scope scope = Scope::kNothing;
  visit_baseline(p.baseline, [&](auto baseline) { scope = baseline.kScope; });
  const bool leave_out = scope == Scope::kBatch || scope == Scope::kPrompt;
  const bool learns = scope == Scope::kEarlierBatches;
  if (leave_out) {
    leave_one_out(run, p.sequences, samples, others, [&](int64_t i) {
      return i > 0 && (scope == Scope::kBatch || p.prompt[i] == p.prompt[i - 1]);
    });
  }
  RewardSums earlier;
  if (learns) earlier = {p.baseline_state[0], p.baseline_state[1]};

  BatchStatistics statistics;
  RewardSums batch;
  for (int64_t i = run.begin; i < run.end; ++i) {
    const SampleReward sample = samples[i];
    const RewardSums sums = leave_out ? others[i] : earlier;
    double value = 0;
    visit_baseline(p.baseline, [&](auto baseline) { value = baseline.value(sums); });
    p.weights[i] = sample.weight(value);
    statistics.add(sample, value);
    batch.add(sample.ratio_reward, sample.ratio);
  }
  statistics = block_merge(statistics);
  batch = block_merge(batch);
  if (threadIdx.x != 0) return;
  statistics.write(p.statistics);
  if (learns) {
    const int64_t used = p.sequences - statistics.n_skipped;
    update_moving_average(p.baseline_state, batch, used, p.baseline_param);
  }
}

}  // namespace
}  // namespace fdpg::cuda
