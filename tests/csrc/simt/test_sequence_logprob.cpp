// sequence_logprob on CUDA: the CPU's bits, and nothing read beyond a length.
#include <cmath>
#include <random>
#include <vector>

#include "fdpg/cpu.h"
#include "harness.h"
//
#include "sequence_logprob.cu"  // its launcher and kernel, built for the emulator or for the device

using namespace fdpg;

namespace {

template <class T>
void check(int64_t sequences, int64_t tokens, int64_t padding) {
  const int64_t stride = tokens + padding;
  Buffer<T> values(sequences * stride);
  Buffer<int64_t> lengths(sequences);
  std::mt19937 random(1);
  std::normal_distribution<double> normal(-3, 2);
  for (int64_t b = 0; b < sequences; ++b) {
    lengths[b] = b % 5 == 0 ? tokens : static_cast<int64_t>(random() % (tokens + 1));
    for (int64_t t = 0; t < lengths[b]; ++t)
      values[b * stride + t] = static_cast<T>(normal(random));
  }
  if (sequences > 4) lengths[3] = -1, lengths[4] = tokens + 1;
  Buffer<double> expected(sequences), got(sequences);
  SequenceLogprobParams p{
      values.data(),  std::is_same_v<T, double>, sequences, tokens, stride, lengths.data(),
      expected.data()};
  CHECK(cpu::sequence_logprob(p, 0, sequences) == (sequences > 4 ? 3 : kOk));

  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t length = lengths[b] < 0 || lengths[b] > tokens ? 0 : lengths[b];
    values.forbid(b * stride + length, stride - length);
  }
  p.out = got.data();
  for_each_schedule([&](int) {
    run_on_device([&] { return cuda::sequence_logprob(p, nullptr); });
    for (int64_t b = 0; b < sequences; ++b) CHECK_NEAR(got[b], expected[b], 0.0);
  });
}

template <class T>
void every_size() {
  check<T>(0, 5, 0);
  check<T>(1, 1, 0);
  check<T>(7, 33, 3);
  check<T>(200, 40, 0);
  check<T>(3, 500, 1);
}

}  // namespace

int main() {
  return run_tests([] {
    every_size<float>();
    every_size<double>();
  });
}
