// matmul-inl.h: products of matrices of any storage type and either orientation, with results in
// fp32, or in that type, that are written where the caller wants them, or added to what is there.
//
// Some columns of b, by some of the depth, are packed into panels that the second-level cache
// holds, unless all of b has been packed before, and strips of a few rows of a pass over them. What
// a strip and a panel have in common of out stays in registers while the depth goes by (the inner
// kernel of Goto and van de Geijn, ACM TOMS 34(3), 2008). Rows of a are read where they lie if they
// are contiguous along the depth and need no conversion; else they are packed too, some at a time.
//
// Every element of out is summed along the depth in order, in blocks whose length depends on the
// depth alone: its bits depend on its row of a and its column of b, not on what else there is.
//
// What becomes of the sums is a sink's affair: Result writes them, linear_numerators-inl.h takes
// their exponentials.
#pragma once

#include <cstdint>

#include "fdpg/types.h"  // load
#include "kernels.h"     // Workspace, kMatmulColumnBytes, kMatmulPanelBytes
#include "simd_target.h"

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

// How factors are multiplied: by the numbers that they add up in, one step of the depth at a time.
template <class S, class T>
struct Singly {
  using Simd = S;
  using Stored = T;
  using Vec = typename S::Vec;
  using Unit = typename S::Real;  // what is packed: kSteps steps of one row or column
  static constexpr int64_t kSteps = 1;
  static constexpr int64_t kGrain = 1;  // units of a panel are a multiple, with zeros at its end
  static constexpr bool kAsStored = sizeof(T) == sizeof(Unit);

  static FDPG_ALWAYS_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return S::fma(a, b, sum); }
  static FDPG_ALWAYS_INLINE Vec broadcast(Unit x) { return S::broadcast(x); }
  static FDPG_ALWAYS_INLINE Vec load_units(const Unit* p) { return S::load(p); }
  static FDPG_ALWAYS_INLINE void store_units(Unit* p, Vec x) { S::store(p, x); }

  // The unit that begins at p; `left` steps are there, `stride` apart.
  static FDPG_ALWAYS_INLINE Unit unit(const T* p, int64_t /*stride*/, int64_t /*left*/) {
    return fdpg::load(*p);
  }
  // The units of kLanes neighbours, or kLanes units along the depth.
  static FDPG_ALWAYS_INLINE Vec across(const T* p, int64_t /*stride*/, int64_t /*left*/) {
    return S::load(p);
  }
  static FDPG_ALWAYS_INLINE Vec along(const T* p) { return S::load(p); }
};

template <class S>
constexpr int64_t kVectors = sizeof(typename S::Vec) == 64 ? 4 : 2;  // of as many registers

// Part of a row of out: from `column` on, `columns` of what kVectors vectors hold.
template <class S>
struct Place {
  int64_t row, column, columns;
  bool adds;   // to earlier blocks of the depth, or to what the caller has there
  bool first;  // block of the depth
};

// alpha (sum + bias) of a vector that begins at lane `at` of a place; the bias is the first
// block's.
template <class S>
FDPG_ALWAYS_INLINE typename S::Vec finished(const MatmulParams& p, const Place<S>& place,
                                            int64_t at, typename S::Vec sum) {
  using Real = typename S::Real;
  if (p.bias && place.first) {
    const Real* const bias = static_cast<const Real*>(p.bias) + place.column + at;
    const int64_t left = place.columns - at;
    sum = S::add(sum, left >= S::kLanes ? S::load(bias) : S::load_zeros(bias, left));
  }
  return S::mul(sum, S::broadcast(static_cast<Real>(p.alpha)));
}

// Writes sums where they are wanted.
template <class S, class Out>
struct Result {
  // What is rounded is rounded once.
  static constexpr bool kInBlocks = sizeof(Out) == sizeof(typename S::Real);
  const MatmulParams& p;

  FDPG_ALWAYS_INLINE void take(const Place<S>& place,
                               const typename S::Vec (&sums)[kVectors<S>]) const {
    Out* const out = static_cast<Out*>(p.out) + place.row * p.out_stride + place.column;
    for (int64_t v = 0; v < kVectors<S>; ++v) {
      const int64_t at = v * S::kLanes, left = place.columns - at;
      if (left <= 0) break;
      typename S::Vec x = finished(p, place, at, sums[v]);
      if (left >= S::kLanes) {
        if (place.adds) x = S::add(S::load(out + at), x);
        S::store(out + at, x);
      } else {
        if (place.adds) x = S::add(S::load_zeros(out + at, left), x);
        S::store_first(out + at, x, left);
      }
    }
  }
};

template <class M>
FDPG_ALWAYS_INLINE int64_t units_of(int64_t depth) {
  return (depth + M::kSteps - 1) / M::kSteps;
}

// With the zeros at the end of a panel.
template <class M>
FDPG_ALWAYS_INLINE int64_t in_grains(int64_t units) {
  return (units + M::kGrain - 1) / M::kGrain * M::kGrain;
}

// kWidth neighbours, rows of a or columns of b, of which `count` are there: [units][kWidth], with
// zeros where the depth or the neighbours have ended. `steps`: along the depth, among neighbours.
template <class M, int64_t kWidth>
void pack(const typename M::Stored* from, const int64_t (&steps)[2], int64_t depth, int64_t count,
          typename M::Unit* to) {
  using S = typename M::Simd;
  using T = typename M::Stored;
  using Vec = typename S::Vec;
  using Unit = typename M::Unit;
  const int64_t units = units_of<M>(depth), stride = M::kSteps * steps[0];
  for (int64_t first = 0; first < kWidth; first += S::kLanes) {
    const T* const neighbour = from + first * steps[1];
    Unit* const place = to + first;
    int64_t u = 0;
    if (count - first >= S::kLanes) {
      if (steps[1] == 1) {
        for (; u < units; ++u) {
          M::store_units(place + u * kWidth,
                         M::across(neighbour + u * stride, steps[0], depth - u * M::kSteps));
        }
      } else if (steps[0] == 1) {
        for (; (u + S::kLanes) * M::kSteps <= depth; u += S::kLanes) {
          Vec x[S::kLanes];
          for (int64_t i = 0; i < S::kLanes; ++i) {
            x[i] = M::along(neighbour + i * steps[1] + u * stride);
          }
          S::transpose(x);
          for (int64_t i = 0; i < S::kLanes; ++i) M::store_units(place + (u + i) * kWidth, x[i]);
        }
      }
    }
    for (; u < units; ++u) {
      for (int64_t i = 0; i < S::kLanes; ++i) {
        place[u * kWidth + i] = first + i < count ? M::unit(neighbour + i * steps[1] + u * stride,
                                                            steps[0], depth - u * M::kSteps)
                                                  : Unit{0};
      }
    }
  }
}

// Panels from `from` on, so many columns of them side by side, `step` units apart. Where rows are
// contiguous they go by in stretches that every panel has its part of: each row is on a page of its
// own. In AVX2, one thread, [64, 768] x [768, 3072]: 5.0 ms with all of them for one panel after
// the other, 4.1 so.
template <class M, int64_t kSide>
void pack_panels(const typename M::Stored* from, const int64_t (&steps)[2], int64_t depth,
                 int64_t columns, typename M::Unit* to, int64_t step) {
  constexpr int64_t kStretch = 16;
  static_assert(kStretch % M::kSteps == 0, "a stretch ends where a unit does");
  constexpr int64_t kPanel = kVectors<typename M::Simd> * M::Simd::kLanes;
  const int64_t most = steps[1] == 1 ? kStretch : depth;
  const int64_t all = (columns + kPanel - 1) / kPanel * kPanel;
  for (int64_t d = 0; d < depth; d += most) {
    for (int64_t c = 0; c < all; c += kSide) {
      pack<M, kSide>(from + d * steps[0] + c * steps[1], steps, depth - d < most ? depth - d : most,
                     columns - c, to + c / kSide * step + d / M::kSteps * kSide);
    }
  }
  const int64_t units = units_of<M>(depth), wide = in_grains<M>(units);
  for (int64_t c = 0; c < all; c += kSide) {
    for (int64_t i = units * kSide; i < wide * kSide; ++i) {
      to[c / kSide * step + i] = typename M::Unit{0};
    }
  }
}

// Some rows of a, over one panel of b.
template <class M>
struct Strip {
  const char* a;  // row r at a + r row_bytes, its units unit_bytes apart
  int64_t row_bytes, unit_bytes, units;
  const typename M::Unit* panel;
  int64_t side_step;              // from columns that are packed side by side to the next ones
  Place<typename M::Simd> place;  // of row 0
  const char* ahead;              // cache lines to ask for meanwhile
  const int32_t* lines;
  float* sums;        // of earlier and for later passes
  bool begins, ends;  // it is the first pass, the last
};

// How many rows a strip has, how rows are packed for it, and how it is multiplied: by vectors here,
// one row of a against kVectors vectors of b. There is another in simd_amx-inl.h.
template <class M, class Sink>
class Strips {
  using S = typename M::Simd;
  using T = typename M::Stored;
  using Vec = typename S::Vec;
  using Unit = typename M::Unit;
  static constexpr int64_t kPanel = kVectors<S> * S::kLanes;

 public:
  // Rows of a strip: 6 x 4 sums, 4 vectors of b and one of a fit 32 registers. Rows of a that are
  // packed at a time. Columns of a panel that are packed side by side.
  static constexpr int64_t kRows = 6, kPackedRows = kMatmulTileRows, kSide = kPanel;
  // Cache lines of the next block of b that are asked for per unit.
  static constexpr int64_t kLines = 1;
  // How far along the depth a strip goes before it turns to the next panel, and the sums of a panel
  // that wait meanwhile: to the end, and none.
  static constexpr int64_t kPassUnits = int64_t{1} << 40, kSums = 0;
  // Of panels at a time, where rows of a are packed and where they are read as they are.
  static constexpr int64_t kPanelBytes = kMatmulPanelBytes, kFewPanelBytes = kMatmulFewPanelBytes;

  // Whether rows that are contiguous along the depth need not be packed.
  static bool reads(int64_t depth, int64_t /*count*/) {
    return M::kAsStored && depth % M::kSteps == 0;
  }
  static void pack_rows(const T* from, const int64_t (&steps)[2], int64_t depth, int64_t count,
                        Unit* to, Strip<M>& strip) {
    pack<M, kPackedRows>(from, steps, depth, count, to);
    strip.row_bytes = sizeof(Unit);
    strip.unit_bytes = kPackedRows * static_cast<int64_t>(sizeof(Unit));
  }

  static FDPG_ALWAYS_INLINE void multiply(const Strip<M>& s, const Sink& sink, int64_t height) {
    by_height<kRows>(s, sink, height);
  }

 private:
  template <int kHeight>
  static FDPG_ALWAYS_INLINE void by_height(const Strip<M>& s, const Sink& sink, int64_t height) {
    if constexpr (kHeight > 1) {
      if (height < kHeight) return by_height<kHeight - 1>(s, sink, height);
    }
    multiply_rows<kHeight>(s, sink);
  }

  // Not inlined: all registers are for its sums.
  template <int kHeight>
  static __attribute__((noinline)) void multiply_rows(const Strip<M>& s, const Sink& sink) {
    Vec sums[kHeight][kVectors<S>];
    for (auto& row : sums) {
      for (Vec& sum : row) sum = S::broadcast(0);
    }
    const char* a = s.a;
    const Unit* b = s.panel;
    const int64_t row_bytes = s.row_bytes, unit_bytes = s.unit_bytes;
    const char* const ahead = s.ahead;
    const int32_t* const lines = s.lines;
    for (int64_t u = 0; u < s.units; ++u, a += unit_bytes, b += kPanel) {
      __builtin_prefetch(ahead + lines[u], 0, 2);  // to the second level
      Vec column[kVectors<S>];
      for (int64_t v = 0; v < kVectors<S>; ++v) column[v] = M::load_units(b + v * S::kLanes);
      for (int64_t r = 0; r < kHeight; ++r) {
        Unit unit;
        __builtin_memcpy(&unit, a + r * row_bytes, sizeof(unit));
        const Vec x = M::broadcast(unit);
        for (int64_t v = 0; v < kVectors<S>; ++v) {
          sums[r][v] = M::multiply_add(x, column[v], sums[r][v]);
        }
      }
    }
    Place<S> place = s.place;
    for (int64_t r = 0; r < kHeight; ++r, ++place.row) sink.take(place, sums[r]);
  }
};

template <class M, class Sink>
class Matmul {
  using S = typename M::Simd;
  using T = typename M::Stored;
  using Unit = typename M::Unit;
  using By = Strips<M, Sink>;
  static constexpr int64_t kPanel = kVectors<S> * S::kLanes;  // columns
  static constexpr int64_t kLine = 64;                        // bytes of a cache line
  static_assert(By::kPackedRows % By::kRows == 0, "rows are packed by whole strips");
  static_assert(kMatmulTileColumns % kPanel == 0, "a tile is whole panels");

 public:
  FDPG_ALWAYS_INLINE Matmul(const MatmulParams& p, const Sink& sink, Workspace& workspace)
      : p_(p), sink_(sink) {
    const int64_t units = units_of<M>(p.depth);
    const int64_t most = kMatmulColumnBytes / static_cast<int64_t>(sizeof(Unit));
    const int64_t blocks = Sink::kInBlocks && units > most ? (units + most - 1) / most : 1;
    units_ = in_grains<M>((units + blocks - 1) / blocks);
    const int64_t room = packs_a() ? By::kPanelBytes : By::kFewPanelBytes;
    const int64_t panels = room / (units_ * kPanel * static_cast<int64_t>(sizeof(Unit)) + 1);
    const int64_t all = (p.columns + kPanel - 1) / kPanel;
    columns_ = (panels < 1 ? 1 : panels < all ? panels : all) * kPanel;
    // A strip alone goes over b as it lies in memory.
    const bool alone = p.rows <= By::kRows;
    const int64_t passes = alone ? 1 : (units_ + By::kPassUnits - 1) / By::kPassUnits;
    pass_units_ = passes > 1 ? in_grains<M>((units_ + passes - 1) / passes) : units_;
    // Rows of a, the panels of b, the lines of the next ones: see find_lines.
    const int64_t packed = (By::kPackedRows + (p.packed ? 0 : columns_)) * units_;
    panel_step_ = (p.packed ? in_grains<M>(units) : units_) * kPanel;
    const int64_t lines = rows_of_lines() * lines_of_row() + units_ * By::kLines;
    // What is kept from pass to pass, or else one place for all panels.
    sums_step_ = passes > 1 ? By::kSums : 0;
    const int64_t sums = passes > 1 ? columns_ / kPanel * By::kSums : By::kSums;
    rows_of_a_ = static_cast<Unit*>(workspace.allocate(
        packed * static_cast<int64_t>(sizeof(Unit)) + sums * static_cast<int64_t>(sizeof(float)) +
        lines * static_cast<int64_t>(sizeof(int32_t))));
    panels_ = rows_of_a_ + By::kPackedRows * units_;
    sums_ = reinterpret_cast<float*>(rows_of_a_ + packed);
    lines_ = reinterpret_cast<int32_t*>(sums_ + sums);
    find_lines();
  }

  void block(int64_t row, int64_t end_row, int64_t column, int64_t end_column) {
    const int64_t most = units_ * M::kSteps;
    for (int64_t j = column; j < end_column; j += columns_) {
      const int64_t end = end_column - j < columns_ ? end_column : j + columns_;
      int64_t k = 0;
      do {  // once where there is no depth: zeros, or the bias
        const int64_t depth = p_.depth - k < most ? p_.depth - k : most;
        if (!p_.packed) {
          pack_panels<M, By::kSide>(b_at(k, j), p_.b_stride, depth, end - j, panels_,
                                    panel_step_ / kPanel * By::kSide);
        }
        first_ = p_.packed ? static_cast<const Unit*>(block_of_b(k, j)) : panels_;
        if (k + depth < p_.depth) {
          ask_for(block_of_b(k + depth, j));
        } else if (end < end_column) {
          ask_for(block_of_b(0, end));
        } else {
          ask_for(nullptr);
        }
        for (int64_t i = row; i < end_row; i += By::kPackedRows) {
          rows(i, end_row - i < By::kPackedRows ? end_row - i : By::kPackedRows, j, end, k, depth);
        }
        k += depth;
      } while (k < p_.depth);
    }
  }

 private:
  // Whether rows of a are packed, but for odd ends.
  bool packs_a() const { return !M::kAsStored || p_.a_stride[1] != 1; }

  FDPG_ALWAYS_INLINE const T* b_at(int64_t k, int64_t column) const {
    return static_cast<const T*>(p_.b) + k * p_.b_stride[0] + column * p_.b_stride[1];
  }

  // Where the columns from this one on begin, at this depth.
  FDPG_ALWAYS_INLINE const void* block_of_b(int64_t k, int64_t column) const {
    if (!p_.packed) return b_at(k, column);
    return static_cast<const Unit*>(p_.b) + column / kPanel * panel_step_ +
           k / M::kSteps * By::kSide;
  }

  // What a block of b comes from, as offsets of its cache lines from the first, and zeros for one
  // strip more. While strips go over a block they ask for the next: a weight comes from memory, and
  // to wait for it while it is packed takes half as long as the product of 64 rows with it.
  void find_lines() {
    count_ = 0;
    for (int64_t r = 0; r < rows_of_lines(); ++r) {
      for (int64_t i = 0; i < lines_of_row(); ++i) {
        lines_[count_++] = static_cast<int32_t>(r * row_bytes_of_b() + i * kLine);
      }
    }
    for (int64_t i = 0; i < units_ * By::kLines; ++i) lines_[count_ + i] = 0;
  }

  // Of a block of b, as it lies in memory; none where there is one block only, or nobody asks.
  int64_t rows_of_lines() const {
    const int64_t depth = units_ * M::kSteps;
    const int64_t rows = p_.packed ? columns_ / kPanel : b_lies_across() ? depth : columns_;
    const bool alone = columns_ >= p_.columns && depth >= p_.depth;
    return By::kLines == 0 || packs_a() || alone || rows * row_bytes_of_b() >= INT32_MAX ? 0 : rows;
  }
  int64_t lines_of_row() const {
    if (p_.packed) return units_ * kPanel * static_cast<int64_t>(sizeof(Unit)) / kLine;
    const int64_t row = b_lies_across() ? columns_ : units_ * M::kSteps;
    return (row * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine;
  }
  int64_t row_bytes_of_b() const {
    if (p_.packed) return panel_step_ * static_cast<int64_t>(sizeof(Unit));
    return p_.b_stride[b_lies_across() ? 0 : 1] * static_cast<int64_t>(sizeof(T));
  }
  bool b_lies_across() const { return p_.b_stride[1] == 1; }

  void ask_for(const void* block) {
    ahead_ = static_cast<const char*>(block ? block : p_.b);
    asked_ = block ? 0 : count_;
  }

  // `count` rows over the panels of columns [begin, end), at `depth` steps from k on.
  void rows(int64_t row, int64_t count, int64_t begin, int64_t end, int64_t k, int64_t depth) {
    const T* const a = static_cast<const T*>(p_.a) + row * p_.a_stride[0] + k * p_.a_stride[1];
    Strip<M> s;
    const bool as_it_is = p_.a_stride[1] == 1 && By::reads(depth, count);
    if (as_it_is) {
      s.row_bytes = p_.a_stride[0] * static_cast<int64_t>(sizeof(T));
      s.unit_bytes = sizeof(Unit);
    } else {
      By::pack_rows(a, {p_.a_stride[1], p_.a_stride[0]}, depth, count, rows_of_a_, s);
    }
    const char* const first =
        as_it_is ? reinterpret_cast<const char*>(a) : reinterpret_cast<const char*>(rows_of_a_);
    const int64_t units = units_of<M>(depth);
    s.place.adds = p_.accumulate || k > 0;
    s.place.first = k == 0;
    s.ahead = ahead_;
    s.side_step = panel_step_ / kPanel * By::kSide;
    const int64_t panels = (end - begin + kPanel - 1) / kPanel;
    const int64_t passes = units > pass_units_ ? (units + pass_units_ - 1) / pass_units_ : 1;
    for (int64_t i = 0; i < count; i += By::kRows) {
      const int64_t height = count - i < By::kRows ? count - i : By::kRows;
      s.place.row = row + i;
      for (int64_t pass = 0; pass < passes; ++pass) {
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t u = pass * pass_units_, c = begin + panel * kPanel;
          s.units = units - u < pass_units_ ? units - u : pass_units_;
          s.begins = pass == 0;
          s.ends = pass == passes - 1;
          s.a = first + i * s.row_bytes + u * s.unit_bytes;
          s.panel = first_ + panel * panel_step_ + u * By::kSide;
          s.sums = sums_ + panel * sums_step_;
          s.place.column = c;
          s.place.columns = end - c < kPanel ? end - c : kPanel;
          s.lines = lines_ + asked_;
          const int64_t asked = s.units * By::kLines;
          asked_ = asked_ + asked < count_ ? asked_ + asked : count_;
          strips_.multiply(s, sink_, height);
        }
      }
    }
  }

  const MatmulParams& p_;
  const Sink& sink_;
  By strips_;
  int64_t units_;  // of a block of the depth
  int64_t pass_units_;
  int64_t columns_;  // whose panels are packed at a time
  Unit* rows_of_a_;
  Unit* panels_;
  const Unit* first_;   // panel of the block, packed by us or before
  int64_t panel_step_;  // from one to the next
  float* sums_;
  int64_t sums_step_;
  int32_t* lines_;
  int64_t count_, asked_ = 0;  // lines of a block; of the next one
  const char* ahead_ = nullptr;
};

// Tiles [begin, end) of out, counted along its longer side first: each of several threads packs its
// own part of the larger factor, and all of the smaller.
template <class M, class Sink>
void matmul_into(const Sink& sink, const MatmulParams& p, int64_t begin, int64_t end,
                 Workspace& workspace) {
  Matmul<M, Sink> product(p, sink, workspace);
  const bool by_rows = p.rows > p.columns;
  const int64_t high = (p.rows + kMatmulTileRows - 1) / kMatmulTileRows;
  const int64_t wide = (p.columns + kMatmulTileColumns - 1) / kMatmulTileColumns;
  const int64_t line = by_rows ? wide : high;  // tiles across the shorter side
  while (begin < end) {
    // What is left of a line, or as many whole lines as there are.
    const int64_t at = begin / line, from = begin % line;
    const bool whole = from == 0 && end - begin >= line;
    const int64_t lines = whole ? (end - begin) / line : 1;
    const int64_t to = whole ? line : from + end - begin < line ? from + end - begin : line;
    const int64_t row = (by_rows ? at : from) * kMatmulTileRows;
    const int64_t column = (by_rows ? from : at) * kMatmulTileColumns;
    const int64_t end_row = (by_rows ? at + lines : to) * kMatmulTileRows;
    const int64_t end_column = (by_rows ? to : at + lines) * kMatmulTileColumns;
    product.block(row, end_row < p.rows ? end_row : p.rows, column,
                  end_column < p.columns ? end_column : p.columns);
    begin += lines * (to - from);
  }
}

template <class M>
int64_t matmul(const MatmulParams& p, int64_t begin, int64_t end, Workspace& workspace) {
  using S = typename M::Simd;
  if (p.rounds_out) {
    matmul_into<M>(Result<S, typename M::Stored>{p}, p, begin, end, workspace);
  } else {
    matmul_into<M>(Result<S, typename S::Real>{p}, p, begin, end, workspace);
  }
  return kOk;
}

// Panels [begin, end) of a factor of many products.
template <class M>
int64_t matmul_pack(const MatmulPackParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kPanel = kVectors<typename M::Simd> * M::Simd::kLanes;
  constexpr int64_t kSide = Strips<M, Result<typename M::Simd, float>>::kSide;
  static_assert(kPanel == kMatmulTileColumns, "as MatmulPackParams has it");
  const int64_t units = in_grains<M>(units_of<M>(p.depth)), first = begin * kPanel;
  const int64_t columns = (end * kPanel < p.columns ? end * kPanel : p.columns) - first;
  pack_panels<M, kSide>(p.b + first * p.b_stride[1], p.b_stride, p.depth, columns,
                        static_cast<typename M::Unit*>(p.out) + first * units, units * kSide);
  return kOk;
}

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD
