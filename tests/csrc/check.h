// check.h: all the test framework there is. A test is a program; it fails by returning non-zero.
#pragma once

#include <cmath>
#include <cstdio>

inline int g_failures = 0;

// CHECK(condition): counts and prints a failure, and goes on.
#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      ++g_failures;                                                             \
    }                                                                           \
  } while (0)

// CHECK_NEAR(got, expected, tolerance): infinities must be equal, NaN must meet NaN.
#define CHECK_NEAR(got, expected, tolerance)                                                   \
  do {                                                                                         \
    const double got_ = (got), expected_ = (expected), tolerance_ = (tolerance);               \
    const bool ok_ = got_ == expected_ || std::fabs(got_ - expected_) <= tolerance_ ||         \
                     (std::isnan(got_) && std::isnan(expected_));                              \
    if (!ok_) {                                                                                \
      std::printf("%s:%d: %s is %.17g, expected %s = %.17g +- %g\n", __FILE__, __LINE__, #got, \
                  got_, #expected, expected_, tolerance_);                                     \
      ++g_failures;                                                                            \
    }                                                                                          \
  } while (0)

// The last line of main: `return test_result();`
inline int test_result() {
  std::printf(g_failures ? "%d checks failed\n" : "ok\n", g_failures);
  return g_failures != 0;
}
