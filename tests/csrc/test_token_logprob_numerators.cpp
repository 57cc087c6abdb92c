// token_logprob_numerators against long double, on every instruction set and pair of dtypes. What
// is promised is row_scale * numerators, so that is what is looked at.
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "check.h"
#include "rows.h"

namespace {

using fdpg::accumulate_t;
using fdpg::Dtype;
using fdpg::kOk;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// T: logits, U: numerators. Rows of numerators are padded with 42.
template <class T, class U>
struct Call {
  static constexpr int64_t kPadding = 3;
  std::vector<int64_t> target;
  std::vector<T> coefficient, logp, lse, row_scale;
  std::vector<T> hint;  // empty: none
  const bool* mask = nullptr;
  double inv_temperature = 1;
  std::vector<U> numerators;
  int64_t stride = 0;

  Call(std::vector<int64_t> target, std::vector<T> coefficient)
      : target(target),
        coefficient(coefficient),
        logp(target.size(), 7),
        lse(target.size(), 7),
        row_scale(target.size(), 7) {}

  // In place of the logits if `in_place`, which is x then.
  int64_t run(const Rows<T>& x, Dtype dtype, Dtype numerator_dtype, Rows<T>* in_place = nullptr) {
    stride = in_place ? x.stride : x.vocab + kPadding;
    if (!in_place) numerators.assign(x.rows * stride, fdpg::store<U>(42));
    void* const out = in_place ? static_cast<void*>(in_place->data.data())
                               : static_cast<void*>(numerators.data());
    const fdpg::TokenLogprobNumeratorsParams p = {x.data.data(),
                                                  out,
                                                  dtype,
                                                  numerator_dtype,
                                                  x.rows,
                                                  x.vocab,
                                                  x.stride,
                                                  stride,
                                                  target.data(),
                                                  mask,
                                                  coefficient.data(),
                                                  hint.empty() ? nullptr : hint.data(),
                                                  inv_temperature,
                                                  x.softcap,
                                                  logp.data(),
                                                  lse.data(),
                                                  row_scale.data()};
    const int64_t status = fdpg::cpu::token_logprob_numerators(p, 0, x.rows);
    if constexpr (std::is_same_v<T, U>) {
      if (in_place) numerators = in_place->data;
    }
    return status;
  }

  long double numerator(int64_t i, int64_t j) const {
    return fdpg::load(numerators[i * stride + j]);
  }
  long double gradient(int64_t i, int64_t j) const { return row_scale[i] * numerator(i, j); }
};

template <class T, class U>
constexpr double kRounding = sizeof(T) == 8                      ? 0x1p-52
                             : sizeof(U) == 4                    ? 0x1p-24
                             : std::is_same_v<U, fdpg::BFloat16> ? 0x1p-8
                                                                 : 0x1p-11;

template <class T>
double tolerance(long double value) {
  return sizeof(T) == 8 ? 1e-14 * (1 + std::fabs(value)) : 6e-8 * std::fabs(value) + 2e-7;
}

// Row results and every gradient of row i against the truth. `x`: the logits, as they were.
template <class T, class U>
void check_row(const Rows<T>& x, const Call<T, U>& got, int64_t i) {
  const long double s = static_cast<T>(got.inv_temperature), most = x.largest(i);
  const long double log_sum = x.log_sum(i, s), logp = x.logp(i, got.target[i], s);
  // Without fma, s u is rounded before the offset is taken away.
  const bool exact = s == 1 && x.softcap == 0;
  const double rounded = exact ? 0 : tolerance<T>(s * most) + 2 * x.cap_error();
  CHECK_NEAR(got.lse[i], s * most + log_sum, tolerance<T>(s * most + log_sum) + x.cap_error());
  CHECK_NEAR(got.logp[i], logp, tolerance<T>(logp) + rounded);
  CHECK(got.logp[i] <= 0);
  const long double whole = s * got.coefficient[i];
  if (whole == 0) CHECK(got.row_scale[i] == 0);
  for (int64_t j = 0; j < x.vocab; ++j) {
    const long double p = std::exp(s * (x.at(i, j) - most) - log_sum);
    const bool here = j == got.target[i];
    const long double slope = x.slope(i, j);
    const long double expected = whole * (here ? -std::expm1(logp) : -p) * slope;
    // One rounding to U, relative (or half of fp16's smallest number); what the exponential of a
    // rounded argument is off, relative; and a small part of 1 at the target.
    const double exponent = std::fabs(s * (x.at(i, j) - most));
    const double unit = sizeof(T) == 8 ? 2e-14 : 4e-7 + 2e-7 * std::fmin(exponent, 90) + rounded;
    const double error =
        1.01 * kRounding<T, U> * std::fabs(expected) + unit * std::fabs(whole) * (here ? 1 : p) +
        std::fabs(whole) * (std::is_same_v<U, fdpg::Float16> ? 0x1.1p-25 : 0x1p-120);
    CHECK_NEAR(got.gradient(i, j), expected, error);
    if (g_failures > 20) return;
  }
}

template <class T, class U>
void values(Dtype dtype, Dtype numerator_dtype, double softcap) {
  for (int64_t vocab : {1, 7, 16, 63, 64, 65, 1000, 1025, 14019}) {
    for (double scale : {1.0, 0.7}) {
      Rows<T> x(5, vocab, 4, static_cast<int>(vocab));
      std::vector<int64_t> target(x.rows);
      for (int64_t i = 0; i < x.rows; ++i) target[i] = (i * 7919 + vocab - 1) % vocab;
      for (int64_t j = 0; j < vocab; ++j) {
        x.set(1, j, static_cast<double>(x.at(1, j)) - 90);
        if (j % 3 == 1 && j != target[2]) x.set(2, j, -kInf);  // banned
      }
      x.set(3, target[3], 25);                    // all but certain
      if (vocab > 1) x.set(4, target[4], -kInf);  // impossible: logp = -inf, p = 0
      x.softcap = softcap;
      Call<T, U> apart(target, {1.5, -2, 0.25, 3, -1});
      apart.inv_temperature = scale;
      CHECK(apart.run(x, dtype, numerator_dtype) == kOk);
      for (int64_t i = 0; i < x.rows; ++i) {
        check_row(x, apart, i);
        for (int64_t j = vocab; j < apart.stride; ++j) CHECK(apart.numerator(i, j) == 42);
      }
      // A hint may change the split between scale and numerators, and nothing else.
      for (double hint : {0.0, 5.0, -300.0, kInf, kNan}) {
        Call<T, U> hinted = apart;
        hinted.hint.assign(x.rows, static_cast<T>(hint));
        CHECK(hinted.run(x, dtype, numerator_dtype) == kOk);
        for (int64_t i = 0; i < x.rows; ++i) check_row(x, hinted, i);
      }
      if constexpr (std::is_same_v<T, U>) {
        Rows<T> overwritten = x;
        Call<T, U> in_place = apart;
        CHECK(in_place.run(overwritten, dtype, numerator_dtype, &overwritten) == kOk);
        for (int64_t i = 0; i < x.rows; ++i) {
          CHECK(std::memcmp(&in_place.numerators[i * x.stride], &apart.numerators[i * apart.stride],
                            vocab * sizeof(U)) == 0);
          CHECK(in_place.logp[i] == apart.logp[i] && in_place.row_scale[i] == apart.row_scale[i]);
          for (int64_t j = vocab; j < x.stride; ++j) CHECK(std::isnan(in_place.numerator(i, j)));
        }
      }
    }
  }
}

// Rows that get no gradient, and rows that cannot have one.
template <class T, class U>
void unusual_rows(Dtype dtype, Dtype numerator_dtype) {
  Rows<T> x(8, 2500, 2);
  for (int64_t j = 0; j < x.vocab; ++j) {
    x.set(0, j, kNan);             // masked
    if (j % 2) x.set(1, j, kNan);  // coefficient 0
    x.set(2, j, -kInf);            // nothing allowed
  }
  x.set(3, 2400, kNan);
  x.set(4, 2499, kInf);
  const bool mask[] = {false, true, true, true, true, true, true, true};
  // A masked target is not looked at; a bad one is told whatever the coefficient.
  Call<T, U> got({-100, 2, 3, 4, 5, 2500, -1, 7}, {1, 0, 1, 1, 1, 1, 0, 1});
  got.mask = mask;
  CHECK(got.run(x, dtype, numerator_dtype) == 5);
  CHECK(got.logp[0] == 0 && got.lse[0] == 0 && got.row_scale[0] == 0);
  CHECK(std::isnan(got.logp[1]) && std::isnan(got.lse[1]) && got.row_scale[1] == 0);
  CHECK(got.lse[2] == -kInf);
  for (int i : {2, 3, 4, 5, 6}) CHECK(std::isnan(got.logp[i]));
  for (int i : {3, 4, 5, 6}) CHECK(std::isnan(got.lse[i]));
  bool zeros = true, nans = true;
  for (int64_t j = 0; j < x.vocab; ++j) {
    for (int i : {0, 1}) zeros = zeros && got.numerator(i, j) == 0;
    for (int i : {2, 3, 4, 5, 6}) nans = nans && std::isnan(got.gradient(i, j));
  }
  CHECK(zeros);
  CHECK(nans);
  check_row(x, got, 7);  // neighbours do not spoil it
}

// Coefficient 0 has log-probs, but no gradient; and a row is the same in any batch.
template <class T, class U>
void coefficients_and_batches(Dtype dtype, Dtype numerator_dtype) {
  const Rows<T> x(3, 1000, 3);
  Call<T, U> zero({1, 2, 3}, {0, 0, 0});
  CHECK(zero.run(x, dtype, numerator_dtype) == kOk);
  for (int64_t i = 0; i < x.rows; ++i) {
    check_row(x, zero, i);
    for (int64_t j = 0; j < x.vocab; ++j) CHECK(zero.numerator(i, j) == 0);
  }
  Call<T, U> whole({1, 2, 3}, {1, 1, 1});
  CHECK(whole.run(x, dtype, numerator_dtype) == kOk);
  for (int64_t i = 0; i < x.rows; ++i) {
    Rows<T> one(1, x.vocab, 1, 0, 0);
    std::memcpy(one.data.data(), x.data.data() + i * x.stride, x.vocab * sizeof(T));
    Call<T, U> alone({whole.target[i]}, {1});
    CHECK(alone.run(one, dtype, numerator_dtype) == kOk);
    CHECK(alone.logp[0] == whole.logp[i] && alone.row_scale[0] == whole.row_scale[i]);
    CHECK(std::memcmp(alone.numerators.data(), &whole.numerators[i * whole.stride],
                      x.vocab * sizeof(U)) == 0);
  }
}

}  // namespace

int main() {
  for_each_isa([](const std::string& isa) {
    std::printf("%s\n", isa.c_str());
    for_each_dtype([](Dtype dtype, auto logit) {
      for_each_dtype([&](Dtype numerator_dtype, auto numerator) {
        using T = decltype(logit);
        using U = decltype(numerator);
        if constexpr (std::is_same_v<T, accumulate_t<U>>) {
          for (double softcap : {0.0, 20.0}) values<T, U>(dtype, numerator_dtype, softcap);
          unusual_rows<T, U>(dtype, numerator_dtype);
          coefficients_and_batches<T, U>(dtype, numerator_dtype);
        }
      });
    });
  });
  return test_result();
}
