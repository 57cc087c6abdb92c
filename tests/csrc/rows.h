// rows.h: what the tests of the vocabulary kernels share: every instruction set, rows of logits in
// every dtype with poisoned padding, and the answer in long double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "fdpg/cpu.h"
#include "fdpg/types.h"

// Runs fn for each instruction set this CPU has, and says which.
template <class Fn>
void for_each_isa(Fn fn) {
  for (const char* name : {"portable", "avx2", "avx512", "avx512bf16", "amx"}) {
    if (!fdpg::cpu::set_isa(name)) {
      std::printf("skipped %s: this CPU does not have it\n", name);
      continue;
    }
    const std::string isa = name;
    fn(isa);
  }
}

// Calls fn(dtype, tag) for every storage type; `decltype(tag)` is the type.
template <class Fn>
void for_each_dtype(Fn fn) {
  using namespace fdpg;  // the list names types as fdpg does
#define FDPG_TEST_DTYPE(id, T) fn(fdpg::Dtype::id, T{});
  FDPG_DTYPES(FDPG_TEST_DTYPE)
#undef FDPG_TEST_DTYPE
}

// (rows, vocab) logits with `padding` NaNs behind every row: reading one would show. What is said
// of them is true of softcap tanh(x / softcap) where a softcap is set.
template <class T>
struct Rows {
  int64_t rows, vocab, stride;
  double softcap = 0;
  std::vector<T> data;

  Rows(int64_t rows, int64_t vocab, double deviation, int seed = 0, int64_t padding = 5)
      : rows(rows), vocab(vocab), stride(vocab + padding), data(rows * (vocab + padding)) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal(0, deviation);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < stride; ++j) {
        const double x = j < vocab ? normal(engine) : std::numeric_limits<double>::quiet_NaN();
        set(i, j, x);
      }
    }
  }

  void set(int64_t i, int64_t j, double x) {
    data[i * stride + j] = fdpg::store<T>(static_cast<fdpg::accumulate_t<T>>(x));
  }
  long double at(int64_t i, int64_t j) const {
    const long double x = fdpg::load(data[i * stride + j]);
    return softcap > 0 ? softcap * std::tanh(x / softcap) : x;
  }
  // Of at() by the logit.
  long double slope(int64_t i, int64_t j) const {
    return softcap > 0 ? 1 - std::pow(at(i, j) / softcap, 2) : 1;
  }
  // What at() may be off in the arithmetic of T.
  double cap_error() const {
    return softcap * (sizeof(fdpg::accumulate_t<T>) == sizeof(double) ? 1e-15 : 4e-7);
  }

  long double largest(int64_t i) const {
    long double most = -INFINITY;
    for (int64_t j = 0; j < vocab; ++j) most = std::fmax(most, at(i, j));
    return most;
  }
  // log sum exp(scale x) relative to the largest: log p_j = scale (x_j - largest) - this.
  long double log_sum(int64_t i, long double scale) const {
    const long double most = largest(i);
    long double sum = 0;
    for (int64_t j = 0; j < vocab; ++j) sum += std::exp(scale * (at(i, j) - most));
    return std::log(sum);
  }
  long double logp(int64_t i, int64_t j, long double scale) const {
    return scale * (at(i, j) - largest(i)) - log_sum(i, scale);
  }
};
