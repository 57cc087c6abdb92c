// The running estimate of Z: hand-worked sums, extreme weights, and indifference to splitting.
#include <algorithm>
#include <vector>

#include "check.h"
#include "fdpg/cpu.h"

using namespace fdpg;

namespace {

struct State {
  std::vector<double> rows;

  explicit State(int64_t prompts) {
    for (int64_t g = 0; g < prompts; ++g) rows.insert(rows.end(), {-INFINITY, -INFINITY, 0.0});
  }
  int64_t add(const std::vector<double>& log_weight, const std::vector<int64_t>& prompt) {
    LogPartitionParams p{};
    p.log_weight = log_weight.data();
    p.prompt = prompt.data();
    p.sequences = static_cast<int64_t>(prompt.size());
    p.prompts = static_cast<int64_t>(rows.size()) / 3;
    p.state = rows.data();
    return cpu::log_partition(p);
  }
};

void test_sums_by_hand() {
  State state(3);
  // Prompt 0: weights 1, 2, 0. Prompt 2: weight 3. Prompt 1 gets nothing; order does not matter.
  const double zero = -INFINITY;
  CHECK(state.add({0.0, std::log(3.0), std::log(2.0), zero}, {0, 2, 0, 0}) == kOk);
  CHECK_NEAR(state.rows[0], std::log(3.0), 1e-15);
  CHECK_NEAR(state.rows[1], std::log(5.0), 1e-15);
  CHECK(state.rows[2] == 3.0);
  CHECK(state.rows[3] == -INFINITY && state.rows[4] == -INFINITY && state.rows[5] == 0.0);
  CHECK_NEAR(state.rows[6], std::log(3.0), 1e-15);
  CHECK_NEAR(state.rows[7], std::log(9.0), 1e-15);
  CHECK(state.rows[8] == 1.0);
}

void test_weights_beyond_double() {
  State state(1);
  CHECK(state.add({-2000.0, -2000.0, -3000.0}, {0, 0, 0}) == kOk);
  CHECK_NEAR(state.rows[0], -2000.0 + std::log(2.0), 1e-12);
  CHECK(state.add({2000.0}, {0}) == kOk);
  CHECK_NEAR(state.rows[0], 2000.0, 1e-12);
  CHECK_NEAR(state.rows[1], 4000.0, 1e-12);
  CHECK(state.rows[2] == 4.0);
}

void test_all_zero_weights_still_count() {
  State state(1);
  CHECK(state.add({-INFINITY, -INFINITY}, {0, 0}) == kOk);
  CHECK(state.rows[0] == -INFINITY && state.rows[1] == -INFINITY && state.rows[2] == 2.0);
}

void test_splitting_changes_no_bit() {
  std::vector<double> log_weight;
  std::vector<int64_t> prompt;
  for (int i = 0; i < 1000; ++i) {
    log_weight.push_back(30.0 * std::sin(1.7 * i));
    prompt.push_back(i % 7);
  }
  State whole(7), parts(7);
  CHECK(whole.add(log_weight, prompt) == kOk);
  for (size_t begin = 0; begin < prompt.size(); begin += 111) {
    const size_t end = std::min(begin + 111, prompt.size());
    parts.add({log_weight.begin() + begin, log_weight.begin() + end},
              {prompt.begin() + begin, prompt.begin() + end});
  }
  CHECK(whole.rows == parts.rows);
}

void test_a_bad_prompt_leaves_the_state_alone() {
  State state(2);
  const std::vector<double> before = state.rows;
  CHECK(state.add({0.0, 0.0, 0.0}, {0, 2, 1}) == 1);
  CHECK(state.add({0.0, 0.0, 0.0}, {0, 1, -1}) == 2);
  CHECK(state.rows == before);
  CHECK(state.add({}, {}) == kOk);
  CHECK(state.rows == before);
}

}  // namespace

int main() {
  test_sums_by_hand();
  test_weights_beyond_double();
  test_all_zero_weights_still_count();
  test_splitting_changes_no_bit();
  test_a_bad_prompt_leaves_the_state_alone();
  return test_result();
}
