// logits.cuh: what a stored logit x comes to. With a softcap (Gemma 2) it counts as
// softcap tanh(x / softcap), then comes the temperature:
//   z = scale u:  u = x,                  scale = inv_temperature
//                 u = tanh(x / softcap),  scale = softcap * inv_temperature
// Kernels are compiled once for either. A bound has no infinity beyond it: a logit of -inf is
// -softcap, as in PyTorch, and NaN stays NaN.
#pragma once

#include "device.cuh"
//
#include <type_traits>

#include "fdpg/types.h"
#include "instructions.cuh"

namespace fdpg::cuda {

// Calls fn(capped) with std::true_type or std::false_type, and returns what it returns.
template <class Fn>
cudaError_t with_softcap(double softcap, Fn&& fn) {
  return softcap > 0 ? fn(std::true_type{}) : fn(std::false_type{});
}

namespace {

// A: the type of arithmetic.
template <class A, bool kCapped>
struct Logits {
  A inv_softcap, scale;

  template <class Params>
  __device__ __forceinline__ explicit Logits(const Params& p)
      : inv_softcap(static_cast<A>(kCapped ? 1 / p.softcap : 0)),
        scale(static_cast<A>(kCapped ? p.softcap * p.inv_temperature : p.inv_temperature)) {}

  __device__ __forceinline__ A capped(A x) const {
    if constexpr (!kCapped) return x;
    return std::tanh(x * inv_softcap);
  }
  template <class T>
  __device__ __forceinline__ A u(T x) const {
    return capped(widen(x));
  }
  // e^z is power(u rate).
  __device__ __forceinline__ A rate() const { return scale * kPowerRate<A>; }
  // How far z lies from an anchor's, and e to that. Taken in u, where it is exact near the anchor:
  // large logits, or a temperature near 0, make a z that is not.
  __device__ __forceinline__ A distance(A u, A anchor) const { return (u - anchor) * scale; }
  __device__ __forceinline__ A power_from(A u, A anchor) const {
    return power((u - anchor) * rate());
  }
  // From the derivative by softcap u, at u, to that by x.
  __device__ __forceinline__ A back(A gradient, A u) const {
    if constexpr (!kCapped) return gradient;
    return gradient * std::fma(-u, u, A{1});
  }
};

}  // namespace
}  // namespace fdpg::cuda
