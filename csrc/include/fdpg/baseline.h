// baseline.h: every baseline, once.
//
// A baseline b_i is subtracted from the reward of sample i to make the gradient less noisy:
//   weight_i = ratio_i (r_i - b_i),   ratio = pi / q
// It leaves the expected gradient as it is when b_i does not depend on x_i, because
// E_q[ratio grad log pi] = 0. That holds off policy only if the baseline too is under the ratio,
// as here (f-DPG, arXiv 2302.08215, Fact 1). A plain mean of the batch, which includes r_i, shrinks
// the gradient by (1 - 1/B); so the means below leave sample i out.
//
// Those that learn from samples estimate E_pi[r] by sum ratio_j r_j / sum ratio_j over other
// samples j. A baseline says which others (its scope) and what it makes of the two sums; who walks
// over the samples need not know more. To add one: a struct, and one line in the list at the foot.
#pragma once

#include <cmath>
#include <cstdint>

#include "fdpg/divergence.h"  // DivergenceId
#include "fdpg/types.h"       // FDPG_HOST_DEVICE

namespace fdpg {

// sum ratio_j r_j and sum ratio_j over some samples.
struct RewardSums {
  double ratio_reward = 0.0;
  double ratio = 0.0;

  FDPG_HOST_DEVICE void add(double sample_ratio_reward, double sample_ratio) {
    ratio_reward += sample_ratio_reward;
    ratio += sample_ratio;
  }
  FDPG_HOST_DEVICE void merge(const RewardSums& later) {
    ratio_reward += later.ratio_reward;
    ratio += later.ratio;
  }
  // 0 where there is nothing to learn from: a group of one, a first batch.
  FDPG_HOST_DEVICE double mean() const { return ratio > 0.0 ? ratio_reward / ratio : 0.0; }
};

// Which samples a baseline's sums run over; always without sample i itself.
enum class Scope : int32_t {
  kNothing,         // the sums are empty
  kPrompt,          // the other samples of the same prompt
  kBatch,           // the other samples of the batch
  kEarlierBatches,  // the moving average in `baseline_state`, updated after use
};

// -------------------------------------------------------------------------------------------------
// The baselines.

struct NoBaseline {
  static constexpr Scope kScope = Scope::kNothing;
  FDPG_HOST_DEVICE static double value(const RewardSums&) { return 0.0; }
};

struct MeanBaseline {
  static constexpr Scope kScope = Scope::kBatch;
  FDPG_HOST_DEVICE static double value(const RewardSums& others) { return others.mean(); }
};

struct LooBaseline {
  static constexpr Scope kScope = Scope::kPrompt;
  FDPG_HOST_DEVICE static double value(const RewardSums& others) { return others.mean(); }
};

struct EmaBaseline {
  static constexpr Scope kScope = Scope::kEarlierBatches;
  FDPG_HOST_DEVICE static double value(const RewardSums& earlier) { return earlier.mean(); }
};

// For kl, E_pi[r] = E_pi[p / pi] = 1 exactly.
struct AnalyticBaseline {
  static constexpr Scope kScope = Scope::kNothing;
  FDPG_HOST_DEVICE static double value(const RewardSums&) { return 1.0; }
};

// Moves `state`, the (2,) sums of the moving average, by one batch: its `sums` over `n` samples.
// The state starts at (0, 0); both parts decay alike, so their quotient is corrected for the start.
// A batch that is not finite is left out: it would stay in the average for ever.
FDPG_HOST_DEVICE inline void update_moving_average(double* state, RewardSums sums, int64_t n,
                                                   double decay) {
  if (n == 0 || !std::isfinite(sums.ratio_reward) || !std::isfinite(sums.ratio)) return;
  const double share = (1.0 - decay) / static_cast<double>(n);
  state[0] = decay * state[0] + share * sums.ratio_reward;
  state[1] = decay * state[1] + share * sums.ratio;
}

// -------------------------------------------------------------------------------------------------
// THE list: name, struct, takes a parameter, its default, and the open interval it must lie in;
// one line of meaning. The order gives the ids.

#define FDPG_BASELINES(X)                                                                         \
  X(none, NoBaseline, false, 0, 0, 0, "no baseline: the noisiest gradient")                       \
  X(mean, MeanBaseline, false, 0, 0, 0, "mean reward of the other samples of the batch")          \
  X(loo, LooBaseline, false, 0, 0, 0, "leave-one-out: mean reward of the prompt's other samples") \
  X(ema, EmaBaseline, true, 0.99, 0, 1, "moving average of the mean reward of earlier batches")   \
  X(analytic, AnalyticBaseline, false, 0, 0, 0, "the exact mean reward, which is 1; only with kl")

enum class BaselineId : int32_t {
#define FDPG_BASELINE_ID(name, ...) name,
  FDPG_BASELINES(FDPG_BASELINE_ID)
#undef FDPG_BASELINE_ID
      count
};
inline constexpr int32_t kBaselines = static_cast<int32_t>(BaselineId::count);

struct BaselineInfo {
  const char* name;
  bool takes_param;
  double default_param;
  double low, high;  // low < param < high, where there is one
  Scope scope;
  const char* meaning;
};

inline constexpr BaselineInfo kBaselineInfo[kBaselines] = {
#define FDPG_BASELINE_INFO(name, Type, takes_param, fallback, low, high, meaning) \
  {#name, takes_param, fallback, low, high, Type::kScope, meaning},
    FDPG_BASELINES(FDPG_BASELINE_INFO)
#undef FDPG_BASELINE_INFO
};

// Is (id, param) a baseline that leaves the gradient of `divergence` unbiased?
inline bool valid_baseline(int32_t id, double param, int32_t divergence) {
  if (id < 0 || id >= kBaselines) return false;
  const BaselineInfo& info = kBaselineInfo[id];
  const bool is_kl = divergence == static_cast<int32_t>(DivergenceId::kl);
  if (id == static_cast<int32_t>(BaselineId::analytic) && !is_kl) return false;
  return !info.takes_param || (info.low < param && param < info.high);
}

// Calls fn(baseline) with the struct of `id`; false if there is none.
FDPG_ANY_CALLABLE
template <class Fn>
FDPG_HOST_DEVICE inline bool visit_baseline(int32_t id, Fn&& fn) {
  switch (static_cast<BaselineId>(id)) {
#define FDPG_VISIT(name, Type, ...) \
  case BaselineId::name:            \
    fn(Type());                     \
    return true;
    FDPG_BASELINES(FDPG_VISIT)
#undef FDPG_VISIT
    default:
      return false;
  }
}

}  // namespace fdpg
