// fdiv_terms on CUDA: the CPU's numbers for every divergence of the list.
#include <cmath>
#include <random>
#include <vector>

#include "fdpg/cpu.h"
#include "harness.h"
//
#include "fdiv_terms.cu"  // its launcher and kernel, built for the emulator or for the device

using namespace fdpg;

namespace {

void agrees_with_cpu(int32_t divergence) {
  constexpr int64_t kSamples = 150, kPrompts = 4;
  Buffer<double> log_pi(kSamples), log_q(kSamples), log_score(kSamples), log_z(kPrompts);
  Buffer<double> expected(kSamples), got(kSamples);
  Buffer<int64_t> prompt(kSamples);
  std::mt19937 random(static_cast<unsigned>(divergence));
  std::normal_distribution<double> normal;
  for (int64_t g = 0; g < kPrompts; ++g) log_z[g] = g == 2 ? -INFINITY : normal(random);
  for (int64_t i = 0; i < kSamples; ++i) {
    log_pi[i] = i % 11 == 3 ? -INFINITY : -30 + 4 * normal(random);
    log_q[i] = -30 + normal(random);
    log_score[i] = i % 7 == 2 ? -INFINITY : -30 + 4 * normal(random);
    prompt[i] = i % kPrompts;
  }
  prompt[5] = -1, prompt[9] = kPrompts;
  FdivTermsParams p{log_pi.data(),  log_q.data(),  log_score.data(),
                    log_z.data(),   prompt.data(), kSamples,
                    kPrompts,       divergence,    kDivergenceInfo[divergence].default_param,
                    expected.data()};
  CHECK(cpu::fdiv_terms(p, 0, kSamples) == 5);
  p.out = got.data();
  run_on_device([&] { return cuda::fdiv_terms(p, nullptr); });
  for (int64_t i = 0; i < kSamples; ++i) {
    CHECK_NEAR(got[i], expected[i], 1e-12 * (1 + std::fabs(expected[i])));
  }
}

}  // namespace

int main() {
  return run_tests([] {
    for (int32_t d = 0; d < kDivergences; ++d) agrees_with_cpu(d);
  });
}
