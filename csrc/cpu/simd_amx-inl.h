// simd_amx-inl.h: AVX-512 with its instructions for bf16, and AMX: registers of 16 rows of 64
// bytes, tiles, of which one instruction multiplies two and adds to a third, 16 x 32 by 32 x 16
// numbers. Products of bf16 are added in pairs, to fp32 sums; denormal numbers are zeros.
//
// A product of tiles takes 16 cycles, which is what loading one takes from the first level; from
// the second it is more. So two tiles of a are multiplied by two of b, each loaded for two
// products.
#pragma once

#include "simd_avx512bf16-inl.h"

#undef FDPG_BEGIN_SIMD
#define FDPG_BEGIN_SIMD \
  FDPG_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512bf16,amx-tile,amx-bf16")

#include "matmul-inl.h"

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

// Of bf16, or of fp32 that is rounded to it when it is packed.
template <class T>
struct InTiles : InPairs<T> {};

template <class T, class Sink>
class Strips<InTiles<T>, Sink> {
  using M = InTiles<T>;
  using S = typename M::Simd;
  using Vec = typename S::Vec;
  using Unit = typename M::Unit;
  static constexpr int64_t kTile = 16;  // rows; units of a row of a tile of a; rows of one of b
  static constexpr int64_t kPanel = kVectors<S> * S::kLanes;
  static_assert(M::kGrain == kTile && S::kLanes == kTile, "a grain is as deep as a tile");
  static constexpr int64_t kHigh = 2 * kTile, kWide = 2 * kTile;  // of sums that are in registers
  static constexpr int64_t kLine = 64;  // bytes of a row of a tile, of a, b or sums

 public:
  static constexpr int64_t kRows = 2 * kHigh, kPackedRows = kRows, kSide = kTile;
  static constexpr int64_t kLines = 0;  // what a core fetches ahead by itself is more
  // 32 KB of a strip: the first level keeps much of it, and columns of b from one half of the strip
  // to the other. 1024 x 768 by 768 x 50257: 43 ms, and 53 in one pass.
  static constexpr int64_t kPassUnits = 8 * kTile;
  static constexpr int64_t kSums = kRows * kPanel;
  // Of a second-level cache of 2 MB, which all CPUs with AMX have.
  static constexpr int64_t kPanelBytes = 1 << 20, kFewPanelBytes = 512 << 10;

  Strips() {
    // As LDTILECFG reads it (Intel's Software Developer's Manual, volume 1, XTILECFG).
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {1, 0, {}, {}, {}};
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = kTile * sizeof(Unit);
      config.rows[i] = kTile;
    }
    wait();
    _tile_loadconfig(&config);
  }
  Strips(const Strips&) = delete;
  Strips& operator=(const Strips&) = delete;
  ~Strips() { _tile_release(); }

  static bool reads(int64_t depth, int64_t count) {
    return M::kAsStored && depth % (kTile * M::kSteps) == 0 && count % kTile == 0;
  }

  // Rows of units, with zeros where the depth or the rows have ended.
  static void pack_rows(const T* from, const int64_t (&steps)[2], int64_t depth, int64_t count,
                        Unit* to, Strip<M>& strip) {
    const int64_t units = units_of<M>(depth), wide = in_grains<M>(units);
    for (int64_t r = 0; r < count; r += kTile) {
      const T* const rows = from + r * steps[1];
      const int64_t high = count - r < kTile ? count - r : kTile;
      for (int64_t u = 0; u < wide; u += kTile) {
        const T* const corner = rows + u * M::kSteps * steps[0];
        const int64_t left = depth - u * M::kSteps;
        Unit* const tile = to + r * wide + u;
        Vec x[kTile];
        if (steps[0] == 1 && left >= kTile * M::kSteps) {
          for (int64_t i = 0; i < kTile; ++i) {
            x[i] = i < high ? M::along(corner + i * steps[1]) : S::broadcast(0);
          }
        } else if (steps[1] == 1 && high == kTile) {
          for (int64_t i = 0; i < kTile; ++i) {
            const int64_t step = i * M::kSteps;
            x[i] = step < left ? M::across(corner + step * steps[0], steps[0], left - step)
                               : S::broadcast(0);
          }
          S::transpose(x);
        } else {
          for (int64_t i = 0; i < kTile; ++i) {
            alignas(64) Unit row[kTile] = {};
            for (int64_t j = 0; j < kTile && i < high && j * M::kSteps < left; ++j) {
              const int64_t step = j * M::kSteps;
              row[j] = M::unit(corner + i * steps[1] + step * steps[0], steps[0], left - step);
            }
            x[i] = M::load_units(row);
          }
        }
        for (int64_t i = 0; i < kTile; ++i) M::store_units(tile + i * wide, x[i]);
      }
    }
    strip.row_bytes = wide * static_cast<int64_t>(sizeof(Unit));
    strip.unit_bytes = sizeof(Unit);
  }

  void multiply(const Strip<M>& s, const Sink& sink, int64_t height) {
    wait();
    for (int64_t column = 0; column < s.place.columns; column += kWide) {
      const Unit* const b = s.panel + column / kSide * s.side_step;
      for (int64_t row = 0; row < height; row += kHigh) {
        float* const sums = s.sums + column * kRows + row * kTile;
        if (height - row > kTile) {
          multiply_tiles<true>(s, s.a + row * s.row_bytes, b, sums);
        } else {
          multiply_tiles<false>(s, s.a + row * s.row_bytes, b, sums);
        }
      }
    }
    wait();
    if (!s.ends) return;
    Place<S> place = s.place;
    for (int64_t r = 0; r < height; ++r, ++place.row) {
      Vec sums[kVectors<S>];
      for (int64_t v = 0; v < kVectors<S>; ++v) {
        sums[v] = S::load(s.sums + (v * kRows + r) * kTile);
      }
      sink.take(place, sums);
    }
  }

 private:
  // Compilers do not know that tiles are loaded from memory and stored to it.
  static FDPG_ALWAYS_INLINE void wait() { __asm__ volatile("" ::: "memory"); }

  // 32 rows, or 16, of a against 32 columns of b.
  template <bool kTwo>
  static __attribute__((noinline)) void multiply_tiles(const Strip<M>& s, const char* a,
                                                       const Unit* b, float* sums) {
    const int64_t row_bytes = s.row_bytes, side_step = s.side_step;
    float* const right = sums + kRows * kTile;
    if (s.begins) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kTwo) {
        _tile_zero(2);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, sums, kLine);
      _tile_loadd(1, right, kLine);
      if constexpr (kTwo) {
        _tile_loadd(2, sums + kTile * kTile, kLine);
        _tile_loadd(3, right + kTile * kTile, kLine);
      }
    }
    for (int64_t u = 0; u < s.units; u += kTile, a += kLine, b += kTile * kTile) {
      _tile_loadd(4, b, kLine);
      _tile_loadd(5, b + side_step, kLine);
      _tile_loadd(6, a, row_bytes);
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 6, 5);
      if constexpr (kTwo) {
        _tile_loadd(7, a + kTile * row_bytes, row_bytes);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
      }
    }
    _tile_stored(0, sums, kLine);
    _tile_stored(1, right, kLine);
    if constexpr (kTwo) {
      _tile_stored(2, sums + kTile * kTile, kLine);
      _tile_stored(3, right + kTile * kTile, kLine);
    }
  }
};

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD
