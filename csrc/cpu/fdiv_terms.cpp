// fdiv_terms: each sample's term of the estimate of D_f(pi || p). The formula is fdiv_weights.h's.
#include <limits>

#include "fdpg/cpu.h"
#include "fdpg/fdiv_weights.h"

namespace fdpg::cpu {

int64_t fdiv_terms(const FdivTermsParams& p, int64_t begin, int64_t end) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  int64_t offender = kOk;
  visit_divergence<double>(p.divergence, p.divergence_param, [&](const auto& divergence) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t g = p.prompt[b];
      const bool in_range = 0 <= g && g < p.prompts;
      if (!in_range && offender == kOk) offender = b;
      const double log_z = in_range ? p.log_z[g] : -INFINITY;
      p.out[b] = log_z == -INFINITY
                     ? kNaN
                     : fdiv_term(divergence, p.log_pi[b], p.log_q[b], p.log_score[b] - log_z);
    }
  });
  return offender;
}

}  // namespace fdpg::cpu
