// The choice of instruction set, and the words that each one has: exp, load, store.
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

// Writes x as T and reads it back.
#define FDPG_TEST_STORE(name, S, T)                                                  \
  void name(const float* x, float* y, int64_t n) {                                   \
    T stored[32];                                                                    \
    for (int64_t i = 0; i < n; i += S::kLanes) S::store(stored + i, S::load(x + i)); \
    for (int64_t i = 0; i < n; i += S::kLanes) S::store(y + i, S::load(stored + i)); \
    S::store_first(stored, S::load_first(x + 1, 3), 3);                              \
    for (int64_t i = 0; i < 3; ++i) y[n + i] = load(stored[i]);                      \
  }

FDPG_TEST_EXP(exp_portable, Portable<float>)
FDPG_TEST_STORE(bf16_portable, Portable<float>, BFloat16)
FDPG_TEST_STORE(fp16_portable, Portable<float>, Float16)
#if defined(__x86_64__)
FDPG_BEGIN_TARGET("avx2,fma,f16c")
FDPG_TEST_EXP(exp_avx2, Avx2)
FDPG_TEST_STORE(bf16_avx2, Avx2, BFloat16)
FDPG_TEST_STORE(fp16_avx2, Avx2, Float16)
FDPG_END_TARGET
FDPG_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
FDPG_TEST_EXP(exp_avx512, Avx512)
FDPG_TEST_STORE(bf16_avx512, Avx512, BFloat16)
FDPG_TEST_STORE(fp16_avx512, Avx512, Float16)
FDPG_END_TARGET
#endif

struct Words {
  const char* isa;
  void (*exp)(const float* x, float* y, int64_t n);
  void (*bf16)(const float* x, float* y, int64_t n);
  void (*fp16)(const float* x, float* y, int64_t n);
};

constexpr Words kWords[] = {
    {"portable", exp_portable, bf16_portable, fp16_portable},
#if defined(__x86_64__)
    {"avx2", exp_avx2, bf16_avx2, fp16_avx2},
    {"avx512", exp_avx512, bf16_avx512, fp16_avx512},
#endif
};

// Every 61st float of [-87, 88], and the ends. Far from 0 an argument is rounded by more than what
// the result may be off.
void exp_is_accurate() {
  std::vector<float> x;
  for (uint32_t bits = bits_of(-1e-30f); bits <= bits_of(-87.0f); bits += 61) {
    x.push_back(float_of(bits));
  }
  for (uint32_t bits = bits_of(1e-30f); bits <= bits_of(88.0f); bits += 61) {
    x.push_back(float_of(bits));
  }
  x.push_back(-87.0f);
  x.push_back(88.0f);
  std::vector<float> y(x.size());
  for (const Words& e : kWords) {
    if (!set_isa(e.isa)) continue;
    e.exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
    double near = 0, far = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = std::exp(double{x[i]});
      // An ulp of the float nearest to the answer.
      const double ulp = std::ldexp(1.0, std::ilogb(expected) - 23);
      double& worst = std::fabs(x[i]) <= 12 ? near : far;
      worst = std::max(worst, std::fabs(y[i] - expected) / ulp);
    }
    const bool has_fma = std::strcmp(e.isa, "portable") != 0;
    std::printf("exp on %s: at most %.2f ulp in [-12, 12], %.2f beyond\n", e.isa, near, far);
    CHECK(near < (has_fma ? 1.1 : 1.2));
    CHECK(far < (has_fma ? 4.5 : 1.2));
  }
}

void exp_at_the_ends() {
  const float inf = INFINITY;
  const float x[] = {0.0f, -0.0f, -inf, -87.001f, -104.0f, -1e4f, -3e38f, NAN, 1e-45f, -1e-45f};
  float y[10];
  for (const Words& e : kWords) {
    if (!set_isa(e.isa)) continue;
    e.exp(x, y, 10);
    for (int i : {0, 1, 8, 9}) CHECK(y[i] == 1);
    for (int i : {2, 3, 4, 5, 6}) CHECK(y[i] == 0 && !std::signbit(y[i]));
    CHECK(std::isnan(y[7]));
    const float high[] = {88.5f, 89.0f, 100.0f, 1e4f, 1e9f, 1e30f, 3e38f, inf};
    e.exp(high, y, 8);
    // Not too small, whatever it is: that is how a sum tells that its anchor is too low. (At +inf
    // and near it, NaN tells as well.)
    for (int i = 0; i < 8; ++i) CHECK(!(y[i] < 1e38f));
  }
}

// Rounding to storage is the one of types.h: ties to even, subnormal, overflow, NaN of any payload.
void storage_is_that_of_types_h() {
  const float inf = INFINITY;
  const float x[32] = {0.0f,
                       -0.0f,
                       1.0f,
                       1.00390625f,     // halfway in bf16, down to even
                       1.01171875f,     // halfway in bf16, up to even
                       1.00048828125f,  // halfway in fp16, down
                       1.00146484375f,  // halfway in fp16, up
                       -3.14159265f,
                       65504.0f,
                       65519.9f,
                       65520.0f,  // rounds to infinity in fp16
                       -1e38f,
                       3.4e38f,  // rounds to infinity in bf16
                       inf,
                       -inf,
                       NAN,
                       -NAN,
                       float_of(0x7fffffffu),  // a NaN whose rounding carries into the sign
                       float_of(0xffffffffu),
                       float_of(0x7f800001u),
                       6e-8f,
                       2.98e-8f,
                       2.9802322e-8f,  // half of the smallest fp16
                       6.1e-5f,
                       1e-40f,
                       -1e-45f,
                       0.1f,
                       1e-3f,
                       123.456f,
                       -0.999f,
                       2049.0f,
                       4099.0f};
  const auto same = [](float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); };
  for (const Words& e : kWords) {
    if (!set_isa(e.isa)) continue;
    float bf16[35], fp16[35];
    e.bf16(x, bf16, 32);
    e.fp16(x, fp16, 32);
    for (int i = 0; i < 35; ++i) {
      const float from = x[i < 32 ? i : i - 31];  // the last three: x[1], x[2], x[3] by store_first
      CHECK(same(bf16[i], load(store<BFloat16>(from))));
      CHECK(same(fp16[i], load(store<Float16>(from))));
    }
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
  for (const Words& e : kWords) {
    if (set_isa(e.isa)) CHECK(std::strcmp(isa(), e.isa) == 0);
  }
#if defined(__x86_64__)
  CHECK(set_isa("avx512") == (__builtin_cpu_supports("avx512f") != 0));
  CHECK(set_isa("avx512bf16") == (__builtin_cpu_supports("avx512bf16") != 0));
  CHECK(!set_isa("amx") || __builtin_cpu_supports("avx512bf16"));
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
  fdpg::cpu::storage_is_that_of_types_h();
  return test_result();
}
