// log_partition on CUDA: the CPU's numbers, over several updates.
#include <cmath>
#include <random>
#include <vector>

#include "fdpg/cpu.h"
#include "harness.h"
//
#include "log_partition.cu"  // its launcher and kernel, built for the emulator or for the device

using namespace fdpg;

namespace {

std::vector<double> fresh(int64_t prompts) {
  std::vector<double> state;
  for (int64_t g = 0; g < prompts; ++g) state.insert(state.end(), {-INFINITY, -INFINITY, 0.0});
  return state;
}

// Prompts in no order, weights far apart, some of them zero, at least one prompt without any.
// `together`: samples of a prompt side by side, as far as chance does not make it more.
void agrees_with_cpu(int64_t sequences, int64_t prompts, int64_t together = 1) {
  Buffer<double> expected(fresh(prompts)), log_weight(sequences);
  Buffer<int64_t> prompt(sequences);
  std::vector<double> first;
  for_each_schedule([&](int schedule) {
    std::mt19937 random(5);
    std::normal_distribution<double> normal(-200, 20);
    Buffer<double> got(fresh(prompts));
    for (int update = 0; update < 3; ++update) {
      for (int64_t i = 0; i < sequences; ++i) {
        log_weight[i] = i % 4 == 1 ? -INFINITY : normal(random);
        if (i % together > 0) {
          prompt[i] = prompt[i - 1];
        } else {
          prompt[i] = prompts == 1 ? 0 : static_cast<int64_t>(random() % (prompts - 1));
        }
      }
      LogPartitionParams p{log_weight.data(), prompt.data(), sequences, prompts, got.data()};
      run_on_device([&] { return cuda::log_partition(p, nullptr); });
      if (schedule > 0) continue;
      p.state = expected.data();
      CHECK(cpu::log_partition(p) == kOk);
      for (int64_t k = 0; k < 3 * prompts; ++k) CHECK_NEAR(got[k], expected[k], 1e-12 * 400);
    }
    if (schedule == 0) first.assign(got.data(), got.data() + 3 * prompts);
    CHECK(same_bits(got, first));
  });
}

// Prompts with a weight that is infinite, two of them, and NaN; one with nothing but zeros.
void not_finite() {
  constexpr double kNaN = NAN;
  Buffer<double> log_weight(std::vector<double>{1, INFINITY, 2, INFINITY, 3, INFINITY, kNaN,
                                                INFINITY, kNaN, -5, -INFINITY, -INFINITY});
  Buffer<int64_t> prompt(std::vector<int64_t>{0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4});
  Buffer<double> got(fresh(5)), expected(fresh(5));
  LogPartitionParams p{log_weight.data(), prompt.data(), 12, 5, got.data()};
  run_on_device([&] { return cuda::log_partition(p, nullptr); });
  p.state = expected.data();
  CHECK(cpu::log_partition(p) == kOk);
  for (int k = 0; k < 15; ++k) CHECK_NEAR(got[k], expected[k], 1e-12);
}

// Two infinite weights that are one thread's, neighbours', or several warps' apart.
void two_infinities() {
  for (const int64_t apart : {1, 32, 256, 300, 512}) {
    std::vector<double> weights(600, 0.5);
    weights[7] = weights[7 + apart] = INFINITY;
    Buffer<double> log_weight(weights), got(fresh(1)), expected(fresh(1));
    Buffer<int64_t> prompt(std::vector<int64_t>(600, 0));
    LogPartitionParams p{log_weight.data(), prompt.data(), 600, 1, got.data()};
    run_on_device([&] { return cuda::log_partition(p, nullptr); });
    p.state = expected.data();
    CHECK(cpu::log_partition(p) == kOk);
    CHECK(got[0] == INFINITY && got[1] == INFINITY && got[2] == 600);
    for (int k = 0; k < 3; ++k) CHECK(got[k] == expected[k]);
  }
}

// Of fewer prompts than samples, and of more.
void a_prompt_that_does_not_exist(int64_t prompts) {
  for (const std::vector<int64_t>& ids :
       {std::vector<int64_t>{0, prompts, 1}, {-1, 0, 1}, {1, 1, prompts}, {prompts, prompts, -1}}) {
    Buffer<double> state(fresh(prompts)), log_weight(std::vector<double>{0, 0, 0});
    Buffer<int64_t> prompt(ids);
    const LogPartitionParams p{log_weight.data(), prompt.data(), 3, prompts, state.data()};
    for_each_schedule([&](int) {
      run_on_device([&] { return cuda::log_partition(p, nullptr); });
      for (int64_t k = 0; k < 3 * prompts; ++k) CHECK(std::isnan(state[k]));
    });
  }
}

}  // namespace

int main() {
  return run_tests([] {
    agrees_with_cpu(0, 2);
    agrees_with_cpu(1, 1);
    agrees_with_cpu(300, 1);
    agrees_with_cpu(70, 9);
    agrees_with_cpu(8200, 3);  // ids beyond two rounds of a block's
    // More prompts than samples, which mostly stand beside others of theirs.
    agrees_with_cpu(40, 41);
    agrees_with_cpu(150, 200, 1);
    agrees_with_cpu(150, 200, 7);
    not_finite();
    two_infinities();
    for (const int64_t prompts : {2, 200}) a_prompt_that_does_not_exist(prompts);
  });
}
