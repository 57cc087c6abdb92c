// online_logsumexp.h: log-sum-exp in one pass, as the pair (max, sum of exp(x - max)), and the
// entropy of a softmax as one number more. Push an element, merge two halves; the order in which a
// kernel does so is its own affair, and must be fixed.
//
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867). The pair
// with nothing in it is (-inf, 0); -inf is an element like any other and adds nothing; NaN and +inf
// make the result NaN, as in log_softmax.
#pragma once

#include <cmath>  // exp, log: overloads for float and double, on host and device

#include "fdpg/types.h"  // FDPG_HOST_DEVICE

namespace fdpg {

// exp(x - max), where both may be -inf: an element that weighs nothing is 0, not NaN.
template <class T>
FDPG_HOST_DEVICE inline T exp_difference(T x, T max) {
  using std::exp;
  return x == -static_cast<T>(INFINITY) ? T{0} : exp(x - max);
}

template <class T>
struct OnlineLogSumExp {
  T max = -static_cast<T>(INFINITY);
  T sum = 0;

  FDPG_HOST_DEVICE void push(T x) { merge({x, T{1}}); }

  FDPG_HOST_DEVICE void merge(const OnlineLogSumExp& other) {
    const T larger = other.max > max || other.max != other.max ? other.max : max;
    sum = sum * exp_difference(max, larger) + other.sum * exp_difference(other.max, larger);
    max = larger;
  }

  // log sum exp x; -inf of nothing.
  FDPG_HOST_DEVICE T value() const {
    using std::log;
    return max + log(sum);
  }
};

// The same with sum of exp(x - max) (x - max), from which the entropy of softmax(x) follows without
// a second pass and without the cancellation of lse - sum p x at large |x|.
template <class T>
struct OnlineEntropy {
  T max = -static_cast<T>(INFINITY);
  T sum = 0;
  T weighted = 0;

  FDPG_HOST_DEVICE void push(T x) { merge({x, T{1}, T{0}}); }

  FDPG_HOST_DEVICE void merge(const OnlineEntropy& other) {
    const T larger = other.max > max || other.max != other.max ? other.max : max;
    const OnlineEntropy a = shifted_to(larger), b = other.shifted_to(larger);
    max = larger;
    sum = a.sum + b.sum;
    weighted = a.weighted + b.weighted;
  }

  FDPG_HOST_DEVICE T value() const {
    using std::log;
    return max + log(sum);
  }

  // -sum p log p of p = softmax(x)
  FDPG_HOST_DEVICE T entropy() const {
    using std::log;
    return log(sum) - weighted / sum;
  }

 private:
  // Relative to another maximum: e^(x - new) = e^(x - max) e^(max - new).
  FDPG_HOST_DEVICE OnlineEntropy shifted_to(T other_max) const {
    if (max == -static_cast<T>(INFINITY)) return {other_max, T{0}, T{0}};
    const T factor = exp_difference(max, other_max);
    if (factor == 0) return {other_max, sum * factor, sum * factor};  // so far that 0 times inf
    return {other_max, sum * factor, (weighted + sum * (max - other_max)) * factor};
  }
};

}  // namespace fdpg
