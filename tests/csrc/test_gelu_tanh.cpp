// GPT-2's activation against long double: every instruction set and dtype, the ends, and the same
// bits wherever an element stands.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "fdpg/cpu.h"
#include "fdpg/types.h"
#include "rows.h"

using namespace fdpg;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
std::vector<T> stored(const std::vector<double>& x) {
  std::vector<T> out;
  for (const double v : x) out.push_back(store<T>(static_cast<accumulate_t<T>>(v)));
  return out;
}

template <class T>
std::vector<T> gelu_tanh(const std::vector<T>& x, Dtype dtype) {
  std::vector<T> out(x.size());
  const GeluTanhParams p{x.data(), out.data(), dtype, static_cast<int64_t>(x.size())};
  CHECK(cpu::gelu_tanh(p, 0, p.count) == kOk);
  return out;
}

long double truth(long double x) {
  const long double u = std::sqrt(2 / std::acos(-1.0L)) * (x + 0.044715L * x * x * x);
  return x / (1 + std::exp(-2 * u));
}

// What a number of this type is rounded to, as a part of it.
template <class T>
constexpr double kEpsilon = 1.2e-7;
template <>
constexpr double kEpsilon<double> = 2.3e-16;
template <>
constexpr double kEpsilon<BFloat16> = 7.9e-3;
template <>
constexpr double kEpsilon<Float16> = 9.8e-4;

void test_against_long_double(const std::string& isa) {
  std::vector<double> numbers;
  for (double x = -9.5; x < 12; x += 1.7e-4) numbers.push_back(x);
  for (double x = 1e-6; x < 1; x *= 1.3) numbers.push_back(-x);
  for_each_dtype([&](Dtype dtype, auto tag) {
    using T = decltype(tag);
    const std::vector<T> x = stored<T>(numbers), y = gelu_tanh(x, dtype);
    double worst = 0;  // of what is allowed
    for (size_t i = 0; i < x.size(); ++i) {
      const long double at = load(x[i]), expected = truth(at), tail = truth(-std::fabs(at));
      // Rounding of the result, and of the exponent, up to 80. Float16 has no smaller numbers.
      const double allowed =
          static_cast<double>(kEpsilon<T> / 2 * std::fabs(expected) +
                              100 * kEpsilon<accumulate_t<T>> * std::fabs(tail)) +
          (dtype == Dtype::kFloat16 ? 3e-8 : 0);
      const double error = static_cast<double>(std::fabs(load(y[i]) - expected)) / allowed;
      worst = error <= worst ? worst : error;  // NaN is worst
    }
    if (!(worst <= 1)) std::printf("%s: off by %g of what is allowed\n", isa.c_str(), worst);
    CHECK(worst <= 1);
  });
}

void test_the_ends(const std::string&) {
  for_each_dtype([](Dtype dtype, auto tag) {
    using T = decltype(tag);
    const double most = dtype == Dtype::kFloat16 ? 6e4 : 3e38;
    const std::vector<double> x = {-kInf, -most, -100, -10, 0, 10.5, most, kInf, kNan};
    const std::vector<T> y = gelu_tanh(stored<T>(x), dtype);
    for (size_t i = 0; i < x.size(); ++i) {
      const double rounded = load(stored<T>(x)[i]);
      CHECK_NEAR(static_cast<double>(load(y[i])), x[i] > 0 || std::isnan(x[i]) ? rounded : 0,
                 1e-36);
    }
  });
}

void test_bits_do_not_depend_on_the_place(const std::string&) {
  for_each_dtype([](Dtype dtype, auto tag) {
    using T = decltype(tag);
    std::vector<double> numbers;
    for (int i = 0; i < 45; ++i) numbers.push_back(7 * std::sin(i));
    const std::vector<T> x = stored<T>(numbers), whole = gelu_tanh(x, dtype);
    for (int64_t begin = 0; begin < 45; ++begin) {
      for (int64_t end = begin; end <= 45; ++end) {
        std::vector<T> out = x;  // in place
        const GeluTanhParams p{out.data(), out.data(), dtype, 45};
        CHECK(cpu::gelu_tanh(p, begin, end) == kOk);
        for (int64_t i = 0; i < 45; ++i) {
          const T& expected = begin <= i && i < end ? whole[i] : x[i];
          CHECK(std::memcmp(&out[i], &expected, sizeof(T)) == 0);
        }
      }
    }
  });
}

}  // namespace

int main() {
  for_each_isa(test_against_long_double);
  for_each_isa(test_the_ends);
  for_each_isa(test_bits_do_not_depend_on_the_place);
  return test_result();
}
