// kernels.h: the table of function pointers between dispatch.cpp and the builds of the vocabulary
// kernels, one per instruction set.
#pragma once

#include <cstdint>

#include "fdpg/cpu.h"  // kMatmulTileRows
#include "fdpg/params.h"

namespace fdpg::cpu {

// Memory of one call, whose kernel alone knows how much it needs. Not inline: the code between
// FDPG_BEGIN_SIMD and FDPG_END_SIMD may call it.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  void* allocate(int64_t bytes);  // once; begins on a cache line

 private:
  void* memory_ = nullptr;
};

// The vocabulary kernels for one dtype of logits; meanings as in fdpg/cpu.h.
struct VocabularyKernels {
  int64_t (*token_logprob)(const TokenLogprobParams& p, int64_t begin, int64_t end);
  int64_t (*token_logprob_backward)(const TokenLogprobBackwardParams& p, int64_t begin,
                                    int64_t end);
  int64_t (*token_logprob_numerators)(const TokenLogprobNumeratorsParams& p, int64_t begin,
                                      int64_t end);
  int64_t (*sample_logprob)(const SampleLogprobParams& p, int64_t begin, int64_t end);
  int64_t (*decode_attention)(const DecodeAttentionParams& p, int64_t begin, int64_t end);
  int64_t (*gelu_tanh)(const GeluTanhParams& p, int64_t begin, int64_t end);
  int64_t (*matmul)(const MatmulParams& p, int64_t begin, int64_t end, Workspace& workspace);
  int64_t (*linear_numerators)(const LinearNumeratorsParams& p, LinearWalk walk, int64_t begin,
                               int64_t end, Workspace& workspace);
  // Of fp32 alone; null where there is no such thing.
  int64_t (*matmul_pack)(const MatmulPackParams& p, int64_t begin, int64_t end) = nullptr;
};

// Of what matmul packs of b: bytes of a column at a time, and of all columns at a time. Three
// quarters of a second-level cache of 1 MB, so that a is packed seldom; where it is not, a quarter,
// and room for what comes next.
inline constexpr int64_t kMatmulColumnBytes = 4096;
inline constexpr int64_t kMatmulPanelBytes = 768 << 10, kMatmulFewPanelBytes = 256 << 10;

VocabularyKernels portable_kernels(Dtype dtype);

#if defined(__x86_64__)
// fp64 comes from the portable build: it is there to check gradients by, not to be fast.
VocabularyKernels avx2_kernels(Dtype dtype);
VocabularyKernels avx512_kernels(Dtype dtype);
VocabularyKernels avx512bf16_kernels(Dtype dtype);
VocabularyKernels amx_kernels(Dtype dtype);
#endif

}  // namespace fdpg::cpu
