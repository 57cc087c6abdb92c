// linear_numerators against long double of the same factors, on every instruction set: heads that
// end inside strips, panels and tiles, poison around, offsets that are near, far and absent. What
// is promised is row_scale * numerators, so that is what is looked at.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "fdpg/cpu.h"
#include "fdpg/types.h"
#include "rows.h"

using namespace fdpg;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

struct Shape {
  int64_t rows, depth, vocab;
};

// A head whose hidden states and weight have NaNs behind every row, and numerators poison.
template <class T>
struct Head {
  using Real = accumulate_t<T>;
  static constexpr int64_t kRoom = 3;

  Shape s;
  std::vector<T> hidden, weight, numerators;
  std::vector<Real> bias, coefficient, hint, logp, lse, row_scale, offset, target_logit;
  std::vector<double> parts;
  std::vector<int64_t> target;
  LinearNumeratorsParams p{};

  Head(const Shape& s, Dtype dtype, double softcap, double inv_temperature)
      : s(s),
        numerators(s.rows * (s.vocab + kRoom), store<T>(static_cast<Real>(kNan))),
        logp(s.rows, 7),
        lse(s.rows, 7),
        row_scale(s.rows, 7),
        offset(s.rows, 7),
        target_logit(s.rows, 7),
        parts(s.rows * ((s.vocab + kVocabularyTile - 1) / kVocabularyTile), kNan) {
    fill(hidden, s.rows);
    fill(weight, s.vocab);
    for (int64_t j = 0; j < s.vocab; ++j) bias.push_back(static_cast<Real>(normal(engine)));
    for (int64_t i = 0; i < s.rows; ++i) {
      coefficient.push_back(static_cast<Real>(normal(engine)));
      target.push_back((i * 7919 + s.vocab - 1) % s.vocab);
    }
    MatmulParams& product = p.product;
    product.a = hidden.data();
    product.b = weight.data();
    product.dtype = dtype;
    product.out = numerators.data();
    product.rows = s.rows;
    product.depth = s.depth;
    product.columns = s.vocab;
    product.a_stride[0] = product.b_stride[1] = s.depth + kRoom;
    product.a_stride[1] = product.b_stride[0] = 1;
    product.out_stride = s.vocab + kRoom;
    product.bias = bias.data();
    product.alpha = 0.75;
    p.target = target.data();
    p.coefficient = coefficient.data();
    p.inv_temperature = inv_temperature;
    p.softcap = softcap;
    p.logp = logp.data();
    p.lse = lse.data();
    p.row_scale = row_scale.data();
    p.offset = offset.data();
    p.target_logit = target_logit.data();
    p.parts = parts.data();
  }

  void fill(std::vector<T>& to, int64_t rows) {
    const double size = 2 / std::sqrt(static_cast<double>(s.depth));
    for (int64_t i = 0; i < rows * (s.depth + kRoom); ++i) {
      const bool there = i % (s.depth + kRoom) < s.depth;
      to.push_back(store<T>(static_cast<Real>(there ? size * normal(engine) : kNan)));
    }
  }

  int64_t tiles() const {
    return (p.product.rows + cpu::kMatmulTileRows - 1) / cpu::kMatmulTileRows *
           ((s.vocab + cpu::kMatmulTileColumns - 1) / cpu::kMatmulTileColumns);
  }

  int64_t run() {
    const int64_t rows = p.product.rows;
    const int64_t bad = cpu::linear_numerators(p, LinearWalk::kOffsets, 0, rows);
    if (bad != kOk) return bad;
    cpu::linear_numerators(p, LinearWalk::kTiles, 0, tiles());
    return cpu::linear_numerators(p, LinearWalk::kRows, 0, rows);
  }

  void hint_at(double distance) {
    for (int64_t i = 0; i < s.rows; ++i) {
      hint.push_back(static_cast<Real>(static_cast<double>(row_lse(i)) + distance));
    }
    p.lse_hint = hint.data();
  }

  long double logit(int64_t i, int64_t j) const {
    long double x = bias[j];
    for (int64_t k = 0; k < s.depth; ++k) {
      x += static_cast<long double>(load(hidden[i * (s.depth + kRoom) + k])) *
           load(weight[j * (s.depth + kRoom) + k]);
    }
    return p.product.alpha * x;
  }
  long double capped(long double x) const {
    return p.softcap > 0 ? p.softcap * std::tanh(x / p.softcap) : x;
  }
  std::vector<long double> row(int64_t i) const {  // of z
    std::vector<long double> z;
    for (int64_t j = 0; j < s.vocab; ++j) z.push_back(p.inv_temperature * capped(logit(i, j)));
    return z;
  }
  long double row_lse(int64_t i) const {
    const std::vector<long double> z = row(i);
    const long double most = *std::max_element(z.begin(), z.end());
    long double sum = 0;
    for (const long double x : z) sum += std::exp(x - most);
    return most + std::log(sum);
  }

 private:
  std::mt19937 engine{7};
  std::normal_distribution<double> normal{0, 1};
};

// `distance`: what fp32 cannot tell of an exponential whose offset is so far away.
template <class T>
void check_row(const Head<T>& got, int64_t i, double distance) {
  const bool wide = sizeof(T) == 8;
  const std::vector<long double> z = got.row(i);
  const long double lse = got.row_lse(i), logp = z[got.target[i]] - lse;
  const double unit = wide ? 1e-14 : 3e-6 + 1e-7 * distance;
  CHECK_NEAR(got.lse[i], lse, unit * (1 + std::fabs(lse)));
  CHECK_NEAR(got.logp[i], logp, unit * (1 + std::fabs(z[got.target[i]])));
  CHECK(got.logp[i] <= 0);
  const long double whole = got.coefficient[i] * got.p.inv_temperature;
  const double rounding = wide ? 0 : sizeof(T) == 4 ? 1e-6 : 0x1.1p-8;
  for (int64_t j = 0; j < got.s.vocab; ++j) {
    const bool here = j == got.target[i];
    const long double p = std::exp(z[j] - lse), u = got.capped(got.logit(i, j));
    const long double slope = got.p.softcap > 0 ? 1 - std::pow(u / got.p.softcap, 2) : 1;
    const long double expected = whole * slope * (here ? -std::expm1(logp) : -p);
    const long double gradient =
        got.row_scale[i] *
        static_cast<long double>(load(got.numerators[i * (got.s.vocab + Head<T>::kRoom) + j]));
    const double error = rounding * std::fabs(expected) + 4 * unit * std::fabs(whole) + 1e-30;
    CHECK_NEAR(gradient, expected, error);
    if (g_failures > 20) return;
  }
  for (int64_t j = 0; j < Head<T>::kRoom; ++j) {
    CHECK(std::isnan(load(got.numerators[(i + 1) * (got.s.vocab + Head<T>::kRoom) - 1 - j])));
  }
}

// Around 6 rows of a strip, 48 x 64 of a tile, 1024 steps of the depth.
const std::vector<Shape> kShapes = {{1, 1, 1},    {6, 2, 64},     {7, 16, 17},
                                    {49, 33, 65}, {5, 1025, 130}, {100, 64, 203}};

template <class T, class Each>
void for_each_head(Dtype dtype, Each each) {
  for (const Shape& s : kShapes) {
    for (const double softcap : {0.0, 3.0}) {
      for (const double inv_temperature : {1.0, 1.3})
        each(Head<T>(s, dtype, softcap, inv_temperature));
    }
  }
}

template <class T>
void values(Dtype dtype) {
  for_each_head<T>(dtype, [](Head<T> head) {
    CHECK(head.run() == kOk);
    for (int64_t i = 0; i < head.s.rows; ++i) check_row(head, i, 10);
    // Log-probs alone are the same.
    const auto logp = head.logp, lse = head.lse;
    head.p.product.out = nullptr;
    head.p.coefficient = nullptr;
    head.row_scale.assign(head.s.rows, 7);
    CHECK(head.run() == kOk);
    CHECK(head.logp == logp && head.lse == lse);
    for (const auto& scale : head.row_scale) CHECK(scale == 7);
  });
}

// A hint may change the split between scale and numerators, and nothing else, however far it is.
template <class T>
void hints(Dtype dtype) {
  for (const double distance : {0.0, 3.0, -40.0, 40.0, -200.0, 200.0, -kInf, kInf, kNan}) {
    for (const double softcap : {0.0, 3.0}) {
      Head<T> head({13, 33, 130}, dtype, softcap, 1.0);
      head.hint_at(distance);
      CHECK(head.run() == kOk);
      const double near = std::fabs(distance) < 60 ? std::fabs(distance) : 0;
      for (int64_t i = 0; i < head.s.rows; ++i) check_row(head, i, near);
    }
  }
}

// A row is the same alone, and whoever computes the tiles.
template <class T>
void surroundings(Dtype dtype) {
  for_each_head<T>(dtype, [](Head<T> head) {
    head.run();
    const Head<T> whole = head;
    for (auto& part : head.parts) part = kNan;
    for (int64_t i = head.tiles() - 1; i >= 0; --i) {
      cpu::linear_numerators(head.p, LinearWalk::kTiles, i, i + 1);
    }
    cpu::linear_numerators(head.p, LinearWalk::kRows, 0, head.s.rows);
    CHECK(head.logp == whole.logp && head.lse == whole.lse && head.row_scale == whole.row_scale);
    const int64_t i = head.s.rows - 1, width = head.s.vocab + Head<T>::kRoom;
    head.p.product.rows = 1;
    head.p.product.a = head.hidden.data() + i * (head.s.depth + Head<T>::kRoom);
    head.p.target += i;
    head.p.coefficient = head.coefficient.data() + i;
    head.run();
    CHECK(head.logp[0] == whole.logp[i] && head.lse[0] == whole.lse[i]);
    CHECK(head.row_scale[0] == whole.row_scale[i]);
    for (int64_t j = 0; j < head.s.vocab; ++j) {
      CHECK(load(head.numerators[j]) == load(whole.numerators[i * width + j]));
    }
  });
}

// Tokens that are not allowed; rows that allow none, or are not finite; targets out of range.
template <class T>
void unusual_rows(Dtype dtype) {
  using Real = accumulate_t<T>;
  Head<T> head({8, 20, 150}, dtype, 0, 1);
  head.bias[3] = head.bias[140] = static_cast<Real>(-kInf);
  head.target[2] = 140;
  head.coefficient[4] = 0;
  head.hidden[5 * (20 + Head<T>::kRoom)] = store<T>(static_cast<Real>(kNan));
  CHECK(head.run() == kOk);
  for (const int64_t i : {0, 1, 3, 4, 6, 7}) check_row(head, i, 10);
  CHECK(head.logp[2] == -kInf && std::isfinite(head.lse[2]));
  CHECK(std::isnan(head.logp[5]) && std::isnan(head.lse[5]));
  CHECK(head.row_scale[4] == 0);
  for (Real& b : head.bias) b = static_cast<Real>(-kInf);
  CHECK(head.run() == kOk);
  CHECK(head.lse[0] == -kInf && std::isnan(head.logp[0]));
  head.target[6] = 150;
  CHECK(head.run() == 6);
  head.target[1] = -1;
  CHECK(head.run() == 1);
}

}  // namespace

int main() {
  for_each_isa([](const std::string&) {
    const auto each = [](Dtype dtype, auto tag) {
      using T = decltype(tag);
      values<T>(dtype);
      hints<T>(dtype);
      surroundings<T>(dtype);
      unusual_rows<T>(dtype);
    };
    each(Dtype::kFloat32, float{});
    each(Dtype::kBFloat16, BFloat16{});
    each(Dtype::kFloat64, double{});
  });
  return test_result();
}
