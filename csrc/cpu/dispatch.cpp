// dispatch.cpp: the only file that asks what the CPU is. It chooses once, through a table of
// function pointers; no kernel branches on the instruction set.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "fdpg/cpu.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fdpg::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  VocabularyKernels (*kernels)(Dtype dtype);
};

#if defined(__x86_64__)
bool has_avx2() {
  unsigned a, b, c, d;  // clang 14 has no name for F16C
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The registers are 8 KB, which Linux saves for processes that have asked for them (from 5.16 on).
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;  // CPUID leaf 7, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) &&
         (d & kBf16) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// THE list, best first. The conditions name what the target pragma of simd_<isa>-inl.h names; each
// also implies that the operating system saves the registers: __builtin_cpu_supports asks, and
// Linux for tiles.
constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"amx", has_amx, amx_kernels},
    {"avx512bf16", has_avx512bf16, avx512bf16_kernels},
    {"avx512", has_avx512, avx512_kernels},
    {"avx2", has_avx2, avx2_kernels},
#endif
    {"portable", [] { return true; }, portable_kernels},
};

const Isa* find(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.supported()) return &isa;
  }
  return nullptr;
}

const Isa* choose_at_start() {
  if (const char* name = std::getenv("FDPG_CPU_ISA"); name && *name) {
    if (const Isa* isa = find(name)) return isa;
    std::fprintf(stderr, "fdpg: FDPG_CPU_ISA=%s is unknown or not supported by this CPU; ignored\n",
                 name);
  }
  for (const Isa& isa : kIsas) {
    if (isa.supported()) return &isa;
  }
  return nullptr;  // never: portable is supported
}

std::atomic<const Isa*>& active() {
  static std::atomic<const Isa*> isa{choose_at_start()};
  return isa;
}

constexpr std::align_val_t kCacheLine{64};

VocabularyKernels kernels(Dtype dtype) { return active().load()->kernels(dtype); }

}  // namespace

void* Workspace::allocate(int64_t bytes) {
  memory_ = ::operator new(static_cast<size_t>(bytes), kCacheLine);
  return memory_;
}

Workspace::~Workspace() { ::operator delete(memory_, kCacheLine); }

const char* isa() { return active().load()->name; }

const char* vendor() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

bool set_isa(const char* name) {
  const Isa* chosen = find(name);
  if (chosen) active().store(chosen);
  return chosen != nullptr;
}

int64_t token_logprob(const TokenLogprobParams& p, int64_t begin, int64_t end) {
  return kernels(p.dtype).token_logprob(p, begin, end);
}

int64_t token_logprob_backward(const TokenLogprobBackwardParams& p, int64_t begin, int64_t end) {
  return kernels(p.dtype).token_logprob_backward(p, begin, end);
}

int64_t token_logprob_numerators(const TokenLogprobNumeratorsParams& p, int64_t begin,
                                 int64_t end) {
  return kernels(p.dtype).token_logprob_numerators(p, begin, end);
}

int64_t sample_logprob(const SampleLogprobParams& p, int64_t begin, int64_t end) {
  return kernels(p.dtype).sample_logprob(p, begin, end);
}

int64_t decode_attention(const DecodeAttentionParams& p, int64_t begin, int64_t end) {
  return kernels(p.dtype).decode_attention(p, begin, end);
}

int64_t gelu_tanh(const GeluTanhParams& p, int64_t begin, int64_t end) {
  return kernels(p.dtype).gelu_tanh(p, begin, end);
}

int64_t matmul(const MatmulParams& p, int64_t begin, int64_t end) {
  Workspace workspace;
  return kernels(p.dtype).matmul(p, begin, end, workspace);
}

bool has_packed_products() { return kernels(Dtype::kFloat32).matmul_pack != nullptr; }

int64_t matmul_pack(const MatmulPackParams& p, int64_t begin, int64_t end) {
  return kernels(Dtype::kFloat32).matmul_pack(p, begin, end);
}

int64_t linear_numerators(const LinearNumeratorsParams& p, LinearWalk walk, int64_t begin,
                          int64_t end) {
  Workspace workspace;
  return kernels(p.product.dtype).linear_numerators(p, walk, begin, end, workspace);
}

}  // namespace fdpg::cpu
