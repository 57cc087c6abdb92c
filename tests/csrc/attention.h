// attention.h: what the tests of decode_attention share: a shape, and the parameters of a problem.
#pragma once

#include <cstdint>

#include "fdpg/params.h"

inline constexpr double kScale = 0.3;

struct Shape {
  int64_t sequences, heads, key_heads, tokens, size, value_size;
  double softcap = 0;
  bool sinks = false;
  int64_t rows = 0;  // of the cache, which sequences share; 0: one of each
  bool bias = false;

  int64_t cache_rows() const { return rows > 0 ? rows : sequences; }
  // Neighbours share a row, more of them than a kernel takes together, and others do not.
  int64_t row_of(int64_t sequence) const { return rows > 0 ? sequence / 11 * 7 % rows : sequence; }
};

// `problem` has its shape `s`, and what parameters point to under the names that they have for it;
// `query_room` and `room` are the elements behind each row of the query and of the cache.
template <class Problem>
fdpg::DecodeAttentionParams params_of(Problem& problem, fdpg::Dtype dtype, int64_t query_room,
                                      int64_t room) {
  const Shape& s = problem.s;
  fdpg::DecodeAttentionParams p{};
  p.query = problem.query.data();
  p.keys = problem.keys.data();
  p.values = problem.values.data();
  p.out = problem.out.data();
  p.dtype = dtype;
  p.sequences = s.sequences;
  p.cache_rows = s.cache_rows();
  p.heads = s.heads;
  p.key_heads = s.key_heads;
  p.tokens = s.tokens;
  p.size = s.size;
  p.value_size = s.value_size;
  p.query_stride[1] = s.size + query_room;
  p.query_stride[0] = s.heads * p.query_stride[1];
  p.key_stride[2] = s.size + room;
  p.value_stride[2] = s.value_size + room;
  for (int i = 1; i >= 0; --i) {
    const int64_t times = i == 1 ? s.tokens : s.key_heads;
    p.key_stride[i] = p.key_stride[i + 1] * times;
    p.value_stride[i] = p.value_stride[i + 1] * times;
  }
  p.begin = problem.begin.data();
  p.end = problem.end.data();
  p.rows = s.rows > 0 ? problem.rows.data() : nullptr;
  p.bias = s.bias ? problem.bias.data() : nullptr;
  p.bias_stride = s.tokens + query_room;
  p.sinks = s.sinks ? problem.sinks.data() : nullptr;
  p.scale = kScale;
  p.softcap = s.softcap;
  return p;
}
