// fdiv_terms.cuh: each sample's term of the estimate of D_f(pi || p), one thread per sample. The
// formula is fdpg/fdiv_weights.h's.
//   bytes:  40 B read, 8 B written
//   floor:  a launch
#pragma once

#include "device.cuh"
//
#include "fdpg/fdiv_weights.h"

namespace fdpg::cuda {
namespace {

constexpr int kTermThreads = 128;

__global__ void __launch_bounds__(kTermThreads) state_terms(FdivTermsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.sequences) return;
  const int64_t g = p.prompt[i];
  const double log_z = 0 <= g && g < p.prompts ? p.log_z[g] : -INFINITY;
  p.out[i] = NAN;
  if (log_z == -INFINITY) return;
  visit_divergence<double>(p.divergence, p.divergence_param, [&](const auto& divergence) {
    p.out[i] = fdiv_term(divergence, p.log_pi[i], p.log_q[i], p.log_score[i] - log_z);
  });
}

}  // namespace
}  // namespace fdpg::cuda
