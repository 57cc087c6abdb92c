// fdiv_weights.cuh: the weight of each sample, and the statistics of the batch. The formulas are
// fdpg/fdiv_weights.h's, shared with the CPU; here is the walk.
//
// Fused: pseudo-reward, importance ratio, clipping, baseline, weights and every statistic that a
// run logs, in two launches of a block per tile of samples and a thread per sample. The first
// states what is known of each sample by itself, the second what it is worth beside the others; the
// last block to get there adds up the batch.
//   bytes:  B (4 * 8 + 8) read, 8 B written; 88 B of workspace written and read again: 1 MB for
//           4096 samples, which stays in the L2 cache
//   floor:  two launches, about 4 us, and what the threads of a block wait for each other
//
// The leave-one-out baselines add what is before a sample to what is after it, as on the CPU:
// subtracting a sample from the whole would cancel where one importance ratio outweighs the rest.
// So a sample walks to both ends of its group, over tiles that lie within it by their sums.
//
// Both launches begin early. Groups are found in prompts, which the first does not write, so that
// the second waits for it only after that.
//
// What a block waits for is its chains of steps and the fetching of its code, each of which runs
// once: so statistics share code, and divisions are a warp's each.
#pragma once

#include "device.cuh"
//
#include "fdpg/fdiv_weights.h"
#include "reduce.cuh"
#include "whole.cuh"

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
  }* partial;         // (tiles,)
  unsigned* arrived;  // how many blocks of the second launch have left their partial
};

// Of a batch, by a block: counts and sums, which are added up alike.
struct Totals {
  Counts counts;
  RewardSums sums;
  __device__ void merge(const Totals& later) {
    counts.merge(later.counts);
    sums.merge(later.sums);
  }
};

// All statistics but the counts, each by a warp. `part(k, statistic, value)`: that of part k, of
// which BatchStatistics::each says what it is made of. A warp finds its statistics as it runs: code
// of its own for each would be twice the kernel.
template <class Part>
__device__ void take_wholes(int64_t count, const Part& part, BatchStatistics* out) {
#pragma unroll 1
  for (int job = threadIdx.x / kWarp;; job += kTile / kWarp) {
    Moments BatchStatistics::* moments = nullptr;
    EffectiveSize BatchStatistics::* size = nullptr;
    double SampleStatistics::* made_of = nullptr;
    int k = 0;
    BatchStatistics::each([&](auto statistic, auto value) {
      if (k++ != job) return;
      if constexpr (std::is_same_v<decltype(statistic), decltype(moments)>) {
        moments = statistic;
      } else {
        size = statistic;
      }
      made_of = value;
    });
    if (job >= k) return;
    auto take = [&](auto statistic, auto whole) {
      take_whole(count, [&](int64_t i) { return part(i, statistic, made_of); }, whole);
      if (threadIdx.x % kWarp == 0) out->*statistic = whole;
    };
    if (moments != nullptr) {
      take(moments, Moments());
    } else {
      take(size, EffectiveSize());
    }
  }
}

struct PartIsSample {
  const SampleStatistics* samples;

  template <class S>
  __device__ S operator()(int64_t k, S BatchStatistics::*, double SampleStatistics::* value) const {
    return samples[k].used ? S::of(samples[k].*value) : S{};
  }
};

struct PartIsTile {
  const FdivTiles::Partial* tiles;

  template <class S>
  __device__ S operator()(int64_t k, S BatchStatistics::* statistic,
                          double SampleStatistics::*) const {
    return tiles[k].statistics.*statistic;
  }
};

// Block k, thread t: sample t of tile k.
__global__ void __launch_bounds__(kTile) reward_samples(FdivWeightsParams p, FdivTiles tiles) {
  after_previous();
  let_next_begin();
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

// The places [first, end) in a tile of the samples of one group: the batch, or the samples of one
// prompt, which are neighbours. `prompts` is the tile; `starts` has a word for each warp.
struct Span {
  int first, end;
};
__device__ Span group_in_tile(bool whole_batch, const int64_t* prompts, unsigned* starts) {
  const int t = threadIdx.x, lane = t % kWarp;
  const bool start = t == 0 || (!whole_batch && prompts[t - 1] != prompts[t]);
  const unsigned votes = __ballot_sync(0xffffffffu, start);
  if (lane == 0) starts[t / kWarp] = votes;
  __syncthreads();
  const unsigned up_to_mine = 0xffffffffu >> (kWarp - 1 - lane);
  int w = t / kWarp;
  unsigned found = starts[w] & up_to_mine;
  while (found == 0) found = starts[--w];  // the tile's first sample is a start
  const int first = w * kWarp + kWarp - 1 - __clz(static_cast<int>(found));
  w = t / kWarp;
  found = starts[w] & ~up_to_mine;
  while (found == 0 && ++w < kTile / kWarp) found = starts[w];
  return {first, w * kWarp + (found ? __ffs(static_cast<int>(found)) - 1 : 0)};
}

// The sums over the samples of i's group but i, nearest first. `sums` is the tile of i, in shared
// memory; t is its place and `mine` where its group lies. `prompts` are the tile's, from -1 to
// kTile: with its two neighbours. No loop over sums waits for what it reads to know whether it goes
// on, but at the far ends of a group that leaves the tile.
__device__ RewardSums others_of(const FdivWeightsParams& p, const FdivTiles& tiles,
                                bool whole_batch, Span mine, const int64_t* prompts,
                                const RewardSums* sums, int t) {
  const int64_t tile = blockIdx.x, prompt = prompts[t];
  auto in_group = [&](int64_t j) { return whole_batch || p.prompt[j] == prompt; };

  RewardSums before;
  for (int k = t - 1; k >= mine.first; --k) before.merge(sums[k]);
  if (mine.first == 0 && (whole_batch || prompts[-1] == prompt)) {
    int64_t whole = whole_batch ? 0 : tile;  // the first tile that lies within the group
    while (whole > 0 && in_group((whole - 1) * kTile)) --whole;
    for (int64_t k = tile - 1; k >= whole; --k) before.merge(tiles.whole[k]);
    for (int64_t j = whole * kTile - 1; j >= 0 && in_group(j); --j) before.merge(tiles.sums[j]);
  }
  RewardSums after;
  for (int k = t + 1; k < mine.end; ++k) after.merge(sums[k]);
  if (mine.end == kTile && (whole_batch || prompts[kTile] == prompt)) {
    int64_t whole = whole_batch ? tiles.tiles : tile + 1;  // one past the last such tile
    while (whole < tiles.tiles && in_group(min((whole + 1) * kTile, p.sequences) - 1)) ++whole;
    for (int64_t k = tile + 1; k < whole; ++k) after.merge(tiles.whole[k]);
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
  __shared__ int64_t prompts_storage[1 + kTile + 1];
  int64_t* prompts = prompts_storage + 1;  // the tile's, and its neighbours'; -1 where none is
  alignas(16) __shared__ unsigned char sums_storage[kTile * sizeof(RewardSums)];
  alignas(16) __shared__ unsigned char statistics_storage[kTile * sizeof(SampleStatistics)];
  __shared__ unsigned starts[kTile / kWarp];
  RewardSums* sums = reinterpret_cast<RewardSums*>(sums_storage);
  SampleStatistics* statistics = reinterpret_cast<SampleStatistics*>(statistics_storage);
  const int t = threadIdx.x;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTile + t;
  const bool exists = i < p.sequences;
  auto prompt_of = [&](int64_t j) { return 0 <= j && j < p.sequences ? p.prompt[j] : -1; };
  prompts[t] = prompt_of(i);
  if (t == 0) prompts[-1] = prompt_of(i - 1);
  if (t == kTile - 1) prompts[kTile] = prompt_of(i + 1);
  __syncthreads();

  Scope scope = Scope::kNothing;
  visit_baseline(p.baseline, [&](auto baseline) { scope = baseline.kScope; });
  const bool learns = scope == Scope::kEarlierBatches;
  const Span group = group_in_tile(scope == Scope::kBatch, prompts, starts);

  after_previous();
  let_next_begin();
  bool bad = false;
  for (int64_t k = t; k < tiles.tiles; k += kTile) bad |= tiles.bad[k] != 0;
  const SampleReward sample = tiles.samples[i];
  sums[t] = tiles.sums[i];
  if (__syncthreads_or(bad)) return refuse(p, i);

  Totals totals;
  SampleStatistics mine;
  if (exists) {
    RewardSums others;
    if (learns) others = {p.baseline_state[0], p.baseline_state[1]};
    if (scope == Scope::kBatch || scope == Scope::kPrompt) {
      others = others_of(p, tiles, scope == Scope::kBatch, group, prompts, sums, t);
    }
    double value = 0;
    visit_baseline(p.baseline, [&](auto baseline) { value = baseline.value(others); });
    p.weights[i] = sample.weight(value);
    mine = SampleStatistics(sample, value);
    totals.counts.add(mine);
    totals.sums.add(sample.ratio_reward, sample.ratio);
  }
  statistics[t] = mine;
  totals = block_merge(totals);  // and a barrier
  FdivTiles::Partial* out = tiles.partial + blockIdx.x;
  if (t == 0) {
    out->statistics.counts = totals.counts;
    out->sums = totals.sums;
  }
  take_wholes(kTile, PartIsSample{statistics}, &out->statistics);
  if (!last_to_arrive(tiles.arrived, gridDim.x)) return;

  totals = {};
  for (int64_t k = t; k < tiles.tiles; k += kTile) {
    totals.merge({tiles.partial[k].statistics.counts, tiles.partial[k].sums});
  }
  totals = block_merge(totals);
  alignas(16) __shared__ unsigned char whole_storage[sizeof(BatchStatistics)];
  BatchStatistics* whole = reinterpret_cast<BatchStatistics*>(whole_storage);
  take_wholes(tiles.tiles, PartIsTile{tiles.partial}, whole);
  if (t == 0) whole->counts = totals.counts;
  __syncthreads();
  // Each divides, and a warp would do one after the other; so the warps share them.
#pragma unroll 1
  for (int k = t / kWarp; k < kStatistics; k += kTile / kWarp) {
    if (t % kWarp == 0) p.statistics[k] = whole->value(k);
  }
  if (t == 0 && learns) {
    const int64_t used = p.sequences - totals.counts.skipped;
    update_moving_average(p.baseline_state, totals.sums, used, p.baseline_param);
  }
}

}  // namespace
}  // namespace fdpg::cuda
