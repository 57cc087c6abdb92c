// The choice of instruction set, and the exponential that each one has.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/simd_portable-inl.h"
#include "fdpg/cpu.h"
#if defined(__x86_64__)
#undef FDPG_BEGIN_SIMD
#undef FDPG_END_SIMD
#include "cpu/simd_avx2-inl.h"
#undef FDPG_BEGIN_SIMD
#undef FDPG_END_SIMD
#include "cpu/simd_avx512-inl.h"
#endif

namespace fdpg::cpu {
namespace {

// A macro, because a template would be compiled for the target of the place where it is written.
#define FDPG_TEST_EXP(name, S)                                                          \
  void name(const float* x, float* y, int64_t n) {                                      \
    int64_t i = 0;                                                                      \
    for (; i + S::kLanes <= n; i += S::kLanes) S::store(y + i, S::exp(S::load(x + i))); \
    if (i < n) S::store_first(y + i, S::exp(S::load_first(x + i, n - i)), n - i);       \
  }

FDPG_TEST_EXP(exp_portable, Portable<float>)
#if defined(__x86_64__)
FDPG_BEGIN_TARGET("avx2,fma,f16c")
FDPG_TEST_EXP(exp_avx2, Avx2)
FDPG_END_TARGET
FDPG_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
FDPG_TEST_EXP(exp_avx512, Avx512)
FDPG_END_TARGET
#endif

struct Exp {
  const char* isa;
  void (*exp)(const float* x, float* y, int64_t n);
};

constexpr Exp kExps[] = {
    {"portable", exp_portable},
#if defined(__x86_64__)
    {"avx2", exp_avx2},
    {"avx512", exp_avx512},
#endif
};

// Every 61st float of [-87, 2], and the ends.
void exp_is_accurate() {
  std::vector<float> x;
  for (uint32_t bits = bits_of(-1e-30f); bits <= bits_of(-87.0f); bits += 61) {
    x.push_back(float_of(bits));
  }
  for (uint32_t bits = bits_of(1e-30f); bits <= bits_of(2.0f); bits += 61) {
    x.push_back(float_of(bits));
  }
  x.push_back(-87.0f);
  x.push_back(2.0f);
  std::vector<float> y(x.size());
  for (const Exp& e : kExps) {
    if (!set_isa(e.isa)) continue;
    e.exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = std::exp(double{x[i]});
      // An ulp of the float nearest to the answer.
      const double ulp = std::ldexp(1.0, std::ilogb(expected) - 23);
      worst = std::max(worst, std::fabs(y[i] - expected) / ulp);
    }
    std::printf("exp on %s: at most %.2f ulp\n", e.isa, worst);
    CHECK(worst < (std::strcmp(e.isa, "portable") == 0 ? 1.2 : 1));
  }
}

void exp_at_the_ends() {
  const float inf = INFINITY;
  const float x[] = {0.0f, -0.0f, -inf, -87.001f, -104.0f, -1e4f, -3e38f, NAN, 1e-45f, -1e-45f};
  float y[10];
  for (const Exp& e : kExps) {
    if (!set_isa(e.isa)) continue;
    e.exp(x, y, 10);
    for (int i : {0, 1, 8, 9}) CHECK(y[i] == 1);
    for (int i : {2, 3, 4, 5, 6}) CHECK(y[i] == 0 && !std::signbit(y[i]));
    CHECK(std::isnan(y[7]));
  }
}

// The environment variable is read once, at the first question, which is this one.
void environment_lowers_the_choice() {
  setenv("FDPG_CPU_ISA", "portable", 1);
  CHECK(std::strcmp(isa(), "portable") == 0);
}

void set_isa_by_name() {
  CHECK(set_isa("portable") && std::strcmp(isa(), "portable") == 0);
  CHECK(!set_isa("avx1024") && std::strcmp(isa(), "portable") == 0);
  CHECK(!set_isa("") && std::strcmp(isa(), "portable") == 0);
  for (const Exp& e : kExps) {
    if (set_isa(e.isa)) CHECK(std::strcmp(isa(), e.isa) == 0);
  }
#if defined(__x86_64__)
  CHECK(set_isa("avx512") == (__builtin_cpu_supports("avx512f") != 0));
  CHECK(set_isa("avx2") == (__builtin_cpu_supports("avx2") != 0));
#endif
}

}  // namespace
}  // namespace fdpg::cpu

int main() {
  fdpg::cpu::environment_lowers_the_choice();
  fdpg::cpu::set_isa_by_name();
  fdpg::cpu::exp_is_accurate();
  fdpg::cpu::exp_at_the_ends();
  return test_result();
}
