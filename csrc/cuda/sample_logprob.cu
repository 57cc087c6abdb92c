// sample_logprob.cu: the two launches of sample_logprob.cuh.
#include "fdpg/cuda.h"
#include "sample_logprob.cuh"

namespace fdpg::cuda {

std::size_t sample_logprob_workspace(const SampleLogprobParams& p) {
  std::size_t bytes = 0;
  with_cut(p.dtype, p.vocab, [&](const Cut& cut, auto tag) {
    bytes = p.rows * cut.parts * sizeof(OnlineLogSumExp<accumulate_t<decltype(tag)>>);
    return cudaSuccess;
  });
  return bytes;
}

Status sample_logprob(const SampleLogprobParams& p, void* workspace, Stream stream) {
  return with_cut(p.dtype, p.vocab, [&](const Cut& cut, auto tag) {
    using T = decltype(tag);
    auto* partial = static_cast<OnlineLogSumExp<accumulate_t<T>>*>(workspace);
    const std::size_t stage = cut.stage_bytes<T>(cut.part);
    return with_softcap(p.softcap, [&](auto capped) {
      constexpr bool kCapped = decltype(capped)::value;
      const cudaError_t status =
          launch(sample_logprob_parts<T, kCapped>, p.rows * cut.parts, cut.threads, stage, stream,
                 p, cut.part, cut.parts, partial);
      if (status != cudaSuccess) return status;
      return launch(sample_logprob_rows<T, kCapped>, p.rows, cut.threads, stage, stream, p,
                    cut.part, cut.parts, partial);
    });
  });
}

}  // namespace fdpg::cuda
