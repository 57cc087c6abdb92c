// runtime.h: what the two halves of the emulator share. simt.cc runs fibers; race.cc watches
// memory.
#pragma once

// Switching stacks by hand takes ten instructions, swapcontext two system calls. SIMT_UCONTEXT asks
// for the latter where the former exists, to test it.
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>

#include "simt.h"

namespace simt {

inline constexpr unsigned kMaxThreads = 1024;
inline constexpr std::size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;
inline constexpr std::size_t kMaxSharedBytes = 227 << 10;  // of one block on sm_90

enum class State : unsigned char { kReady, kAtBarrier, kInWarp, kDone };

// One CUDA thread.
struct Fiber {
#ifdef SIMT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  void* fake_stack;  // AddressSanitizer's
  const char* stack;
  std::size_t stack_bytes;

  State state;
  const char* operation;  // the rendezvous it waits in, and where
  Site site;
  unsigned mask;
  int predicate;
  WarpFunction fn;
  Slot slot;

  // Race detector. `clock[l]`: up to which moment this thread has seen the work of lane l of its
  // warp; moved by __syncwarp alone. `unfenced`: 1 + epoch of a global store that no fence of this
  // block has published yet, or 0.
  uint32_t clock[32];
  uint32_t unfenced;

  bool waited;  // for the launch before, where this one has begun early
};

struct Runtime {
  Fiber host;
  Fiber threads[kMaxThreads];
  unsigned count;    // threads of the block
  unsigned current;  // the running one
  unsigned live;     // that have not returned
  unsigned arrived;  // at the block barrier
  Barrier barrier;
  int barrier_result;
  unsigned ready[kMaxThreads], ready_count;  // a stack
  unsigned seed;
  uint64_t random;

  void (*entry)(void*);
  void* arg;
  char* stacks;
  unsigned char* shared;  // dynamic shared memory
  std::size_t shared_bytes;

  bool in_kernel;  // device code is running: loads and stores count
  bool failed;
  char message[4096];

  uint32_t epoch;        // barriers passed by this block
  uint32_t block;        // serial number over all launches, from 1
  uint32_t first_block;  // of this launch
  bool early;            // this launch has begun before the one before it has ended,
  uint32_t early_block;  // of which this is the first block
};
extern Runtime runtime;

// The executable's thread-local block: where static shared memory sits in the race build.
void static_shared_range(char*& begin, char*& end);

// race.cc
bool race_build();
void race_begin_launch(std::size_t blocks);
void race_check_copy(void* to, const void* from, std::size_t bytes, const void* pc);

}  // namespace simt
