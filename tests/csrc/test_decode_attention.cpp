// One query per sequence over the live keys of a cache, against long double: every instruction set
// and dtype, sizes that end inside a vector, spans that cross blocks, poison outside of them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "attention.h"
#include "check.h"
#include "fdpg/cpu.h"
#include "fdpg/types.h"
#include "rows.h"

using namespace fdpg;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A cache with room between its rows, and everything that is not live NaN.
template <class T>
struct Problem {
  Shape s;
  std::vector<int64_t> begin, end, rows;
  std::vector<accumulate_t<T>> bias, sinks;
  std::vector<T> query, keys, values, out;

  static constexpr int64_t kRoom = 3;

  explicit Problem(const Shape& s) : s(s) {
    std::mt19937 engine(static_cast<unsigned>(s.tokens));
    std::normal_distribution<double> normal(0, 1.5);
    for (int64_t b = 0; b < s.sequences; ++b) {
      end.push_back(b + 1 == s.sequences ? s.tokens
                                         : static_cast<int64_t>(engine() % (s.tokens + 1)));
      begin.push_back(end.back() == 0 ? 0 : static_cast<int64_t>(engine() % end.back()));
      rows.push_back(s.row_of(b));
    }
    // Half of those that share a row have the same span, the others each their own.
    for (int64_t b = 1; s.rows > 0 && b < s.sequences; ++b) {
      if (b / 11 % 2 == 0 && rows[b] == rows[b - 1]) begin[b] = begin[b - 1], end[b] = end[b - 1];
    }
    auto number = [&](bool live) {
      return store<T>(static_cast<accumulate_t<T>>(live ? normal(engine) : kNan));
    };
    for (int64_t i = 0; i < s.sequences * s.heads * (s.size + kRoom); ++i) {
      query.push_back(number(i % (s.size + kRoom) < s.size));
    }
    for (int64_t row = 0; row < s.cache_rows(); ++row) {
      for (int64_t i = 0; i < s.key_heads * s.tokens; ++i) {
        const int64_t t = i % s.tokens;
        bool live = false;
        for (int64_t b = 0; b < s.sequences; ++b) {
          live = live || (rows[b] == row && begin[b] <= t && t < end[b]);
        }
        for (int64_t d = 0; d < s.size + kRoom; ++d) keys.push_back(number(live && d < s.size));
        for (int64_t e = 0; e < s.value_size + kRoom; ++e) {
          values.push_back(number(live && e < s.value_size));
        }
      }
    }
    for (int64_t i = 0; i < s.heads * (s.tokens + kRoom); ++i) {
      bias.push_back(static_cast<float>(i % (s.tokens + kRoom) < s.tokens ? normal(engine) : kNan));
    }
    for (int64_t h = 0; h < s.heads; ++h) sinks.push_back(static_cast<float>(normal(engine)));
    out.resize(s.sequences * s.heads * s.value_size, number(true));
  }

  DecodeAttentionParams params(Dtype dtype) { return params_of(*this, dtype, kRoom, kRoom); }

  long double truth(int64_t b, int64_t h, int64_t e) const {
    const int64_t row = (rows[b] * s.key_heads + h / (s.heads / s.key_heads)) * s.tokens;
    std::vector<long double> score;
    long double most = -INFINITY;
    for (int64_t t = begin[b]; t < end[b]; ++t) {
      long double sum = 0;
      for (int64_t d = 0; d < s.size; ++d) {
        sum += static_cast<long double>(load(query[(b * s.heads + h) * (s.size + kRoom) + d])) *
               load(keys[(row + t) * (s.size + kRoom) + d]);
      }
      sum *= kScale;
      if (s.softcap > 0) sum = s.softcap * std::tanh(sum / s.softcap);
      if (s.bias) sum += bias[h * (s.tokens + kRoom) + s.tokens - end[b] + t];
      score.push_back(sum);
      most = std::max(most, sum);
    }
    if (score.empty()) return 0;
    long double norm = s.sinks ? std::exp(sinks[h] - most) : 0, out = 0;
    for (size_t i = 0; i < score.size(); ++i) {
      const long double w = std::exp(score[i] - most);
      const int64_t t = begin[b] + static_cast<int64_t>(i);
      norm += w;
      out += w * load(values[(row + t) * (s.value_size + kRoom) + e]);
    }
    return out / norm;
  }
};

// Of a sum of numbers of size 1.5 or so; 16-bit results are rounded once.
template <class T>
constexpr double kTolerance = sizeof(T) == 8   ? 1e-13
                              : sizeof(T) == 4 ? 4e-6
                                               : 2e-3;
template <>
constexpr double kTolerance<BFloat16> = 1.6e-2;

void test_against_long_double(const std::string& isa) {
  for (const Shape& s :
       {Shape{1, 1, 1, 1, 1, 1, 0, false}, Shape{6, 4, 2, 37, 8, 8, 0, false},
        Shape{3, 20, 2, 300, 17, 33, 0, true}, Shape{4, 3, 3, 257, 64, 16, 2, true},
        Shape{2, 2, 1, 129, 40, 128, 0.5, false}, Shape{50, 2, 2, 140, 16, 24, 0, true, 3, true},
        Shape{40, 2, 2, 33, 8, 8, 2, false, 3, true}, Shape{40, 4, 2, 33, 8, 8, 0, false, 4, false},
        Shape{3, 6, 2, 300, 8, 8, 2, true, 0, true}}) {
    for_each_dtype([&](Dtype dtype, auto tag) {
      using T = decltype(tag);
      Problem<T> problem(s);
      const auto p = problem.params(dtype);
      CHECK(cpu::decode_attention(p, 0, s.sequences * s.key_heads) == kOk);
      double worst = 0;
      for (int64_t i = 0; i < static_cast<int64_t>(problem.out.size()); ++i) {
        const int64_t e = i % s.value_size, h = i / s.value_size % s.heads;
        const long double truth = problem.truth(i / s.value_size / s.heads, h, e);
        const double error = std::fabs(static_cast<double>(load(problem.out[i]) - truth));
        worst = error <= worst ? worst : error;  // NaN is worst
      }
      if (!(worst <= kTolerance<T>)) std::printf("%s: off by %g\n", isa.c_str(), worst);
      CHECK(worst <= kTolerance<T>);
    });
  }
}

void test_reports_the_first_bad_span_and_does_the_rest(const std::string&) {
  Problem<float> problem({3, 2, 2, 5, 8, 4});
  problem.begin = {0, 0, 0};
  problem.end = {0, 6, 0};
  CHECK(cpu::decode_attention(problem.params(Dtype::kFloat32), 0, 6) == 1);
  CHECK(problem.out[0] == 0 && problem.out[7] == 0);
  for (int i = 8; i < 16; ++i) CHECK(std::isnan(problem.out[i]));
  CHECK(problem.out[16] == 0 && problem.out[23] == 0);
}

void test_reports_the_first_row_that_is_none(const std::string&) {
  for (const int64_t bad : {-1, 2}) {
    Problem<float> problem({4, 2, 2, 5, 8, 4, 0, false, 2});
    problem.begin = {0, 0, 0, 0};
    problem.end = {5, 5, 5, 5};
    problem.rows = {0, 0, bad, 0};
    for (float& x : problem.keys) x = 1;
    for (float& x : problem.values) x = 1;
    CHECK(cpu::decode_attention(problem.params(Dtype::kFloat32), 0, 8) == 2);
    for (int i = 0; i < 32; ++i)
      CHECK(i / 8 == 2 ? std::isnan(problem.out[i]) : problem.out[i] == 1);
  }
}

void test_the_first_is_named_whatever_the_order(const std::string&) {
  Problem<float> problem({4, 2, 2, 5, 8, 4, 0, false, 2});
  problem.begin = {0, 0, 0, 0};
  problem.end = {9, 5, 5, 9};
  CHECK(cpu::decode_attention(problem.params(Dtype::kFloat32), 3, 8) == 0);
}

// Of the first keys, and of all.
void test_keys_of_minus_infinity_weigh_nothing(const std::string&) {
  for (const bool sinks : {false, true}) {
    Problem<float> problem({1, 1, 1, 300, 8, 8, 0, sinks, 0, true});
    problem.begin = {0};
    problem.end = {300};
    for (float& x : problem.keys) x = 0;
    for (float& x : problem.values) x = 2;
    problem.sinks[0] = -std::numeric_limits<float>::infinity();
    for (int t = 0; t < 300; ++t) {
      problem.bias[t] = t < 200 ? -std::numeric_limits<float>::infinity() : 0;
    }
    CHECK(cpu::decode_attention(problem.params(Dtype::kFloat32), 0, 1) == kOk);
    for (const float x : problem.out) CHECK(std::fabs(x - 2) < 1e-6f);
    for (float& x : problem.bias) x = -std::numeric_limits<float>::infinity();
    CHECK(cpu::decode_attention(problem.params(Dtype::kFloat32), 0, 1) == kOk);
    for (const float x : problem.out) CHECK(std::isnan(x));
  }
}

// Whether it is taken with others depends on what else there is.
void test_sharing_a_row_changes_no_bit(const std::string&) {
  Problem<float> problem({40, 2, 2, 150, 17, 24, 0, true, 3, true});
  const auto p = problem.params(Dtype::kFloat32);
  CHECK(cpu::decode_attention(p, 0, 80) == kOk);
  const std::vector<float> together = problem.out;
  std::fill(problem.out.begin(), problem.out.end(), -7.0f);
  for (int i = 0; i < 80; ++i) CHECK(cpu::decode_attention(p, i, i + 1) == kOk);
  CHECK(problem.out == together);
}

void test_a_range_touches_only_its_items(const std::string&) {
  Problem<float> problem({2, 2, 2, 5, 8, 4});
  std::fill(problem.out.begin(), problem.out.end(), -7.0f);
  CHECK(cpu::decode_attention(problem.params(Dtype::kFloat32), 3, 4) == kOk);
  for (int i = 0; i < 12; ++i) CHECK(problem.out[i] == -7.0f);
  CHECK(problem.out[12] != -7.0f);
}

void test_append() {
  // (2, 1, 4, 1) bytes, one of padding behind each sequence; one and two new tokens.
  std::vector<char> keys = {0, 0, 0, 0, 9, 0, 0, 0, 0, 9}, values = keys;
  const std::vector<char> new_keys = {1, 2, 3, 4}, new_values = {5, 6, 7, 8};
  const std::vector<int64_t> position = {2, 0};
  CacheAppendParams p{};
  p.parts[0] = {keys.data(), new_keys.data(), 1, {5, 4, 1}, {2, 2, 1}};
  p.parts[1] = {values.data(), new_values.data(), 1, {5, 4, 1}, {2, 2, 1}};
  p.sequences = 2;
  p.heads = 1;
  p.tokens = 4;
  p.queries = 2;
  p.position = position.data();
  CHECK(cpu::cache_append(p, 0, 2) == kOk);
  CHECK((keys == std::vector<char>{0, 0, 1, 2, 9, 3, 4, 0, 0, 9}));
  CHECK((values == std::vector<char>{0, 0, 5, 6, 9, 7, 8, 0, 0, 9}));
  const std::vector<int64_t> past = {3, 2};
  p.position = past.data();
  CHECK(cpu::cache_append(p, 0, 2) == 0);  // and sequence 1 is written all the same
  CHECK((keys == std::vector<char>{0, 0, 1, 2, 9, 3, 4, 3, 4, 9}));
}

}  // namespace

int main() {
  test_append();
  for_each_isa(test_against_long_double);
  for_each_isa(test_reports_the_first_bad_span_and_does_the_rest);
  for_each_isa(test_reports_the_first_row_that_is_none);
  for_each_isa(test_the_first_is_named_whatever_the_order);
  for_each_isa(test_keys_of_minus_infinity_weigh_nothing);
  for_each_isa(test_sharing_a_row_changes_no_bit);
  for_each_isa(test_a_range_touches_only_its_items);
  return test_result();
}
