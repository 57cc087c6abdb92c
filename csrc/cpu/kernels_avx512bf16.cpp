// kernels_avx512bf16.cpp: those of AVX-512, but products of bf16 by the instructions for them.
#if defined(__x86_64__)

#include "kernels.h"
#include "simd_avx512bf16-inl.h"
//
#include "linear_numerators-inl.h"
#include "matmul-inl.h"

namespace fdpg::cpu {

VocabularyKernels avx512bf16_kernels(Dtype dtype) {
  VocabularyKernels kernels = avx512_kernels(dtype);
  if (dtype == Dtype::kBFloat16) {
    kernels.matmul = matmul<InPairs<BFloat16>>;
    kernels.linear_numerators = linear_numerators<InPairs<BFloat16>>;
  }
  if (dtype == Dtype::kFloat32) {
    kernels.matmul_pack = matmul_pack<InPairs<float>>;
    kernels.matmul = [](const MatmulParams& p, int64_t begin, int64_t end, Workspace& workspace) {
      const auto run = p.may_round ? matmul<InPairs<float>> : matmul<Singly<Avx512, float>>;
      return run(p, begin, end, workspace);
    };
    kernels.linear_numerators = [](const LinearNumeratorsParams& p, LinearWalk walk, int64_t begin,
                                   int64_t end, Workspace& workspace) {
      const auto run = p.product.may_round ? linear_numerators<InPairs<float>>
                                           : linear_numerators<Singly<Avx512, float>>;
      return run(p, walk, begin, end, workspace);
    };
  }
  return kernels;
}

}  // namespace fdpg::cpu

#endif  // __x86_64__
