// sequence_logprob.cu: the launch of sequence_logprob.cuh.
#include "fdpg/cuda.h"
#include "sequence_logprob.cuh"

namespace fdpg::cuda {

Status sequence_logprob(const SequenceLogprobParams& p, Stream stream) {
  const int64_t blocks = divide_up(p.sequences, kSequenceThreads);
  return p.is_double ? launch(sum_sequences<double>, blocks, kSequenceThreads, 0, stream, p)
                     : launch(sum_sequences<float>, blocks, kSequenceThreads, 0, stream, p);
}

}  // namespace fdpg::cuda
