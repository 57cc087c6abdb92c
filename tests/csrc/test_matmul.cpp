// Products of matrices against long double: every instruction set and dtype, both orientations of
// both factors, sizes that end inside strips, panels, tiles and blocks of the depth, poison around.
#include <algorithm>
#include <cmath>
#include <cstring>
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

struct Shape {
  int64_t rows, depth, columns;
};

// Matrices whose rows, or columns, have NaNs behind them.
template <class T>
struct Problem {
  using Real = accumulate_t<T>;
  static constexpr int64_t kRoom = 3;

  Shape s;
  bool a_by_rows, b_by_rows;
  std::vector<T> a, b;
  std::vector<Real> out, bias;

  Problem(const Shape& s, bool a_by_rows, bool b_by_rows)
      : s(s), a_by_rows(a_by_rows), b_by_rows(b_by_rows) {
    fill(a, a_by_rows ? s.rows : s.depth, a_by_rows ? s.depth : s.rows);
    fill(b, b_by_rows ? s.depth : s.columns, b_by_rows ? s.columns : s.depth);
    for (int64_t j = 0; j < s.columns; ++j) bias.push_back(static_cast<Real>(normal(engine)));
    out.assign(s.rows * (s.columns + kRoom), static_cast<Real>(kNan));
  }

  void fill(std::vector<T>& to, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows * (columns + kRoom); ++i) {
      const double x = i % (columns + kRoom) < columns ? normal(engine) : kNan;
      to.push_back(store<T>(static_cast<Real>(x)));
    }
  }

  int64_t a_stride(int which) const {
    return a_by_rows == (which == 1) ? 1 : which ? s.rows + kRoom : s.depth + kRoom;
  }
  int64_t b_stride(int which) const {
    return b_by_rows == (which == 1) ? 1 : which ? s.depth + kRoom : s.columns + kRoom;
  }

  MatmulParams params(Dtype dtype) {
    MatmulParams p{};
    p.a = a.data();
    p.b = b.data();
    p.dtype = dtype;
    p.out = out.data();
    p.rows = s.rows;
    p.depth = s.depth;
    p.columns = s.columns;
    for (int i = 0; i < 2; ++i) p.a_stride[i] = a_stride(i);
    for (int i = 0; i < 2; ++i) p.b_stride[i] = b_stride(i);
    p.out_stride = s.columns + kRoom;
    p.alpha = 1;
    return p;
  }

  int64_t tiles() const {
    return (s.rows + cpu::kMatmulTileRows - 1) / cpu::kMatmulTileRows *
           ((s.columns + cpu::kMatmulTileColumns - 1) / cpu::kMatmulTileColumns);
  }

  Real& at(int64_t i, int64_t j) { return out[i * (s.columns + kRoom) + j]; }

  // Sum of products, and of their sizes.
  std::pair<long double, long double> truth(int64_t i, int64_t j) const {
    long double sum = 0, size = 0;
    for (int64_t k = 0; k < s.depth; ++k) {
      const long double x = static_cast<long double>(load(a[i * a_stride(0) + k * a_stride(1)])) *
                            load(b[k * b_stride(0) + j * b_stride(1)]);
      sum += x;
      size += std::fabs(x);
    }
    return {sum, size};
  }

 private:
  std::mt19937 engine{7};
  std::normal_distribution<double> normal{0, 1};
};

// Sizes around 6 rows of a strip, 48 x 64 of a tile, 1024 steps of the depth (512 in fp64); of AMX
// 16 and 64 rows, 32 steps, and more rows than a strip by more steps than a pass, of two panels.
const std::vector<Shape> kShapes = {{1, 1, 1},      {6, 2, 64},    {7, 16, 17},
                                    {49, 33, 65},   {100, 64, 3},  {112, 96, 70},
                                    {5, 1025, 130}, {70, 600, 70}, {2, 2101, 20}};

template <class T>
double tolerance() {
  return sizeof(T) == 8 ? 1e-15 : 4e-7;  // times the sum of the sizes of the products
}

template <class Each>
void for_each_problem(Each each) {
  for (const Shape& s : kShapes) {
    for (const bool a_by_rows : {true, false}) {
      for (const bool b_by_rows : {true, false}) {
        for_each_dtype([&](Dtype dtype, auto tag) {
          Problem<decltype(tag)> problem(s, a_by_rows, b_by_rows);
          each(dtype, problem);
        });
      }
    }
  }
}

void test_against_long_double(const std::string& isa) {
  for_each_problem([&](Dtype dtype, auto& problem) {
    using T = typename std::decay_t<decltype(problem)>;
    using Real = typename T::Real;
    const Shape s = problem.s;
    MatmulParams p = problem.params(dtype);
    CHECK(cpu::matmul(p, 0, problem.tiles()) == kOk);
    const std::vector<Real> plain = problem.out;
    p.alpha = -0.5;
    p.bias = problem.bias.data();
    p.accumulate = true;
    CHECK(cpu::matmul(p, 0, problem.tiles()) == kOk);
    double worst = 0;
    for (int64_t i = 0; i < s.rows; ++i) {
      for (int64_t j = 0; j < s.columns; ++j) {
        const auto [sum, size] = problem.truth(i, j);
        const long double added = sum - 0.5L * (sum + problem.bias[j]);
        const Real first = plain[i * (s.columns + T::kRoom) + j];
        const double error = std::max(std::fabs(static_cast<double>(first - sum)),
                                      std::fabs(static_cast<double>(problem.at(i, j) - added)));
        const double relative = error / static_cast<double>(size + 1);
        worst = relative <= worst ? worst : relative;  // NaN is worst
      }
      for (int64_t j = 0; j < T::kRoom; ++j) CHECK(std::isnan(problem.at(i, s.columns + j)));
    }
    const double most = tolerance<Real>();
    if (!(worst <= most)) {
      std::printf("%s, dtype %d, %d x %d x %d: off by %g\n", isa.c_str(), static_cast<int>(dtype),
                  static_cast<int>(s.rows), static_cast<int>(s.depth), static_cast<int>(s.columns),
                  worst);
    }
    CHECK(worst <= most);
  });
}

// 16-bit results are sums in fp32, rounded once.
template <class T>
void test_rounded_results(Dtype dtype) {
  for (const Shape& s : kShapes) {
    Problem<T> problem(s, true, false);
    MatmulParams p = problem.params(dtype);
    p.bias = problem.bias.data();
    cpu::matmul(p, 0, problem.tiles());
    std::vector<T> out(problem.out.size());
    p.out = out.data();
    p.rounds_out = true;
    cpu::matmul(p, 0, problem.tiles());
    for (int64_t i = 0; i < s.rows; ++i) {
      for (int64_t j = 0; j < s.columns; ++j) {
        const float got = load(out[i * p.out_stride + j]), wide = problem.at(i, j);
        if (s.depth < 1024) CHECK(got == load(store<T>(wide)));
        CHECK_NEAR(got, wide, std::fabs(wide) * 0x1p-8 + 1e-4);  // summed in other blocks
      }
      for (int64_t j = s.columns; j < p.out_stride; ++j) CHECK(out[i * p.out_stride + j].bits == 0);
    }
  }
}

// fp32 factors that may be rounded to bf16 are, if that is faster: then as if they were bf16. The
// same of one that is packed before.
void test_rounded_factors(const std::string& isa) {
  for (const Shape& s : kShapes) {
    for (const bool a_by_rows : {true, false}) {
      for (const bool b_by_rows : {true, false}) {
        Problem<float> exact(s, a_by_rows, b_by_rows);
        Problem<BFloat16> rounded(s, a_by_rows, b_by_rows);
        for (size_t i = 0; i < exact.a.size(); ++i) rounded.a[i] = store<BFloat16>(exact.a[i]);
        for (size_t i = 0; i < exact.b.size(); ++i) rounded.b[i] = store<BFloat16>(exact.b[i]);
        const bool rounds = isa == "avx512bf16" || isa == "amx";
        MatmulParams p = exact.params(Dtype::kFloat32);
        cpu::matmul(p, 0, exact.tiles());
        std::vector<float> expected = exact.out;
        if (rounds) {
          cpu::matmul(rounded.params(Dtype::kBFloat16), 0, rounded.tiles());
          expected = rounded.out;
        }
        p.may_round = true;
        cpu::matmul(p, 0, exact.tiles());
        for (int64_t i = 0; i < s.rows; ++i) {
          for (int64_t j = 0; j < s.columns; ++j) {
            CHECK(exact.at(i, j) == expected[i * p.out_stride + j]);
          }
        }
        CHECK(cpu::has_packed_products() == rounds);
        if (!rounds) continue;
        const auto parts = [](int64_t size, int64_t of) { return (size + of - 1) / of; };
        const int64_t panels = parts(s.columns, kVocabularyTile), pairs = parts(s.depth, 32) * 16;
        std::vector<BFloat16> packed(panels * pairs * kVocabularyTile * 2);
        MatmulPackParams pack{exact.b.data(), packed.data(), s.depth, s.columns, {}};
        for (int i = 0; i < 2; ++i) pack.b_stride[i] = exact.b_stride(i);
        for (int64_t i = 0; i < panels; ++i) cpu::matmul_pack(pack, i, i + 1);
        MatmulParams by_packed = rounded.params(Dtype::kBFloat16);
        by_packed.b = packed.data();
        by_packed.packed = true;
        for (int64_t i = 0; i < rounded.tiles(); ++i) cpu::matmul(by_packed, i, i + 1);
        CHECK(std::memcmp(rounded.out.data(), expected.data(), expected.size() * 4) == 0);
        cpu::matmul(by_packed, 0, rounded.tiles());
        CHECK(std::memcmp(rounded.out.data(), expected.data(), expected.size() * 4) == 0);
      }
    }
  }
}

// Bits of an element do not depend on what else is computed, where, or in whose company.
void test_elements_do_not_depend_on_their_surroundings(const std::string&) {
  for_each_problem([&](Dtype dtype, auto& problem) {
    MatmulParams p = problem.params(dtype);
    cpu::matmul(p, 0, problem.tiles());
    const auto whole = problem.out;
    for (int64_t i = 0; i < problem.tiles(); ++i) cpu::matmul(p, i, i + 1);
    for (int64_t i = 0; i < problem.s.rows; ++i) {
      for (int64_t j = 0; j < problem.s.columns; ++j) {
        CHECK(problem.at(i, j) == whole[i * p.out_stride + j]);
      }
    }
    // One row and one column alone.
    const int64_t i = problem.s.rows - 1, j = problem.s.columns / 2;
    const int64_t bytes = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
    p.a = static_cast<const char*>(p.a) + i * p.a_stride[0] * bytes;
    p.b = static_cast<const char*>(p.b) + j * p.b_stride[1] * bytes;
    p.rows = p.columns = 1;
    cpu::matmul(p, 0, 1);
    CHECK(problem.at(0, 0) == whole[i * p.out_stride + j]);
  });
}

void test_a_range_touches_only_its_tiles(const std::string&) {
  Problem<float> problem({100, 5, 130}, true, true);  // 3 x 3 tiles, counted down: it is wider
  CHECK(cpu::matmul(problem.params(Dtype::kFloat32), 4, 8) == kOk);
  for (int64_t i = 0; i < 100; ++i) {
    for (int64_t j = 0; j < 130; ++j) {
      const int64_t tile = j / cpu::kMatmulTileColumns * 3 + i / cpu::kMatmulTileRows;
      CHECK(std::isnan(problem.at(i, j)) == (tile < 4 || tile >= 8));
    }
  }
}

void test_no_depth(const std::string&) {
  Problem<float> problem({2, 0, 3}, true, true);
  MatmulParams p = problem.params(Dtype::kFloat32);
  cpu::matmul(p, 0, 1);
  CHECK(problem.at(0, 0) == 0 && problem.at(1, 2) == 0);
  p.bias = problem.bias.data();
  p.alpha = 2;
  cpu::matmul(p, 0, 1);
  CHECK(problem.at(1, 2) == 2 * problem.bias[2]);
}

// Infinities and NaNs go where arithmetic sends them, and nowhere else.
void test_values_that_are_not_finite(const std::string&) {
  for_each_dtype([&](Dtype dtype, auto tag) {
    using T = decltype(tag);
    using Real = accumulate_t<T>;
    Problem<T> problem({13, 40, 70}, true, false);
    problem.a[1 * problem.a_stride(0) + 5] = store<T>(static_cast<Real>(-INFINITY));
    problem.b[69 * problem.b_stride(1) + 7] = store<T>(static_cast<Real>(kNan));
    cpu::matmul(problem.params(dtype), 0, problem.tiles());
    for (int64_t i = 0; i < 13; ++i) {
      for (int64_t j = 0; j < 70; ++j) {
        if (j == 69) {
          CHECK(std::isnan(problem.at(i, j)));
        } else {
          CHECK(std::isinf(problem.at(i, j)) == (i == 1));
        }
      }
    }
  });
}

}  // namespace

int main() {
  for_each_isa(test_against_long_double);
  for_each_isa([](const std::string&) {
    test_rounded_results<BFloat16>(Dtype::kBFloat16);
    test_rounded_results<Float16>(Dtype::kFloat16);
  });
  for_each_isa(test_rounded_factors);
  for_each_isa(test_elements_do_not_depend_on_their_surroundings);
  for_each_isa(test_a_range_touches_only_its_tiles);
  for_each_isa(test_no_depth);
  for_each_isa(test_values_that_are_not_finite);
  return test_result();
}
