// Kernels with one bug each, that the emulator must catch. Given a NAME this runs that one with its
// bug; tests/test_simt.py knows which builds must report it, and how. Without a name it runs all of
// them repaired, which must pass in every build.
#include <cstdio>
#include <cstring>
#include <string>

#include "harness.h"
//
#include "device.cuh"

namespace {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int blocks, int threads, std::size_t shared_bytes,
            Args... args) {
  run_on_device(
      [&] { return fdpg::cuda::launch(kernel, blocks, threads, shared_bytes, nullptr, args...); });
}

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

// -------------------------------------------------------------------------------------------------
// Addresses: AddressSanitizer and UndefinedBehaviorSanitizer

__global__ void copy(const float* from, float* to, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
}

// A tail that is one vector too long.
void global_oob(bool bug) {
  Buffer<float> from(100), to(128);
  launch(copy, 1, kThreads, 0, from.data(), to.data(), bug ? 101 : 100);
}

// A row of an odd vocabulary, read as if rows began at 16-byte boundaries.
__global__ void copy_vectors(const float* from, uint4* to, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    to[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}
void misaligned_vector(bool bug) {
  Buffer<float> from(129, bug ? 1 : 0);
  Buffer<uint4> to(32);
  launch(copy_vectors, 1, kThreads, 0, from.data(), to.data(), 32);
}

// One slot per warp, and a warp too many.
__global__ void warp_sums(float* out, int shift) {
  __shared__ float sums[kThreads / 32];
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32 + shift] = 1;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = sums[shift];
}
void static_shared_oob(bool bug) {
  Buffer<float> out(1);
  launch(warp_sums, 1, bug ? kThreads : 32, 0, out.data(), 1);
}

__global__ void reverse(float* out, int n) {
  FDPG_DYNAMIC_SHARED(float, stage);
  for (int i = threadIdx.x; i < n; i += blockDim.x) stage[i] = static_cast<float>(i);
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = stage[n - 1 - i];
}
void dynamic_shared_oob(bool bug) {
  Buffer<float> out(100);
  launch(reverse, 1, kThreads, bug ? 99 * sizeof(float) : 100 * sizeof(float), out.data(), 100);
}

// -------------------------------------------------------------------------------------------------
// Order: the race detector

// The second round overwrites what others still read.
__global__ void two_rounds(float* out, bool bug) {
  __shared__ float sums[kThreads / 32];
  float total = 0;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = static_cast<float>(round);
    __syncthreads();
    for (float sum : sums) total += sum;
    if (!bug) __syncthreads();
  }
  out[threadIdx.x] = total;
}
void missing_syncthreads(bool bug) {
  Buffer<float> out(kThreads);
  launch(two_rounds, 1, kThreads, 0, out.data(), bug);
}

// Shuffles do not order memory, __syncwarp does.
__global__ void swap_neighbours(int* out, bool bug) {
  __shared__ int values[32];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (bug) {
    static_cast<void>(__shfl_xor_sync(kAll, 1, 1));
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}
void missing_syncwarp(bool bug) {
  Buffer<int> out(32);
  launch(swap_neighbours, 1, 32, 0, out.data(), bug);
}

// The last block to finish adds up what all have written.
__global__ void last_block_sums(float* parts, unsigned* counter, float* out, bool fence,
                                bool barrier) {
  __shared__ bool last;
  parts[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (fence) __threadfence();
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) sum += parts[i];
  atomicAdd(out, sum);
}
void last_block(bool fence, bool barrier) {
  Buffer<float> parts(4 * kThreads), out(std::vector<float>{0});
  Buffer<unsigned> counter(std::vector<unsigned>{0});
  launch(last_block_sums, 4, kThreads, 0, parts.data(), counter.data(), out.data(), fence, barrier);
  CHECK(out[0] == 4 * kThreads);
}
void missing_threadfence(bool bug) { last_block(!bug, true); }
void missing_barrier_before_counter(bool bug) { last_block(true, !bug); }

// Two blocks write one element.
__global__ void claim(int* out) { out[threadIdx.x] = static_cast<int>(blockIdx.x); }
void two_blocks_write(bool bug) {
  Buffer<int> out(kThreads);
  launch(claim, bug ? 2 : 1, kThreads, 0, out.data());
}

// Asynchronous copies are read before they are waited for.
__global__ void stage_and_add(const float* from, float* out, bool bug) {
  alignas(16) __shared__ float stage[4 * kThreads];
  const int i = 4 * static_cast<int>(threadIdx.x);
  __pipeline_memcpy_async(stage + i, from + i, 16);
  __pipeline_commit();
  __pipeline_wait_prior(bug ? 1 : 0);
  __syncthreads();
  out[threadIdx.x] = stage[4 * kThreads - 1 - i];
}
void missing_copy_wait(bool bug) {
  Buffer<float> from(4 * kThreads), out(kThreads);
  launch(stage_and_add, 1, kThreads, 0, from.data(), out.data(), bug);
}

__global__ void read_before_write(float* out, bool bug) {
  __shared__ float values[kThreads];
  if (!bug) values[threadIdx.x] = 0;
  out[threadIdx.x] = values[threadIdx.x];
}
void uninitialised_shared(bool bug) {
  Buffer<float> out(kThreads);
  launch(read_before_write, 1, kThreads, 0, out.data(), bug);
}

// -------------------------------------------------------------------------------------------------
// Rendezvous that a GPU hangs on, or is undefined for: every build

__global__ void barrier_in_branch(bool bug) {
  if (bug && threadIdx.x / 32 == 1) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void divergent_barrier(bool bug) { launch(barrier_in_branch, 1, kThreads, 0, bug); }

// Lanes leave a loop of shuffles at different times, and the rest wait for them for ever.
__global__ void shuffle_in_loop(int* out, bool bug) {
  int sum = 0;
  const int rounds = bug ? 1 + static_cast<int>(threadIdx.x % 2) : 2;
  for (int i = 0; i < rounds; ++i) sum += __shfl_xor_sync(kAll, i, 1);
  __syncthreads();
  out[threadIdx.x] = sum;
}
void deadlock(bool bug) {
  Buffer<int> out(kThreads);
  launch(shuffle_in_loop, 1, kThreads, 0, out.data(), bug);
}

__global__ void return_early(int* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
}
void shuffle_from_returned_lane(bool bug) {
  Buffer<int> out(32);
  launch(return_early, 1, 32, 0, out.data(), bug ? 21 : 32);
}

// The second of two launches, begun early: it writes what the first has written.
enum class Early { kRight, kWriteFirst, kNeverWait, kLetNextBeginFirst };
__global__ void write_early(int* out, int value, Early how) {
  if (how == Early::kLetNextBeginFirst) fdpg::cuda::let_next_begin();
  if (how != Early::kWriteFirst && how != Early::kNeverWait) fdpg::cuda::after_previous();
  if (how == Early::kRight) fdpg::cuda::let_next_begin();
  out[threadIdx.x] = value;
  if (how == Early::kWriteFirst) fdpg::cuda::after_previous();
}
void two_launches(Early how) {
  Buffer<int> out(kThreads);
  launch(write_early, 1, kThreads, 0, out.data(), 1, Early::kRight);
  run_on_device([&] {
    return fdpg::cuda::launch<fdpg::cuda::Begin::kEarly>(write_early, 1, kThreads, 0, nullptr,
                                                         out.data(), 2, how);
  });
}
void write_before_previous_has_ended(bool bug) {
  two_launches(bug ? Early::kWriteFirst : Early::kRight);
}
void missing_after_previous(bool bug) { two_launches(bug ? Early::kNeverWait : Early::kRight); }
void next_begins_too_soon(bool bug) {
  two_launches(bug ? Early::kLetNextBeginFirst : Early::kRight);
}

struct Planted {
  const char* name;
  void (*run)(bool bug);
};
constexpr Planted kPlanted[] = {
#define PLANTED(name) {#name, name}
    PLANTED(global_oob),
    PLANTED(misaligned_vector),
    PLANTED(static_shared_oob),
    PLANTED(dynamic_shared_oob),
    PLANTED(missing_syncthreads),
    PLANTED(missing_syncwarp),
    PLANTED(missing_threadfence),
    PLANTED(missing_barrier_before_counter),
    PLANTED(two_blocks_write),
    PLANTED(missing_copy_wait),
    PLANTED(uninitialised_shared),
    PLANTED(divergent_barrier),
    PLANTED(deadlock),
    PLANTED(shuffle_from_returned_lane),
    PLANTED(write_before_previous_has_ended),
    PLANTED(missing_after_previous),
    PLANTED(next_begins_too_soon),
};

}  // namespace

int main(int argc, char** argv) {
  const std::string wish = argc == 2 ? argv[1] : "";
  return run_tests([&] {
    bool found = argc == 1;
    for (const Planted& planted : kPlanted) {
      if (argc > 1 && wish != planted.name) continue;
      found = true;
      for_each_schedule([&](int) { planted.run(argc > 1); });
    }
    if (!found) {
      std::printf("usage: %s [NAME], where NAME is one of\n", argv[0]);
      for (const Planted& planted : kPlanted) std::printf("  %s\n", planted.name);
    }
    CHECK(found);
  });
}
