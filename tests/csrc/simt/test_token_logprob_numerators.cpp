// token_logprob_numerators on CUDA: against fp64, whatever the hint; bit for bit under every
// schedule and in any batch; on sizes that cut rows into heads, tails and parts, differently in
// the two matrices.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "fdpg/types.h"
#include "harness.h"
//
#include "token_logprob_numerators.cu"  // its launchers and kernels

using namespace fdpg;

namespace {

constexpr double kInf = INFINITY;

template <class T>
constexpr Dtype dtype();
template <>
constexpr Dtype dtype<float>() {
  return Dtype::kFloat32;
}
template <>
constexpr Dtype dtype<BFloat16>() {
  return Dtype::kBFloat16;
}
template <>
constexpr Dtype dtype<Float16>() {
  return Dtype::kFloat16;
}
template <>
constexpr Dtype dtype<double>() {
  return Dtype::kFloat64;
}

// Half a unit in the last place of 1.
template <class T>
constexpr double kRounding = 0x1p-24;
template <>
constexpr double kRounding<BFloat16> = 0x1p-8;
template <>
constexpr double kRounding<Float16> = 0x1p-11;
template <>
constexpr double kRounding<double> = 0x1p-53;

struct Shape {
  int64_t rows, vocab;
  int64_t padding = 0, numerator_padding = 0;  // row stride - vocab
  int offset = 0, numerator_offset = 0;        // of the first element, past a 16-byte boundary
  double inv_temperature = 1;
  double softcap = 0;
};

// What the kernel is told of the log-sum-exp: how far off, in nats; and whether there is a hint.
struct Hint {
  enum Kind { kNone, kInPlace, kOffBy } kind;
  int first = 0;  // row i is off by kOff[(first + i) % kOffs]
};
constexpr double kOff[] = {0,   0.05, -5,  2.7, 50,   -0.05,     -2.7,
                           -50, 5,    200, NAN, -200, -INFINITY, INFINITY};
constexpr int kOffs = sizeof(kOff) / sizeof(kOff[0]);

double off_by(const Hint& hint, int64_t row) { return kOff[(hint.first + row) % kOffs]; }

// Elements of a matrix whose last row ends with the allocation: it has no padding.
int64_t extent(int64_t rows, int64_t stride, int64_t vocab) {
  return rows ? (rows - 1) * stride + vocab : 0;
}

template <class T>
std::vector<T> copy_of(const Buffer<T>& b) {
  std::vector<T> values(b.size());
  for (int64_t i = 0; i < b.size(); ++i) values[i] = b[i];
  return values;
}

template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T, class U>
struct Case {
  static constexpr int kKinds = 8;
  Shape shape;
  int64_t stride, numerator_stride;
  Buffer<T> logits;
  Buffer<int64_t> target;
  Buffer<bool> mask;
  Buffer<T> coefficient;
  std::vector<T> original;
  double inv_temperature;   // as the kernel computes with it
  std::vector<double> z;    // (N, V) of the softmax
  std::vector<double> lse;  // (N,)

  explicit Case(const Shape& shape)
      : shape(shape),
        stride(shape.vocab + shape.padding),
        numerator_stride(shape.vocab + shape.numerator_padding),
        logits(extent(shape.rows, stride, shape.vocab), shape.offset),
        target(shape.rows),
        mask(shape.rows),
        coefficient(shape.rows),
        inv_temperature(static_cast<T>(shape.inv_temperature)) {
    std::mt19937 random(static_cast<unsigned>(shape.vocab));
    std::normal_distribution<double> normal(0, 3);
    const int64_t vocab = shape.vocab;
    for (int64_t row = 0; row < shape.rows; ++row) {
      const int64_t first = row * stride, kind = row % kKinds;
      const double level = kind == 1 ? 60 : kind == 7 ? -300 : 0;  // softmax does not care
      const bool bans = kind == 2 || kind == 6;
      for (int64_t j = 0; j < vocab; ++j) {
        logits[first + j] = static_cast<T>(bans && j % 3 == 1 ? -kInf : normal(random) + level);
      }
      mask[row] = kind != 3;
      coefficient[row] = static_cast<T>(kind == 4 ? 0 : row % 2 ? -0.75 : 1.5);
      target[row] = mask[row] ? static_cast<int64_t>(random() % vocab) : -100;
      if (kind == 2) target[row] -= target[row] % 3 == 1;  // not a banned one
      if (kind == 5) logits[first + target[row]] = 25;     // all but certain
      if (kind == 6 && vocab > 1) target[row] = 1;         // a banned one
    }
    state_truth();
  }

  void state_truth() {
    original = copy_of(logits);
    z.assign(shape.rows * shape.vocab, 0);
    lse.assign(shape.rows, 0);
    for (int64_t row = 0; row < shape.rows; ++row) {
      if (!mask[row]) continue;
      double* x = &z[row * shape.vocab];
      double max = -kInf, sum = 0;
      for (int64_t j = 0; j < shape.vocab; ++j) {
        x[j] = inv_temperature * capped(logits[row * stride + j]);
        max = std::max(max, x[j]);
      }
      for (int64_t j = 0; j < shape.vocab; ++j) sum += std::exp(x[j] - max);
      lse[row] = max + std::log(sum);
    }
  }

  double capped(double x) const {
    return shape.softcap > 0 ? shape.softcap * std::tanh(x / shape.softcap) : x;
  }
  // Of it by x.
  double slope(double x) const {
    return shape.softcap > 0 ? 1 - std::pow(std::tanh(x / shape.softcap), 2) : 1;
  }
  // What z may be off for it.
  double cap_error() const { return shape.softcap * 8 * std::max(kRounding<T>, 0x1p-50); }

  struct Results {
    std::vector<T> logp, lse, row_scale;
    std::vector<U> numerators;
    int64_t stride;
    U at(int64_t row, int64_t j) const { return numerators[row * stride + j]; }
    bool same_as(const Results& other) const {
      return same(logp, other.logp) && same(lse, other.lse) && same(row_scale, other.row_scale) &&
             same(numerators, other.numerators);
    }
  };

  // Without a hint there are two ways, which give the same bits.
  Results run(const Hint& hint) {
    const Results all_folded_first = run(hint, /*row_by_row=*/false);
    if (hint.kind != Hint::kOffBy) CHECK(run(hint, /*row_by_row=*/true).same_as(all_folded_first));
    return all_folded_first;
  }

  // Numerators of their own, or in place of the logits, which are made again first. Padding and
  // masked rows are out of bounds for the kernel.
  Results run(const Hint& hint, bool row_by_row) {
    const int64_t rows = shape.rows, vocab = shape.vocab;
    const bool in_place = hint.kind == Hint::kInPlace;
    const int64_t out_stride = in_place ? stride : numerator_stride;
    for (std::size_t i = 0; i < original.size(); ++i) logits[i] = original[i];
    Buffer<T> logp(rows), lse_out(rows), row_scale(rows), hints(rows);
    Buffer<U> apart(in_place ? 0 : extent(rows, numerator_stride, vocab), shape.numerator_offset);
    Buffer<U>* numerators = &apart;
    if constexpr (std::is_same_v<T, U>) {
      if (in_place) numerators = &logits;
    }
    for (int64_t row = 0; row < rows; ++row) {
      hints[row] = static_cast<T>(mask[row] ? lse[row] + off_by(hint, row) : NAN);
    }
    TokenLogprobNumeratorsParams p{};
    p.logits = logits.data();
    p.numerators = numerators->data();
    p.dtype = dtype<T>();
    p.numerator_dtype = dtype<U>();
    p.rows = rows;
    p.vocab = vocab;
    p.row_stride = stride;
    p.numerator_row_stride = out_stride;
    p.target = target.data();
    p.mask = mask.data();
    p.coefficient = coefficient.data();
    p.lse_hint = hint.kind == Hint::kNone ? nullptr : hints.data();
    p.inv_temperature = shape.inv_temperature;
    p.softcap = shape.softcap;
    p.logp = logp.data();
    p.lse = lse_out.data();
    p.row_scale = row_scale.data();

    for (int64_t row = 0; row < rows; ++row) {
      if (row + 1 < rows) {
        logits.forbid(row * stride + vocab, shape.padding);
        numerators->forbid(row * out_stride + vocab, out_stride - vocab);
      }
      if (!mask[row] && !in_place) logits.forbid(row * stride, vocab);
    }
    Buffer<unsigned char> workspace(
        static_cast<int64_t>(cuda::token_logprob_numerators_workspace(p)));
    run_on_device([&] { return cuda::run(p, workspace.data(), nullptr, row_by_row); });
    logits.allow(0, logits.size());
    numerators->allow(0, numerators->size());
    if (!in_place) CHECK(same_bits(logits, original));
    return {copy_of(logp), copy_of(lse_out), copy_of(row_scale), copy_of(*numerators), out_stride};
  }
};

// Whether a row's numerators are relative to its hint, as far as the results tell.
bool expects_hint(const Hint& hint, int64_t row) {
  return hint.kind == Hint::kOffBy && std::fabs(off_by(hint, row)) < 2.75;
}

template <class T, class U>
void check_row(const Case<T, U>& c, const typename Case<T, U>::Results& out, const Hint& hint,
               int64_t row) {
  const double unit = std::max(kRounding<T>, 0x1p-50);  // the truth is fp64 itself
  const int64_t vocab = c.shape.vocab, target = c.target[row];
  if (!c.mask[row]) {
    CHECK(out.logp[row] == 0 && out.lse[row] == 0 && out.row_scale[row] == 0);
    for (int64_t j = 0; j < vocab; ++j) CHECK(load(out.at(row, j)) == 0);
    return;
  }
  const double* z = &c.z[row * vocab];
  const double lse = c.lse[row], logp = z[target] - lse;
  const double cap = c.cap_error();
  CHECK_NEAR(out.lse[row], lse, unit * (20 + 2 * std::fabs(lse)) + cap);
  // No error of the level of the logits, in particular none of the hint's rounding.
  CHECK_NEAR(out.logp[row], logp, unit * (20 + 4 * std::fabs(logp)) + cap);
  CHECK(out.logp[row] <= 0);
  if (c.coefficient[row] == 0) {
    CHECK(out.row_scale[row] == 0);
    for (int64_t j = 0; j < vocab; ++j) CHECK(load(out.at(row, j)) == 0);
    return;
  }
  // A good hint must be of use: the row was not done again.
  const double size = expects_hint(hint, row) ? std::exp(-off_by(hint, row)) : 1;
  const double whole = static_cast<double>(c.coefficient[row]) * c.inv_temperature;
  CHECK_NEAR(out.row_scale[row] * size / -whole, 1, sizeof(T) == 8 ? 1e-13 : 1e-4);

  for (int64_t j = 0; j < vocab; ++j) {
    const double p = std::exp(z[j] - lse);
    const double slope = c.slope(c.original[row * c.stride + j]);
    const double expected = whole * (j == target ? -std::expm1(logp) : -p) * slope;
    const double got = static_cast<double>(out.row_scale[row]) * load(out.at(row, j));
    // One rounding to U, relative, or half of fp16's smallest number; and what fp32 makes of it.
    const double tolerance = (1.01 * kRounding<U> + 50 * unit) * std::fabs(expected) +
                             (16 * unit + cap) * std::fabs(whole) * (j == target ? 1 : p) +
                             (std::is_same_v<U, Float16> ? 0x1.1p-25 / size * std::fabs(whole) : 0);
    CHECK_NEAR(got, expected, tolerance + 1e-37);
    if (g_failures > 20) return;
  }
}

template <class T, class U>
void values(const Shape& shape, const Hint& hint) {
  Case<T, U> c(shape);
  typename Case<T, U>::Results first;
  for_each_schedule([&](int schedule) {
    const auto out = c.run(hint);
    if (schedule > 0) {
      CHECK(out.same_as(first));
      return;
    }
    first = out;
    for (int64_t row = 0; row < shape.rows; ++row) check_row(c, out, hint, row);
    // Padding is as it was: 0xff, or the logits' own.
    for (int64_t row = 0; row + 1 < shape.rows; ++row) {
      for (int64_t j = shape.vocab; j < out.stride; ++j) {
        const U got = out.at(row, j);
        const uint64_t ones = ~uint64_t{0};
        const void* expected = &ones;
        if (hint.kind == Hint::kInPlace) expected = &c.original[row * c.stride + j];
        CHECK(std::memcmp(&got, expected, sizeof(got)) == 0);
      }
    }
  });
}

// Whole parts of a number that stands for -inf, which a temperature rounds by more than an
// exponential can hold, or takes beyond the largest number.
template <class T, class U>
void masked_by_a_number(double mask, const Hint& hint) {
  constexpr int64_t kVocab = 12000, kMasked = 7000;
  Shape shape{Case<T, U>::kKinds, kVocab};
  shape.inv_temperature = 1.3;
  Case<T, U> c(shape);
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t j = 0; j < kMasked; ++j) c.logits[row * kVocab + j] = static_cast<T>(mask);
    if (c.mask[row]) c.target[row] = kMasked + 3 * row;
  }
  c.state_truth();
  const auto out = c.run(hint);
  for (int64_t row = 0; row < shape.rows; ++row) check_row(c, out, hint, row);
}

// The bits of a row do not depend on where it lies, in either matrix, and on what lies beside it.
template <class T, class U>
void same_in_any_batch(int64_t vocab, const Hint& hint) {
  Case<T, U> together({Case<T, U>::kKinds, vocab, 1, 3, 1, 1});
  const auto all = together.run(hint);
  for (int64_t row = 0; row < together.shape.rows; ++row) {
    Case<T, U> single({1, vocab});
    for (int64_t j = 0; j < vocab; ++j) {
      single.logits[j] = together.original[row * together.stride + j];
    }
    single.target[0] = together.target[row];
    single.mask[0] = together.mask[row];
    single.coefficient[0] = together.coefficient[row];
    single.state_truth();
    const auto alone = single.run({hint.kind, static_cast<int>((hint.first + row) % kOffs)});
    CHECK(same(alone.logp[0], all.logp[row]) && same(alone.lse[0], all.lse[row]));
    CHECK(same(alone.row_scale[0], all.row_scale[row]));
    bool equal = true;
    for (int64_t j = 0; j < vocab; ++j) equal &= same(alone.at(0, j), all.at(row, j));
    CHECK(equal);
  }
}

// What the results say of rows that have no answer, and that the row beside them is not disturbed.
template <class T, class U>
void rows_without_an_answer(const Hint& hint) {
  constexpr int64_t kVocab = 12000;  // several parts
  Case<T, U> c({7, kVocab});
  for (int64_t row = 0; row < 7; ++row) {
    c.mask[row] = true, c.target[row] = 5, c.coefficient[row] = 1;
  }
  for (int64_t j = 0; j < kVocab; ++j) c.logits[j] = static_cast<T>(-kInf);  // nothing is possible
  c.logits[1 * kVocab + 11000] = static_cast<T>(NAN);
  c.logits[2 * kVocab + 6000] = static_cast<T>(kInf);
  c.target[3] = kVocab;
  c.target[4] = -1;
  c.coefficient[4] = 0;  // even then
  c.logits[6 * kVocab] = static_cast<T>(NAN);
  c.coefficient[6] = 0;
  c.state_truth();
  c.lse[4] = 1;  // a hint of no use, and no target
  const auto out = c.run(hint);
  for (const int64_t row : {0, 1, 2, 3, 4, 6}) {
    CHECK(std::isnan(out.logp[row]));
    CHECK(row == 0 ? out.lse[row] == -kInf : std::isnan(out.lse[row]));
    if (row == 6) continue;
    bool all_nan = true;
    for (int64_t j = 0; j < kVocab; ++j) {
      all_nan &= std::isnan(out.row_scale[row] * load(out.at(row, j)));
    }
    CHECK(all_nan);
  }
  // Nobody asked for this gradient: zeros, not 0 * NaN.
  CHECK(out.row_scale[6] == 0);
  for (int64_t j = 0; j < kVocab; ++j) CHECK(load(out.at(6, j)) == 0);
  check_row(c, out, hint, 5);
}

// Offsets beyond 2^31 elements. Row 0 is masked: it has no logits at all, and numerators 4 GiB
// before row 1's.
void far_apart(bool with_hint) {
  constexpr int64_t kVocab = 1000, kStride = (int64_t{1} << 31) + 8;
  Case<float, BFloat16> near({1, kVocab});
  const auto expected = near.run({with_hint ? Hint::kOffBy : Hint::kNone});
  Buffer<BFloat16> far(kStride + kVocab);
  Buffer<bool> mask(2);
  mask[0] = false, mask[1] = true;
  Buffer<int64_t> target(std::vector<int64_t>{0, near.target[0]});
  Buffer<float> coefficient(std::vector<float>{1, near.coefficient[0]});
  Buffer<float> hint(std::vector<float>{0, static_cast<float>(near.lse[0])});
  Buffer<float> logp(2), lse(2), row_scale(2);
  TokenLogprobNumeratorsParams p{};
  p.logits = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(near.logits.data()) -
                                           kStride * sizeof(float));
  p.numerators = far.data();
  p.dtype = Dtype::kFloat32;
  p.numerator_dtype = Dtype::kBFloat16;
  p.rows = 2;
  p.vocab = kVocab;
  p.row_stride = p.numerator_row_stride = kStride;
  p.target = target.data();
  p.mask = mask.data();
  p.coefficient = coefficient.data();
  p.lse_hint = with_hint ? hint.data() : nullptr;
  p.inv_temperature = 1;
  p.logp = logp.data();
  p.lse = lse.data();
  p.row_scale = row_scale.data();
  Buffer<unsigned char> workspace(
      static_cast<int64_t>(cuda::token_logprob_numerators_workspace(p)));
  run_on_device([&] { return cuda::token_logprob_numerators(p, workspace.data(), nullptr); });
  CHECK(same(logp[1], expected.logp[0]) && same(row_scale[1], expected.row_scale[0]));
  for (int64_t j = 0; j < kVocab; ++j) {
    CHECK(load(far[j]) == 0);
    CHECK(same(far[kStride + j], expected.at(0, j)));
  }
}

template <class T, class U>
void every_way(const std::vector<Shape>& shapes) {
  for (const Shape& shape : shapes) {
    values<T, U>(shape, {Hint::kNone});
    if constexpr (std::is_same_v<T, U>) values<T, U>(shape, {Hint::kInPlace});
    values<T, U>(shape, {Hint::kOffBy, static_cast<int>(shape.vocab % kOffs)});
  }
  // Every hint for every kind of row.
  for (int first = 0; first < kOffs; ++first) {
    values<T, U>({Case<T, U>::kKinds, 301, 0, 2}, {Hint::kOffBy, first});
  }
  for (const int64_t vocab : {1000, 11003}) {
    same_in_any_batch<T, U>(vocab, {Hint::kNone});
    same_in_any_batch<T, U>(vocab, {Hint::kOffBy, 0});
  }
  if constexpr (std::is_same_v<T, U>) {
    same_in_any_batch<T, U>(1000, {Hint::kInPlace});
    rows_without_an_answer<T, U>({Hint::kInPlace});
  }
  rows_without_an_answer<T, U>({Hint::kNone});
  rows_without_an_answer<T, U>({Hint::kOffBy});
}

}  // namespace

int main() {
  return run_tests([] {
    const std::vector<Shape> small = {
        {8, 1},
        {9, 7, 2, 1},                  // shorter than a vector
        {9, 31, 0, 0, 1, 3},           // every alignment, not alike
        {8, 1000, 24, 8},              // padded, aligned
        {8, 8003, 0, 2, 3, 1, 0.7},    // misaligned, odd
        {9, 301, 0, 2, 1, 3, 1.3, 6},  // with a softcap, some logits far beyond it
        {0, 1000},                     // nobody
    };
    every_way<float, float>(small);
    every_way<float, BFloat16>(small);
    every_way<float, Float16>(small);
    every_way<double, double>(small);
    // Rows of many parts, as a model has them: the first hints are of use, the second not.
    for (const Hint hint : {Hint{Hint::kNone}, Hint{Hint::kOffBy, 0}, Hint{Hint::kOffBy, 7}}) {
      values<float, BFloat16>({2, 128256, 0, 0, 0, 0, 1.25}, hint);
      values<float, Float16>({2, 50257, 0, 0, 1, 1}, hint);
      values<float, BFloat16>({2, 50257, 0, 0, 1, 1, 1, 30}, hint);
    }
    values<float, float>({2, 50257}, {Hint::kInPlace});
    for (const double mask : {-1e10, -3e38}) {
      masked_by_a_number<float, float>(mask, {Hint::kInPlace});
      masked_by_a_number<float, BFloat16>(mask, {Hint::kNone});
      masked_by_a_number<float, Float16>(mask, {Hint::kOffBy, 0});
    }
    for (const bool with_hint : {false, true}) far_apart(with_hint);
  });
}
