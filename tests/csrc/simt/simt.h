// simt.h: the words of CUDA for g++, so that kernels run on the CPU, unchanged, one fiber per CUDA
// thread and one block (CTA) at a time. README.md beside this file says what is checked and how.
//
// A kernel header gets here through csrc/cuda/device.cuh. No CUDA header is needed: the few types
// that kernels name are below.
#pragma once
#ifdef __CUDACC__
#error "simt.h is for the host compiler only"
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

// -------------------------------------------------------------------------------------------------
// Qualifiers and types

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifdef SIMT_RACE
// One known range of addresses (the executable's thread-local block), so that the race detector can
// tell shared memory from global.
#define __shared__ static thread_local
#else
// A global variable, so that AddressSanitizer puts red zones around it. It does so only for
// internal linkage: kernels live in an anonymous namespace.
#define __shared__ static
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
};
using cudaStream_t = struct CUstream_st*;

// -------------------------------------------------------------------------------------------------
// The emulator

namespace simt {

// What launch() throws when a kernel does something a GPU would hang on, or be undefined for.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// In which order threads run between two rendezvous points, and blocks of a grid: 0 ascending,
// 1 descending, 2 and more random, by seed. A correct kernel gives the same bits for every seed.
void set_schedule(unsigned seed);

// `early`: before the launch before it has ended, as far as the race detector is concerned, until a
// thread calls after_previous(), which all must, and before let_next_begin() if they call that.
cudaError_t run(dim3 grid, dim3 block, std::size_t shared_bytes, bool early, void (*entry)(void*),
                void* arg);
void after_previous();
void let_next_begin();

template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   bool early, std::tuple<P...> args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::move(args)};
  auto entry = [](void* arg) {
    auto* call = static_cast<Call*>(arg);
    std::apply(call->kernel, std::as_const(call->args));
  };
  return run(grid, block, shared_bytes, early, entry, &call);
}

// Ends the launch from inside a kernel, with the text after "block (x,y,z), ".
void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;
void* dynamic_shared();

// Source position of a rendezvous, by default arguments: kernels stay as they are. (Braces around
// __builtin_LINE() would give the line of the braces.)
struct Site {
  const char* file;
  int line;
};
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_HERE \
  simt::Site { file, line }

enum class Barrier { kSync, kCount, kAnd, kOr };
int block_barrier(Barrier kind, int predicate, Site site);

// What a lane brings to a warp-wide operation and takes away. The last lane to arrive computes the
// results of all.
struct Slot {
  alignas(16) unsigned char in[16], out[16];
  int a, b;
};
using WarpFunction = void (*)(Slot* slots, unsigned active);
Slot& my_slot();
void warp_rendezvous(const char* name, WarpFunction fn, unsigned mask, Site site);

enum class Scope { kBlock, kDevice };
void fence(Scope scope);
void on_atomic(const void* address, std::size_t bytes, const void* pc);
void copy_async(void* to, const void* from, std::size_t bytes);
void commit_copies();
void wait_for_copies(int groups_left);

template <class T>
T get(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
void put(unsigned char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}
template <class F>
void for_each_lane(unsigned active, F f) {
  for (int lane = 0; lane < 32; ++lane) {
    if (active >> lane & 1) f(lane);
  }
}

template <class T>
T warp_operation(const char* name, WarpFunction fn, unsigned mask, T value, int a, int b,
                 Site site) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  Slot& slot = my_slot();
  put(slot.in, value);
  slot.a = a;
  slot.b = b;
  warp_rendezvous(name, fn, mask, site);
  return get<T>(slot.out);
}

inline void shuffle(Slot* slots, unsigned active, int lane, int source) {
  if (!(active >> source & 1)) {
    return fail("shuffle: lane %d reads lane %d, which does not take part", lane, source);
  }
  std::memcpy(slots[lane].out, slots[source].in, sizeof slots[lane].out);
}

template <class T, class F>
void reduce(Slot* slots, unsigned active, F f) {
  bool first = true;
  T result{};
  for_each_lane(active, [&](int lane) {
    T value = get<T>(slots[lane].in);
    result = first ? value : f(result, value);
    first = false;
  });
  for_each_lane(active, [&](int lane) { put(slots[lane].out, result); });
}

// One OS thread: atomic by construction. The race detector hears of it from on_atomic alone.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T read_modify_write(T* p, F f) {
  on_atomic(p, sizeof(T), __builtin_return_address(0));
  T old = *p;
  *p = f(old);
  return old;
}

template <class T>
struct Identity {
  using type = T;
};
template <class T>
using identity_t = typename Identity<T>::type;  // takes a parameter out of template deduction

}  // namespace simt

#define threadIdx (static_cast<const uint3&>(simt::thread_index))
#define blockIdx (static_cast<const uint3&>(simt::block_index))
#define blockDim (static_cast<const dim3&>(simt::block_size))
#define gridDim (static_cast<const dim3&>(simt::grid_size))

// -------------------------------------------------------------------------------------------------
// Barriers and warp-wide operations

inline void __syncthreads(SIMT_SITE) { simt::block_barrier(simt::Barrier::kSync, 0, SIMT_HERE); }
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  return simt::block_barrier(simt::Barrier::kCount, predicate, SIMT_HERE);
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
  return simt::block_barrier(simt::Barrier::kAnd, predicate, SIMT_HERE);
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return simt::block_barrier(simt::Barrier::kOr, predicate, SIMT_HERE);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  simt::warp_rendezvous("__syncwarp", [](simt::Slot*, unsigned) {}, mask, SIMT_HERE);
}

// `a` is the operation's argument, `i` the lane, `first` the first lane of its segment of `width`.
#define SIMT_SHUFFLE(NAME, ARGUMENT, SOURCE)                                              \
  template <class T>                                                                      \
  T NAME(unsigned mask, T value, ARGUMENT argument, int width = 32, SIMT_SITE) {          \
    simt::WarpFunction fn = [](simt::Slot* slots, unsigned active) {                      \
      simt::for_each_lane(active, [&](int i) {                                            \
        [[maybe_unused]] int a = slots[i].a, w = slots[i].b, first = i & ~(w - 1);        \
        simt::shuffle(slots, active, i, (SOURCE));                                        \
      });                                                                                 \
    };                                                                                    \
    return simt::warp_operation(#NAME, fn, mask, value, int(argument), width, SIMT_HERE); \
  }
SIMT_SHUFFLE(__shfl_sync, int, first + (a & (w - 1)))
SIMT_SHUFFLE(__shfl_xor_sync, int, (i ^ a) < first + w ? i ^ a : i)
SIMT_SHUFFLE(__shfl_down_sync, unsigned, i + a < first + w ? i + a : i)
SIMT_SHUFFLE(__shfl_up_sync, unsigned, i - a >= first ? i - a : i)
#undef SIMT_SHUFFLE

#define SIMT_VOTE(NAME, RESULT, EXPRESSION)                                                       \
  inline RESULT NAME(unsigned mask, int predicate, SIMT_SITE) {                                   \
    simt::WarpFunction fn = [](simt::Slot* slots, unsigned active) {                              \
      unsigned votes = 0;                                                                         \
      simt::for_each_lane(active, [&](int i) {                                                    \
        if (simt::get<int>(slots[i].in)) votes |= 1u << i;                                        \
      });                                                                                         \
      simt::for_each_lane(active, [&](int i) { simt::put<int>(slots[i].out, int(EXPRESSION)); }); \
    };                                                                                            \
    return RESULT(simt::warp_operation<int>(#NAME, fn, mask, predicate, 0, 0, SIMT_HERE));        \
  }
SIMT_VOTE(__ballot_sync, unsigned, votes)
SIMT_VOTE(__any_sync, int, votes != 0)
SIMT_VOTE(__all_sync, int, votes == active)
#undef SIMT_VOTE

#define SIMT_REDUCE(NAME, EXPRESSION)                                           \
  template <class T>                                                            \
  T NAME(unsigned mask, T value, SIMT_SITE) {                                   \
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);       \
    simt::WarpFunction fn = [](simt::Slot* slots, unsigned active) {            \
      simt::reduce<T>(slots, active, [](T x, T y) -> T { return EXPRESSION; }); \
    };                                                                          \
    return simt::warp_operation(#NAME, fn, mask, value, 0, 0, SIMT_HERE);       \
  }
SIMT_REDUCE(__reduce_add_sync, T(unsigned(x) + unsigned(y)))
SIMT_REDUCE(__reduce_min_sync, x < y ? x : y)
SIMT_REDUCE(__reduce_max_sync, x < y ? y : x)
#undef SIMT_REDUCE
#undef SIMT_SITE
#undef SIMT_HERE

// -------------------------------------------------------------------------------------------------
// Memory

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stwb(T* p, T value) {
  *p = value;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

inline void __threadfence_block() { simt::fence(simt::Scope::kBlock); }
inline void __threadfence() { simt::fence(simt::Scope::kDevice); }

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes) {
  simt::copy_async(to, from, bytes);
}
inline void __pipeline_commit() { simt::commit_copies(); }
inline void __pipeline_wait_prior(int groups_left) { simt::wait_for_copies(groups_left); }

template <class T>
T atomicAdd(T* p, simt::identity_t<T> value) {
  return simt::read_modify_write(p, [=](T old) { return T(old + value); });
}
template <class T>
T atomicMax(T* p, simt::identity_t<T> value) {
  return simt::read_modify_write(p, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicExch(T* p, simt::identity_t<T> value) {
  return simt::read_modify_write(p, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* p, simt::identity_t<T> expected, simt::identity_t<T> value) {
  return simt::read_modify_write(p, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::read_modify_write(p, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// -------------------------------------------------------------------------------------------------
// Arithmetic that <cmath> does not have: full precision where the GPU is approximate

using std::max;
using std::min;

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
