// token_logprob and its gradient on CUDA: against fp64, bit for bit under every schedule and in any
// batch, on sizes that cut rows into heads, tails and parts.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "fdpg/cpu.h"
#include "fdpg/types.h"
#include "harness.h"
//
#include "token_logprob.cu"  // its launchers and kernels, built for the emulator or for the device

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
  int64_t padding = 0;  // row stride - vocab
  int offset = 0;       // of the first logit, in elements past a 16-byte boundary
  double inv_temperature = 1;
  double softcap = 0;
};

// Elements of a matrix whose last row ends with the allocation: it has no padding.
int64_t extent(int64_t rows, int64_t stride, int64_t vocab) {
  return rows ? (rows - 1) * stride + vocab : 0;
}

struct Row {
  double logp, lse, entropy;
};

// Logits, targets and a mask as a model would make them, and the truth about them.
template <class T>
struct Case {
  using A = accumulate_t<T>;
  Shape shape;
  int64_t stride;
  Buffer<T> logits;
  Buffer<int64_t> target;
  Buffer<bool> mask;
  std::vector<double> z;  // (N, V) of the softmax
  std::vector<Row> truth;

  explicit Case(const Shape& shape)
      : shape(shape),
        stride(shape.vocab + shape.padding),
        logits(extent(shape.rows, stride, shape.vocab), shape.offset),
        target(shape.rows),
        mask(shape.rows),
        z(shape.rows * shape.vocab) {
    std::mt19937 random(static_cast<unsigned>(shape.vocab));
    std::normal_distribution<double> normal(0, 3);
    for (int64_t row = 0; row < shape.rows; ++row) {
      const int64_t first = row * stride;
      // log-softmax does not care; a log-sum-exp in fp32 is off by 1e-4 there
      const double level = row % 3 != 1 ? 0 : sizeof(T) == 4 ? 3000 : 60;
      for (int64_t j = 0; j < shape.vocab; ++j) {
        const bool banned = row % 4 == 2 && j % 3 == 1;
        logits[first + j] = store<T>(static_cast<A>(banned ? -kInf : normal(random) + level));
      }
      mask[row] = row % 5 != 3;
      target[row] = mask[row] ? static_cast<int64_t>(random() % shape.vocab) : -100;
      if (row % 4 == 2 && shape.vocab > 1) target[row] -= target[row] % 3 == 1;  // not a banned one
    }
    state_truth();
    forbid();
  }
  ~Case() { logits.allow(0, logits.size()); }

  // What no kernel may read: padding, and rows that the mask leaves out.
  void forbid() {
    for (int64_t row = 0; row < shape.rows; ++row) {
      const bool last = row + 1 == shape.rows;
      if (!last) logits.forbid(row * stride + shape.vocab, shape.padding);
      if (!mask[row]) logits.forbid(row * stride, shape.vocab);
    }
  }

  void state_truth() {
    logits.allow(0, logits.size());
    truth.clear();
    for (int64_t row = 0; row < shape.rows; ++row) {
      if (!mask[row]) {
        truth.push_back({0, 0, 0});
        continue;
      }
      double* x = &z[row * shape.vocab];
      double max = -kInf, sum = 0, mean = 0;
      for (int64_t j = 0; j < shape.vocab; ++j) {
        x[j] = capped(row, j) * shape.inv_temperature;
        max = std::max(max, x[j]);
      }
      for (int64_t j = 0; j < shape.vocab; ++j) sum += std::exp(x[j] - max);
      const double lse = max + std::log(sum);
      for (int64_t j = 0; j < shape.vocab; ++j) {
        if (x[j] != -kInf) mean += std::exp(x[j] - lse) * (x[j] - lse);
      }
      truth.push_back({x[target[row]] - lse, lse, -mean});
    }
  }

  double capped(int64_t row, int64_t j) const {
    const double x = load(logits[row * stride + j]), cap = shape.softcap;
    return cap > 0 ? cap * std::tanh(x / cap) : x;
  }
  // What z may be off for it.
  double cap_error() const { return shape.softcap * 8 * std::max(kRounding<A>, 0x1p-50); }

  struct Results {
    Buffer<A> logp, lse, entropy;
    Buffer<double> lse_exact;
    explicit Results(int64_t rows) : logp(rows), lse(rows), entropy(rows), lse_exact(rows) {}
  };

  // What the params of either direction say of the input.
  template <class P>
  P of_input() {
    P p{};
    p.logits = logits.data();
    p.dtype = dtype<T>();
    p.rows = shape.rows;
    p.vocab = shape.vocab;
    p.row_stride = stride;
    p.target = target.data();
    p.mask = mask.data();
    p.inv_temperature = shape.inv_temperature;
    p.softcap = shape.softcap;
    return p;
  }

  TokenLogprobParams params(Results& out, bool entropy) {
    auto p = of_input<TokenLogprobParams>();
    p.logp = out.logp.data();
    p.lse = out.lse.data();
    p.lse_exact = out.lse_exact.data();
    p.entropy = entropy ? out.entropy.data() : nullptr;
    return p;
  }

  void forward(Results& out, bool entropy) {
    const TokenLogprobParams p = params(out, entropy);
    Buffer<unsigned char> workspace(static_cast<int64_t>(cuda::token_logprob_workspace(p)));
    run_on_device([&] { return cuda::token_logprob(p, workspace.data(), nullptr); });
  }

  // Of the sum of log-probs and entropies; from what forward has left in `out`.
  void backward(Results& out, bool entropy, Buffer<T>& grad) {
    Buffer<A> ones(std::vector<A>(shape.rows, 1));
    auto p = of_input<TokenLogprobBackwardParams>();
    p.grad_logits = grad.data();
    p.grad_row_stride = stride;
    p.lse_exact = out.lse_exact.data();
    p.entropy = out.entropy.data();
    p.grad_logp = ones.data();
    p.grad_entropy = entropy ? ones.data() : nullptr;
    run_on_device([&] { return cuda::token_logprob_backward(p, nullptr); });
  }
};

template <class T>
std::vector<T> copy_of(const Buffer<T>& b) {
  std::vector<T> values(b.size());
  for (int64_t i = 0; i < b.size(); ++i) values[i] = b[i];
  return values;
}

template <class T>
void forward(const Shape& shape) {
  Case<T> c(shape);
  const double unit = std::max(kRounding<accumulate_t<T>>, 0x1p-50);  // the truth is fp64 itself
  for (const bool entropy : {false, true}) {
    typename Case<T>::Results out(shape.rows);
    std::vector<accumulate_t<T>> logp, lse, entropies;
    for_each_schedule([&](int schedule) {
      c.forward(out, entropy);
      if (schedule == 0) {
        logp = copy_of(out.logp), lse = copy_of(out.lse), entropies = copy_of(out.entropy);
      }
      CHECK(same_bits(out.logp, logp) && same_bits(out.lse, lse));
      CHECK(!entropy || same_bits(out.entropy, entropies));
    });
    typename Case<T>::Results on_cpu(shape.rows);
    CHECK(cpu::token_logprob(c.params(on_cpu, entropy), 0, shape.rows) == kOk);
    for (int64_t row = 0; row < shape.rows; ++row) {
      const double cap = c.cap_error();
      CHECK_NEAR(out.logp[row], on_cpu.logp[row],
                 unit * (20 + 4 * std::fabs(on_cpu.logp[row])) + cap);
      const Row& truth = c.truth[row];
      // logp carries no error of the level of the logits, lse half a unit of its own size.
      CHECK_NEAR(out.logp[row], truth.logp, unit * (20 + 4 * std::fabs(truth.logp)) + cap);
      CHECK_NEAR(out.lse[row], truth.lse, unit * (20 + 2 * std::fabs(truth.lse)) + cap);
      if (entropy) CHECK_NEAR(out.entropy[row], truth.entropy, unit * 100 + 4 * cap);
    }
  }
}

// The bits of a row do not depend on where it lies and on what lies beside it.
template <class T>
void same_in_any_batch(int64_t vocab) {
  Case<T> together({6, vocab, 1, 1});
  typename Case<T>::Results all(6), alone(1);
  together.forward(all, true);
  for (int64_t row = 0; row < 6; ++row) {
    if (!together.mask[row]) continue;
    Case<T> single({1, vocab});
    for (int64_t j = 0; j < vocab; ++j)
      single.logits[j] = together.logits[row * together.stride + j];
    single.target[0] = together.target[row];
    single.forward(alone, true);
    CHECK(std::memcmp(&alone.logp[0], &all.logp[row], sizeof(alone.logp[0])) == 0);
    CHECK(std::memcmp(&alone.lse[0], &all.lse[row], sizeof(alone.lse[0])) == 0);
    CHECK(std::memcmp(&alone.entropy[0], &all.entropy[row], sizeof(alone.entropy[0])) == 0);
  }
}

enum class Place { kInPlace, kApart, kApartUnlikeStride };

template <class T>
void backward(const Shape& shape, bool entropy, Place place) {
  using A = accumulate_t<T>;
  Case<T> c(shape);
  typename Case<T>::Results rows(shape.rows);
  c.forward(rows, true);
  Buffer<A> grad_logp(shape.rows), grad_lse(shape.rows), grad_entropy(shape.rows);
  for (int64_t row = 0; row < shape.rows; ++row) {
    // One row has no gradient and must be zeroed without being read.
    const bool none = row % 7 == 4;
    grad_logp[row] = static_cast<A>(none ? 0 : 0.5 + 0.1 * static_cast<double>(row % 3));
    grad_lse[row] = static_cast<A>(none ? 0 : row % 2 ? -0.25 : 0);
    grad_entropy[row] = static_cast<A>(none || !entropy ? 0 : 0.125);
  }
  const int64_t grad_stride = c.stride + (place == Place::kApartUnlikeStride ? 1 : 0);
  const std::vector<T> original = [&] {
    c.logits.allow(0, c.logits.size());
    return copy_of(c.logits);
  }();

  auto p = c.template of_input<TokenLogprobBackwardParams>();
  p.grad_row_stride = grad_stride;
  p.lse_exact = rows.lse_exact.data();
  p.entropy = entropy ? rows.entropy.data() : nullptr;
  p.grad_logp = grad_logp.data();
  p.grad_lse = grad_lse.data();
  p.grad_entropy = entropy ? grad_entropy.data() : nullptr;

  std::vector<T> first;
  for_each_schedule([&](int schedule) {
    for (std::size_t i = 0; i < original.size(); ++i) c.logits[i] = original[i];
    Buffer<T> apart(place == Place::kInPlace ? 0 : extent(shape.rows, grad_stride, shape.vocab),
                    shape.offset);
    Buffer<T>& grad = place == Place::kInPlace ? c.logits : apart;
    for (int64_t row = 0; row + 1 < shape.rows; ++row) {
      grad.forbid(row * grad_stride + shape.vocab, grad_stride - shape.vocab);
      if (place != Place::kInPlace && (!c.mask[row] || row % 7 == 4)) {
        c.logits.forbid(row * c.stride, shape.vocab);  // not read
      }
    }
    p.grad_logits = grad.data();
    run_on_device([&] { return cuda::token_logprob_backward(p, nullptr); });
    grad.allow(0, grad.size());
    c.logits.allow(0, c.logits.size());
    if (schedule > 0) {
      CHECK(same_bits(grad, first));
      return;
    }
    first = copy_of(grad);
    const double cap = shape.softcap * shape.inv_temperature;
    for (int64_t row = 0; row < shape.rows; ++row) {
      // The truth, not what forward has rounded it to.
      const double lse = c.truth[row].lse, h = c.truth[row].entropy;
      for (int64_t j = 0; j < shape.vocab; ++j) {
        double expected = 0;
        if (c.mask[row]) {
          const double z = c.z[row * shape.vocab + j], prob = std::exp(z - lse);
          expected = (grad_lse[row] - grad_logp[row]) * prob;
          if (prob > 0) expected -= grad_entropy[row] * prob * (z - lse + h);
          expected = shape.inv_temperature *
                     (expected + (j == c.target[row] ? static_cast<double>(grad_logp[row]) : 0));
          if (cap > 0) expected *= 1 - z / cap * (z / cap);
        }
        const double tolerance = kRounding<T> * std::fabs(expected) +
                                 16 * std::max(kRounding<A>, 0x1p-50) +
                                 (sizeof(T) == 2 ? 0x1p-25 : 0) + c.cap_error();
        CHECK_NEAR(load(grad[row * grad_stride + j]), expected, tolerance);
      }
      if (g_failures > 20) return;
    }
  });
}

// What the results say of rows that have no answer, and that the row beside them is not disturbed.
template <class T>
void rows_without_an_answer() {
  constexpr int64_t kVocab = 40000;  // several parts
  Case<T> c({6, kVocab});
  c.logits.allow(0, c.logits.size());
  for (int64_t row = 0; row < 6; ++row) c.mask[row] = true, c.target[row] = 5;
  for (int64_t j = 0; j < kVocab; ++j) c.logits[j] = store<T>(-INFINITY);  // nothing is possible
  c.logits[1 * kVocab + 39000] = store<T>(NAN);
  c.logits[2 * kVocab + 20000] = store<T>(INFINITY);
  c.target[3] = kVocab;
  c.target[4] = -1;
  typename Case<T>::Results out(6);
  for (const bool entropy : {false, true}) {
    c.forward(out, entropy);
    for (int64_t row = 0; row < 5; ++row) {
      CHECK(std::isnan(out.logp[row]));
      CHECK(row == 0 ? out.lse[row] == -INFINITY : std::isnan(out.lse[row]));
      if (entropy) CHECK(std::isnan(out.entropy[row]));
    }
    CHECK_NEAR(out.lse[5], c.truth[5].lse, 1e-5);
    CHECK_NEAR(out.logp[5], load(c.logits[5 * kVocab + 5]) - c.truth[5].lse, 1e-5);
    if (entropy) CHECK_NEAR(out.entropy[5], c.truth[5].entropy, 1e-5);
  }

  // NaN in, NaN out, in that row alone.
  Buffer<T> grad_logits(6 * kVocab);
  c.backward(out, false, grad_logits);
  for (int64_t row = 1; row < 5; ++row) CHECK(std::isnan(load(grad_logits[row * kVocab + 777])));
  double sum = 0;
  for (int64_t j = 0; j < kVocab; ++j) sum += load(grad_logits[5 * kVocab + j]);
  CHECK_NEAR(sum, 0.0, 1e-3);
}

// Whole parts without a number, or with the least one there is; and at any temperature, by which
// such a number is rounded by more than an exponential can hold.
template <class T>
void extremes(double inv_temperature) {
  using A = accumulate_t<T>;
  constexpr int64_t kVocab = 40000;  // several parts
  const A least = sizeof(T) == 4 ? -std::numeric_limits<float>::max() : A{-3.3895313892515355e38f};
  Case<T> c({5, kVocab});
  c.shape.inv_temperature = inv_temperature;
  c.logits.allow(0, c.logits.size());
  auto fill = [&](int64_t row, A x) {
    for (int64_t j = 0; j < kVocab; ++j) c.logits[row * kVocab + j] = store<T>(x);
    c.mask[row] = true;
    c.target[row] = 12345;
  };
  fill(0, -65504);
  fill(1, least);  // a uniform distribution at any level
  fill(2, -INFINITY);
  c.logits[2 * kVocab + 12345] = store<T>(7);
  fill(3, -INFINITY);
  c.logits[3 * kVocab + 39000] = store<T>(NAN);
  fill(4, least);
  c.logits[4 * kVocab + 12345] = store<T>(7);
  typename Case<T>::Results out(5);
  for (const bool entropy : {false, true}) {
    c.forward(out, entropy);
    for (const int64_t row : {0, 1}) {
      CHECK_NEAR(out.logp[row], -std::log(40000.0), 1e-5);
      CHECK(out.lse[row] < -4e4);
      if (entropy) CHECK_NEAR(out.entropy[row], std::log(40000.0), 1e-5);
    }
    for (const int64_t row : {2, 4}) {
      CHECK(out.logp[row] == 0 && out.lse[row] == 7 * static_cast<A>(inv_temperature));
      if (entropy) CHECK(out.entropy[row] == 0);
    }
    CHECK(std::isnan(out.logp[3]) && std::isnan(out.lse[3]));
    if (entropy) CHECK(std::isnan(out.entropy[3]));

    Buffer<T> grad(5 * kVocab);
    c.backward(out, entropy, grad);
    for (int64_t j = 0; j < kVocab; ++j) {
      // The log of V is lost in a log-sum-exp of -6e24.
      const double one = j == 12345, of_row_0 = inv_temperature * (one - 1 / 40000.0);
      if (inv_temperature < 2) CHECK_NEAR(load(grad[j]), of_row_0, 0x1p-8 * std::fabs(of_row_0));
      CHECK(load(grad[2 * kVocab + j]) == 0 && load(grad[4 * kVocab + j]) == 0);
      CHECK(std::isnan(load(grad[3 * kVocab + j])));
      if (g_failures > 20) return;
    }
  }
}

// Temperature near 0: the largest logit has all, and no gradient; two of them share.
template <class T>
void no_temperature(double softcap) {
  constexpr int64_t kVocab = 1000;
  for (const double inv_temperature : {1e9, 1e10, 1e12, 1e20, 1e30}) {
    Case<T> c({2, kVocab, 0, 0, inv_temperature, softcap});
    for (int64_t row : {0, 1}) {
      for (int64_t j = 0; j < kVocab; ++j) c.logits[row * kVocab + j] = store<T>(j % 7 - 3);
      c.logits[row * kVocab + 700] = store<T>(20.3f);
      c.target[row] = 700;
    }
    c.logits[kVocab + 7] = c.logits[700];
    typename Case<T>::Results out(2);
    for (const bool entropy : {false, true}) {
      c.forward(out, entropy);
      CHECK(out.logp[0] == 0);
      CHECK_NEAR(out.logp[1], -std::log(2.0), 1e-6);
      Buffer<T> grad(2 * kVocab);
      c.backward(out, entropy, grad);
      for (int64_t j = 0; j < kVocab; ++j) {
        CHECK(load(grad[j]) == 0);
        const double half = j == 700 ? 0.5 : j == 7 ? -0.5 : 0;
        const double slope =
            softcap > 0 ? 1 - std::pow(std::tanh(load(c.logits[700]) / softcap), 2) : 1;
        const double expected = half * slope * inv_temperature;
        // The log of 2 is in a log-sum-exp of 2e13 to two digits, in one of 2e21 not at all.
        if (inv_temperature < 1e13)
          CHECK_NEAR(load(grad[kVocab + j]), expected, 0.01 * std::fabs(expected));
      }
    }
  }
}

// Offsets beyond 2^31 elements: two rows, far apart, at the ends of 4 GiB of which little is
// touched.
void far_apart() {
  constexpr int64_t kVocab = 1000, kStride = (int64_t{1} << 31) + 8;
  using T = BFloat16;
  Case<T> near({2, kVocab});
  Buffer<T> far(kStride + kVocab);
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t j = 0; j < kVocab; ++j) far[row * kStride + j] = near.logits[row * kVocab + j];
  }
  Case<T>::Results expected(2), got(2);
  near.forward(expected, false);
  TokenLogprobParams p{};
  p.logits = far.data();
  p.dtype = dtype<T>();
  p.rows = 2;
  p.vocab = kVocab;
  p.row_stride = kStride;
  p.target = near.target.data();
  p.inv_temperature = 1;
  p.logp = got.logp.data();
  p.lse = got.lse.data();
  p.lse_exact = got.lse_exact.data();
  run_on_device([&] { return cuda::token_logprob(p, nullptr, nullptr); });
  for (int64_t row = 0; row < 2; ++row) {
    CHECK(got.logp[row] == expected.logp[row] && got.lse[row] == expected.lse[row]);
  }

  Buffer<float> grad(std::vector<float>{1, 1});
  TokenLogprobBackwardParams b{};
  b.logits = b.grad_logits = far.data();
  b.dtype = dtype<T>();
  b.rows = 2;
  b.vocab = kVocab;
  b.row_stride = b.grad_row_stride = kStride;
  b.target = near.target.data();
  b.inv_temperature = 1;
  b.lse_exact = got.lse_exact.data();
  b.grad_logp = grad.data();
  run_on_device([&] { return cuda::token_logprob_backward(b, nullptr); });
  for (int64_t row = 0; row < 2; ++row) {
    const double at_target = 1 - std::exp(near.truth[row].logp);
    CHECK_NEAR(load(far[row * kStride + near.target[row]]), at_target, 0.004);
  }
}

template <class T>
void every_size() {
  for (const Shape& shape : std::vector<Shape>{
           {3, 1},
           {6, 7, 2},             // shorter than a vector
           {6, 31, 0, 1},         // every alignment
           {6, 1000, 24},         // padded, aligned
           {6, 8003, 0, 3, 0.7},  // misaligned, odd
           {6, 31, 0, 1, 1, 3},   // with a softcap, some logits far beyond it
           {6, 8003, 0, 3, 0.7, 8},
           {3, 511, 0, 1},  // a warp's group of 512, all but one
           {3, 512, 0, 1},
           {5, 1537, 0, 1},
           {0, 1000},  // nobody
       }) {
    forward<T>(shape);
    for (const Place place : {Place::kInPlace, Place::kApart, Place::kApartUnlikeStride}) {
      backward<T>(shape, place != Place::kApart, place);
    }
  }
}

}  // namespace

int main() {
  return run_tests([] {
    every_size<float>();
    every_size<BFloat16>();
    every_size<Float16>();
    every_size<double>();
    // Rows of several parts.
    forward<float>({3, 50257, 0, 1, 1.25});
    forward<BFloat16>({4, 50257, 7});
    forward<BFloat16>({4, 50257, 7, 0, 1, 30});
    backward<BFloat16>({2, 50257, 0, 1}, true, Place::kInPlace);
    same_in_any_batch<float>(1000);
    same_in_any_batch<BFloat16>(33001);
    same_in_any_batch<Float16>(1537);
    far_apart();
    rows_without_an_answer<float>();
    rows_without_an_answer<BFloat16>();
    for (const double inv_temperature : {1.0, 0.7, 1.3, 1e20}) {
      extremes<float>(inv_temperature);
      extremes<BFloat16>(inv_temperature);
    }
    for (const double softcap : {0.0, 30.0}) {
      no_temperature<float>(softcap);
      no_temperature<BFloat16>(softcap);
    }
  });
}
