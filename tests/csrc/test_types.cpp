// Storage conversions: bf16 and fp16 against rounding done in double by hand.
#include <algorithm>

#include "check.h"
#include "fdpg/types.h"

using namespace fdpg;

namespace {

// x rounded to nearest even with `digits` significant bits and least exponent `least`.
double rounded(double x, int digits, int least, double overflow) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x) - digits + 1, least);
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
  return std::fabs(y) >= overflow ? std::copysign(INFINITY, y) : y;
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

}  // namespace

int main() {
  int64_t wrong_half = 0, wrong_brain = 0, wrong_round_trip = 0;
  // 10007 is coprime to 2^32 and hits every exponent and every rounding case.
  for (uint64_t i = 0; i < uint64_t{1} << 32; i += 10007) {
    const float x = float_of(static_cast<uint32_t>(i));
    wrong_half += !same(load(store<Float16>(x)), rounded(x, 11, -24, 65536.0));
    wrong_brain += !same(load(store<BFloat16>(x)), rounded(x, 8, -133, 0x1p128));
  }
  // Ties, which a stride seldom meets.
  for (uint32_t i = 0; i < 0x10000u; ++i) {
    const float brain_tie = float_of(i << 16 | 0x8000u);
    wrong_brain += !same(load(store<BFloat16>(brain_tie)), rounded(brain_tie, 8, -133, 0x1p128));
    const Float16 half{static_cast<uint16_t>(i)};
    const float value = load(half);
    wrong_round_trip += !same(load(store<Float16>(value)), value);
    const float half_tie = float_of(bits_of(value) | 0x1000u);
    wrong_half += !same(load(store<Float16>(half_tie)), rounded(half_tie, 11, -24, 65536.0));
  }
  CHECK(wrong_half == 0);
  CHECK(wrong_brain == 0);
  CHECK(wrong_round_trip == 0);
  CHECK(load(Float16{0x3c00}) == 1.0f);
  CHECK(load(Float16{0x0001}) == 0x1p-24f);
  CHECK(load(Float16{0x7bff}) == 65504.0f);
  CHECK(load(BFloat16{0x3f80}) == 1.0f);

  int visited = 0;
  CHECK(visit_dtype(Dtype::kBFloat16, [&](auto tag) { visited = sizeof(tag); }));
  CHECK(visited == 2);
  CHECK(!visit_dtype(static_cast<Dtype>(99), [](auto) {}));
  return test_result();
}
