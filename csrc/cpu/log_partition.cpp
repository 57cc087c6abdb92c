// log_partition: the running importance-sampling estimate of Z per prompt, in log space.
// Samples are added one after the other, so a batch in two parts gives the same bits as in one.
#include "fdpg/cpu.h"
#include "fdpg/divergence.h"  // log_add_exp

namespace fdpg::cpu {

int64_t log_partition(const LogPartitionParams& p) {
  // First all checks: a state that outlives the step must not be left half updated.
  for (int64_t b = 0; b < p.sequences; ++b) {
    if (p.prompt[b] < 0 || p.prompt[b] >= p.prompts) return b;
  }
  for (int64_t b = 0; b < p.sequences; ++b) {
    double* state = p.state + 3 * p.prompt[b];
    state[0] = log_add_exp(state[0], p.log_weight[b]);
    state[1] = log_add_exp(state[1], 2.0 * p.log_weight[b]);
    state[2] += 1.0;
  }
  return kOk;
}

}  // namespace fdpg::cpu
