// race.cc: the race detector of the emulator. Files with kernels are compiled with
// -fsanitize=thread but NOT linked with it: g++ then calls the __tsan_ functions at the foot of
// this file around every load and store, and they keep a shadow of memory.
//
// Two accesses to the same byte, one of them a write and not both atomic, must be ordered:
//   in one thread            by the program;
//   in one block             by __syncthreads (an "epoch" ends), within a warp also by __syncwarp
//                            (each lane keeps a clock per lane), but not by shuffles and votes;
//   in two blocks            by an atomic that the second does after the first did one on the same
//                            address, if a __threadfence covered the first block's stores;
//   in two launches          by the stream.
// Also reported: shared memory read before this block wrote it.
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime.h"

namespace simt {
namespace {

Runtime& r = runtime;
bool instrumented = false;

struct Access {
  uint32_t block;  // 0: never
  uint16_t thread;
  bool atomic;
  uint8_t bytes;  // which of the cell's two bytes
  uint32_t epoch, clock;
  const void* pc;
};

// Two bytes of memory: the last write and two of the reads since.
struct Cell {
  Access write, reads[2];
};
constexpr std::size_t kPageCells = 2048;
struct Page {
  Cell cells[kPageCells];
};
std::unordered_map<uintptr_t, Page*> shadow;

Cell& cell_at(uintptr_t index) {
  static Page* page = nullptr;
  static uintptr_t key = 0;
  if (!page || key != index / kPageCells) {
    key = index / kPageCells;
    Page*& found = shadow[key];
    if (!found) found = static_cast<Page*>(std::calloc(1, sizeof(Page)));
    page = found;
  }
  return page->cells[index % kPageCells];
}

// Up to where the work of each block of this launch has been published:
// (epoch + 1) << 16 | thread, that is all earlier epochs, and that thread's own work in this one.
using Published = std::vector<uint64_t>;
std::vector<Published> acquired;                      // per block: what it has learnt by atomics
std::unordered_map<const void*, Published> released;  // per atomic: what it hands on
std::size_t launch_blocks;

bool ordered(const Access& before, const Access& now, bool shared) {
  if (!before.block) return true;
  if (before.block < r.first_block && (r.threads[now.thread].waited || shared)) return true;
  if (before.block < (r.early ? r.early_block : r.first_block)) return true;
  if (!(before.bytes & now.bytes) || (before.atomic && now.atomic)) return true;
  if (before.block < r.first_block) return false;
  if (before.block != now.block) {
    if (shared) return true;  // another block's shared memory
    const Published& known = acquired[now.block - r.first_block];
    if (known.empty()) return false;
    const uint64_t upto = known[before.block - r.first_block];
    return before.epoch + 1 < upto >> 16 ||
           (before.epoch + 1 == upto >> 16 && before.thread == (upto & 0xffff));
  }
  if (before.thread == now.thread || before.epoch < now.epoch) return true;
  return before.thread / 32 == now.thread / 32 &&
         before.clock <= r.threads[now.thread].clock[before.thread % 32];
}

// "file.cuh:123" of an instruction, by addr2line: the innermost inlined call that is the kernel's
// and not simt.h's. The bare address where there is no addr2line.
std::string source_line(const void* pc) {
  uintptr_t load_address = 0;
  auto first_object = [](dl_phdr_info* info, std::size_t, void* out) {
    *static_cast<uintptr_t*>(out) = info->dlpi_addr;
    return 1;
  };
  dl_iterate_phdr(first_object, &load_address);
  char command[128], line[512], result[512] = "";
  std::snprintf(command, sizeof command, "addr2line -sie /proc/%d/exe %#zx 2>/dev/null",
                int(getpid()), std::size_t(uintptr_t(pc) - load_address - 1));
  if (FILE* pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof line, pipe)) {
      line[std::strcspn(line, " \n")] = 0;
      if (!*result && std::strncmp(line, "simt.h:", 7) != 0) std::strcpy(result, line);
    }
    pclose(pipe);
  }
  if (!*result) std::snprintf(result, sizeof result, "pc %p", pc);
  return result;
}

void report(const char* what, const Access& now, const char* how, const Access& before, bool shared,
            const void* address) {
  r.in_kernel = false;  // the next lines are the host's
  const std::string here = source_line(now.pc), there = source_line(before.pc);
  r.in_kernel = true;
  fail(
      "race on %s memory %p: %s by thread %u at %s, unordered with %s by thread %u of %s block, %s",
      shared ? "shared" : "global", address, what, r.current, here.c_str(), how, before.thread,
      before.block == now.block ? "this" : "another", there.c_str());
}

bool within(const void* p, const void* begin, std::size_t bytes) {
  return p >= begin && p < static_cast<const char*>(begin) + bytes;
}

void on_access(const void* address, std::size_t bytes, bool write, bool atomic, const void* pc) {
  if (!r.in_kernel) return;
  if (within(address, r.stacks, kMaxThreads * (kStackBytes + kGuardBytes))) return;  // locals
  if (within(address, &r, sizeof r) || within(address, &thread_index, sizeof thread_index)) return;
  char *begin, *end;
  static_shared_range(begin, end);
  const bool shared =
      within(address, begin, end - begin) || within(address, r.shared, r.shared_bytes);

  Fiber& me = r.threads[r.current];
  if (write && !atomic && !shared) me.unfenced = r.epoch + 1;
  Access now{r.block, uint16_t(r.current), atomic, 3, r.epoch, me.clock[r.current % 32], pc};
  const uintptr_t first = uintptr_t(address) / 2, last = (uintptr_t(address) + bytes - 1) / 2;
  for (uintptr_t index = first; index <= last; ++index) {
    Cell& cell = cell_at(index);
    if (bytes == 1) now.bytes = uint8_t(1 << (uintptr_t(address) & 1));
    if (shared && !write && cell.write.block != r.block) {
      r.in_kernel = false;
      const std::string here = source_line(pc);
      r.in_kernel = true;
      return fail("uninitialised shared memory is read by thread %u at %s", r.current,
                  here.c_str());
    }
    if (!ordered(cell.write, now, shared)) {
      return report(write ? "write" : "read", now, "write", cell.write, shared, address);
    }
    if (write) {
      for (const Access& read : cell.reads) {
        if (!ordered(read, now, shared)) return report("write", now, "read", read, shared, address);
      }
      cell.write = now;
    } else if (cell.reads[0].block != now.block || cell.reads[0].thread == now.thread) {
      cell.reads[0] = now;
    } else {
      cell.reads[1] = now;
    }
  }
}

}  // namespace

bool race_build() { return instrumented; }

void race_begin_launch(std::size_t blocks) {
  if (!instrumented) return;
  launch_blocks = blocks;
  acquired.assign(blocks, {});
  released.clear();
}

void race_check_copy(void* to, const void* from, std::size_t bytes, const void* pc) {
  if (!instrumented) return;
  on_access(from, bytes, false, false, pc);
  on_access(to, bytes, true, false, pc);
}

// Cumulative: covers this thread's stores and those that a barrier has shown it.
void fence(Scope scope) {
  if (scope == Scope::kBlock) return;
  for (unsigned i = 0; i < r.count; ++i) {
    uint32_t& unfenced = r.threads[i].unfenced;
    if (unfenced && (i == r.current || unfenced - 1 < r.epoch)) unfenced = 0;
  }
}

// Acquires what earlier atomics on this address released, and releases what this block knows if
// all its stores are fenced.
void on_atomic(const void* address, std::size_t bytes, const void* pc) {
  if (!instrumented) return;
  on_access(address, bytes, true, true, pc);
  const std::size_t me = r.block - r.first_block;
  Published& mine = acquired[me];
  Published& there = released[address];
  mine.resize(launch_blocks);
  there.resize(launch_blocks);
  bool covered = true;
  for (unsigned i = 0; i < r.count; ++i) covered &= !r.threads[i].unfenced;
  for (std::size_t i = 0; i < launch_blocks; ++i) {
    mine[i] = std::max(mine[i], there[i]);
    if (covered) there[i] = mine[i];
  }
  if (covered) there[me] = (uint64_t(r.epoch) + 1) << 16 | r.current;
}

}  // namespace simt

extern "C" {
#define SIMT_HOOK(NAME, BYTES, WRITE)                                     \
  void __tsan_##NAME##BYTES(void* p) {                                    \
    simt::on_access(p, BYTES, WRITE, false, __builtin_return_address(0)); \
  }
#define SIMT_HOOKS(BYTES)                 \
  SIMT_HOOK(read, BYTES, false)           \
  SIMT_HOOK(write, BYTES, true)           \
  SIMT_HOOK(unaligned_read, BYTES, false) \
  SIMT_HOOK(unaligned_write, BYTES, true)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* p, std::size_t n) {
  simt::on_access(p, n, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, std::size_t n) {
  simt::on_access(p, n, true, false, __builtin_return_address(0));
}
void __tsan_init() { simt::instrumented = true; }  // constructor of every instrumented object
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
