// fdiv_weights.cuh: the weight of each sample, and the statistics of the batch. The formulas are
// fdpg/fdiv_weights.h's, shared with the CPU; here is the walk.
//
// Fused: pseudo-reward, importance ratio, clipping, baseline, weights and every statistic that a
// run logs, in two launches of a block per tile of samples and a thread per sample. The first
// states what is known of each sample by itself, the second what it is worth beside the others; the
// last block to get there adds up the batch.
//   bytes:  B (4 * 8 + 8) read, 8 B written; 88 B of workspace written and read again: 1 MB for
//           4096 samples, which stays in the L2 cache
//   floor:  two launches, about 4 us, and eight merges of statistics, one after the other
//
// The leave-one-out baselines add what is before a sample to what is after it, as on the CPU:
// subtracting a sample from the whole would cancel where one importance ratio outweighs the rest.
// So a sample walks to both ends of its group, over tiles that lie within it by their sums.
#pragma once

#include "device.cuh"
//
#include "fdpg/fdiv_weights.h"
#include "reduce.cuh"

namespace fdpg::cuda {
namespace {

constexpr int kTile = 128;

// What the launches hand on, in the workspace.
struct FdivTiles {
  int64_t tiles;
  SampleReward* samples;  // (tiles, kTile)
  RewardSums* sums;       // (tiles, kTile) of each sample alone
  RewardSums* whole;      // (tiles,) of each tile
  int64_t* bad;           // (tiles,) has a prompt out of range or order?
  struct Partial {
    BatchStatistics statistics;
    RewardSums sums;
    __device__ void merge(const Partial& later) {
      statistics.merge(later.statistics);
      sums.merge(later.sums);
    }
  }* partial;         // (tiles,)
  unsigned* arrived;  // how many blocks of the second launch have left their partial
};

// Block k, thread t: sample t of tile k.
__global__ void __launch_bounds__(kTile) reward_samples(FdivWeightsParams p, FdivTiles tiles) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  SampleReward sample;
  bool bad = false;
  if (i < p.sequences) {
    const int64_t prompt = p.prompt[i];
    bad = prompt < (i > 0 ? p.prompt[i - 1] : 0) || prompt >= p.prompts;
    if (prompt >= 0 && prompt < p.prompts) {
      visit_divergence<double>(p.divergence, p.divergence_param, [&](const auto& divergence) {
        sample = sample_reward(p, divergence, i);
      });
    }
  }
  const RewardSums sums{sample.ratio_reward, sample.ratio};
  tiles.samples[i] = sample;
  tiles.sums[i] = sums;
  const bool any_bad = __syncthreads_or(bad);
  const RewardSums whole = block_merge(sums);
  if (threadIdx.x != 0) return;
  tiles.whole[blockIdx.x] = whole;
  tiles.bad[blockIdx.x] = any_bad;
  if (blockIdx.x == 0) *tiles.arrived = 0;
}

// The sums over the samples of i's group but i. A group is the batch or the samples of one prompt,
// which are neighbours. `prompts` and `sums` are the tile of i, in shared memory; t is its place.
__device__ RewardSums others_of(const FdivWeightsParams& p, const FdivTiles& tiles,
                                bool whole_batch, const int64_t* prompts, const RewardSums* sums,
                                int t) {
  const int64_t tile = blockIdx.x, prompt = prompts[t];
  const int size = static_cast<int>(min(static_cast<int64_t>(kTile), p.sequences - tile * kTile));
  auto in_group = [&](int64_t j) { return whole_batch || p.prompt[j] == prompt; };

  RewardSums before;
  int k = t - 1;
  while (k >= 0 && (whole_batch || prompts[k] == prompt)) before.merge(sums[k--]);
  if (k < 0) {
    int64_t whole = tile - 1;
    while (whole >= 0 && in_group(whole * kTile)) before.merge(tiles.whole[whole--]);
    if (whole >= 0) {
      for (int64_t j = whole * kTile + kTile - 1; in_group(j); --j) before.merge(tiles.sums[j]);
    }
  }
  RewardSums after;
  k = t + 1;
  while (k < size && (whole_batch || prompts[k] == prompt)) after.merge(sums[k++]);
  if (k == kTile) {
    int64_t whole = tile + 1;
    while (whole < tiles.tiles && in_group(min((whole + 1) * kTile, p.sequences) - 1)) {
      after.merge(tiles.whole[whole++]);
    }
    for (int64_t j = whole * kTile; j < p.sequences && in_group(j); ++j) {
      after.merge(tiles.sums[j]);
    }
  }
  before.merge(after);
  return before;
}

// What a block makes of a batch whose samples are not grouped by prompt: nothing that could be
// mistaken for an answer.
__device__ void refuse(const FdivWeightsParams& p, int64_t i) {
  if (i < p.sequences) p.weights[i] = NAN;
  if (blockIdx.x > 0) return;
  for (int k = threadIdx.x; k < kStatistics; k += kTile) p.statistics[k] = NAN;
}

// Block k, thread t: sample t of tile k.
__global__ void __launch_bounds__(kTile) weigh_samples(FdivWeightsParams p, FdivTiles tiles) {
  __shared__ int64_t prompts[kTile];
  alignas(16) __shared__ unsigned char storage[kTile * sizeof(RewardSums)];
  __shared__ bool last;
  RewardSums* sums = reinterpret_cast<RewardSums*>(storage);
  const int t = threadIdx.x;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTile + t;
  const bool exists = i < p.sequences;
  bool bad = false;
  for (int64_t k = t; k < tiles.tiles; k += kTile) bad |= tiles.bad[k] != 0;
  const SampleReward sample = tiles.samples[i];
  prompts[t] = exists ? p.prompt[i] : -1;
  sums[t] = tiles.sums[i];
  if (__syncthreads_or(bad)) return refuse(p, i);

  Scope scope = Scope::kNothing;
  visit_baseline(p.baseline, [&](auto baseline) { scope = baseline.kScope; });
  const bool learns = scope == Scope::kEarlierBatches;
  FdivTiles::Partial mine;
  if (exists) {
    RewardSums others;
    if (learns) others = {p.baseline_state[0], p.baseline_state[1]};
    if (scope == Scope::kBatch || scope == Scope::kPrompt) {
      others = others_of(p, tiles, scope == Scope::kBatch, prompts, sums, t);
    }
    double value = 0;
    visit_baseline(p.baseline, [&](auto baseline) { value = baseline.value(others); });
    p.weights[i] = sample.weight(value);
    mine.statistics.add(sample, value);
    mine.sums.add(sample.ratio_reward, sample.ratio);
  }
  mine = block_merge(mine);
  if (t == 0) {
    tiles.partial[blockIdx.x] = mine;
    __threadfence();
    last = atomicInc(tiles.arrived, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;

  __threadfence();
  const int64_t each = divide_up(tiles.tiles, kTile);
  FdivTiles::Partial batch;
  for (int64_t k = t * each; k < min(tiles.tiles, (t + 1) * each); ++k) {
    batch.merge(tiles.partial[k]);
  }
  batch = block_merge(batch);
  if (t != 0) return;
  batch.statistics.write(p.statistics);
  if (learns) {
    const int64_t used = p.sequences - batch.statistics.n_skipped;
    update_moving_average(p.baseline_state, batch.sums, used, p.baseline_param);
  }
}

}  // namespace
}  // namespace fdpg::cuda
