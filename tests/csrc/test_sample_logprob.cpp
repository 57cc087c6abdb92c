// sample_logprob: the law, far into the tail; the key; its log-prob; rows that cannot be sampled.
#include <algorithm>  // sort
#include <cstring>    // memcpy
#include <initializer_list>

#include "check.h"
#include "fdpg/random.h"
#include "rows.h"

namespace {

using fdpg::accumulate_t;
using fdpg::Dtype;
using fdpg::kOk;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

template <class T>
struct Draws {
  using Real = accumulate_t<T>;
  std::vector<int64_t> sample_id, position, token;
  std::vector<Real> logp, lse, entropy;

  // Rows of `x`; or, if there is but one, that row `draws` times over (a row stride of 0).
  Draws(const Rows<T>& x, Dtype dtype, int64_t seed, int64_t draws, int64_t first_id = 0,
        double scale = 1)
      : sample_id(draws),
        position(draws),
        token(draws, -7),
        logp(draws, 7),
        lse(draws, 7),
        entropy(draws, 7) {
    for (int64_t i = 0; i < draws; ++i) {
      sample_id[i] = first_id + i;
      position[i] = i % 3;
    }
    const fdpg::SampleLogprobParams p = {
        x.data.data(), dtype,       draws,      x.vocab,          x.rows == 1 ? 0 : x.stride,
        scale,         x.softcap,   &seed,      sample_id.data(), position.data(),
        token.data(),  logp.data(), lse.data(), entropy.data()};
    CHECK(fdpg::cpu::sample_logprob(p, 0, draws) == kOk);
  }
};

// By hand: the first token whose cumulative probability exceeds the uniform. Tokens agree unless
// the uniform falls within rounding of a border.
template <class T>
void inverts_the_cumulative_distribution(Dtype dtype, double softcap) {
  for (int64_t vocab : {1, 2, 7, 64, 65, 1000, 1025, 14019, 50257}) {
    const double scale = vocab % 2 ? 1 : 0.7;
    const double s = static_cast<accumulate_t<T>>(scale);
    Rows<T> x(vocab > 10000 ? 4 : 12, vocab, 3, static_cast<int>(vocab));
    x.softcap = softcap;
    const Draws<T> got(x, dtype, 11, x.rows, 1000, scale);
    for (int64_t i = 0; i < x.rows; ++i) {
      const double u = fdpg::random_uniform(11, got.sample_id[i], got.position[i]);
      CHECK(got.token[i] >= 0 && got.token[i] < vocab);
      const long double log_sum = x.log_sum(i, s), most = x.largest(i);
      long double below = 0;
      for (int64_t j = 0; j < got.token[i]; ++j) {
        below += std::exp(s * (x.at(i, j) - most) - log_sum);
      }
      const long double logp = x.logp(i, got.token[i], s);
      CHECK(below - 2e-6L <= u && u <= below + std::exp(logp) + 2e-6L);
      // Without fma, scale u is rounded before the offset is taken away.
      const bool exact = scale == 1 && softcap == 0;
      const double rounded = exact ? 0 : 6e-8 * std::fabs(s * most) + 2 * x.cap_error();
      CHECK_NEAR(got.logp[i], logp, 6e-8 * std::fabs(logp) + 2e-7 + rounded);
      CHECK_NEAR(got.lse[i], s * most + log_sum,
                 6e-8 * std::fabs(s * most + log_sum) + 2e-7 + x.cap_error());
    }
  }
}

// 10^6 draws from one row, tokens binned by probability so that each bin expects at least 40.
template <class T>
void chi_squared(Dtype dtype, int64_t vocab) {
  constexpr int64_t kDraws = 1000000;
  const Rows<T> x(1, vocab, 2, 5);
  const Draws<T> got(x, dtype, 3, kDraws);
  std::vector<double> p(vocab);
  std::vector<int64_t> order(vocab), count(vocab);
  for (int64_t j = 0; j < vocab; ++j) {
    p[j] = std::exp(x.logp(0, j, 1));
    order[j] = j;
  }
  for (int64_t token : got.token) ++count[token];
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p[a] < p[b]; });
  double statistic = 0, expected = 0, seen = 0, bins = 0;
  for (int64_t j : order) {
    expected += p[j] * kDraws;
    seen += count[j];
    if (expected >= 40) {
      statistic += (seen - expected) * (seen - expected) / expected;
      expected = seen = 0;
      ++bins;
    }
  }
  const double freedom = bins - 1;
  CHECK_NEAR(statistic, freedom, 5 * std::sqrt(2 * freedom));
}

// One token of probability near 1, and vocab - 1 others that share `mass`: draws * mass = 30 of
// them are expected, before the likely one and behind it, in its block and in others. A search that
// compares the uniform with a running fp32 sum cannot tell them from the end of the row.
void rare_tokens_are_drawn(int64_t vocab, int64_t place, int64_t draws) {
  const double mass = 30. / draws;
  Rows<float> x(1, vocab, 0);
  for (int64_t j = 0; j < vocab; ++j) x.set(0, j, std::log(mass / (vocab - 1)));
  x.set(0, place, 0);
  const Draws<float> got(x, Dtype::kFloat32, 17, draws);
  int64_t rare = 0, before = 0;
  for (int64_t token : got.token) {
    rare += token != place;
    before += token < place;
  }
  CHECK_NEAR(rare, 30, 4 * std::sqrt(30));
  const double share = place / (vocab - 1.);
  CHECK_NEAR(before, rare * share, 4 * std::sqrt(rare * share * (1 - share)) + 1e-9);
}

// The same within the 64 tokens that are searched one by one: 63 tokens of probability 5e-8, less
// than the spacing of fp32 numbers at 1, behind a likely one. 31 of 10^7 draws, spread over them.
void rare_tokens_among_neighbours() {
  Rows<float> x(1, 64, 0);
  for (int64_t j = 1; j < x.vocab; ++j) x.set(0, j, std::log(5e-8));
  int64_t rare = 0, early = 0;
  for (int64_t i = 0; i < 10; ++i) {
    const Draws<float> got(x, Dtype::kFloat32, 19, 1000000, i * 1000000);
    for (int64_t token : got.token) {
      rare += token > 0;
      early += token > 0 && token < 32;
    }
  }
  CHECK_NEAR(rare, 31.5, 4 * std::sqrt(31.5));
  CHECK_NEAR(early, 0.5 * rare, 4 * std::sqrt(0.25 * rare));
}

// Nothing of probability zero, be it first, last, alone in its block, or all but one of them.
template <class T>
void never_a_masked_token(Dtype dtype) {
  for (int64_t vocab : {2, 65, 2500, 50257}) {
    for (int64_t allowed : {int64_t{0}, vocab / 2, vocab - 1}) {
      Rows<T> x(1, vocab, 0);
      for (int64_t j = 0; j < vocab; ++j) x.set(0, j, -kInf);
      x.set(0, allowed, 3);
      const Draws<T> got(x, dtype, 1, 20);
      for (int i = 0; i < 20; ++i) CHECK(got.token[i] == allowed && got.logp[i] == 0);
    }
  }
  Rows<T> x(1, 3000, 1);
  for (int64_t j = 0; j < x.vocab; ++j) {
    if (j % 3 || j / 1000 == 1) x.set(0, j, -kInf);
  }
  const Draws<T> got(x, dtype, 2, 5000);
  for (int64_t token : got.token) CHECK(token % 3 == 0 && token / 1000 != 1);
}

template <class T>
void rows_that_cannot_be_sampled(Dtype dtype) {
  Rows<T> x(6, 2500, 1);
  for (int64_t j = 0; j < x.vocab; ++j) {
    x.set(1, j, -kInf);
    if (j < 1024) x.set(5, j, kNan);
  }
  x.set(2, 2400, kNan);
  x.set(3, 1, kInf);
  const Draws<T> got(x, dtype, 1, x.rows);
  for (int i : {1, 2, 3, 5}) {
    CHECK(got.token[i] == 0);
    CHECK(std::isnan(got.logp[i]) && std::isnan(got.lse[i]) && std::isnan(got.entropy[i]));
  }
  for (int i : {0, 4}) CHECK(std::isfinite(got.logp[i]) && std::isfinite(got.lse[i]));
}

// The key decides, not the place in the batch; and each part of the key decides.
template <class T>
void keyed(Dtype dtype) {
  const Rows<T> x(6, 2000, 2);
  const Draws<T> whole(x, dtype, 5, x.rows, 100);
  for (int64_t i = 0; i < x.rows; ++i) {
    Rows<T> one(1, x.vocab, 1);
    std::memcpy(one.data.data(), &x.data[i * x.stride], x.vocab * sizeof(T));
    Draws<T> alone(one, dtype, 5, 7, 100);  // ids 100..106 of the same row
    CHECK(alone.token[i] == whole.token[i]);
    CHECK(alone.logp[i] == whole.logp[i] && alone.lse[i] == whole.lse[i]);
  }
  const Draws<T> again(x, dtype, 5, x.rows, 100), other_seed(x, dtype, 6, x.rows, 100),
      other_ids(x, dtype, 5, x.rows, 103);
  CHECK(again.token == whole.token);
  CHECK(other_seed.token != whole.token);
  CHECK(other_ids.token != whole.token);
}

// What the sampler records is what scoring gives, to the bit; and with no entropy the same.
template <class T>
void agrees_with_token_logprob(Dtype dtype, double softcap) {
  Rows<T> x(8, 14019, 4);
  x.softcap = softcap;
  const Draws<T> got(x, dtype, 5, x.rows, 0, 0.7);
  std::vector<accumulate_t<T>> logp(x.rows), lse(x.rows), entropy(x.rows);
  std::vector<double> lse_exact(x.rows);
  const fdpg::TokenLogprobParams p = {
      x.data.data(), dtype,   x.rows,      x.vocab,    x.stride,       got.token.data(), nullptr,
      0.7,           softcap, logp.data(), lse.data(), entropy.data(), lse_exact.data()};
  CHECK(fdpg::cpu::token_logprob(p, 0, x.rows) == kOk);
  CHECK(logp == got.logp && lse == got.lse && entropy == got.entropy);
}

// Vocabularies beyond 512 blocks of 1024 have longer blocks.
void a_huge_vocabulary() {
  Rows<float> x(1, 1300000, 1, 0, 0);
  const Draws<float> got(x, Dtype::kFloat32, 5, x.rows);
  for (int64_t i = 0; i < x.rows; ++i) {
    const double u = fdpg::random_uniform(5, got.sample_id[i], got.position[i]);
    const long double log_sum = x.log_sum(i, 1), most = x.largest(i);
    long double below = 0;
    for (int64_t j = 0; j < got.token[i]; ++j) below += std::exp(x.at(i, j) - most - log_sum);
    CHECK_NEAR(below, u, 2e-6);
    CHECK_NEAR(got.logp[i], x.logp(i, got.token[i], 1), 2e-6);
  }
  std::vector<float> logp(x.rows), lse(x.rows);
  std::vector<double> lse_exact(x.rows);
  const fdpg::TokenLogprobParams p = {x.data.data(),
                                      Dtype::kFloat32,
                                      x.rows,
                                      x.vocab,
                                      x.stride,
                                      got.token.data(),
                                      nullptr,
                                      1,
                                      0,
                                      logp.data(),
                                      lse.data(),
                                      nullptr,
                                      lse_exact.data()};
  CHECK(fdpg::cpu::token_logprob(p, 0, x.rows) == kOk);
  CHECK(logp == got.logp && lse == got.lse);
}

}  // namespace

int main() {
  for_each_isa([](const std::string& isa) {
    std::printf("%s\n", isa.c_str());
    for_each_dtype([](Dtype dtype, auto tag) {
      using T = decltype(tag);
      for (double softcap : {0.0, 5.0}) {
        inverts_the_cumulative_distribution<T>(dtype, softcap);
        agrees_with_token_logprob<T>(dtype, softcap);
      }
      never_a_masked_token<T>(dtype);
      rows_that_cannot_be_sampled<T>(dtype);
      keyed<T>(dtype);
    });
    chi_squared<float>(Dtype::kFloat32, 300);
    rare_tokens_are_drawn(3000, 1500, 100000);
    a_huge_vocabulary();
  });
  // On the best instruction set, which is the one chosen last.
  chi_squared<fdpg::BFloat16>(Dtype::kBFloat16, 2000);
  rare_tokens_among_neighbours();
  rare_tokens_are_drawn(3000, 0, 100000);
  rare_tokens_are_drawn(3000, 1023, 100000);
  rare_tokens_are_drawn(3000, 2999, 100000);
  rare_tokens_are_drawn(15001, 7000, 1000000);  // 2e-9 each
  return test_result();
}
