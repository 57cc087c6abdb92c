// sequence_logprob: the sum of a sequence's values up to its length, one read of the row.
// Added in the order t = 0, 1, ... in fp64, so that neither batch nor padding changes a bit.
#include <limits>

#include "fdpg/cpu.h"

namespace fdpg::cpu {
namespace {

template <class T>
int64_t sum_rows(const SequenceLogprobParams& p, int64_t begin, int64_t end) {
  int64_t offender = kOk;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t length = p.lengths[b];
    if (length < 0 || length > p.tokens) {
      p.out[b] = std::numeric_limits<double>::quiet_NaN();
      if (offender == kOk) offender = b;
      continue;
    }
    const T* row = static_cast<const T*>(p.values) + b * p.row_stride;
    double sum = 0.0;
    for (int64_t t = 0; t < length; ++t) sum += static_cast<double>(row[t]);
    p.out[b] = sum;
  }
  return offender;
}

}  // namespace

int64_t sequence_logprob(const SequenceLogprobParams& p, int64_t begin, int64_t end) {
  return p.is_double ? sum_rows<double>(p, begin, end) : sum_rows<float>(p, begin, end);
}

}  // namespace fdpg::cpu
