// bf16_products.h: a table of kernels whose products of bf16, and of fp32 that may be rounded to
// it, are multiplied in one of the ways there are instructions for.
#pragma once

#include "kernels.h"
//
#include "linear_numerators-inl.h"
#include "matmul-inl.h"

namespace fdpg::cpu {
namespace {

// M: InPairs or InTiles.
template <template <class T> class M>
VocabularyKernels avx512_kernels_with(Dtype dtype) {
  VocabularyKernels kernels = avx512_kernels(dtype);
  if (dtype == Dtype::kBFloat16) {
    kernels.matmul = matmul<M<BFloat16>>;
    kernels.linear_numerators = linear_numerators<M<BFloat16>>;
  }
  if (dtype == Dtype::kFloat32) {
    kernels.matmul_pack = matmul_pack<M<float>>;
    kernels.matmul = [](const MatmulParams& p, int64_t begin, int64_t end, Workspace& workspace) {
      const auto run = p.may_round ? matmul<M<float>> : avx512_kernels(Dtype::kFloat32).matmul;
      return run(p, begin, end, workspace);
    };
    kernels.linear_numerators = [](const LinearNumeratorsParams& p, LinearWalk walk, int64_t begin,
                                   int64_t end, Workspace& workspace) {
      const auto run = p.product.may_round ? linear_numerators<M<float>>
                                           : avx512_kernels(Dtype::kFloat32).linear_numerators;
      return run(p, walk, begin, end, workspace);
    };
  }
  return kernels;
}

}  // namespace
}  // namespace fdpg::cpu
