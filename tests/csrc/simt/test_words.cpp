// test_words.cc: what the emulator's words mean. Values worked out by hand.
#include "harness.h"
//
#include "device.cuh"

namespace {

using fdpg::cuda::launch;

constexpr unsigned kAll = 0xffffffffu;

// Each thread writes what one warp-wide word gave it.
struct Words {
  int xor3, down2, up1, at5, xor_of_width8;
  unsigned ballot;
  int any, all, sum, largest;
};

__global__ void say_words(Words* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Words w;
  w.xor3 = __shfl_xor_sync(kAll, lane, 3);
  w.down2 = __shfl_down_sync(kAll, lane, 2);
  w.up1 = __shfl_up_sync(kAll, lane, 1);
  w.at5 = __shfl_sync(kAll, lane * 10, 5);
  w.xor_of_width8 = __shfl_xor_sync(kAll, lane, 8, 8);
  w.ballot = __ballot_sync(kAll, lane % 2);
  w.any = __any_sync(kAll, lane == 7);
  w.all = __all_sync(kAll, lane == 7);
  w.sum = __reduce_add_sync(kAll, lane);
  w.largest = __reduce_max_sync(kAll, lane);
  out[blockIdx.x * blockDim.x + threadIdx.x] = w;
}

void warp_words() {
  Buffer<Words> out(3 * 64);
  for_each_schedule([&](int) {
    run_on_device([&] { return launch(say_words, 3, 64, 0, nullptr, out.data()); });
    for (int64_t i = 0; i < out.size(); ++i) {
      const int lane = static_cast<int>(i % 32);
      const Words& w = out[i];
      CHECK(w.xor3 == (lane ^ 3));
      CHECK(w.down2 == (lane < 30 ? lane + 2 : lane));
      CHECK(w.up1 == (lane > 0 ? lane - 1 : 0));
      CHECK(w.at5 == 50);
      // An earlier segment may be read; instead of a later one a lane reads itself.
      CHECK(w.xor_of_width8 == (lane & 8 ? lane ^ 8 : lane));
      CHECK(w.ballot == 0xaaaaaaaau);
      CHECK(w.any && !w.all);
      CHECK(w.sum == 496 && w.largest == 31);
    }
  });
}

// The halves of a warp do different things at once.
__global__ void half_warps(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = lane < 16 ? __reduce_add_sync(0x0000ffffu, 1) : __reduce_add_sync(0xffff0000u, lane);
}

void independent_halves() {
  Buffer<int> out(32);
  for_each_schedule([&](int) {
    run_on_device([&] { return launch(half_warps, 1, 32, 0, nullptr, out.data()); });
    CHECK(out[3] == 16);
    CHECK(out[20] == 16 * 47 / 2);  // 16 + ... + 31
  });
}

// One thread each writes, so that there is no race.
__global__ void vote(int* out, int n) {
  const int t = static_cast<int>(threadIdx.x);
  if (t >= n) return;  // a returned thread is not waited for
  const int count = __syncthreads_count(t % 2);
  const int any = __syncthreads_or(t == 5);
  const int all = __syncthreads_and(t != 5);
  if (t < 3) out[t] = t == 0 ? count : t == 1 ? any : all;
}

void block_votes() {
  Buffer<int> out(3);
  for_each_schedule([&](int) {
    run_on_device([&] { return launch(vote, 1, 96, 0, nullptr, out.data(), 50); });
    CHECK(out[0] == 25);
    CHECK(out[1] != 0);
    CHECK(out[2] == 0);
  });
}

__global__ void count_threads(int* out) { atomicAdd(out, 1); }

void atomics() {
  for_each_schedule([&](int) {
    Buffer<int> out(std::vector<int>{0});
    run_on_device([&] { return launch(count_threads, 3, 70, 0, nullptr, out.data()); });
    CHECK(out[0] == 210);
  });
}

void limits() {
  Buffer<int> out(std::vector<int>{0});
  CHECK(launch(count_threads, 0, 32, 0, nullptr, out.data()) == cudaSuccess);
  CHECK(out[0] == 0);
  CHECK(launch(count_threads, 1, 2048, 0, nullptr, out.data()) != cudaSuccess);
  CHECK(launch(count_threads, int64_t{1} << 31, 32, 0, nullptr, out.data()) != cudaSuccess);
#ifdef FDPG_TEST_ON_GPU
  cudaGetLastError();  // forget what was provoked
#endif
}

}  // namespace

int main() {
  return run_tests([] {
    warp_words();
    independent_halves();
    block_votes();
    atomics();
    limits();
  });
}
