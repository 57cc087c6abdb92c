// token_logprob and its backward against long double, on every instruction set and dtype.
#include <cstring>
#include <initializer_list>

#include "check.h"
#include "rows.h"

namespace {

using fdpg::accumulate_t;
using fdpg::Dtype;
using fdpg::kOk;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

template <class T>
struct Forward {
  using Real = accumulate_t<T>;
  std::vector<int64_t> target;
  std::vector<Real> logp, lse, entropy;
  std::vector<double> lse_exact;
  int64_t status;

  Forward(const Rows<T>& x, Dtype dtype, std::vector<int64_t> targets, double scale = 1,
          const bool* mask = nullptr)
      : target(targets), logp(x.rows, 7), lse(x.rows, 7), entropy(x.rows, 7), lse_exact(x.rows, 7) {
    const fdpg::TokenLogprobParams p = {
        x.data.data(), dtype,     x.rows,      x.vocab,    x.stride,       target.data(),   mask,
        scale,         x.softcap, logp.data(), lse.data(), entropy.data(), lse_exact.data()};
    status = fdpg::cpu::token_logprob(p, 0, x.rows);
  }
};

template <class T>
std::vector<int64_t> some_targets(const Rows<T>& x) {
  std::vector<int64_t> target(x.rows);
  for (int64_t i = 0; i < x.rows; ++i) target[i] = (i * 7919 + x.vocab - 1) % x.vocab;
  return target;
}

// One rounding of the result, and 2e-7 for the sum; for double, the same in its own units.
template <class T>
double tolerance(long double value) {
  const bool wide = sizeof(accumulate_t<T>) == sizeof(double);
  return wide ? 1e-14 * (1 + std::fabs(value)) : 6e-8 * std::fabs(value) + 2e-7;
}

template <class T>
void values(Dtype dtype, double softcap) {
  for (int64_t vocab : {1, 7, 16, 63, 64, 65, 1000, 1024, 1025, 14019, 50257}) {
    for (double scale : {1.0, 0.7}) {
      Rows<T> x(3, vocab, 4, static_cast<int>(vocab));
      x.softcap = softcap;
      const double s = static_cast<accumulate_t<T>>(scale);
      const Forward<T> got(x, dtype, some_targets(x), scale);
      CHECK(got.status == kOk);
      for (int64_t i = 0; i < x.rows; ++i) {
        const long double lse = s * x.largest(i) + x.log_sum(i, s);
        const long double logp = x.logp(i, got.target[i], s);
        long double entropy = 0;
        for (int64_t j = 0; j < vocab; ++j) {
          const long double l = s * x.at(i, j) - lse;
          entropy -= std::exp(l) * l;
        }
        CHECK_NEAR(got.lse[i], lse, tolerance<T>(lse) + x.cap_error());
        CHECK_NEAR(got.logp[i], logp, tolerance<T>(logp) + x.cap_error());
        CHECK_NEAR(got.entropy[i], entropy, 4 * tolerance<T>(entropy) + 4 * x.cap_error());
      }
    }
  }
}

// A maximum that grows along the row, by little and by much, moves the anchor again and again;
// large offsets cost no accuracy in the log-prob.
template <class T>
void rising_rows(Dtype dtype) {
  for (double slope : {0.001, 0.05, 1.0}) {
    Rows<T> x(2, 5000, 1);
    for (int64_t j = 0; j < x.vocab; ++j) {
      x.set(0, j, slope * j);
      x.set(1, j, slope * (x.vocab - j) - 9000);
    }
    const Forward<T> got(x, dtype, {x.vocab - 1, 0});
    for (int64_t i = 0; i < 2; ++i) {
      const long double logp = x.logp(i, got.target[i], 1);
      CHECK_NEAR(got.logp[i], logp, tolerance<T>(logp));
      CHECK_NEAR(got.lse[i], x.largest(i) + x.log_sum(i, 1), tolerance<T>(x.largest(i)));
    }
  }
}

// Blocks that lie far below what follows: exponentials relative to the first would be taken of
// large numbers, whose rounding is an error of the result.
void a_low_first_block() {
  for (double depth : {1.5, 20.0, 70.0, 500.0}) {
    Rows<float> x(20, 3000, 1);
    std::vector<int64_t> target(x.rows);
    for (int64_t i = 0; i < x.rows; ++i) {
      for (int64_t j = 0; j < 1024; ++j) x.set(i, j, static_cast<double>(x.at(i, j)) - depth);
      for (int64_t j = 1027; j < x.vocab; ++j) x.set(i, j, -1000);  // three tokens count
      target[i] = 1024;
    }
    const Forward<float> got(x, Dtype::kFloat32, target);
    for (int64_t i = 0; i < x.rows; ++i) {
      const double logp = x.logp(i, target[i], 1), lse = x.largest(i) + x.log_sum(i, 1);
      CHECK_NEAR(got.logp[i], logp, 6e-8 * std::fabs(logp) + 1e-7);
      CHECK_NEAR(got.lse[i], lse, 6e-8 * std::fabs(lse) + 1e-7);
    }
  }
}

template <class T>
void unusual_values(Dtype dtype) {
  Rows<T> x(8, 2500, 2);
  for (int64_t j = 0; j < x.vocab; ++j) {
    if (j != 2000) x.set(0, j, -kInf);          // one token allowed, in a later block
    if (j % 2 || j < 1500) x.set(1, j, -kInf);  // a masked vocabulary
    x.set(2, j, -kInf);                         // nothing allowed
    x.set(3, j, j == 17 ? 1e4 : -1e4);          // extreme, and certain
  }
  x.set(4, 2400, kNan);
  x.set(5, 3, kInf);
  x.set(6, 2499, kInf);
  const Forward<T> got(x, dtype, {2000, 1, 0, 17, 0, 0, 0, 5});
  CHECK_NEAR(got.logp[0], 0, 0);
  CHECK_NEAR(got.entropy[0], 0, 0);
  CHECK_NEAR(got.lse[0], x.at(0, 2000), 0);
  CHECK(got.logp[1] == -kInf);
  CHECK_NEAR(got.lse[1], x.largest(1) + x.log_sum(1, 1), 1e-6);
  CHECK(got.entropy[1] > 0);
  CHECK(std::isnan(got.logp[2]));
  CHECK(got.lse[2] == -kInf);
  CHECK_NEAR(got.logp[3], 0, 0);
  for (int i : {4, 5, 6}) CHECK(std::isnan(got.logp[i]) && std::isnan(got.lse[i]));
  CHECK(std::isfinite(got.logp[7]) && std::isfinite(got.lse[7]));  // neighbours do not spoil it
}

// A NaN is the largest of nothing: rows whose first blocks hold NaN alone, or NaN and -inf.
template <class T>
void nothing_but_nan(Dtype dtype) {
  Rows<T> x(4, 2500, 1);
  for (int64_t j = 0; j < x.vocab; ++j) {
    x.set(0, j, kNan);
    if (j < 1024) x.set(1, j, kNan);
    if (j < 2048) x.set(2, j, j == 1030 ? kNan : -kInf);
  }
  const Forward<T> got(x, dtype, {0, 2000, 2100, 0});
  for (int i : {0, 1, 2}) {
    CHECK(std::isnan(got.logp[i]) && std::isnan(got.lse[i]) && std::isnan(got.entropy[i]));
  }
  CHECK(std::isfinite(got.lse[3]));
}

// Logits so large that a temperature rounds them by more than an exponential can hold, or takes
// them beyond the largest number: alone, and as the mask of the first blocks that some use in place
// of -inf.
template <class T>
void enormous_logits(Dtype dtype) {
  for (double scale : {1.0, 0.7, 1.3, 1.25}) {
    for (double mask : {-1e10, -1e30, -3e38}) {
      const double s = static_cast<float>(scale);
      Rows<T> x(2, 3000, 1);
      x.set(0, 1500, 1e30);
      for (int64_t j = 0; j < 1100; ++j) x.set(1, j, mask);
      const Forward<T> got(x, dtype, {1500, 2000}, s);
      CHECK(got.logp[0] == 0 && got.entropy[0] == 0);
      CHECK_NEAR(got.lse[0], s * x.at(0, 1500), 1e23);
      const long double logp = x.logp(1, 2000, s), lse = s * x.largest(1) + x.log_sum(1, s);
      CHECK_NEAR(got.logp[1], logp, tolerance<T>(logp));
      CHECK_NEAR(got.lse[1], lse, tolerance<T>(lse));
      CHECK(std::isfinite(got.entropy[1]));
    }
  }
}

// A row of one logit and a softcap of 1 has lse = tanh x: every 1009th float, and the ends.
void tanh_is_accurate(const std::string& isa) {
  std::vector<float> x;
  for (uint32_t bits = fdpg::bits_of(1e-30f); bits <= fdpg::bits_of(12.0f); bits += 1009) {
    x.push_back(fdpg::float_of(bits));
    x.push_back(-fdpg::float_of(bits));
  }
  const size_t inside = x.size();
  const float ends[] = {0.0f, 1e-45f, 9.1f, 30.0f, 3e38f, static_cast<float>(kInf)};
  for (float end : ends) x.insert(x.end(), {end, -end});
  x.push_back(static_cast<float>(kNan));
  Rows<float> rows(static_cast<int64_t>(x.size()), 1, 0, 0, 0);
  rows.data = x;
  rows.softcap = 1;
  const Forward<float> got(rows, Dtype::kFloat32, std::vector<int64_t>(x.size(), 0));
  double worst = 0;
  for (size_t i = 0; i < inside; ++i) {
    const double expected = std::tanh(double{x[i]});
    const double ulp = std::ldexp(1.0, std::ilogb(expected) - 23);
    worst = std::fmax(worst, std::fabs(got.lse[i] - expected) / ulp);
    CHECK(std::fabs(got.lse[i]) <= 1);
  }
  std::printf("tanh on %s: at most %.2f ulp\n", isa.c_str(), worst);
  CHECK(worst < 2.7);
  for (size_t i = inside; i + 1 < x.size(); ++i) {
    CHECK(got.lse[i] == (std::fabs(x[i]) < 1 ? x[i] : std::copysign(1.0f, x[i])));
  }
  CHECK(std::isnan(got.lse.back()));
}

// tanh has values at both infinities: a banned token is -softcap then, and can be the target.
template <class T>
void a_softcap_bounds_infinity(Dtype dtype) {
  Rows<T> x(4, 2500, 2);
  for (int64_t j = 0; j < x.vocab; ++j) {
    if (j % 2) x.set(0, j, -kInf);
    x.set(1, j, -kInf);
  }
  x.set(2, 2400, kInf);
  x.set(3, 2400, kNan);
  x.softcap = 3;
  const Forward<T> got(x, dtype, {1, 7, 2400, 0});
  for (int64_t i : {0, 1, 2}) {
    CHECK_NEAR(got.lse[i], x.largest(i) + x.log_sum(i, 1), 3e-6);
    CHECK_NEAR(got.logp[i], x.logp(i, got.target[i], 1), 3e-6);
    CHECK(std::isfinite(got.entropy[i]));
  }
  CHECK_NEAR(got.lse[1], -3 + std::log(2500.0), 3e-6);
  CHECK(std::isnan(got.logp[3]) && std::isnan(got.lse[3]) && std::isnan(got.entropy[3]));
}

template <class T>
void masks_and_bad_targets(Dtype dtype) {
  Rows<T> x(4, 1000, 1);
  for (int64_t j = 0; j < x.vocab; ++j) x.set(1, j, kNan);
  const bool mask[] = {true, false, true, true};
  const Forward<T> got(x, dtype, {3, -100, 1000, -1}, 1, mask);  // a masked target is not looked at
  CHECK(got.status == 2);
  CHECK(got.logp[1] == 0 && got.lse[1] == 0 && got.entropy[1] == 0);
  CHECK(std::isfinite(got.logp[0]));
  for (int i : {2, 3}) {
    CHECK(std::isnan(got.logp[i]) && std::isnan(got.lse[i]) && std::isnan(got.entropy[i]));
  }
}

// A row's result does not depend on the range it came in.
template <class T>
void any_split_gives_the_same(Dtype dtype) {
  const Rows<T> x(5, 3001, 3);
  const Forward<T> whole(x, dtype, some_targets(x));
  for (int64_t i = 0; i < x.rows; ++i) {
    Rows<T> one(1, x.vocab, 1, 0, 0);
    std::memcpy(one.data.data(), x.data.data() + i * x.stride, x.vocab * sizeof(T));
    const Forward<T> alone(one, dtype, {whole.target[i]});
    CHECK(alone.logp[0] == whole.logp[i] && alone.lse[0] == whole.lse[i]);
    CHECK(alone.entropy[0] == whole.entropy[i]);
  }
}

// ---------------------------------------------------------------------------------------------
// Backward

template <class T>
struct Gradients {
  using Real = accumulate_t<T>;
  std::vector<Real> logp, lse, entropy;
};

template <class T>
int64_t backward(const Rows<T>& x, Dtype dtype, const Forward<T>& forward, const Gradients<T>& g,
                 double scale, const bool* mask, T* out, int64_t out_stride) {
  const fdpg::TokenLogprobBackwardParams p = {x.data.data(),
                                              out,
                                              dtype,
                                              x.rows,
                                              x.vocab,
                                              x.stride,
                                              out_stride,
                                              forward.target.data(),
                                              mask,
                                              scale,
                                              x.softcap,
                                              forward.lse_exact.data(),
                                              forward.entropy.data(),
                                              g.logp.data(),
                                              g.lse.empty() ? nullptr : g.lse.data(),
                                              g.entropy.empty() ? nullptr : g.entropy.data()};
  return fdpg::cpu::token_logprob_backward(p, 0, x.rows);
}

template <class T>
void gradients(Dtype dtype, double softcap) {
  // Rounding of the storage type, relative to the row's largest gradient.
  const double unit = dtype == Dtype::kFloat64   ? 1e-14
                      : dtype == Dtype::kFloat32 ? 2.5e-7
                      : dtype == Dtype::kFloat16 ? 5e-4
                                                 : 4e-3;
  for (int64_t vocab : {1, 7, 17, 64, 1000, 14019}) {
    for (bool all : {false, true}) {
      const double scale = all ? 0.5 : 1;
      Rows<T> x(3, vocab, 3);
      if (vocab > 2) x.set(0, 1, -kInf);
      if (dtype != Dtype::kFloat16) {
        for (int64_t j = 0; j < vocab; ++j) x.set(2, j, static_cast<double>(x.at(2, j)) - 90);
      }
      x.softcap = softcap;
      const Forward<T> forward(x, dtype, some_targets(x), scale);
      Gradients<T> g = {{1.5, -2, 0.25}, {}, {}};
      if (all) {
        g.lse = {-0.5, 1, 0.125};
        g.entropy = {0.75, -1, 2};
      }
      const int64_t stride = vocab + 3;
      std::vector<T> out(x.rows * stride, fdpg::store<T>(42));
      CHECK(backward(x, dtype, forward, g, scale, nullptr, out.data(), stride) == kOk);
      for (int64_t i = 0; i < x.rows; ++i) {
        const long double most = x.largest(i), log_sum = x.log_sum(i, scale);
        long double entropy = 0;
        for (int64_t j = 0; j < vocab; ++j) {
          const long double l = scale * (x.at(i, j) - most) - log_sum;
          if (std::exp(l) > 0) entropy -= std::exp(l) * l;
        }
        long double worst = 0, size = 0;
        for (int64_t j = 0; j < vocab; ++j) {
          const long double l = scale * (x.at(i, j) - most) - log_sum, q = std::exp(l);
          long double expected = g.logp[i] * ((j == forward.target[i]) - q);
          if (all) expected += g.lse[i] * q - (q > 0 ? g.entropy[i] * q * (l + entropy) : 0);
          expected *= scale * x.slope(i, j);
          const long double error = fdpg::load(out[i * stride + j]) - expected;
          CHECK(std::isfinite(error));
          worst = std::fmax(worst, std::fabs(error));
          size = std::fmax(size, std::fabs(expected));
        }
        CHECK_NEAR(worst, 0, (unit + 2 * x.cap_error()) * std::fmax(size, 1));
        for (int64_t j = vocab; j < stride; ++j) CHECK(fdpg::load(out[i * stride + j]) == 42);
      }
      // In place gives the same bits.
      Rows<T> in_place = x;
      CHECK(backward(in_place, dtype, forward, g, scale, nullptr, in_place.data.data(), x.stride) ==
            kOk);
      for (int64_t i = 0; i < x.rows; ++i) {
        CHECK(std::memcmp(&in_place.data[i * x.stride], &out[i * stride], vocab * sizeof(T)) == 0);
      }
    }
  }
}

template <class T>
void rows_without_gradient(Dtype dtype) {
  Rows<T> x(4, 100, 1);
  const Forward<T> forward(x, dtype, {1, 2, 3, 4});
  for (int64_t j = 0; j < x.vocab; ++j) {
    x.set(0, j, kNan);  // masked
    x.set(1, j, kNan);  // no gradient
  }
  Forward<T> bad = forward;
  bad.target = {-1, 2, 100, 4};
  const bool mask[] = {false, true, true, true};
  std::vector<T> out(x.rows * x.vocab, fdpg::store<T>(42));
  const Gradients<T> g = {{1, 0, 1, 1}, {}, {}};
  CHECK(backward(x, dtype, bad, g, 1, mask, out.data(), x.vocab) == 2);
  for (int64_t j = 0; j < x.vocab; ++j) {
    CHECK(fdpg::load(out[j]) == 0);
    CHECK(fdpg::load(out[x.vocab + j]) == 0);
    CHECK(std::isnan(fdpg::load(out[2 * x.vocab + j])));
    CHECK(std::isfinite(fdpg::load(out[3 * x.vocab + j])));
  }
}

// Temperature near 0: the largest logit has all, though z be beyond the largest number, and no
// gradient; two of them share.
template <class T>
void no_temperature(Dtype dtype) {
  for (double scale : {3e7, 1e10, 1e30, 3e38}) {
    Rows<T> x(2, 3000, 1);
    for (int64_t i : {0, 1}) x.set(i, 2000, 20.3);
    x.set(1, 7, 20.3);
    const Forward<T> got(x, dtype, {2000, 2000}, scale);
    CHECK(got.logp[0] == 0 && got.entropy[0] == 0);
    CHECK_NEAR(got.logp[1], -std::log(2.0), 1e-7);
    CHECK_NEAR(got.entropy[1], std::log(2.0), 1e-7);
    if (scale > 1e37) continue;  // beyond what a gradient has room for

    const Gradients<T> g = {{1, 1}, {0, 0}, {1, 1}};
    std::vector<T> out(2 * x.vocab);
    CHECK(backward(x, dtype, got, g, scale, nullptr, out.data(), x.vocab) == kOk);
    for (int64_t j = 0; j < x.vocab; ++j) {
      CHECK(fdpg::load(out[j]) == 0);
      const double expected = scale * (j == 2000 ? 0.5 : j == 7 ? -0.5 : 0);
      // The log of 2 is lost in a log-sum-exp of 2e31, and fp16 ends at 65504.
      if (scale > 1e13 || dtype == Dtype::kFloat16) continue;
      CHECK_NEAR(fdpg::load(out[x.vocab + j]), expected, 0.01 * std::fabs(expected));
    }
  }
}

}  // namespace

int main() {
  for_each_isa([](const std::string& isa) {
    std::printf("%s\n", isa.c_str());
    a_low_first_block();
    tanh_is_accurate(isa);
    for_each_dtype([](Dtype dtype, auto tag) {
      using T = decltype(tag);
      for (double softcap : {0.0, 5.0, 30.0}) values<T>(dtype, softcap);
      rising_rows<T>(dtype);
      nothing_but_nan<T>(dtype);
      a_softcap_bounds_infinity<T>(dtype);
      if (dtype != Dtype::kFloat16) {
        unusual_values<T>(dtype);
        enormous_logits<T>(dtype);
      }
      no_temperature<T>(dtype);
      masks_and_bad_targets<T>(dtype);
      any_split_gives_the_same<T>(dtype);
      for (double softcap : {0.0, 3.0}) gradients<T>(dtype, softcap);
      rows_without_gradient<T>(dtype);
    });
  });
  return test_result();
}
