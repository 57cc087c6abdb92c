// instructions.cuh: what the GPU does in one instruction and the shared formulas in several; the
// only file with inline PTX. Under g++ each is its portable meaning.
#pragma once

#include "device.cuh"
//
#include <type_traits>

#include "fdpg/types.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fdpg::cuda {
namespace {

// 2^x, 0 where it would be subnormal. exp2f is four instructions for the sake of the subnormal
// ones, which are nothing beside a largest term of 1.
__device__ __forceinline__ float exp2_or_zero(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // NaN stays
#endif
}

// The exponential to the base that is cheapest: e^x is power(x * kPowerRate).
template <class A>
inline constexpr A kPowerRate = static_cast<A>(1.4426950408889634);
template <>
inline constexpr double kPowerRate<double> = 1;
__device__ __forceinline__ float power(float x) { return exp2_or_zero(x); }
__device__ __forceinline__ double power(double x) { return std::exp(x); }

// e^x, 0 where it would be subnormal (fp32).
template <class A>
__device__ __forceinline__ A exponential(A x) {
  return power(x * kPowerRate<A>);
}

// The larger; a number before NaN.
__device__ __forceinline__ float larger_number(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger_number(double a, double b) { return fmax(a, b); }

// load() and store() of types.h, to the bit except for the payload of NaN.
template <class T>
__device__ __forceinline__ accumulate_t<T> widen(T x) {
  return load(x);
}
template <class T>
__device__ __forceinline__ T narrow(accumulate_t<T> x) {
  return store<T>(x);
}
#ifdef __CUDACC__
template <>
__device__ __forceinline__ float widen<Float16>(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
template <>
__device__ __forceinline__ Float16 narrow<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
#endif

// Both elements of a word, the first of them in its low half.
template <class T>
__device__ __forceinline__ void widen_both(uint32_t word, accumulate_t<T>* first,
                                           accumulate_t<T>* second) {
  if constexpr (std::is_same_v<T, BFloat16>) {  // nvcc 13.0 takes the upper half out, and shifts it
    *first = float_of(word << 16);
    *second = float_of(word & 0xffff0000u);
  } else {
    T both[2];
    static_assert(sizeof(both) == sizeof(word));
    memcpy(both, &word, sizeof(both));
    *first = widen(both[0]);
    *second = widen(both[1]);
  }
}

}  // namespace
}  // namespace fdpg::cuda
