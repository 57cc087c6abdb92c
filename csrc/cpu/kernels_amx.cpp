// kernels_amx.cpp: those of AVX-512, but products of bf16 by tiles.
#if defined(__x86_64__)

#include "simd_amx-inl.h"
//
#include "bf16_products.h"

namespace fdpg::cpu {

VocabularyKernels amx_kernels(Dtype dtype) { return avx512_kernels_with<InTiles>(dtype); }

}  // namespace fdpg::cpu

#endif  // __x86_64__
