// sample_logprob.cu: the two launches of sample_logprob.cuh.
#include "fdpg/cuda.h"
#include "sample_logprob.cuh"

namespace fdpg::cuda {
namespace {

template <class T, bool kEntropy, bool kCapped>
cudaError_t run(const SampleLogprobParams& p, void* workspace, cudaStream_t stream) {
  constexpr int kWarps = kSpanThreads / kWarp;
  auto* partial = static_cast<Seen<accumulate_t<T>, kEntropy>*>(workspace);
  const int64_t runs = divide_up(p.vocab, kRun<T>), spans = divide_up(p.vocab, kSpan);
  const cudaError_t status = launch<Begin::kEarly>(
      sample_logprob_spans<T, kEntropy, kCapped>, divide_up(p.rows * runs, kWarps), kSpanThreads,
      kWarps * kRunRoom<T> * sizeof(T), stream, p, runs, spans, partial);
  if (status != cudaSuccess) return status;
  return launch<Begin::kEarly>(sample_logprob_rows<T, kEntropy, kCapped>, p.rows, kWarp, 0, stream,
                               p, spans, partial);
}

}  // namespace

std::size_t sample_logprob_workspace(const SampleLogprobParams& p) {
  std::size_t bytes = 0;
  visit_dtype(p.dtype, [&](auto tag) {
    using A = accumulate_t<decltype(tag)>;
    const std::size_t seen = p.entropy ? sizeof(Seen<A, true>) : sizeof(Seen<A, false>);
    bytes = p.rows * divide_up(p.vocab, kSpan) * seen;
  });
  return bytes;
}

Status sample_logprob(const SampleLogprobParams& p, void* workspace, Stream stream) {
  cudaError_t status = cudaErrorInvalidValue;  // no vocabulary, or a dtype that there is not
  if (p.vocab <= 0) return status;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    status = with_softcap(p.softcap, [&](auto capped) {
      constexpr bool kCapped = decltype(capped)::value;
      return p.entropy ? run<T, true, kCapped>(p, workspace, stream)
                       : run<T, false, kCapped>(p, workspace, stream);
    });
  });
  return status;
}

}  // namespace fdpg::cuda
