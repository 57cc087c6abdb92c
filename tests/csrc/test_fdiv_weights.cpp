// fdiv_weights and fdiv_terms on batches small enough to work out by hand.
#include <algorithm>
#include <vector>

#include "check.h"
#include "fdpg/cpu.h"
#include "fdpg/fdiv_weights.h"

using namespace fdpg;

namespace {

constexpr double kInf = INFINITY;
const double kLog2 = std::log(2.0);

// A batch with the parameters a test does not care about filled in.
struct Batch {
  std::vector<double> log_pi, log_q, log_score;
  std::vector<int64_t> prompt;
  std::vector<double> log_z = {0.0};
  DivergenceId divergence = DivergenceId::kl;
  double divergence_param = 0.0;
  BaselineId baseline = BaselineId::none;
  double baseline_param = 0.0;
  std::vector<double> state = {0.0, 0.0};
  double ratio_clip = kInf, reward_clip = kInf;

  std::vector<double> weights = {}, statistics = {};

  int64_t run() {
    weights.assign(log_pi.size(), std::nan(""));
    statistics.assign(kStatistics, std::nan(""));
    FdivWeightsParams p{};
    p.log_pi = log_pi.data();
    p.log_q = log_q.data();
    p.log_score = log_score.data();
    p.log_z = log_z.data();
    p.prompt = prompt.data();
    p.sequences = static_cast<int64_t>(log_pi.size());
    p.prompts = static_cast<int64_t>(log_z.size());
    p.divergence = static_cast<int32_t>(divergence);
    p.divergence_param = divergence_param;
    p.baseline = static_cast<int32_t>(baseline);
    p.baseline_param = baseline_param;
    p.baseline_state = state.data();
    p.ratio_clip = ratio_clip;
    p.reward_clip = reward_clip;
    p.weights = weights.data();
    p.statistics = statistics.data();
    return cpu::fdiv_weights(p);
  }

  std::vector<double> terms() const {
    std::vector<double> out(log_pi.size());
    FdivTermsParams p{};
    p.log_pi = log_pi.data();
    p.log_q = log_q.data();
    p.log_score = log_score.data();
    p.log_z = log_z.data();
    p.prompt = prompt.data();
    p.sequences = static_cast<int64_t>(log_pi.size());
    p.prompts = static_cast<int64_t>(log_z.size());
    p.divergence = static_cast<int32_t>(divergence);
    p.divergence_param = divergence_param;
    p.out = out.data();
    CHECK(cpu::fdiv_terms(p, 0, p.sequences) == kOk);
    return out;
  }
};

void check_vector(const std::vector<double>& got, const std::vector<double>& expected) {
  CHECK(got.size() == expected.size());
  for (size_t i = 0; i < std::min(got.size(), expected.size()); ++i) {
    CHECK_NEAR(got[i], expected[i], 1e-14 * (1 + std::fabs(expected[i])));
  }
}

// Forward KL on policy: r = p / pi. Prompt 0: Z = 2, rewards 1/2, 1, 0. Prompt 1: reward 3.
Batch forward_kl() {
  return {.log_pi = {-1.0, -2.0, -3.0, -4.0},
          .log_q = {-1.0, -2.0, -3.0, -4.0},
          .log_score = {-1.0, -2.0 + kLog2, -kInf, -4.0 + std::log(3.0)},
          .prompt = {0, 0, 0, 1},
          .log_z = {kLog2, 0.0}};
}

void test_rewards_and_baselines_on_policy() {
  Batch b = forward_kl();
  CHECK(b.run() == kOk);
  check_vector(b.weights, {0.5, 1.0, 0.0, 3.0});
  b.baseline = BaselineId::mean;  // of the other three
  CHECK(b.run() == kOk);
  check_vector(b.weights, {0.5 - 4.0 / 3, 1.0 - 3.5 / 3, 0.0 - 4.5 / 3, 3.0 - 1.5 / 3});
  b.baseline = BaselineId::loo;  // of the others of the prompt; prompt 1 has none
  CHECK(b.run() == kOk);
  check_vector(b.weights, {0.5 - 0.5, 1.0 - 0.25, 0.0 - 0.75, 3.0});
  b.baseline = BaselineId::analytic;
  CHECK(b.run() == kOk);
  check_vector(b.weights, {-0.5, 0.0, -1.0, 2.0});
}

void test_statistics() {
  Batch b = forward_kl();
  b.baseline = BaselineId::loo;
  CHECK(b.run() == kOk);
  const std::vector<double>& s = b.statistics;
  CHECK(s[k_n_used] == 4 && s[k_n_skipped] == 0 && s[k_n_off_support] == 1);
  CHECK_NEAR(s[k_reward_mean], 4.5 / 4, 1e-15);
  // Rewards .5, 1, 0, 3: squared distances from 1.125 are .390625, .015625, 1.265625, 3.515625.
  CHECK_NEAR(s[k_reward_std], std::sqrt(5.1875 / 3), 1e-15);
  CHECK_NEAR(s[k_baseline_mean], 1.5 / 4, 1e-15);
  // Advantages 0, .75, -.75, 3: mean .75, squared distances .5625, 0, 2.25, 5.0625.
  CHECK_NEAR(s[k_advantage_std], std::sqrt(7.875 / 3), 1e-15);
  CHECK_NEAR(s[k_weight_abs_max], 3.0, 1e-15);
  CHECK(s[k_ratio_mean] == 1.0 && s[k_ratio_max] == 1.0 && s[k_ratio_ess] == 4.0);
  CHECK(s[k_n_ratio_clipped] == 0 && s[k_n_reward_clipped] == 0);
  CHECK_NEAR(s[k_target_ess], 4.5 * 4.5 / (0.25 + 1 + 9), 1e-14);
  // Terms p/q (-log t + t - 1): t = 2, 1, inf, 1/3 with p/q = .5, 1, 0, 3; off the support pi/q.
  const std::vector<double> terms = {0.5 * (1 - kLog2), 0.0, 1.0, 3 * (std::log(3.0) - 2.0 / 3)};
  check_vector(b.terms(), terms);
  const double mean = (terms[0] + terms[1] + terms[2] + terms[3]) / 4;
  double square = 0;
  for (double term : terms) square += (term - mean) * (term - mean);
  CHECK_NEAR(s[k_divergence], mean, 1e-15);
  CHECK_NEAR(s[k_divergence_se], std::sqrt(square / 3 / 4), 1e-15);
}

void test_off_policy_ratio_and_clips() {
  // TV: t = e, 1/e, off the support -> r = -1/2, 1/2, -1/2; ratios 2, 1, 1/2.
  Batch b{.log_pi = {0.0, 0.0, 0.0},
          .log_q = {-kLog2, 0.0, kLog2},
          .log_score = {-1.0, 1.0, -kInf},
          .prompt = {0, 0, 0}};
  b.divergence = DivergenceId::tv;
  CHECK(b.run() == kOk);
  check_vector(b.weights, {-1.0, 0.5, -0.25});
  b.baseline = BaselineId::loo;
  CHECK(b.run() == kOk);
  // b_0 = (.5 - .25) / 1.5, b_1 = (-1 - .25) / 2.5, b_2 = (-1 + .5) / 3
  check_vector(b.weights, {2 * (-0.5 - 1.0 / 6), 0.5 + 0.5, 0.5 * (-0.5 + 1.0 / 6)});
  CHECK_NEAR(b.statistics[k_ratio_mean], 3.5 / 3, 1e-15);
  CHECK_NEAR(b.statistics[k_ratio_max], 2.0, 1e-15);
  CHECK_NEAR(b.statistics[k_ratio_ess], 3.5 * 3.5 / 5.25, 1e-14);
  b.baseline = BaselineId::none;
  b.ratio_clip = 1.0;
  b.reward_clip = 0.25;
  CHECK(b.run() == kOk);
  check_vector(b.weights, {-0.25, 0.25, -0.125});
  CHECK(b.statistics[k_n_ratio_clipped] == 1 && b.statistics[k_n_reward_clipped] == 3);
  CHECK_NEAR(b.statistics[k_ratio_max], 2.0, 1e-15);  // before truncation
}

void test_skips_prompts_without_z_and_samples_without_pi() {
  Batch b = forward_kl();
  b.log_z = {kLog2, -kInf};
  b.log_pi[1] = b.log_q[1] = -kInf;
  b.log_q[1] = -2.0;
  b.baseline = BaselineId::mean;
  CHECK(b.run() == kOk);
  check_vector(b.weights, {0.5 - 0.0, 0.0, 0.0 - 0.5, 0.0});
  CHECK(b.statistics[k_n_used] == 2 && b.statistics[k_n_skipped] == 2);
  CHECK_NEAR(b.statistics[k_reward_mean], 0.25, 1e-15);
  CHECK(std::isnan(b.terms()[3]));

  b.log_z = {-kInf, -kInf};  // nobody is left
  b.baseline = BaselineId::ema;
  b.baseline_param = 0.9;
  CHECK(b.run() == kOk);
  check_vector(b.weights, {0.0, 0.0, 0.0, 0.0});
  check_vector(b.state, {0.0, 0.0});
  CHECK(b.statistics[k_n_skipped] == 4);
  for (int i = 0; i < kStatistics; ++i) CHECK(i == k_n_skipped || b.statistics[i] == 0.0);
}

void test_moving_average_is_of_earlier_batches() {
  Batch b = forward_kl();
  b.baseline = BaselineId::ema;
  b.baseline_param = 0.75;
  CHECK(b.run() == kOk);
  check_vector(b.weights, {0.5, 1.0, 0.0, 3.0});           // nothing seen yet
  check_vector(b.state, {0.25 * 1.125, 0.25});             // mean reward 1.125, mean ratio 1
  b.log_score = {-1 + kLog2, -2 + kLog2, -3 + kLog2, -4};  // now every reward is 1
  CHECK(b.run() == kOk);
  check_vector(b.weights, {-0.125, -0.125, -0.125, -0.125});  // corrected for the start: 1.125
  check_vector(b.state, {0.75 * 0.25 * 1.125 + 0.25, 0.75 * 0.25 + 0.25});
  const std::vector<double> before = b.state;
  b.log_score[0] = std::nan("");
  CHECK(b.run() == kOk);
  CHECK(std::isnan(b.weights[0]));
  check_vector(b.state, before);  // not poisoned
}

void test_large_ratios_do_not_cancel() {
  // Subtracting the first ratio from the sum would leave nothing of the other two.
  Batch b{.log_pi = {50.0, 0.0, 0.0},
          .log_q = {0.0, 0.0, 0.0},
          .log_score = {50.0, 0.0, kLog2},
          .prompt = {0, 0, 0}};
  b.baseline = BaselineId::loo;
  CHECK(b.run() == kOk);
  CHECK_NEAR(b.weights[0], std::exp(50.0) * (1 - 1.5), 1e-12 * std::exp(50.0));
  // Nor does forward KL pass through infinity: (pi/q)(p/pi) with pi = e^-2000, p = q = 1.
  b = {.log_pi = {-2000.0}, .log_q = {0.0}, .log_score = {0.0}, .prompt = {0}};
  CHECK(b.run() == kOk);
  check_vector(b.weights, {1.0});
}

void test_terms_at_the_extremes() {
  for (int32_t id = 0; id < kDivergences; ++id) {
    const int failures = g_failures;
    const double param = kDivergenceInfo[id].default_param;
    Batch b{.log_pi = {-800.0, 0.0, -kInf, -kInf, 1e-9},
            .log_q = {-800.0, -1.0, 0.0, 0.0, 0.0},
            .log_score = {0.0, -kInf, 0.0, -kInf, 0.0},
            .prompt = {0, 0, 0, 0, 0},
            .divergence = static_cast<DivergenceId>(id),
            .divergence_param = param};
    const std::vector<double> terms = b.terms();
    visit_divergence<double>(id, param, [&](const auto& d) {
      const double slope = d.f_prime(0.0, 0.0);
      CHECK(terms[0] > 0.0);  // p >> pi = q: large, and for some beyond double
      CHECK_NEAR(terms[1], std::exp(1.0) * (d.f_prime_inf() - slope), 1e-12);
      CHECK_NEAR(terms[2], d.f_zero() + slope, 0.0);
      CHECK(terms[3] == 0.0);
      CHECK(terms[4] >= 0.0 && terms[4] < 1e-8);
    });
    if (g_failures > failures) std::printf("  in %s\n", kDivergenceInfo[id].name);
  }
}

void test_bad_prompts() {
  Batch b = forward_kl();
  b.prompt = {0, 1, 0, 1};
  CHECK(b.run() == 2);
  b.prompt = {0, 0, 1, 2};
  CHECK(b.run() == 3);
  b.prompt = {-1, 0, 0, 0};
  CHECK(b.run() == 0);
  Batch empty;
  CHECK(empty.run() == kOk);
  for (double value : empty.statistics) CHECK(value == 0.0);
}

void test_list() {
  const int32_t kl = static_cast<int32_t>(DivergenceId::kl);
  const int32_t js = static_cast<int32_t>(DivergenceId::js);
  for (int32_t id = 0; id < kBaselines; ++id) {
    CHECK(valid_baseline(id, kBaselineInfo[id].default_param, kl));
    CHECK(visit_baseline(
        id, [&](auto baseline) { CHECK(decltype(baseline)::kScope == kBaselineInfo[id].scope); }));
  }
  CHECK(!valid_baseline(static_cast<int32_t>(BaselineId::analytic), 0.0, js));
  CHECK(!valid_baseline(static_cast<int32_t>(BaselineId::ema), 1.0, js));
  CHECK(!valid_baseline(kBaselines, 0.0, kl));
  CHECK(!visit_baseline(-1, [](auto) {}));
}

// What parts of a batch come to together is what one walk gives: CUDA relies on it.
void test_statistics_of_parts() {
  Moments whole, left, right, empty;
  EffectiveSize whole_size, left_size, right_size;
  for (int i = 0; i < 100; ++i) {
    const double x = 5.0 + std::sin(3.0 * i), log_w = 400.0 * std::sin(7.0 * i);
    whole.add(x);
    (i < 37 ? left : right).add(x);
    whole_size.add(log_w);
    (i < 37 ? left_size : right_size).add(log_w);
  }
  Moments both;
  both.n = left.n + right.n + empty.n;
  both.sum = left.sum + right.sum + empty.sum;
  both.centre = both.mean();
  for (const Moments& part : {left, right, empty, Moments::of(both.centre)}) {
    both.square += part.square_about(both.centre);
  }
  CHECK(both.n == whole.n);
  CHECK_NEAR(both.mean(), whole.mean(), 1e-14);
  CHECK_NEAR(both.deviation(), whole.deviation(), 1e-14);
  CHECK(Moments::of(3.0).square_about(5.0) == 4.0);

  double sum = 0, squares = 0;
  for (const EffectiveSize& part : {left_size, right_size, EffectiveSize::of(-kInf)}) {
    const double scale = part.scale_in(whole_size.largest);
    sum += scale * part.sum;
    squares += scale * scale * part.squares;
  }
  CHECK_NEAR(sum, whole_size.sum, 1e-12);
  CHECK_NEAR(squares, whole_size.squares, 1e-12);
  right_size.merge(left_size);
  CHECK_NEAR(right_size.value(), whole_size.value(), 1e-12);
  whole.add(kInf);
  whole.add(1.0);
  CHECK(whole.mean() == kInf);

  EffectiveSize equal;
  for (int i = 0; i < 7; ++i) equal.add(-5000.0);
  equal.add(-kInf);
  CHECK_NEAR(equal.value(), 7.0, 1e-14);
  equal.add(std::nan(""));
  CHECK(std::isnan(equal.largest));
}

}  // namespace

int main() {
  test_rewards_and_baselines_on_policy();
  test_statistics();
  test_off_policy_ratio_and_clips();
  test_skips_prompts_without_z_and_samples_without_pi();
  test_moving_average_is_of_earlier_batches();
  test_large_ratios_do_not_cancel();
  test_terms_at_the_extremes();
  test_bad_prompts();
  test_list();
  test_statistics_of_parts();
  return test_result();
}
