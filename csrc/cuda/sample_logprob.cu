// sample_logprob.cu: the two launches of sample_logprob.cuh.
#include "fdpg/cuda.h"
#include "sample_logprob.cuh"

namespace fdpg::cuda {

std::size_t sample_logprob_workspace(const SampleLogprobParams& p) {
  std::size_t bytes = 0;
  with_cut(p.dtype, p.vocab, [&](const Cut& cut, auto tag) {
    bytes = p.rows * cut.parts * (cut.threads / kWarp) *
            sizeof(OnlineLogSumExp<accumulate_t<decltype(tag)>>);
    return cudaSuccess;
  });
  return bytes;
}

Status sample_logprob(const SampleLogprobParams& p, void* workspace, Stream stream) {
  return with_cut(p.dtype, p.vocab, [&](const Cut& cut, auto tag) {
    using T = decltype(tag);
    auto* partial = static_cast<OnlineLogSumExp<accumulate_t<T>>*>(workspace);
    return with_softcap(p.softcap, [&](auto capped) {
      constexpr bool kCapped = decltype(capped)::value;
      const cudaError_t status =
          launch(sample_logprob_spans<T, kCapped>, p.rows * cut.parts, cut.threads,
                 cut.stage_bytes<T>(cut.part), stream, p, cut.part, cut.parts, cut.span, partial);
      if (status != cudaSuccess) return status;
      return launch(sample_logprob_rows<T, kCapped>, p.rows, cut.threads,
                    cut.stage_bytes<T>(cut.span), stream, p, cut.part, cut.parts, cut.span,
                    cut.threads / kWarp, partial);
    });
  });
}

}  // namespace fdpg::cuda
