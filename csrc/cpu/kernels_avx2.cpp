// kernels_avx2.cpp: the vocabulary kernels, compiled for AVX2.
#if defined(__x86_64__)

#include "kernels.h"
#include "simd_avx2-inl.h"
//
#include "decode_attention-inl.h"
#include "gelu_tanh-inl.h"
#include "linear_numerators-inl.h"
#include "matmul-inl.h"
#include "sample_logprob-inl.h"
#include "token_logprob-inl.h"

namespace fdpg::cpu {

VocabularyKernels avx2_kernels(Dtype dtype) {
  VocabularyKernels kernels = portable_kernels(dtype);
  visit_dtype(dtype, [&](auto storage) {
    using T = decltype(storage);
    if constexpr (sizeof(accumulate_t<T>) == sizeof(float)) {
      kernels = {token_logprob<Avx2, T>,
                 token_logprob_backward<Avx2, T>,
                 token_logprob_numerators<Avx2, T>,
                 sample_logprob<Avx2, T>,
                 decode_attention<Avx2, T>,
                 gelu_tanh<Avx2, T>,
                 matmul<Singly<Avx2, T>>,
                 linear_numerators<Singly<Avx2, T>>};
    }
  });
  return kernels;
}

}  // namespace fdpg::cpu

#endif  // __x86_64__
