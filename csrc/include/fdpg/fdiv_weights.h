// fdiv_weights.h: what fdiv_weights and fdiv_terms compute of one sample, and how the statistics of
// a batch add up. The walk over the samples is the device's: cpu/fdiv_weights.cpp walks in order,
// cuda/fdiv_weights.cuh merges partial sums in a fixed order.
//
// Everything that is a product of probabilities is multiplied as a sum of logarithms first.
#pragma once

#include <cmath>
#include <cstdint>

#include "fdpg/baseline.h"
#include "fdpg/divergence.h"
#include "fdpg/params.h"
#include "fdpg/statistics.h"
#include "fdpg/types.h"  // FDPG_HOST_DEVICE

namespace fdpg {

// One sample's term of the importance-sampling estimate of D_f(pi || p) under q:
//   (p/q) f~(t) on the support, (pi/q) f~'(inf) off it,   f~(t) = f(t) - f'(1) (t - 1) >= 0
// `log_p` is normalised; -inf off the support.
template <class Divergence>
FDPG_HOST_DEVICE inline double fdiv_term(const Divergence& divergence, double log_pi, double log_q,
                                         double log_p) {
  const double slope = divergence.f_prime(0.0, 0.0);  // f'(1)
  if (log_p == -INFINITY) {
    if (log_pi == -INFINITY) return 0.0;
    return std::exp(log_pi - log_q) * (divergence.f_prime_inf() - slope);
  }
  const double log_target_ratio = log_p - log_q;
  if (log_pi == -INFINITY) return std::exp(log_target_ratio) * (divergence.f_zero() + slope);
  // Ratios beyond double are divided out until the end, else inf - inf would make NaN of inf.
  const double log_t = log_pi - log_p;
  const double log_ratio = log_pi - log_q;
  const double log_largest = log_ratio > log_target_ratio ? log_ratio : log_target_ratio;
  const double excess = log_largest > 0.0 ? log_largest : 0.0;
  const double log_s = log_target_ratio - excess;
  const double term = divergence.f(log_t, log_s) - slope * scaled_expm1(log_t, log_s);
  return term <= 0.0 ? 0.0 : term * std::exp(excess);  // below 0 by rounding; NaN stays NaN
}

// What fdiv_weights knows of one sample before it knows the others.
struct SampleReward {
  bool used = false;  // log Z > -inf and pi(x) > 0; all else is meaningless where false
  bool on_support = false;
  bool ratio_clipped = false;
  bool reward_clipped = false;
  double log_ratio = 0.0;         // log pi/q before truncation
  double log_target_ratio = 0.0;  // log p/q
  double ratio = 0.0;             // pi/q, truncated
  double reward = 0.0;            // -f'(t), clipped
  double ratio_reward = 0.0;      // their product, multiplied in log space
  double term = 0.0;              // fdiv_term

  // weight_i, given the baseline
  FDPG_HOST_DEVICE double weight(double baseline) const {
    return used ? ratio_reward - ratio * baseline : 0.0;
  }
};

template <class Divergence>
FDPG_HOST_DEVICE inline SampleReward sample_reward(const FdivWeightsParams& p,
                                                   const Divergence& divergence, int64_t i) {
  SampleReward s;
  const double log_z = p.log_z[p.prompt[i]];
  const double log_pi = p.log_pi[i], log_q = p.log_q[i], log_score = p.log_score[i];
  // A policy that cannot produce x has no gradient there; what is left of it is 0 * inf.
  s.used = log_z != -INFINITY && log_pi != -INFINITY;
  if (!s.used) return s;

  const double log_p = log_score - log_z;
  s.on_support = log_p != -INFINITY;
  s.log_ratio = log_pi - log_q;
  s.log_target_ratio = log_p - log_q;
  s.ratio_clipped = std::exp(s.log_ratio) > p.ratio_clip;
  const double log_ratio = s.ratio_clipped ? std::log(p.ratio_clip) : s.log_ratio;
  s.ratio = std::exp(log_ratio);

  if (s.on_support) {
    const double log_t = log_pi - log_p;
    s.reward = -divergence.f_prime(log_t, 0.0);
    s.ratio_reward = -divergence.f_prime(log_t, log_ratio);
  } else {
    s.reward = -divergence.f_prime_inf();
    s.ratio_reward = s.ratio * s.reward;
  }
  s.reward_clipped = std::fabs(s.reward) > p.reward_clip;
  if (s.reward_clipped) {
    s.reward = std::copysign(p.reward_clip, s.reward);
    s.ratio_reward = s.ratio * s.reward;
  }
  s.term = fdiv_term(divergence, log_pi, log_q, log_p);
  return s;
}

// -------------------------------------------------------------------------------------------------
// Statistics of a batch. A CPU add()s its samples one after the other; a GPU has them all at once,
// and from a part of it, and from all parts, takes totals first and then what is relative to them.

// Mean and variance (Welford 1962; of parts: Chan, Golub, LeVeque 1979).
struct Moments {
  double n = 0.0;
  double sum = 0.0;     // beside `centre`, so that the mean of an infinite sample is infinite
  double centre = 0.0;  // the mean
  double square = 0.0;  // sum of squared distances from it

  FDPG_HOST_DEVICE static Moments of(double x) { return {1.0, x, x, 0.0}; }

  FDPG_HOST_DEVICE void add(double x) {
    n += 1.0;
    sum += x;
    const double distance = x - centre;
    centre += distance / n;
    square += distance * (x - centre);
  }
  // Sum of squared distances from the mean of a whole that this is a part of.
  FDPG_HOST_DEVICE double square_about(double mean_of_whole) const {
    if (n == 0.0) return 0.0;
    const double distance = centre - mean_of_whole;
    return square + n * (distance * distance);
  }
  FDPG_HOST_DEVICE double mean() const { return n > 0.0 ? sum / n : 0.0; }
  // Standard deviation with n - 1; 0 for fewer than two.
  FDPG_HOST_DEVICE double deviation() const {
    return n > 1.0 ? std::sqrt(square / (n - 1.0)) : 0.0;
  }
  FDPG_HOST_DEVICE double standard_error() const {
    return n > 0.0 ? deviation() / std::sqrt(n) : 0.0;
  }
};

// (sum w)^2 / sum w^2 of weights given as logarithms, relative to the largest so far.
struct EffectiveSize {
  double largest = -INFINITY;
  double sum = 0.0;      // of w / exp(largest)
  double squares = 0.0;  // of its square

  FDPG_HOST_DEVICE static EffectiveSize of(double log_w) {
    if (log_w == -INFINITY) return {};
    return {log_w, 1.0, 1.0};
  }

  FDPG_HOST_DEVICE void add(double log_w) { merge(of(log_w)); }
  FDPG_HOST_DEVICE void merge(const EffectiveSize& later) {
    if (later.largest == -INFINITY) return;
    const bool grows = !(later.largest <= largest);  // also when it is NaN, which stays
    const double below = grows ? largest - later.largest : later.largest - largest;
    const double scale = largest == later.largest ? 1.0 : std::exp(below);  // both infinite, say
    const EffectiveSize& low = grows ? *this : later;
    const EffectiveSize& high = grows ? later : *this;
    const EffectiveSize both = {high.largest, high.sum + scale * low.sum,
                                high.squares + scale * scale * low.squares};
    *this = both;
  }
  // What its sums are to be multiplied with (and by the square of it) in a whole of that largest.
  FDPG_HOST_DEVICE double scale_in(double largest_of_whole) const {
    if (largest == -INFINITY) return 0.0;
    return largest == largest_of_whole ? 1.0 : std::exp(largest - largest_of_whole);
  }
  FDPG_HOST_DEVICE double value() const { return sum > 0.0 ? sum * sum / squares : 0.0; }
};

// The larger, and NaN if either is NaN.
FDPG_HOST_DEVICE inline double larger(double a, double b) { return b <= a || a != a ? a : b; }

// What one sample adds to the statistics.
struct SampleStatistics {
  bool used = false, off_support = false, ratio_clipped = false, reward_clipped = false;
  double reward = 0.0, baseline = 0.0, advantage = 0.0, term = 0.0;
  double ratio = 0.0;  // before truncation
  double log_ratio = -INFINITY, log_target_ratio = -INFINITY;
  double weight_abs = 0.0;

  SampleStatistics() = default;
  FDPG_HOST_DEVICE SampleStatistics(const SampleReward& s, double sample_baseline) {
    used = s.used;
    if (!used) return;
    off_support = !s.on_support;
    ratio_clipped = s.ratio_clipped;
    reward_clipped = s.reward_clipped;
    reward = s.reward;
    baseline = sample_baseline;
    advantage = s.reward - sample_baseline;
    term = s.term;
    ratio = std::exp(s.log_ratio);
    log_ratio = s.log_ratio;
    log_target_ratio = s.log_target_ratio;
    weight_abs = std::fabs(s.weight(sample_baseline));
  }
};

struct Counts {
  int64_t skipped = 0, off_support = 0, ratio_clipped = 0, reward_clipped = 0;
  double weight_abs_max = 0.0, ratio_max = 0.0;

  FDPG_HOST_DEVICE void add(const SampleStatistics& s) {
    skipped += !s.used;
    off_support += s.off_support;
    ratio_clipped += s.ratio_clipped;
    reward_clipped += s.reward_clipped;
    weight_abs_max = larger(weight_abs_max, s.weight_abs);
    ratio_max = larger(ratio_max, s.ratio);
  }
  FDPG_HOST_DEVICE void merge(const Counts& later) {
    skipped += later.skipped;
    off_support += later.off_support;
    ratio_clipped += later.ratio_clipped;
    reward_clipped += later.reward_clipped;
    weight_abs_max = larger(weight_abs_max, later.weight_abs_max);
    ratio_max = larger(ratio_max, later.ratio_max);
  }
};

// All that statistics.h asks for.
struct BatchStatistics {
  Counts counts;
  Moments reward, baseline, advantage, ratio, term;
  EffectiveSize ratio_size, target_size;

  // Calls fn(statistic, what a used sample adds to it) for each, with pointers to members.
  template <class Fn>
  FDPG_HOST_DEVICE static void each(Fn&& fn) {
    fn(&BatchStatistics::reward, &SampleStatistics::reward);
    fn(&BatchStatistics::baseline, &SampleStatistics::baseline);
    fn(&BatchStatistics::advantage, &SampleStatistics::advantage);
    fn(&BatchStatistics::ratio, &SampleStatistics::ratio);
    fn(&BatchStatistics::term, &SampleStatistics::term);
    fn(&BatchStatistics::ratio_size, &SampleStatistics::log_ratio);
    fn(&BatchStatistics::target_size, &SampleStatistics::log_target_ratio);
  }

  FDPG_HOST_DEVICE void add(const SampleStatistics& s) {
    counts.add(s);
    if (!s.used) return;
    each([&](auto statistic, auto value) { (this->*statistic).add(s.*value); });
  }

  // Statistic k of statistics.h; 0 of a batch without a used sample.
  FDPG_HOST_DEVICE double value(int32_t k) const {
    switch (static_cast<Statistic>(k)) {
      case k_n_used:
        return reward.n;
      case k_n_skipped:
        return static_cast<double>(counts.skipped);
      case k_n_off_support:
        return static_cast<double>(counts.off_support);
      case k_reward_mean:
        return reward.mean();
      case k_reward_std:
        return reward.deviation();
      case k_baseline_mean:
        return baseline.mean();
      case k_advantage_std:
        return advantage.deviation();
      case k_weight_abs_max:
        return counts.weight_abs_max;
      case k_ratio_mean:
        return ratio.mean();
      case k_ratio_max:
        return counts.ratio_max;
      case k_ratio_ess:
        return ratio_size.value();
      case k_n_ratio_clipped:
        return static_cast<double>(counts.ratio_clipped);
      case k_n_reward_clipped:
        return static_cast<double>(counts.reward_clipped);
      case k_target_ess:
        return target_size.value();
      case k_divergence:
        return term.mean();
      case k_divergence_se:
        return term.standard_error();
      case kStatistics:
        break;
    }
    return NAN;
  }
};

}  // namespace fdpg
