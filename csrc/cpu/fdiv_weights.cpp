// fdiv_weights: rewards, baselines, importance ratios and the statistics of a batch, in one call.
// Two passes over the B samples, in order; 16 bytes of scratch per sample. The formulas are
// fdiv_weights.h's, shared with CUDA; the sums here leave a sample out by adding what is before it
// to what is after it. Subtracting it from the whole would cancel: one ratio of e^40 beside ratios
// of 1 leaves nothing of the others.
#include "fdpg/fdiv_weights.h"

#include <vector>

#include "fdpg/cpu.h"

namespace fdpg::cpu {
namespace {

// The first sample whose prompt is out of range or comes after a larger one.
int64_t first_bad_prompt(const FdivWeightsParams& p) {
  int64_t least = 0;
  for (int64_t i = 0; i < p.sequences; ++i) {
    if (p.prompt[i] < least || p.prompt[i] >= p.prompts) return i;
    least = p.prompt[i];
  }
  return kOk;
}

// others[i] = the sums over samples [begin, end) but i.
void leave_one_out(const std::vector<SampleReward>& samples, int64_t begin, int64_t end,
                   std::vector<RewardSums>& others) {
  RewardSums before;
  for (int64_t i = begin; i < end; ++i) {
    others[i] = before;
    before.add(samples[i].ratio_reward, samples[i].ratio);
  }
  RewardSums after;
  for (int64_t i = end - 1; i >= begin; --i) {
    others[i].merge(after);
    after.add(samples[i].ratio_reward, samples[i].ratio);
  }
}

template <class Divergence, class Baseline>
void weigh(const FdivWeightsParams& p, const Divergence& divergence, Baseline) {
  const int64_t B = p.sequences;
  std::vector<SampleReward> samples(B);
  for (int64_t i = 0; i < B; ++i) samples[i] = sample_reward(p, divergence, i);

  std::vector<RewardSums> sums(B);  // what the baseline of each sample is made of
  if constexpr (Baseline::kScope == Scope::kBatch) {
    leave_one_out(samples, 0, B, sums);
  } else if constexpr (Baseline::kScope == Scope::kPrompt) {
    for (int64_t begin = 0, end; begin < B; begin = end) {
      for (end = begin; end < B && p.prompt[end] == p.prompt[begin];) ++end;
      leave_one_out(samples, begin, end, sums);
    }
  } else if constexpr (Baseline::kScope == Scope::kEarlierBatches) {
    for (RewardSums& s : sums) s = {p.baseline_state[0], p.baseline_state[1]};
  }

  BatchStatistics statistics;
  RewardSums batch;
  for (int64_t i = 0; i < B; ++i) {
    const double baseline = Baseline::value(sums[i]);
    p.weights[i] = samples[i].weight(baseline);
    statistics.add(SampleStatistics(samples[i], baseline));
    batch.add(samples[i].ratio_reward, samples[i].ratio);
  }
  for (int32_t k = 0; k < kStatistics; ++k) p.statistics[k] = statistics.value(k);
  if constexpr (Baseline::kScope == Scope::kEarlierBatches) {
    update_moving_average(p.baseline_state, batch, B - statistics.counts.skipped, p.baseline_param);
  }
}

}  // namespace

int64_t fdiv_weights(const FdivWeightsParams& p) {
  const int64_t offender = first_bad_prompt(p);
  if (offender != kOk) return offender;
  visit_divergence<double>(p.divergence, p.divergence_param, [&](const auto& divergence) {
    visit_baseline(p.baseline, [&](auto baseline) { weigh(p, divergence, baseline); });
  });
  return kOk;
}

}  // namespace fdpg::cpu
