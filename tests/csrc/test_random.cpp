// The random numbers of sampling: the published known answers, the range, the law.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "check.h"
#include "fdpg/random.h"

namespace {

// kat_vectors of Random123 1.14 (Salmon et al.), philox4x32 with 10 rounds.
void known_answers() {
  struct Known {
    fdpg::Philox4x32 counter;
    uint32_t key0, key1;
    fdpg::Philox4x32 answer;
  };
  const Known known[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
       0xffffffff,
       0xffffffff,
       {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       0xa4093822,
       0x299f31d0,
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const Known& k : known) {
    const fdpg::Philox4x32 got = fdpg::philox4x32_10(k.counter, k.key0, k.key1);
    for (int i = 0; i < 4; ++i) CHECK(got.word[i] == k.answer.word[i]);
  }
}

void uniform_is_keyed_by_all_three() {
  // Worked from the first known answer: (0x6627e8d5e169c58d >> 12 << 1 | 1) * 2^-53.
  CHECK(fdpg::random_uniform(0, 0, 0) == 0x1.989fa35785a72p-2);
  const double base = fdpg::random_uniform(1, 2, 3);
  CHECK(base != fdpg::random_uniform(2, 2, 3));
  CHECK(base != fdpg::random_uniform(1, 3, 3));
  CHECK(base != fdpg::random_uniform(1, 2, 4));
  // The high halves count: ids beyond 2^32 are other samples.
  CHECK(base != fdpg::random_uniform(1 + (int64_t{1} << 32), 2, 3));
  CHECK(base != fdpg::random_uniform(1, 2 + (int64_t{1} << 32), 3));
  CHECK(base != fdpg::random_uniform(1, 2, 3 + (int64_t{1} << 32)));
  CHECK(fdpg::random_uniform(-1, -1, -1) > 0);
}

// Moments, extremes and the correlation of neighbours, over both counters; tolerances are 5
// standard errors.
void uniform_law() {
  constexpr int kN = 1 << 20;
  double sum = 0, square = 0, neighbours = 0, smallest = 1, largest = 0, previous = 0.5;
  int64_t bins[64] = {};
  for (int i = 0; i < kN; ++i) {
    const double u = fdpg::random_uniform(7, i % 1024, i / 1024);
    CHECK(u > 0 && u < 1);
    sum += u;
    square += u * u;
    neighbours += (u - 0.5) * (previous - 0.5);
    previous = u;
    smallest = std::fmin(smallest, u);
    largest = std::fmax(largest, u);
    ++bins[static_cast<int>(u * 64)];
  }
  const double scale = 5 / std::sqrt(double{kN});
  CHECK_NEAR(sum / kN, 1. / 2, scale * std::sqrt(1. / 12));
  CHECK_NEAR(square / kN, 1. / 3, scale * std::sqrt(4. / 45));
  CHECK_NEAR(neighbours / kN, 0, scale / 12);
  CHECK(smallest < 20. / kN && largest > 1 - 20. / kN);
  double chi_squared = 0;  // 63 degrees of freedom: mean 63, deviation 11
  for (int64_t n : bins) chi_squared += (n - kN / 64.) * (n - kN / 64.) / (kN / 64.);
  CHECK(chi_squared > 20 && chi_squared < 130);
}

}  // namespace

int main() {
  known_answers();
  uniform_is_keyed_by_all_three();
  uniform_law();
  return test_result();
}
