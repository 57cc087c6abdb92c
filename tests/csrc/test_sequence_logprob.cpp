// Sums of ragged rows, in order, whatever stands past their ends.
#include <limits>
#include <vector>

#include "check.h"
#include "fdpg/cpu.h"

using namespace fdpg;

namespace {

template <class T>
SequenceLogprobParams params(const std::vector<T>& values, const std::vector<int64_t>& lengths,
                             int64_t tokens, int64_t row_stride, std::vector<double>& out) {
  SequenceLogprobParams p{};
  p.values = values.data();
  p.is_double = sizeof(T) == sizeof(double);
  p.sequences = static_cast<int64_t>(lengths.size());
  p.tokens = tokens;
  p.row_stride = row_stride;
  p.lengths = lengths.data();
  p.out = out.data();
  return p;
}

void test_ragged_rows_with_a_stride() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> values = {1, 2, 3, nan,   // length 2
                                     4, 5, 6, nan,   // length 3: the fourth column is padding
                                     7, 8, 9, nan};  // length 0
  const std::vector<int64_t> lengths = {2, 3, 0};
  std::vector<double> out(3, -1.0);
  CHECK(cpu::sequence_logprob(params(values, lengths, 3, 4, out), 0, 3) == kOk);
  CHECK(out[0] == 3.0);
  CHECK(out[1] == 15.0);
  CHECK(out[2] == 0.0);
}

void test_adds_floats_in_double() {
  const int64_t n = 100000;  // a float sum of these is off by about 1
  const std::vector<float> values(n, 0.1f);
  std::vector<double> out(1);
  CHECK(cpu::sequence_logprob(params(values, {n}, n, n, out), 0, 1) == kOk);
  CHECK_NEAR(out[0], static_cast<double>(0.1f) * n, 1e-7);
}

void test_a_range_touches_only_its_rows() {
  const std::vector<double> values = {1, 2, 3, 4};
  const std::vector<int64_t> lengths = {1, 1, 1, 1};
  std::vector<double> out(4, -1.0);
  CHECK(cpu::sequence_logprob(params(values, lengths, 1, 1, out), 1, 3) == kOk);
  CHECK(out[0] == -1.0 && out[1] == 2.0 && out[2] == 3.0 && out[3] == -1.0);
}

void test_reports_the_first_bad_length_and_does_the_rest() {
  const std::vector<double> values = {1, 2, 3, 4};
  const std::vector<int64_t> lengths = {1, 2, -1, 1};
  std::vector<double> out(4, 0.0);
  CHECK(cpu::sequence_logprob(params(values, lengths, 1, 1, out), 0, 4) == 1);
  CHECK(out[0] == 1.0 && std::isnan(out[1]) && std::isnan(out[2]) && out[3] == 4.0);
}

}  // namespace

int main() {
  test_ragged_rows_with_a_stride();
  test_adds_floats_in_double();
  test_a_range_touches_only_its_rows();
  test_reports_the_first_bad_length_and_does_the_rest();
  return test_result();
}
