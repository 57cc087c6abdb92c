// statistics.h: what fdiv_weights reports of a batch, in this order. THE list: kernels write by
// these names, Python reads them from the compiled module.
#pragma once

#include <cstdint>

namespace fdpg {

#define FDPG_STATISTICS(X)                                                                 \
  X(n_used)        /* samples with log pi > -inf whose prompt has log Z > -inf */          \
  X(n_skipped)     /* the others: weight 0 */                                              \
  X(n_off_support) /* used samples with P(x) = 0 */                                        \
  X(reward_mean)   /* of the pseudo-reward -f'(pi/p), after clipping, over used samples */ \
  X(reward_std)                                                                            \
  X(baseline_mean)                                                                         \
  X(advantage_std) /* of reward - baseline */                                              \
  X(weight_abs_max)                                                                        \
  X(ratio_mean) /* of pi/q before truncation; 1 when on policy */                          \
  X(ratio_max)                                                                             \
  X(ratio_ess) /* (sum ratio)^2 / sum ratio^2 */                                           \
  X(n_ratio_clipped)                                                                       \
  X(n_reward_clipped)                                                                      \
  X(target_ess)    /* (sum p/q)^2 / sum (p/q)^2: how many samples speak for the target */  \
  X(divergence)    /* mean of fdiv_terms: estimate of D_f(pi || p) */                      \
  X(divergence_se) /* its standard error */

enum Statistic : int32_t {
#define FDPG_STATISTIC_ID(name) k_##name,
  FDPG_STATISTICS(FDPG_STATISTIC_ID)
#undef FDPG_STATISTIC_ID
      kStatistics
};

}  // namespace fdpg
