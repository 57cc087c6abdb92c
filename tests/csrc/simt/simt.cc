// simt.cc: fibers, barriers, warp operations and deadlock reports of the emulator. Compiled WITHOUT
// sanitizers; their entry points are weak, so that one object serves every build of the tests.
#include "simt.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "runtime.h"

extern "C" {
#define SIMT_WEAK __attribute__((weak))
SIMT_WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, std::size_t bytes);
SIMT_WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, std::size_t* bytes);
SIMT_WEAK void __asan_poison_memory_region(const volatile void* p, std::size_t bytes);
SIMT_WEAK void __asan_unpoison_memory_region(const volatile void* p, std::size_t bytes);

// A kernel that fails is left where it is; what its fibers hold is never freed.
const char* __asan_default_options() { return "detect_leaks=0"; }
}

namespace simt {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
Runtime runtime;

namespace {

Runtime& r = runtime;

// -------------------------------------------------------------------------------------------------
// Fibers

#ifndef SIMT_UCONTEXT
// Saves what the ABI says a call keeps, swaps stacks, restores.
asm(".text\n"
    ".type simt_switch,@function\n"
    "simt_switch:\n"
    "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
    "mov %rsp,(%rdi)\n"
    "mov %rsi,%rsp\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n"
    "ret\n"
    ".size simt_switch,.-simt_switch\n");
extern "C" void simt_switch(void** save, void* load) asm("simt_switch");
#endif

void switch_fiber(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
  }
#ifndef SIMT_UCONTEXT
  simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
  }
}

void leave_kernel() { switch_fiber(r.threads[r.current], r.host); }

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) {
    const void* bottom;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &r.host.stack_bytes);
    r.host.stack = static_cast<const char*>(bottom);
  }
  for (;;) {  // once per block of the grid
    r.entry(r.arg);
    if (!r.threads[r.current].waited) fail("a thread has returned without after_previous()");
    r.threads[r.current].state = State::kDone;
    leave_kernel();
  }
}

void make_fiber(unsigned i) {
  Fiber& fiber = r.threads[i];
  char* stack = r.stacks + i * (kStackBytes + kGuardBytes) + kGuardBytes;
  fiber.stack = stack;
  fiber.stack_bytes = kStackBytes;
  // A launch that failed left its red zones behind.
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStackBytes);
#ifndef SIMT_UCONTEXT
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // fiber_main's return address; keeps the stack aligned
  *--top = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 6;  // six registers to pop
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
  fiber.context.uc_stack.ss_size = 0;  // else ASan's swapcontext wipes the stack's red zones
#endif
}

// -------------------------------------------------------------------------------------------------
// Order of execution

unsigned random_below(unsigned n) {
  r.random ^= r.random << 13;
  r.random ^= r.random >> 7;
  r.random ^= r.random << 17;
  return unsigned((r.random >> 33) % n);
}

void make_ready(unsigned i) {
  r.threads[i].state = State::kReady;
  r.ready[r.ready_count++] = i;
}

unsigned next_ready() {
  if (r.seed >= 2) std::swap(r.ready[random_below(r.ready_count)], r.ready[r.ready_count - 1]);
  return r.ready[--r.ready_count];
}

// Visits 0..n-1 so that pushing on the stack of ready threads makes them run in the order of the
// schedule: descending for ascending execution.
template <class F>
void in_push_order(unsigned n, F f) {
  for (unsigned k = 0; k < n; ++k) f(r.seed == 1 ? k : n - 1 - k);
}

// -------------------------------------------------------------------------------------------------
// Rendezvous

// Who waits where, runs of equal threads together.
std::string who_waits_where() {
  auto describe = [](const Fiber& f) -> std::string {
    if (f.state == State::kDone) return "has returned";
    if (f.state == State::kReady) return "has not got there";
    char text[256];
    std::snprintf(text, sizeof text, "waits in %s (mask %08x) at %s:%d", f.operation, f.mask,
                  f.site.file, f.site.line);
    return text;
  };
  std::string all;
  for (unsigned i = 0, j; i < r.count; i = j) {
    const std::string text = describe(r.threads[i]);
    for (j = i + 1; j < r.count && describe(r.threads[j]) == text; ++j) {
    }
    all += "\n  threads " + std::to_string(i) + "-" + std::to_string(j - 1) + ": " + text;
    if (all.size() > 1500) return all + "\n  ...";
  }
  return all;
}

bool same_site(const Fiber& a, const Fiber& b) {
  return a.site.line == b.site.line && std::strcmp(a.site.file, b.site.file) == 0;
}

// Lets the block go on if every thread that has not returned has arrived.
void release_block() {
  if (!r.live || r.arrived < r.live) return;
  int votes = 0;
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < r.count; ++i) {
    const Fiber& f = r.threads[i];
    if (f.state != State::kAtBarrier) continue;
    if (first && (f.operation != first->operation || !same_site(f, *first))) {
      return fail("divergent barrier: threads of one block wait at different __syncthreads%s",
                  who_waits_where().c_str());
    }
    first = &f;
    votes += f.predicate != 0;
  }
  switch (r.barrier) {
    case Barrier::kSync:
    case Barrier::kCount:
      r.barrier_result = votes;
      break;
    case Barrier::kAnd:
      r.barrier_result = votes == int(r.arrived);
      break;
    case Barrier::kOr:
      r.barrier_result = votes > 0;
      break;
  }
  r.arrived = 0;
  ++r.epoch;
  in_push_order(r.count, [](unsigned i) {
    if (r.threads[i].state == State::kAtBarrier) make_ready(i);
  });
}

// Lets the lanes of `mask` go on if all that have not returned have arrived.
void release_warp(unsigned warp, unsigned mask) {
  Fiber* lanes = r.threads + warp * 32;
  const unsigned width = std::min(32u, r.count - warp * 32);
  unsigned active = 0;
  const Fiber* first = nullptr;
  for (unsigned l = 0; l < width; ++l) {
    const Fiber& f = lanes[l];
    if (!(mask >> l & 1) || f.state == State::kDone) continue;
    if (f.state != State::kInWarp) return;
    if (first && (f.fn != first->fn || f.mask != first->mask || !same_site(f, *first))) {
      return fail("diverged warp: lanes of one mask wait in different operations%s",
                  who_waits_where().c_str());
    }
    first = &f;
    active |= 1u << l;
  }
  if (!first) return;

  Slot slots[32];
  for_each_lane(active, [&](int l) { slots[l] = lanes[l].slot; });
  first->fn(slots, active);
  if (r.failed) return;
  if (std::strcmp(first->operation, "__syncwarp") == 0) {  // shuffles and votes order no memory
    uint32_t seen[32] = {};
    for_each_lane(active, [&](int l) {
      for (int k = 0; k < 32; ++k) seen[k] = std::max(seen[k], lanes[l].clock[k]);
    });
    for_each_lane(active, [&](int l) {
      std::copy(seen, seen + 32, lanes[l].clock);
      ++lanes[l].clock[l];
    });
  }
  in_push_order(32, [&](unsigned l) {
    if (!(active >> l & 1)) return;
    lanes[l].slot = slots[l];
    make_ready(warp * 32 + l);
  });
}

// A returned thread is no longer waited for.
void on_return(unsigned thread) {
  --r.live;
  release_block();
  const unsigned warp = thread / 32, end = std::min(warp * 32 + 32, r.count);
  for (unsigned i = warp * 32; i < end && !r.failed; ++i) {
    const Fiber& f = r.threads[i];
    if (f.state == State::kInWarp && f.mask >> thread % 32 & 1) return release_warp(warp, f.mask);
  }
}

// -------------------------------------------------------------------------------------------------
// Asynchronous copies, made as late as the kernel's waits allow

struct Copy {
  unsigned group;
  void* to;
  const void* from;
  std::size_t bytes;
};
std::vector<Copy> copies[kMaxThreads];
unsigned copy_group[kMaxThreads];

// -------------------------------------------------------------------------------------------------
// One block

void run_block(uint64_t index) {
  block_index = {unsigned(index % grid_size.x), unsigned(index / grid_size.x % grid_size.y),
                 unsigned(index / grid_size.x / grid_size.y)};
  std::memset(r.shared, 0xff, r.shared_bytes);  // garbage: NaN, -1
  if (race_build()) {
    char *begin, *end;
    static_shared_range(begin, end);
    if (begin) std::memset(begin, 0xff, end - begin);
  }
  ++r.block;
  r.epoch = r.arrived = r.ready_count = 0;
  r.live = r.count;
  for (unsigned i = 0; i < r.count; ++i) {
    Fiber& f = r.threads[i];
    std::memset(f.clock, 0, sizeof f.clock);
    f.clock[i % 32] = 1;
    f.unfenced = 0;
    f.waited = !r.early;
    copies[i].clear();
  }
  in_push_order(r.count, make_ready);
  while (r.live && !r.failed) {
    if (!r.ready_count) {
      fail("deadlock: no thread can go on%s", who_waits_where().c_str());
      break;
    }
    r.current = next_ready();
    thread_index = {r.current % block_size.x, r.current / block_size.x % block_size.y,
                    r.current / block_size.x / block_size.y};
    r.in_kernel = true;
    switch_fiber(r.host, r.threads[r.current]);
    r.in_kernel = false;
    if (!r.failed && r.threads[r.current].state == State::kDone) on_return(r.current);
  }
  if (r.failed) throw Error(r.message);
}

bool reserve_stacks() {
  if (r.stacks) return true;
  void* memory = mmap(nullptr, kMaxThreads * (kStackBytes + kGuardBytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  r.stacks = static_cast<char*>(memory);
  for (unsigned i = 0; i < kMaxThreads; ++i) {
    mprotect(r.stacks + i * (kStackBytes + kGuardBytes), kGuardBytes, PROT_NONE);
  }
  return true;
}

// Exact size: ASan's red zone starts at the last byte.
void allocate_shared(std::size_t bytes) {
  const std::size_t rounded = (bytes + 15) / 16 * 16 + 16;
  std::free(r.shared);
  r.shared = static_cast<unsigned char*>(std::aligned_alloc(16, rounded));
  r.shared_bytes = bytes;
  if (__asan_poison_memory_region) __asan_poison_memory_region(r.shared + bytes, rounded - bytes);
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// What kernels and launchers call

void set_schedule(unsigned seed) { r.seed = seed; }
void* dynamic_shared() { return r.shared; }
Slot& my_slot() { return r.threads[r.current].slot; }

void fail(const char* format, ...) {
  const bool in_kernel = r.in_kernel;
  r.in_kernel = false;
  if (!r.failed) {
    r.failed = true;
    const int n = std::snprintf(r.message, sizeof r.message, "simt: block (%u,%u,%u), ",
                                block_index.x, block_index.y, block_index.z);
    va_list args;
    va_start(args, format);
    std::vsnprintf(r.message + n, sizeof r.message - n, format, args);
    va_end(args);
  }
  if (in_kernel) leave_kernel();  // never comes back
}

int block_barrier(Barrier kind, int predicate, Site site) {
  static const char* const names[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and",
                                      "__syncthreads_or"};
  Fiber& me = r.threads[r.current];
  me.operation = names[int(kind)];
  me.site = site;
  me.predicate = predicate;
  me.mask = ~0u;
  me.state = State::kAtBarrier;
  r.barrier = kind;
  ++r.arrived;
  release_block();
  leave_kernel();
  return r.barrier_result;
}

void warp_rendezvous(const char* name, WarpFunction fn, unsigned mask, Site site) {
  Fiber& me = r.threads[r.current];
  me.operation = name;
  me.fn = fn;
  me.mask = mask;
  me.site = site;
  me.state = State::kInWarp;
  if (!(mask >> r.current % 32 & 1)) {
    fail("%s at %s:%d: thread %u is not in its own mask %08x", name, site.file, site.line,
         r.current, mask);
  }
  release_warp(r.current / 32, mask);
  leave_kernel();
}

void copy_async(void* to, const void* from, std::size_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("asynchronous copy of %zu bytes", bytes);
  if (uintptr_t(to) % bytes || uintptr_t(from) % bytes) {
    fail("misaligned asynchronous copy of %zu bytes from %p to %p", bytes, from, to);
  }
  copies[r.current].push_back({copy_group[r.current], to, from, bytes});
}

void commit_copies() { ++copy_group[r.current]; }

void wait_for_copies(int groups_left) {
  std::vector<Copy>& queue = copies[r.current];
  std::size_t done = 0;
  for (; done < queue.size() && queue[done].group + groups_left < copy_group[r.current]; ++done) {
    const Copy& c = queue[done];
    race_check_copy(c.to, c.from, c.bytes, __builtin_return_address(0));
    std::memcpy(c.to, c.from, c.bytes);  // ASan's memcpy checks both ends
  }
  queue.erase(queue.begin(), queue.begin() + done);
}

void static_shared_range(char*& begin, char*& end) {
  static char *first, *last;
  if (!first) {
    auto find = [](dl_phdr_info* info, std::size_t, void*) {
      for (int k = 0; k < info->dlpi_phnum; ++k) {
        if (info->dlpi_phdr[k].p_type != PT_TLS || !info->dlpi_tls_data) continue;
        first = static_cast<char*>(info->dlpi_tls_data);
        last = first + info->dlpi_phdr[k].p_memsz;
      }
      return 1;  // the first object is the executable
    };
    dl_iterate_phdr(find, nullptr);
  }
  begin = first;
  end = last;
}

void after_previous() { r.threads[r.current].waited = true; }
void let_next_begin() {
  if (!r.threads[r.current].waited) fail("let_next_begin() before after_previous()");
}

cudaError_t run(dim3 grid, dim3 block, std::size_t shared_bytes, bool early, void (*entry)(void*),
                void* arg) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (!threads || threads > kMaxThreads || block.z > 64 || !blocks || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  if (!reserve_stacks()) return cudaErrorMemoryAllocation;
  allocate_shared(shared_bytes);
  r.count = unsigned(threads);
  r.entry = entry;
  r.arg = arg;
  r.failed = false;
  r.early = early;
  r.early_block = r.first_block;
  r.first_block = r.block + 1;
  r.random = 0x9e3779b97f4a7c15ull * (r.seed + 1);
  block_size = block;
  grid_size = grid;
  for (unsigned i = 0; i < r.count; ++i) make_fiber(i);
  race_begin_launch(blocks);

  std::vector<uint32_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = uint32_t(r.seed == 1 ? blocks - 1 - i : i);
  if (r.seed >= 2) {
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(unsigned(i))]);
  }
  for (uint32_t index : order) run_block(index);
  return cudaSuccess;
}

}  // namespace simt
