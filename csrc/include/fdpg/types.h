// types.h: what a number is: the host/device macro, storage types and the types they add up in.
//
// THE list of dtypes is FDPG_DTYPES. To add one, write its storage struct with load() and store<>()
// and one line in the list; visit_dtype and every kernel that dispatches through it follow.
#pragma once

#include <cstdint>
#include <cstring>  // memcpy: the only type pun that both compilers define

#include "fdpg/params.h"  // Dtype

// Marks a function for both devices under nvcc; vanishes under a plain C++ compiler.
#ifdef __CUDACC__
#define FDPG_HOST_DEVICE __host__ __device__
// A template for both devices may be given a functor for one of them; nvcc warns unless told.
#define FDPG_ANY_CALLABLE _Pragma("nv_exec_check_disable")
#else
#define FDPG_HOST_DEVICE
#define FDPG_ANY_CALLABLE
#endif

namespace fdpg {

// -------------------------------------------------------------------------------------------------
// Storage

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type in which a storage type is computed and added up.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateOf<T>::type;

FDPG_HOST_DEVICE inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FDPG_HOST_DEVICE inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// load: storage to the type we compute in. Exact.
FDPG_HOST_DEVICE inline float load(float x) { return x; }
FDPG_HOST_DEVICE inline double load(double x) { return x; }
FDPG_HOST_DEVICE inline float load(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
FDPG_HOST_DEVICE inline float load(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The half's exponent and fraction, read as a float, are 2^112 too small; the product restores
  // them, and makes normal numbers of the half's subnormal ones.
  const float scaled = float_of(magnitude << 13) * 0x1p112f;
  return float_of(sign | bits_of(scaled));
}

// store<T>: round to nearest, ties to even; NaN stays NaN.
template <class T>
FDPG_HOST_DEVICE T store(accumulate_t<T> x);

template <>
FDPG_HOST_DEVICE inline float store<float>(float x) {
  return x;
}

template <>
FDPG_HOST_DEVICE inline double store<double>(double x) {
  return x;
}

template <>
FDPG_HOST_DEVICE inline BFloat16 store<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
FDPG_HOST_DEVICE inline Float16 store<Float16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal in half: adding 0.5 lets the float unit round at the half's last bit, 2^-24.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// -------------------------------------------------------------------------------------------------
// THE list: enumerator of Dtype, storage type.

#define FDPG_DTYPES(X)   \
  X(kFloat32, float)     \
  X(kBFloat16, BFloat16) \
  X(kFloat16, Float16)   \
  X(kFloat64, double)

// Calls fn(T{}) with the storage type of `dtype`; false if there is none.
//   visit_dtype(p.dtype, [&](auto tag) { using T = decltype(tag); ... });
template <class Fn>
inline bool visit_dtype(Dtype dtype, Fn&& fn) {
  switch (dtype) {
#define FDPG_VISIT(id, T) \
  case Dtype::id:         \
    fn(T{});              \
    return true;
    FDPG_DTYPES(FDPG_VISIT)
#undef FDPG_VISIT
  }
  return false;
}

}  // namespace fdpg
