// sample_logprob.cu: the two launches of sample_logprob.cuh.
#include "fdpg/cuda.h"
#include "sample_logprob.cuh"

namespace fdpg::cuda {

std::size_t sample_logprob_workspace(const SampleLogprobParams& p) {
  std::size_t bytes = 0;
  visit_dtype(p.dtype, [&](auto tag) {
    bytes = p.rows * divide_up(p.vocab, kSpan) * sizeof(Seen<accumulate_t<decltype(tag)>, false>);
  });
  return bytes;
}

Status sample_logprob(const SampleLogprobParams& p, void* workspace, Stream stream) {
  cudaError_t status = cudaErrorInvalidValue;  // no vocabulary, or a dtype that there is not
  if (p.vocab <= 0) return status;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kWarps = kSpanThreads / kWarp;
    auto* partial = static_cast<Seen<accumulate_t<T>, false>*>(workspace);
    const int64_t runs = divide_up(p.vocab, kRun<T>), spans = divide_up(p.vocab, kSpan);
    status = with_softcap(p.softcap, [&](auto capped) {
      constexpr bool kCapped = decltype(capped)::value;
      const cudaError_t first = launch<Begin::kEarly>(
          sample_logprob_spans<T, kCapped>, divide_up(p.rows * runs, kWarps), kSpanThreads,
          kWarps * kRunRoom<T> * sizeof(T), stream, p, runs, spans, partial);
      if (first != cudaSuccess) return first;
      return launch<Begin::kEarly>(sample_logprob_rows<T, kCapped>, p.rows, kWarp, 0, stream, p,
                                   spans, partial);
    });
  });
  return status;
}

}  // namespace fdpg::cuda
