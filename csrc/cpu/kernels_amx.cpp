// kernels_amx.cpp: those of AVX-512, but products of bf16 by tiles.
#if defined(__x86_64__)

#include "kernels.h"
#include "simd_amx-inl.h"
//
#include "linear_numerators-inl.h"

namespace fdpg::cpu {

VocabularyKernels amx_kernels(Dtype dtype) {
  VocabularyKernels kernels = avx512bf16_kernels(dtype);
  if (dtype == Dtype::kBFloat16) {
    kernels.matmul = matmul<InTiles<BFloat16>>;
    kernels.linear_numerators = linear_numerators<InTiles<BFloat16>>;
  }
  if (dtype == Dtype::kFloat32) {
    kernels.matmul_pack = matmul_pack<InTiles<float>>;
    kernels.matmul = [](const MatmulParams& p, int64_t begin, int64_t end, Workspace& workspace) {
      const auto run =
          p.may_round ? matmul<InTiles<float>> : avx512_kernels(Dtype::kFloat32).matmul;
      return run(p, begin, end, workspace);
    };
    kernels.linear_numerators = [](const LinearNumeratorsParams& p, LinearWalk walk, int64_t begin,
                                   int64_t end, Workspace& workspace) {
      const auto run = p.product.may_round ? linear_numerators<InTiles<float>>
                                           : avx512_kernels(Dtype::kFloat32).linear_numerators;
      return run(p, walk, begin, end, workspace);
    };
  }
  return kernels;
}

}  // namespace fdpg::cpu

#endif  // __x86_64__
