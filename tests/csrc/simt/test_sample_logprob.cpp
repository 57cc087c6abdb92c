// sample_logprob on CUDA: the token that inverting the distribution in fp64 gives, bit for bit
// under every schedule and in any batch.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "fdpg/cpu.h"
#include "fdpg/random.h"
#include "harness.h"
//
#include "sample_logprob.cu"  // its launchers and kernels, built for the emulator or for the device

using namespace fdpg;

namespace {

template <class T>
struct Case {
  using A = accumulate_t<T>;
  int64_t rows, vocab, stride;
  double inv_temperature, softcap;
  Buffer<T> logits;
  Buffer<int64_t> seed, sample_id, position;
  Buffer<int64_t> token;
  Buffer<A> logp, lse, entropy;

  Case(int64_t rows, int64_t vocab, int64_t padding, int offset, double inv_temperature = 1,
       double softcap = 0)
      : rows(rows),
        vocab(vocab),
        stride(vocab + padding),
        inv_temperature(inv_temperature),
        softcap(softcap),
        logits(rows ? (rows - 1) * stride + vocab : 0, offset),
        seed(std::vector<int64_t>{0x123456789abcdef}),
        sample_id(rows),
        position(rows),
        token(rows),
        logp(rows),
        lse(rows),
        entropy(rows) {
    std::mt19937 random(static_cast<unsigned>(vocab));
    std::normal_distribution<double> normal(0, 3);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < vocab; ++j) {
        const bool banned = row % 3 == 2 && j % 2 == 0 && j + 1 < vocab;
        logits[row * stride + j] = store<T>(static_cast<A>(banned ? -INFINITY : normal(random)));
      }
      if (row + 1 < rows) logits.forbid(row * stride + vocab, padding);
      sample_id[row] = 7 * row;
      position[row] = row % 5;
    }
  }
  ~Case() { logits.allow(0, logits.size()); }

  SampleLogprobParams params(bool want_entropy = true) {
    SampleLogprobParams p{};
    p.logits = logits.data();
    visit_dtype_of(p);
    p.rows = rows;
    p.vocab = vocab;
    p.row_stride = stride;
    p.inv_temperature = inv_temperature;
    p.softcap = softcap;
    p.seed = seed.data();
    p.sample_id = sample_id.data();
    p.position = position.data();
    p.token = token.data();
    p.logp = logp.data();
    p.lse = lse.data();
    p.entropy = want_entropy ? entropy.data() : nullptr;
    return p;
  }

  void run(bool want_entropy = true) {
    const SampleLogprobParams p = params(want_entropy);
    Buffer<unsigned char> workspace(static_cast<int64_t>(cuda::sample_logprob_workspace(p)));
    run_on_device([&] { return cuda::sample_logprob(p, workspace.data(), nullptr); });
  }

  static void visit_dtype_of(SampleLogprobParams& p) {
#define FDPG_SAME(id, Type) \
  if (std::is_same_v<T, Type>) p.dtype = Dtype::id;
    FDPG_DTYPES(FDPG_SAME)
#undef FDPG_SAME
  }

  double z(int64_t row, int64_t j) const {
    const double x = load(logits[row * stride + j]);
    return inv_temperature * (softcap > 0 ? softcap * std::tanh(x / softcap) : x);
  }

  // Tokens, and their log-probs, by one running sum in fp64.
  void check() const {
    for (int64_t row = 0; row < rows; ++row) {
      double max = -INFINITY, total = 0;
      for (int64_t j = 0; j < vocab; ++j) max = std::max(max, z(row, j));
      double mean = 0;
      for (int64_t j = 0; j < vocab; ++j) {
        const double d = z(row, j) - max, weight = std::exp(d);
        total += weight;
        if (weight > 0) mean += weight * d;
      }
      const double goal = total * random_uniform(seed[0], sample_id[row], position[row]);
      double below = 0;
      int64_t expected = 0;
      for (; expected < vocab; ++expected) {
        below += std::exp(z(row, expected) - max);
        if (below > goal) break;
      }
      CHECK(token[row] == expected);
      const double log_total = max + std::log(total);
      CHECK_NEAR(lse[row], log_total, 3e-7 * (5 + std::fabs(log_total)));
      CHECK_NEAR(logp[row], z(row, expected) - log_total, 4e-6);
      CHECK_NEAR(entropy[row], std::log(total) - mean / total, 4e-6);
    }
  }
};

template <class T>
void every_size() {
  struct Shape {
    int64_t rows, vocab, padding;
    int offset;
  };
  for (const Shape& shape : {Shape{3, 1, 0, 0}, Shape{40, 7, 2, 1}, Shape{40, 31, 0, 1},
                             Shape{9, 1000, 24, 0}, Shape{9, 8003, 0, 3}, Shape{0, 5, 0, 0}}) {
    const double inv_temperature = shape.vocab == 8003 ? 0.7 : 1.0;
    const double softcap = shape.padding ? 5 : 0;
    Case<T> c(shape.rows, shape.vocab, shape.padding, shape.offset, inv_temperature, softcap);
    std::vector<int64_t> tokens;
    for_each_schedule([&](int schedule) {
      c.run();
      if (schedule == 0) tokens.assign(c.token.data(), c.token.data() + shape.rows);
      CHECK(same_bits(c.token, tokens));
    });
    c.check();
    const std::vector<accumulate_t<T>> logp(c.logp.data(), c.logp.data() + shape.rows);
    c.run(/*want_entropy=*/false);
    CHECK(same_bits(c.token, tokens) && same_bits(c.logp, logp));
    CHECK(cpu::sample_logprob(c.params(), 0, shape.rows) == kOk);
    CHECK(same_bits(c.token, tokens));  // the CPU draws the same
  }
}

// The same is chosen whatever lies beside the row.
template <class T>
void rows_of_several_runs(int64_t vocab) {
  Case<T> c(4, vocab, 0, 1);
  c.run();
  c.check();
  for (int64_t row = 0; row < 4; ++row) {
    Case<T> alone(1, vocab, 0, 0);
    for (int64_t j = 0; j < c.vocab; ++j) alone.logits[j] = c.logits[row * c.stride + j];
    alone.sample_id[0] = c.sample_id[row];
    alone.position[0] = c.position[row];
    alone.run();
    CHECK(alone.token[0] == c.token[row]);
    CHECK(alone.logp[0] == c.logp[row] && alone.lse[0] == c.lse[row]);
    CHECK(alone.entropy[0] == c.entropy[row]);
  }
}

// A token that has nearly all the probability is drawn, wherever in the row it stands: at either
// side of an edge of spans and runs.
template <class T>
void every_token(int64_t vocab) {
  constexpr int64_t kRows = 40;
  Case<T> c(kRows, vocab, 0, 1);
  for (int64_t row = 0; row < kRows; ++row) {
    const int64_t edge = (row / 2) * (vocab / (kRows / 2)) / 64 * 64;
    const int64_t likely = row == 0 ? vocab - 1 : row % 2 ? edge : std::max<int64_t>(edge - 1, 0);
    for (int64_t j = 0; j < vocab; ++j) {
      c.logits[row * vocab + j] = store<T>(j == likely ? 60 : row % 3 ? 0 : -INFINITY);
    }
    c.token[row] = likely;
  }
  const std::vector<int64_t> likely(c.token.data(), c.token.data() + kRows);
  c.run();
  CHECK(same_bits(c.token, likely));
  for (int64_t row = 0; row < kRows; ++row) CHECK(c.logp[row] == 0 && c.lse[row] == 60);
}

// Whole runs of a number that stands for -inf, which a temperature rounds by more than an
// exponential can hold, or takes beyond the largest number.
template <class T>
void masked_by_a_number(double mask) {
  Case<T> c(6, 20000, 0, 0, 1.3);
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t begin = row % 2 * 8000;
    for (int64_t j = begin; j < begin + 12000; ++j) {
      c.logits[row * c.stride + j] = store<T>(static_cast<accumulate_t<T>>(mask));
    }
  }
  c.run();
  c.check();
  const std::vector<int64_t> tokens(c.token.data(), c.token.data() + c.rows);
  CHECK(cpu::sample_logprob(c.params(), 0, c.rows) == kOk);
  CHECK(same_bits(c.token, tokens));
}

// Temperature near 0: the largest logit is drawn, for certain.
void no_temperature() {
  for (const double inv_temperature : {1e9, 1e20, 1e37}) {
    Case<float> c(6, 20000, 0, 0, inv_temperature);
    for (int64_t row = 0; row < c.rows; ++row) c.logits[row * c.stride + 9000 + row] = 50;
    for (const bool on_cpu : {false, true}) {
      if (on_cpu) {
        CHECK(cpu::sample_logprob(c.params(), 0, c.rows) == kOk);
      } else {
        c.run();
      }
      for (int64_t row = 0; row < c.rows; ++row) {
        CHECK(c.token[row] == 9000 + row && c.logp[row] == 0);
      }
    }
  }
}

// 2000 draws of one distribution: chi-squared, and a token without probability is never drawn.
void law() {
  constexpr int64_t kDraws = 2000, kVocab = 40;
  Case<float> c(kDraws, kVocab, 0, 0);
  std::vector<double> weight(kVocab), count(kVocab);
  double total = 0;
  for (int64_t j = 0; j < kVocab; ++j) {
    weight[j] = j == 17 ? 0 : 1.0 + static_cast<double>(j % 5);
    total += weight[j];
    for (int64_t row = 0; row < kDraws; ++row) {
      c.logits[row * kVocab + j] = static_cast<float>(std::log(weight[j]));
    }
  }
  c.run();
  for (int64_t row = 0; row < kDraws; ++row) count[c.token[row]] += 1;
  double chi_squared = 0;
  for (int64_t j = 0; j < kVocab; ++j) {
    const double expected = kDraws * weight[j] / total;
    if (expected > 0) chi_squared += (count[j] - expected) * (count[j] - expected) / expected;
  }
  CHECK(count[17] == 0);
  CHECK(chi_squared < 38 + 4 * std::sqrt(2 * 38.0));  // 38 degrees of freedom
}

// Behind a token that has all but 3e-6, 7999 others: of ten million uniforms the thirty or so that
// point at one of them draw the one that fp64 says.
void rare_tokens() {
  constexpr int64_t kVocab = 8000;
  constexpr double kTail = 3e-6;
  std::vector<int64_t> ids;
  for (int64_t id = 0; id < 10'000'000; ++id) {
    if (random_uniform(0x123456789abcdef, id, 0) > 1 - kTail) ids.push_back(id);
  }
  CHECK(ids.size() > 8 && ids.size() < 60);
  Case<double> c(static_cast<int64_t>(ids.size()), kVocab, 0, 0);
  Case<float> narrow(c.rows, kVocab, 0, 0);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t j = 0; j < kVocab; ++j) {
      const float logit = j == 0 ? 0 : static_cast<float>(std::log(kTail / 7999));
      c.logits[row * kVocab + j] = narrow.logits[row * kVocab + j] = logit;
    }
    c.sample_id[row] = narrow.sample_id[row] = ids[row];
    c.position[row] = narrow.position[row] = 0;
  }
  c.run();
  c.check();
  narrow.run();
  for (int64_t row = 0; row < c.rows; ++row) {
    CHECK(c.token[row] > 0);
    CHECK(std::llabs(narrow.token[row] - c.token[row]) <= 400);  // 1e-7 of the row: 270 tokens
    CHECK_NEAR(narrow.logp[row], std::log(kTail / 7999), 4e-6);
  }
}

void rows_without_an_answer() {
  constexpr int64_t kVocab = 20000;
  Case<float> c(5, kVocab, 0, 0);
  for (int64_t j = 0; j < kVocab; ++j) c.logits[j] = -INFINITY;
  c.logits[1 * kVocab + 19000] = NAN;
  c.logits[2 * kVocab + 3] = INFINITY;
  for (int64_t j = 0; j < kVocab; ++j) c.logits[4 * kVocab + j] = j == 5 ? NAN : -INFINITY;
  c.run();
  for (const int64_t row : {0, 1, 2, 4}) {
    CHECK(c.token[row] == 0);
    CHECK(std::isnan(c.logp[row]) && std::isnan(c.lse[row]) && std::isnan(c.entropy[row]));
  }
  CHECK(std::isfinite(c.logp[3]) && std::isfinite(c.lse[3]));
}

}  // namespace

int main() {
  return run_tests([] {
    every_size<float>();
    every_size<BFloat16>();
    every_size<Float16>();
    every_size<double>();
    rows_of_several_runs<float>(50257);
    rows_of_several_runs<BFloat16>(50257);
    rows_of_several_runs<float>(2048);  // one run, and one element more
    rows_of_several_runs<float>(2049);
    rows_of_several_runs<BFloat16>(4096);
    rows_of_several_runs<BFloat16>(4097);
    rows_of_several_runs<BFloat16>(140000);  // more spans than a lane looks at at once
    every_token<float>(2100);
    every_token<BFloat16>(16600);
    for (const double mask : {-1e10, -3e38}) {
      masked_by_a_number<float>(mask);
      masked_by_a_number<BFloat16>(mask);
    }
    no_temperature();
    law();
    rare_tokens();
    rows_without_an_answer();
  });
}
