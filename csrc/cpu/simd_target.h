// simd_target.h: two macros that compile what stands between them for an instruction set that the
// rest of the library does not assume, in g++'s spelling and in clang's.
//
// LAW of the code between them: no #include and no std:: call, and internal linkage throughout. The
// linker keeps one copy of an inline function for everybody; were that copy the AVX-512 one, a CPU
// without it would die in a function that has nothing to do with SIMD (numpy#25274, FBGEMM#46).
// Functions written outside (load, store, random_uniform) may be called: they are compiled for
// every CPU. libm is reached by __builtin_log and its like, which are calls and never a copy.
#pragma once

#define FDPG_PRAGMA(...) _Pragma(#__VA_ARGS__)

#if defined(__clang__)
#define FDPG_BEGIN_TARGET(isa) \
  FDPG_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FDPG_END_TARGET FDPG_PRAGMA(clang attribute pop)
#else
#define FDPG_BEGIN_TARGET(isa) FDPG_PRAGMA(GCC push_options) FDPG_PRAGMA(GCC target(isa))
#define FDPG_END_TARGET FDPG_PRAGMA(GCC pop_options)
#endif

// The words of a vector vocabulary vanish into the loop that uses them, in debug builds too.
#define FDPG_ALWAYS_INLINE inline __attribute__((always_inline))
