// fdiv_terms.cu: the launch of fdiv_terms.cuh.
#include "fdiv_terms.cuh"
#include "fdpg/cuda.h"

namespace fdpg::cuda {

Status fdiv_terms(const FdivTermsParams& p, Stream stream) {
  return launch(state_terms, divide_up(p.sequences, kTermThreads), kTermThreads, 0, stream, p);
}

}  // namespace fdpg::cuda
