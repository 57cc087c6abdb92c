// tiles.h: AMX on a CPU without it, and with every byte of it in sight of AddressSanitizer. Given
// to the compiler before a source of csrc/cpu (-include), it has the words of AMX mean functions,
// and dispatch.cpp find them there; they need AVX512_BF16, as the kernels around them do.
//
// What is asked of a program that uses tiles is checked: a configuration before, none after, and
// rows and columns that it has. Sums are made as Intel's manual says, in fp32; denormal numbers are
// not made zeros.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

// Memory that nobody has written is NaN in every type.
extern "C" inline __attribute__((used)) const char* __asan_default_options() {
  return "max_malloc_fill_size=1000000000:malloc_fill_byte=255";
}

namespace tiles {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "as LDTILECFG reads it");

struct State {
  Config config;
  char tile[8][16][64];
  ~State() { require(config.palette == 0, "tiles were not released"); }

  static void require(bool condition, const char* what) {
    if (condition) return;
    std::printf("tiles.h: %s\n", what);
    std::abort();
  }
};

inline State& state() {
  static thread_local State state{};
  return state;
}

inline void load_config(const void* from) {
  State& s = state();
  State::require(s.config.palette == 0, "configured twice");
  std::memcpy(&s.config, from, sizeof(Config));
  State::require(s.config.palette == 1 && s.config.start_row == 0, "palette 1, from row 0");
  for (int i = 0; i < 16; ++i) {
    State::require(i < 8 ? s.config.rows[i] <= 16 && s.config.row_bytes[i] <= 64
                         : s.config.rows[i] == 0 && s.config.row_bytes[i] == 0,
                   "eight tiles of 16 rows of 64 bytes");
  }
  std::memset(s.tile, 0, sizeof(s.tile));
}

inline void release() { state().config = Config{}; }

inline State& configured() {
  State::require(state().config.palette == 1, "not configured");
  return state();
}

inline void zero(int to) { std::memset(configured().tile[to], 0, sizeof(State::tile[to])); }

inline void load(int to, const void* from, int64_t stride) {
  State& s = configured();
  zero(to);
  for (int r = 0; r < s.config.rows[to]; ++r) {
    std::memcpy(s.tile[to][r], static_cast<const char*>(from) + r * stride, s.config.row_bytes[to]);
  }
}

inline void store(int from, void* to, int64_t stride) {
  State& s = configured();
  for (int r = 0; r < s.config.rows[from]; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, s.tile[from][r], s.config.row_bytes[from]);
  }
}

inline float bf16_at(const char* row, int i) {
  uint16_t half;
  std::memcpy(&half, row + 2 * i, sizeof(half));
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// to += a b, a of rows of pairs and b of pairs of rows.
inline void multiply_add(int to, int a, int b) {
  State& s = configured();
  const Config& c = s.config;
  State::require(c.rows[to] == c.rows[a] && c.row_bytes[to] == c.row_bytes[b] &&
                     c.row_bytes[a] == 4 * c.rows[b],
                 "shapes that fit");
  for (int m = 0; m < c.rows[to]; ++m) {
    for (int n = 0; n < c.row_bytes[to] / 4; ++n) {
      float sums[2] = {0, 0}, x;
      for (int k = 0; k < c.rows[b]; ++k) {
        for (int i = 0; i < 2; ++i) {
          sums[i] += bf16_at(s.tile[a][m], 2 * k + i) * bf16_at(s.tile[b][k], 2 * n + i);
        }
      }
      std::memcpy(&x, s.tile[to][m] + 4 * n, sizeof(x));
      x += sums[0] + sums[1];
      std::memcpy(s.tile[to][m] + 4 * n, &x, sizeof(x));
    }
  }
}

// What dispatch.cpp asks of leaf 7: EDX says amx-bf16 and amx-tile.
inline int ask(unsigned* edx) {
  *edx = 1u << 22 | 1u << 24;
  return 1;
}

template <class... Arguments>
int grant(Arguments...) {  // what arch_prctl answers
  return 0;
}

}  // namespace tiles

#define _tile_loadconfig(from) tiles::load_config(from)
#define _tile_release() tiles::release()
#define _tile_zero(to) tiles::zero(to)
#define _tile_loadd(to, from, stride) tiles::load(to, from, stride)
#define _tile_stored(from, to, stride) tiles::store(from, to, stride)
#define _tile_dpbf16ps(to, a, b) tiles::multiply_add(to, a, b)
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) \
  ((void)(a), (void)(b), (void)(c), tiles::ask(d))
#define syscall(...) tiles::grant(__VA_ARGS__)
