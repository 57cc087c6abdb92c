// Every divergence of the list: the properties that make it one, in double and in float.
#include <limits>
#include <vector>

#include "check.h"
#include "fdpg/divergence.h"

using namespace fdpg;

namespace {

constexpr double kInf = INFINITY;

// The parameters each listed divergence is tested with; more where the formula has more cases.
std::vector<double> parameters(const DivergenceInfo& info) {
  if (!info.takes_param) return {0.0};
  if (std::isinf(info.low)) return {-1.0, 0.0, 1e-9, 0.3, 0.5, 0.999, 1.0, 1.0 + 1e-9, 1.5, 2.0};
  return {info.default_param, 0.01, 0.3, 0.5, 0.99};
}

// fn(divergence in F, id, parameter) for all of the above.
template <class F, class Fn>
void for_each(Fn fn) {
  for (int32_t id = 0; id < kDivergences; ++id) {
    for (double param : parameters(kDivergenceInfo[id])) {
      CHECK(valid_divergence(id, param));
      const int failures = g_failures;
      CHECK(visit_divergence<F>(id, F(param), [&](const auto& d) { fn(d, id, param); }));
      if (g_failures > failures) std::printf("  in %s(%g)\n", kDivergenceInfo[id].name, param);
    }
  }
}

void test_f_is_convex_with_slope_f_prime() {
  for_each<double>([](const auto& d, int32_t, double) {
    CHECK_NEAR(d.f(0.0, 0.0), 0.0, 1e-15);
    for (double log_t = -6.0; log_t <= 6.0; log_t += 0.37) {
      const double t = std::exp(log_t), h = 1e-5 * t;
      const double slope = (d.f(std::log(t + h), 0.0) - d.f(std::log(t - h), 0.0)) / (2 * h);
      const double expected = d.f_prime(log_t, 0.0);
      CHECK_NEAR(slope, expected, 1e-5 * (1 + std::fabs(expected)));
    }
    double before = d.f_prime(-kInf, 0.0);
    for (double log_t : {-1000.0, -300.0, -50.0, -10.0, -3.0, -1.0, -1e-3, -1e-12, -0.0, 0.0, 1e-12,
                         1e-3, 1.0, 3.0, 10.0, 50.0, 300.0, 1000.0, kInf}) {
      const double now = d.f_prime(log_t, 0.0);
      CHECK(now >= before || now - before >= -1e-15 * std::fabs(before));  // so neither is NaN
      before = now;
    }
  });
}

void test_limits() {
  for_each<double>([](const auto& d, int32_t, double) {
    CHECK_NEAR(d.f_prime(kInf, 0.0), d.f_prime_inf(), 0.0);
    // alpha(1e-9) needs a t this small; in logarithms it is nothing special.
    if (std::isfinite(d.f_zero())) {
      CHECK_NEAR(d.f(-1e12, 0.0), d.f_zero(), 1e-12 * d.f_zero());
    } else {
      CHECK(d.f(-600.0, 0.0) > 100.0);
    }
    const double far = d.f_prime(600.0, 0.0);
    if (std::isfinite(d.f_prime_inf())) {
      CHECK(far <= d.f_prime_inf());
      CHECK_NEAR(d.f_prime(1e12, 0.0), d.f_prime_inf(), 1e-9 * (1 + std::fabs(d.f_prime_inf())));
    } else {
      CHECK(far > 1.0);
    }
    // f(t)/t tends to f'(inf) as well.
    if (std::isfinite(d.f_prime_inf())) {
      CHECK_NEAR(d.f(1e12, -1e12), d.f_prime_inf(), 1e-9 * (1 + std::fabs(d.f_prime_inf())));
    } else {
      CHECK(d.f(600.0, -600.0) > 1.0);
    }
  });
}

void test_scale_is_a_factor_that_does_not_overflow() {
  for_each<double>([](const auto& d, int32_t, double) {
    for (double log_t : {-60.0, -7.0, -0.3, 0.0, 0.2, 5.0, 60.0}) {
      for (double log_s : {-30.0, -1.0, 0.0, 2.0}) {
        const double f = std::exp(log_s) * d.f(log_t, 0.0);
        const double f_prime = std::exp(log_s) * d.f_prime(log_t, 0.0);
        CHECK_NEAR(d.f(log_t, log_s), f, 1e-13 * (std::fabs(f) + std::exp(log_s)));
        CHECK_NEAR(d.f_prime(log_t, log_s), f_prime, 1e-13 * (std::fabs(f_prime)));
      }
    }
    // pi = q: a term (p/q) f(t) is f(t)/t. Its size is f'(inf) or the logarithm, unless f' is a
    // power.
    for (double log_t : {100.0, 1000.0, 5000.0}) {
      const double term = d.f(log_t, -log_t);
      CHECK(!std::isnan(term));
      if (std::isfinite(d.f_prime_inf())) CHECK(std::isfinite(term));
      CHECK(!std::isnan(d.f(-log_t, 0.0)));
      CHECK(!std::isnan(d.f_prime(log_t, 0.0)));
      CHECK(!std::isnan(d.f_prime(-log_t, 0.0)));
    }
    CHECK(std::isnan(d.f(std::nan(""), 0.0)));
    CHECK(std::isnan(d.f_prime(std::nan(""), 0.0)));
  });
  // Forward KL off policy: (pi/q) (p/pi) is p/q, whatever pi is.
  CHECK_NEAR(Kl<double>(0).f_prime(-1000.0, -1000.0), -1.0, 0.0);
  CHECK_NEAR(Chi2<double>(0).f_prime(-1000.0, -2000.0), -1.0, 0.0);
  CHECK_NEAR(Hellinger<double>(0).f_prime(-4000.0, -2000.0), -1.0, 0.0);
  CHECK_NEAR(Alpha<double>(-1).f_prime(-1000.0, -2000.0), -0.5, 0.0);
  CHECK_NEAR(ReverseChi2<double>(0).f(1000.0, -2000.0), 1.0, 0.0);
  CHECK_NEAR(Jeffreys<double>(0).f_prime(-1000.0, -1000.0), -1.0, 0.0);
}

// D(pi||p) and D(p||pi) trade places by f(t) -> t f(1/t).
template <class A, class B>
void check_dual(const A& a, const B& b, double linear = 0.0) {
  for (double log_t : {-200.0, -3.0, -0.1, 0.0, 0.4, 2.0, 200.0}) {
    const double expected = b.f(-log_t, log_t) + linear * std::expm1(log_t);
    CHECK_NEAR(a.f(log_t, 0.0), expected, 1e-12 * (1 + std::fabs(expected)));
  }
}

void test_duals() {
  check_dual(Kl<double>(0), ReverseKl<double>(0));
  check_dual(ReverseKl<double>(0), Kl<double>(0));
  check_dual(Chi2<double>(0), ReverseChi2<double>(0));
  check_dual(Tv<double>(0), Tv<double>(0));
  check_dual(Js<double>(0), Js<double>(0));
  check_dual(Hellinger<double>(0), Hellinger<double>(0));
  check_dual(Jeffreys<double>(0), Jeffreys<double>(0));
  for (double w : {0.1, 0.5, 0.7}) {
    check_dual(JsW<double>(w), JsW<double>(1 - w));
    check_dual(SkewKl<double>(w), SkewReverseKl<double>(1 - w));
  }
  for (double a : {-1.0, 0.0, 0.25, 1.0, 1.5}) check_dual(Alpha<double>(a), Alpha<double>(1 - a));
}

void test_relations() {
  for (double log_t : {-20.0, -1.0, -1e-3, 0.0, 0.7, 30.0}) {
    const double t_minus_1 = std::expm1(log_t);
    const auto near = [&](double a, double b) { CHECK_NEAR(a, b, 1e-12 * (1 + std::fabs(b))); };
    near(2 * JsW<double>(0.5).f(log_t, 0.0), Js<double>(0).f(log_t, 0.0));
    near(2 * JsW<double>(0.5).f_prime(log_t, 0.0), Js<double>(0).f_prime(log_t, 0.0));
    near(Alpha<double>(0).f(log_t, 0.0), Kl<double>(0).f(log_t, 0.0) + t_minus_1);
    near(Alpha<double>(1).f(log_t, 0.0), ReverseKl<double>(0).f(log_t, 0.0) - t_minus_1);
    near(Alpha<double>(0.5).f(log_t, 0.0), 2 * Hellinger<double>(0).f(log_t, 0.0));
    near(Alpha<double>(2).f(log_t, 0.0), ReverseChi2<double>(0).f(log_t, 0.0) / 2);
    near(Alpha<double>(-1).f(log_t, 0.0), Chi2<double>(0).f(log_t, 0.0) / 2);
    // Continuous in alpha where the formula changes.
    for (double a : {0.0, 0.5, 1.0}) {
      for (double step : {-1e-11, 1e-11}) {
        const Alpha<double> at(a), beside(a + step);
        const double f = at.f(log_t, 0.0), f_prime = at.f_prime(log_t, 0.0);
        CHECK_NEAR(beside.f(log_t, 0.0), f, 1e-8 * (1 + std::fabs(f)));
        CHECK_NEAR(beside.f_prime(log_t, 0.0), f_prime, 1e-8 * (1 + std::fabs(f_prime)));
      }
    }
  }
}

void test_values_by_hand() {
  const double log_2 = std::log(2.0), log_3 = std::log(3.0);
  const double two = log_2;  // t = 2
  CHECK_NEAR(Kl<double>(0).f_prime(two, 0.0), -0.5, 1e-15);
  CHECK_NEAR(ReverseKl<double>(0).f_prime(two, 0.0), log_2 + 1, 1e-15);
  CHECK_NEAR(Tv<double>(0).f(two, 0.0), 0.5, 1e-15);
  CHECK_NEAR(Tv<double>(0).f_prime(-two, 0.0), -0.5, 1e-15);
  CHECK_NEAR(Js<double>(0).f_prime(two, 0.0), 2 * log_2 - log_3, 1e-15);
  CHECK_NEAR(Js<double>(0).f(two, 0.0), 5 * log_2 - 3 * log_3, 1e-15);
  CHECK_NEAR(Alpha<double>(2).f_prime(two, 0.0), 1.0, 1e-15);
  CHECK_NEAR(Hellinger<double>(0).f(2 * two, 0.0), 1.0, 1e-15);  // t = 4
  CHECK_NEAR(Hellinger<double>(0).f_prime(2 * two, 0.0), 0.5, 1e-15);
  CHECK_NEAR(Chi2<double>(0).f(two, 0.0), 0.5, 1e-15);
  CHECK_NEAR(Chi2<double>(0).f_prime(two, 0.0), 0.75, 1e-15);
  CHECK_NEAR(ReverseChi2<double>(0).f_prime(two, 0.0), 2.0, 1e-15);
  CHECK_NEAR(Jeffreys<double>(0).f_prime(two, 0.0), log_2 + 0.5, 1e-15);
  CHECK_NEAR(SkewKl<double>(0.5).f_prime(two, 0.0), -1.0 / 3.0, 1e-15);
  CHECK_NEAR(SkewReverseKl<double>(0.5).f(two, 0.0), 2 * std::log(4.0 / 3.0), 1e-15);
  CHECK_NEAR(SkewReverseKl<double>(0.5).f_prime(two, 0.0), std::log(4.0 / 3.0) + 1.0 / 3.0, 1e-15);
}

void test_float_agrees_with_double() {
  for_each<float>([](const auto& in_float, int32_t id, double param) {
    visit_divergence<double>(id, static_cast<float>(param), [&](const auto& in_double) {
      for (float log_t : {-20.0f, -1.0f, 0.0f, 0.5f, 20.0f}) {
        const double f = in_double.f(log_t, 0.0), f_prime = in_double.f_prime(log_t, 0.0);
        const double size = 1 + std::exp(log_t > 0 ? 2 * log_t : -log_t / 10);
        CHECK_NEAR(in_float.f(log_t, 0.0f), f, 2e-5 * std::fabs(f) + 1e-5 * size);
        CHECK_NEAR(in_float.f_prime(log_t, 0.0f), f_prime, 2e-5 * (1 + std::fabs(f_prime)));
      }
    });
  });
}

void test_list() {
  CHECK(kDivergences >= 12);
  CHECK(!valid_divergence(-1, 0.0));
  CHECK(!valid_divergence(kDivergences, 0.0));
  CHECK(!visit_divergence<double>(kDivergences, 0.0, [](const auto&) {}));
  const int32_t js_w = static_cast<int32_t>(DivergenceId::js_w);
  CHECK(!valid_divergence(js_w, 0.0));
  CHECK(!valid_divergence(js_w, 1.0));
  CHECK(!valid_divergence(js_w, std::nan("")));
  CHECK(!valid_divergence(static_cast<int32_t>(DivergenceId::alpha), kInf));
}

}  // namespace

int main() {
  test_f_is_convex_with_slope_f_prime();
  test_limits();
  test_scale_is_a_factor_that_does_not_overflow();
  test_duals();
  test_relations();
  test_values_by_hand();
  test_float_agrees_with_double();
  test_list();
  return test_result();
}
