// fdiv_weights on CUDA: the same numbers as the CPU's for every divergence and baseline of the
// lists, bit for bit under every schedule.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "fdpg/baseline.h"
#include "fdpg/cpu.h"
#include "fdpg/divergence.h"
#include "fdpg/statistics.h"
#include "harness.h"
//
#include "fdiv_weights.cu"  // its launchers and kernels, built for the emulator or for the device

using namespace fdpg;

namespace {

bool infinite_off_support(int32_t divergence, double param) {
  bool infinite = false;
  visit_divergence<double>(divergence, param,
                           [&](const auto& d) { infinite = std::isinf(d.f_prime_inf()); });
  return infinite;
}

struct Batch {
  int64_t size;
  Buffer<double> log_pi, log_q, log_score, log_z;
  Buffer<int64_t> prompt;
  FdivWeightsParams params{};

  // Prompts of unequal size, some without a sample, one whose Z is still zero.
  Batch(int64_t size, int64_t prompts, unsigned seed)
      : size(size), log_pi(size), log_q(size), log_score(size), log_z(prompts), prompt(size) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t g = 0; g < prompts; ++g) log_z[g] = g % 7 == 5 ? -INFINITY : normal(random);
    for (int64_t i = 0; i < size; ++i) {
      log_pi[i] = -40 + 5 * normal(random);
      log_q[i] = i % 3 ? log_pi[i] : log_pi[i] + normal(random);
      log_score[i] = log_pi[i] + 3 * normal(random);
      prompt[i] = prompts == 1 ? 0 : static_cast<int64_t>(random() % prompts / 2 * 2);
    }
    std::sort(prompt.data(), prompt.data() + size);
    if (size > 5) log_pi[5] = -INFINITY;      // the policy has since lost this sample
    if (size > 8) log_q[8] = log_pi[8] - 30;  // one ratio outweighs the rest

    params.log_pi = log_pi.data();
    params.log_q = log_q.data();
    params.log_score = log_score.data();
    params.log_z = log_z.data();
    params.prompt = prompt.data();
    params.sequences = size;
    params.prompts = prompts;
    params.ratio_clip = INFINITY;
    params.reward_clip = INFINITY;
  }

  void put_off_support() {
    for (int64_t i = 0; i < size; i += 4) log_score[i] = -INFINITY;
  }
};

struct Results {
  Buffer<double> weights, statistics, state;
  explicit Results(int64_t size)
      : weights(size), statistics(kStatistics), state(std::vector<double>{0.3, 0.5}) {}

  FdivWeightsParams of(FdivWeightsParams p) {
    p.weights = weights.data();
    p.statistics = statistics.data();
    p.baseline_state = state.data();
    return p;
  }
};

void run(const FdivWeightsParams& p) {
  Buffer<double> workspace(static_cast<int64_t>(cuda::fdiv_weights_workspace(p) / 8));
  run_on_device([&] { return cuda::fdiv_weights(p, workspace.data(), nullptr); });
}

std::vector<double> values(const Buffer<double>& b) { return {&b[0], &b[0] + b.size()}; }

void check_against_cpu(const FdivWeightsParams& p) {
  Results cpu(p.sequences);
  CHECK(cpu::fdiv_weights(cpu.of(p)) == kOk);
  std::vector<double> weights, statistics;
  const int failures = g_failures;
  for_each_schedule([&](int schedule) {
    Results gpu(p.sequences);
    run(gpu.of(p));
    if (schedule > 0) {
      CHECK(same_bits(gpu.weights, weights) && same_bits(gpu.statistics, statistics));
      return;
    }
    weights = values(gpu.weights), statistics = values(gpu.statistics);
    double scale = 0;
    for (int64_t i = 0; i < p.sequences; ++i) scale = std::max(scale, std::fabs(cpu.weights[i]));
    for (int64_t i = 0; i < p.sequences; ++i) {
      CHECK_NEAR(gpu.weights[i], cpu.weights[i], 1e-12 * scale);
    }
    for (int32_t k = 0; k < kStatistics; ++k) {
      CHECK_NEAR(gpu.statistics[k], cpu.statistics[k], 1e-10 * (1 + std::fabs(cpu.statistics[k])));
    }
    for (int k = 0; k < 2; ++k) {
      CHECK_NEAR(gpu.state[k], cpu.state[k], 1e-12 * (1 + std::fabs(cpu.state[k])));
    }
  });
  if (g_failures > failures) {
    std::printf("  ... %s, %s, %lld samples, %lld prompts\n", kDivergenceInfo[p.divergence].name,
                kBaselineInfo[p.baseline].name, static_cast<long long>(p.sequences),
                static_cast<long long>(p.prompts));
  }
}

void every_divergence_and_baseline() {
  for (int32_t d = 0; d < kDivergences; ++d) {
    for (int32_t b = 0; b < kBaselines; ++b) {
      Batch batch(40, 6, 100 * d + b);
      FdivWeightsParams& p = batch.params;
      p.divergence = d;
      p.divergence_param = kDivergenceInfo[d].default_param;
      p.baseline = b;
      p.baseline_param = kBaselineInfo[b].default_param;
      if (!valid_baseline(b, p.baseline_param, d)) continue;
      if (!infinite_off_support(d, p.divergence_param)) batch.put_off_support();
      if (b % 2) p.ratio_clip = 1.5, p.reward_clip = 2.0;
      check_against_cpu(p);
    }
  }
}

// From nobody to several tiles, from one prompt to one sample each; groups that begin, end and lie
// within tiles.
void every_size() {
  for (const int32_t baseline :
       {static_cast<int32_t>(BaselineId::loo), static_cast<int32_t>(BaselineId::mean)}) {
    for (const int64_t size : {0, 1, 2, 33, 128, 129, 700}) {
      for (const int64_t prompts : {int64_t{1}, int64_t{4}, int64_t{10}, size + 3}) {
        Batch batch(size, prompts, 1);
        batch.params.divergence = static_cast<int32_t>(DivergenceId::js);
        batch.params.baseline = baseline;
        check_against_cpu(batch.params);
      }
    }
  }
}

// More tiles than lanes, and a group of many of them that begins one sample after a tile does and
// ends one before.
void many_tiles() {
  for (int32_t b = 0; b < kBaselines; ++b) {
    Batch batch(33 * 128 + 5, 6, 2);
    batch.params.divergence = static_cast<int32_t>(DivergenceId::kl);
    batch.params.baseline = b;
    batch.params.baseline_param = kBaselineInfo[b].default_param;
    for (int64_t i = 0; i < batch.size; ++i) {
      batch.prompt[i] = i < 2 * 128 + 1 ? 0 : i < 31 * 128 - 1 ? 2 : 4;
    }
    check_against_cpu(batch.params);
  }
}

// A log-prob that is NaN reaches its group's weights and the statistics, and nothing else.
void not_a_number() {
  for (const BaselineId baseline : {BaselineId::none, BaselineId::loo, BaselineId::ema}) {
    Batch batch(300, 40, 4);
    batch.params.divergence = static_cast<int32_t>(DivergenceId::js);
    batch.params.baseline = static_cast<int32_t>(baseline);
    batch.params.baseline_param = 0.9;
    batch.log_score[140] = NAN;
    check_against_cpu(batch.params);
  }
}

// Samples out of order, or of a prompt that does not exist: NaN, and the moving average is kept.
void prompts_not_grouped() {
  for (const int64_t wrong : {int64_t{-1}, int64_t{1}, int64_t{100}}) {
    Batch batch(40, 6, 3);
    batch.params.baseline = static_cast<int32_t>(BaselineId::ema);
    batch.params.baseline_param = 0.9;
    batch.prompt[20] = 2;
    for (int64_t i = 21; i < 40; ++i) batch.prompt[i] = std::max<int64_t>(batch.prompt[i], 2);
    batch.prompt[25] = wrong;
    Results out(40);
    run(out.of(batch.params));
    for (int64_t i = 0; i < 40; ++i) CHECK(std::isnan(out.weights[i]));
    for (int32_t k = 0; k < kStatistics; ++k) CHECK(std::isnan(out.statistics[k]));
    CHECK(out.state[0] == 0.3 && out.state[1] == 0.5);
  }
}

}  // namespace

int main() {
  return run_tests([] {
    every_divergence_and_baseline();
    every_size();
    many_tiles();
    not_a_number();
    prompts_not_grouped();
  });
}
