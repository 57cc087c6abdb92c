// cache_append.cpp: rows of new keys and values, copied to where each sequence of a cache stands.
#include <cstring>

#include "fdpg/cpu.h"

namespace fdpg::cpu {

int64_t cache_append(const CacheAppendParams& p, int64_t begin, int64_t end) {
  int64_t bad_row = kOk;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t position = p.position[b];
    if (position < 0 || position > p.tokens - p.queries) {
      if (bad_row == kOk) bad_row = b;
      continue;
    }
    for (const CacheAppendParams::Part& part : p.parts) {
      char* const to = static_cast<char*>(part.cache) + b * part.cache_stride[0] +
                       position * part.cache_stride[2];
      const char* const from = static_cast<const char*>(part.states) + b * part.state_stride[0];
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t q = 0; q < p.queries; ++q) {
          std::memcpy(to + h * part.cache_stride[1] + q * part.cache_stride[2],
                      from + h * part.state_stride[1] + q * part.state_stride[2], part.row_bytes);
        }
      }
    }
  }
  return bad_row;
}

}  // namespace fdpg::cpu
