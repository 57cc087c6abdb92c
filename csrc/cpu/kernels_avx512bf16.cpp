// kernels_avx512bf16.cpp: those of AVX-512, but products of bf16 by the instructions for them.
#if defined(__x86_64__)

#include "simd_avx512bf16-inl.h"
//
#include "bf16_products.h"

namespace fdpg::cpu {

VocabularyKernels avx512bf16_kernels(Dtype dtype) { return avx512_kernels_with<InPairs>(dtype); }

}  // namespace fdpg::cpu

#endif  // __x86_64__
