// random.h: the counter-based random numbers of sampling. A draw is a pure function of
// (seed, sample id, position): the same on every device, at any batch size, in any order.
//
// Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011): ten rounds of two 32 x 32 -> 64 bit products; passes BigCrush. Known answers of the
// authors' library are in tests/csrc/test_random.cpp.
#pragma once

#include <cstdint>

#include "fdpg/types.h"  // FDPG_HOST_DEVICE

namespace fdpg {

struct Philox4x32 {
  uint32_t word[4];
};

FDPG_HOST_DEVICE inline Philox4x32 philox4x32_10(Philox4x32 counter, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;  // golden ratio, sqrt(3) - 1
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{kMultiplier0} * counter.word[0];
    const uint64_t product1 = uint64_t{kMultiplier1} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The uniform of one draw: an odd multiple of 2^-53. So it is never 0 and never 1, is symmetric
// about 1/2, and converts to double without rounding: the values nearest the ends are 2^-53 and
// 1 - 2^-53.
FDPG_HOST_DEVICE inline double random_uniform(int64_t seed, int64_t sample_id, int64_t position) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint64_t sample = static_cast<uint64_t>(sample_id);
  const uint64_t step = static_cast<uint64_t>(position);
  const Philox4x32 bits =
      philox4x32_10({{static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32),
                      static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)}},
                    static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  const uint64_t wide = uint64_t{bits.word[0]} << 32 | bits.word[1];
  return static_cast<double>(wide >> 12 << 1 | 1) * 0x1p-53;
}

}  // namespace fdpg
