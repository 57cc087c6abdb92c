// kernels_portable.cpp: the vocabulary kernels, compiled for every CPU, and for double.
#include "kernels.h"
#include "simd_portable-inl.h"
//
#include "decode_attention-inl.h"
#include "gelu_tanh-inl.h"
#include "linear_numerators-inl.h"
#include "matmul-inl.h"
#include "sample_logprob-inl.h"
#include "token_logprob-inl.h"

namespace fdpg::cpu {

VocabularyKernels portable_kernels(Dtype dtype) {
  VocabularyKernels kernels = {};
  visit_dtype(dtype, [&](auto storage) {
    using T = decltype(storage);
    using S = Portable<accumulate_t<T>>;
    kernels = {token_logprob<S, T>,  token_logprob_backward<S, T>,   token_logprob_numerators<S, T>,
               sample_logprob<S, T>, decode_attention<S, T>,         gelu_tanh<S, T>,
               matmul<Singly<S, T>>, linear_numerators<Singly<S, T>>};
  });
  return kernels;
}

}  // namespace fdpg::cpu
