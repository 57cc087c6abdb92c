// kernels_avx512.cpp: the vocabulary kernels, compiled for AVX-512.
#if defined(__x86_64__)

#include "kernels.h"
#include "simd_avx512-inl.h"
//
#include "decode_attention-inl.h"
#include "gelu_tanh-inl.h"
#include "linear_numerators-inl.h"
#include "matmul-inl.h"
#include "sample_logprob-inl.h"
#include "token_logprob-inl.h"

namespace fdpg::cpu {

VocabularyKernels avx512_kernels(Dtype dtype) {
  VocabularyKernels kernels = portable_kernels(dtype);
  visit_dtype(dtype, [&](auto storage) {
    using T = decltype(storage);
    if constexpr (sizeof(accumulate_t<T>) == sizeof(float)) {
      kernels = {token_logprob<Avx512, T>,
                 token_logprob_backward<Avx512, T>,
                 token_logprob_numerators<Avx512, T>,
                 sample_logprob<Avx512, T>,
                 decode_attention<Avx512, T>,
                 gelu_tanh<Avx512, T>,
                 matmul<Singly<Avx512, T>>,
                 linear_numerators<Singly<Avx512, T>>};
    }
  });
  return kernels;
}

}  // namespace fdpg::cpu

#endif  // __x86_64__
