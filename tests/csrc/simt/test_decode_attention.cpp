// decode_attention and cache_append on CUDA against the CPU's, which are tested against long
// double: head sizes that end inside a lane's share, one to all lanes per key, shared key heads,
// spans that no thread may look beyond, and the same bits whatever the schedule, the room and the
// alignment.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "fdpg/cpu.h"
#include "fdpg/types.h"
#include "harness.h"
//
#include "cache_append.cu"
#include "decode_attention.cu"

using namespace fdpg;

namespace {

struct Placed : Shape {
  int64_t room = 0;  // elements behind each row of the cache
  int offset = 0;    // of the cache, in elements past a 16-byte boundary
  int64_t live = 0;  // spans end by then; 0: by `tokens`
};

template <class T>
struct Problem {
  Placed s;
  Buffer<int64_t> begin, end, rows;
  Buffer<T> query, keys, values, out;
  Buffer<accumulate_t<T>> bias, sinks;

  explicit Problem(const Placed& s)
      : s(s),
        begin(s.sequences),
        end(s.sequences),
        rows(s.sequences),
        query(s.sequences * s.heads * s.size),
        keys(s.cache_rows() * s.key_heads * s.tokens * (s.size + s.room), s.offset),
        values(s.cache_rows() * s.key_heads * s.tokens * (s.value_size + s.room), s.offset),
        out(s.sequences * s.heads * s.value_size),
        bias(s.heads * bias_stride()),
        sinks(s.heads) {
    std::mt19937 engine(7);
    std::normal_distribution<double> normal(0, 1.2);
    auto number = [&] { return store<T>(static_cast<accumulate_t<T>>(normal(engine))); };
    const int64_t live = s.live > 0 ? s.live : s.tokens;
    for (int64_t b = 0; b < s.sequences; ++b) {
      end[b] = b == 0 ? live : 11 * b % live;
      begin[b] = b % 3 == 2 ? end[b] / 2 : 0;
      rows[b] = s.row_of(b);
    }
    for (int64_t i = 0; i < query.size(); ++i) query[i] = number();
    for (int64_t h = 0; h < s.heads; ++h) sinks[h] = static_cast<float>(normal(engine));
    // By how far a key is from the last one, whatever room there is for tokens.
    for (int64_t h = 0; h < s.heads; ++h) {
      for (int64_t t = s.tokens; t-- > 0;) {
        bias[h * bias_stride() + t] = static_cast<float>((h + 3 * (s.tokens - t)) % 17) / 4;
      }
    }
    for (int64_t row = 0; row < s.cache_rows() * s.key_heads; ++row) {
      for (int64_t t = 0; t < s.tokens; ++t) {
        if (!is_live(row / s.key_heads, t)) continue;
        for (int64_t d = 0; d < s.size; ++d) at(keys, row, t, s.size)[d] = number();
        for (int64_t e = 0; e < s.value_size; ++e) at(values, row, t, s.value_size)[e] = number();
      }
    }
  }

  bool is_live(int64_t row, int64_t t) {
    for (int64_t b = 0; b < s.sequences; ++b) {
      if (rows[b] == row && begin[b] <= t && t < end[b]) return true;
    }
    return false;
  }

  T* at(Buffer<T>& cache, int64_t row, int64_t t, int64_t size) {
    return cache.data() + (row * s.tokens + t) * (size + s.room);
  }

  // What is not live, and the room behind rows, may not even be read.
  void forbid(Buffer<T>& cache, int64_t size) {
    for (int64_t row = 0; row < s.cache_rows() * s.key_heads; ++row) {
      for (int64_t t = 0; t < s.tokens; ++t) {
        const int64_t first = (row * s.tokens + t) * (size + s.room);
        const bool live = is_live(row / s.key_heads, t);
        cache.forbid(first + (live ? size : 0), s.room + (live ? 0 : size));
      }
    }
  }

  int64_t bias_stride() const { return s.tokens + 3; }

  DecodeAttentionParams params(Dtype dtype) {
    DecodeAttentionParams p = params_of(*this, dtype, 0, s.room);
    p.bias_stride = bias_stride();
    return p;
  }

  std::vector<T> on_cpu(Dtype dtype) {
    CHECK(cpu::decode_attention(params(dtype), 0, s.sequences * s.key_heads) == kOk);
    return {out.data(), out.data() + out.size()};
  }

  std::vector<T> on_device(Dtype dtype) {
    const auto p = params(dtype);
    for (int64_t i = 0; i < out.size(); ++i) out[i] = store<T>(NAN);
    run_on_device([&] { return cuda::decode_attention(p, nullptr); });
    return {out.data(), out.data() + out.size()};
  }
};

template <class T>
bool equal_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Sums of some tens of numbers of size 1 in fp32; two 16-bit results are a rounding apart at most.
template <class T>
constexpr double kTolerance = sizeof(T) == 8   ? 1e-13
                              : sizeof(T) == 4 ? 3e-6
                                               : 2e-3;
template <>
constexpr double kTolerance<BFloat16> = 1.6e-2;

template <class T>
void check(Dtype dtype, const Placed& shape) {
  Problem<T> problem(shape);
  const std::vector<T> expected = problem.on_cpu(dtype);
  problem.forbid(problem.keys, shape.size);
  problem.forbid(problem.values, shape.value_size);
  for (int64_t h = 0; h < shape.heads; ++h) {
    problem.bias.forbid(h * problem.bias_stride() + shape.tokens, 3);
  }
  std::vector<T> first;
  for_each_schedule([&](int schedule) {
    const std::vector<T> got = problem.on_device(dtype);
    if (schedule == 0) {
      first = got;
      double worst = 0;
      for (size_t i = 0; i < got.size(); ++i) {
        const double error = std::fabs(static_cast<double>(load(got[i])) - load(expected[i]));
        worst = error <= worst ? worst : error;  // NaN is worst
      }
      CHECK_NEAR(worst, 0.0, kTolerance<T>);
    }
    CHECK(equal_bits(got, first));
  });

  // More room for tokens, and rows that lie elsewhere.
  Placed other = shape;
  other.live = shape.tokens;
  other.tokens += 9;
  other.room = shape.room == 0 ? 1 : 0;
  other.offset = shape.offset == 0 ? 1 : 0;
  Problem<T> moved(other);
  CHECK(equal_bits(moved.on_device(dtype), first));
}

template <class T>
void every_shape(Dtype dtype) {
  for (const Placed& s : {
           Placed{1, 1, 1, 1, 1, 1},
           Placed{5, 4, 2, 37, 8, 8},  // a lane per key, two heads share it
           Placed{4, 5, 1, 40, 17, 33, 0, true, 0, true, 2, 1},  // five share: four, and one
           Placed{4, 3, 3, 160, 64, 64, 2.0},                    // 8 lanes per key
           Placed{4, 3, 3, 160, 64, 64, 0, true, 0, false, 8},   // and padded rows on 16 bytes
           Placed{3, 8, 2, 70, 80, 48},             // four share; lanes without a share
           Placed{3, 2, 1, 37, 200, 256, 0, true},  // a warp per key
           Placed{3, 4, 2, 37, 300, 40, 0.5, false, 0, false, 0, 3},  // the large sizes
           Placed{24, 3, 3, 40, 16, 8, 0, false, 2, true},            // sequences share rows
           Placed{13, 4, 2, 40, 24, 16, 2, true, 3, true},            // and heads
       }) {
    check<T>(dtype, s);
  }
}

// Every number of keys up to more than two rounds of a warp's teams.
void test_every_length() {
  const int64_t tokens = 70;
  for (const Placed& s : {Placed{tokens + 1, 1, 1, tokens, 32, 32},
                          Placed{tokens + 1, 4, 1, tokens, 64, 32, 0, false, 0, true, 8}}) {
    Problem<float> problem(s);
    for (int64_t b = 0; b <= tokens; ++b) problem.begin[b] = 0, problem.end[b] = b;
    for (int64_t i = 0; i < problem.keys.size(); ++i) problem.keys[i] = i % 7 * 0.25f - 0.75f;
    for (int64_t i = 0; i < problem.values.size(); ++i) problem.values[i] = i % 5 - 1.5f;
    const std::vector<float> expected = problem.on_cpu(Dtype::kFloat32);
    problem.forbid(problem.keys, s.size);
    problem.forbid(problem.values, s.value_size);
    const std::vector<float> got = problem.on_device(Dtype::kFloat32);
    for (size_t i = 0; i < got.size(); ++i) CHECK_NEAR(got[i], expected[i], 3e-6);
  }
}

// Scores that rise by a hundred from key to key, of one head or of all but one: each overflows what
// is relative to an earlier one.
void test_scores_that_rise() {
  for (int heads : {1, 4}) {
    for (int falls = 0; falls < heads; ++falls) {
      Problem<float> problem({1, heads, 1, 700, 8, 8});
      for (int64_t i = 0; i < problem.query.size(); ++i) {
        problem.query[i] = i % 8 > 0 ? 0 : heads > 1 && i / 8 == falls ? -1 : 1;
      }
      for (int64_t i = 0; i < problem.keys.size(); ++i) problem.keys[i] = i / 8 * 100 / kScale;
      const std::vector<float> expected = problem.on_cpu(Dtype::kFloat32);
      const std::vector<float> got = problem.on_device(Dtype::kFloat32);
      for (size_t i = 0; i < got.size(); ++i) CHECK_NEAR(got[i], expected[i], 0.0);
    }
  }
}

void test_bad_spans_are_nan_and_empty_ones_zero() {
  Problem<float> problem({5, 2, 1, 6, 8, 4});
  for (int b = 0; b < 5; ++b) problem.begin[b] = 0, problem.end[b] = b == 4 ? 6 : 0;
  problem.end[1] = 7;
  problem.begin[2] = -1;
  problem.begin[3] = 1;  // after its end
  for (int64_t i = 0; i < problem.keys.size(); ++i) problem.keys[i] = 1;
  for (int64_t i = 0; i < problem.values.size(); ++i) problem.values[i] = 1;
  const std::vector<float> got = problem.on_device(Dtype::kFloat32);
  for (int i = 0; i < 40; ++i) CHECK_NEAR(got[i], i < 8 ? 0.0 : i < 32 ? NAN : 1.0, 1e-6);
}

void test_a_row_that_is_none_gives_nan() {
  Problem<float> problem({4, 2, 2, 6, 8, 4, 0, false, 2});
  for (int b = 0; b < 4; ++b) problem.begin[b] = 0, problem.end[b] = 6, problem.rows[b] = b - 1;
  for (int64_t i = 0; i < problem.keys.size(); ++i) problem.keys[i] = 1;
  for (int64_t i = 0; i < problem.values.size(); ++i) problem.values[i] = 1;
  const std::vector<float> got = problem.on_device(Dtype::kFloat32);
  for (int i = 0; i < 32; ++i) CHECK_NEAR(got[i], i / 8 == 0 || i / 8 == 3 ? NAN : 1.0, 1e-6);
}

void test_what_is_not_finite_is_seen() {
  const float infinity = std::numeric_limits<float>::infinity();
  Problem<float> problem({5, 1, 1, 40, 8, 8});
  for (int b = 0; b < 5; ++b) problem.begin[b] = 0, problem.end[b] = 40;
  for (int64_t i = 0; i < problem.query.size(); ++i) problem.query[i] = 1;
  for (int64_t i = 0; i < problem.keys.size(); ++i) problem.keys[i] = 0;
  for (int64_t i = 0; i < problem.values.size(); ++i) problem.values[i] = 2;
  auto key = [&](int64_t b, int64_t t) { return problem.at(problem.keys, b, t, 8); };
  key(0, 33)[5] = NAN;
  for (int t = 0; t < 40; ++t) key(1, t)[0] = -infinity;  // no score above minus infinity
  for (int t = 0; t < 39; ++t) key(2, t)[0] = -infinity;  // one: its value, others weigh nothing
  problem.at(problem.values, 2, 39, 8)[3] = 7;
  key(3, 11)[0] = infinity;
  problem.at(problem.values, 4, 39, 8)[3] = infinity;  // of the last key, and of no key behind it
  const std::vector<float> got = problem.on_device(Dtype::kFloat32);
  for (int i = 0; i < 32; ++i) CHECK_NEAR(got[i], i / 8 != 2 ? NAN : i % 8 == 3 ? 7 : 2, 0.0);
  for (int e = 0; e < 8; ++e) {
    if (e == 3) CHECK(got[32 + e] == infinity);
    if (e != 3) CHECK_NEAR(got[32 + e], 2, 1e-6);
  }
}

// A sink takes all of the weight where every score is minus infinity.
void test_a_sink_may_be_all_there_is() {
  Problem<float> problem({1, 4, 1, 40, 8, 8, 0, true});
  for (int64_t i = 0; i < problem.query.size(); ++i) problem.query[i] = 1;
  for (int64_t i = 0; i < problem.keys.size(); ++i) {
    problem.keys[i] = i % 8 == 0 ? -std::numeric_limits<float>::infinity() : 0;
  }
  for (const float got : problem.on_device(Dtype::kFloat32)) CHECK(got == 0);
}

// Rows of `bytes`, `room` bytes behind each; positions out of range leave their sequence as it is.
void check_append(int64_t key_bytes, int64_t value_bytes, int64_t room) {
  const int64_t sequences = 4, heads = 3, tokens = 7, queries = 2,
                bytes[] = {key_bytes, value_bytes};
  Buffer<int64_t> position(std::vector<int64_t>{5, 6, -1, 0});
  std::vector<char> expected[2];
  Buffer<char> keys(sequences * heads * tokens * (key_bytes + room));
  Buffer<char> values(sequences * heads * tokens * (value_bytes + room));
  Buffer<char> new_keys(sequences * heads * queries * key_bytes);
  Buffer<char> new_values(sequences * heads * queries * value_bytes);
  Buffer<char>* caches[] = {&keys, &values};
  Buffer<char>* states[] = {&new_keys, &new_values};
  CacheAppendParams p{};
  for (int i = 0; i < 2; ++i) {
    const int64_t row = bytes[i] + room;
    for (int64_t j = 0; j < states[i]->size(); ++j) (*states[i])[j] = static_cast<char>(j * 7 + i);
    p.parts[i] = {caches[i]->data(),
                  states[i]->data(),
                  bytes[i],
                  {heads * tokens * row, tokens * row, row},
                  {heads * queries * bytes[i], queries * bytes[i], bytes[i]}};
  }
  p.sequences = sequences;
  p.heads = heads;
  p.tokens = tokens;
  p.queries = queries;
  p.position = position.data();
  const auto clear = [&] {
    for (Buffer<char>* cache : caches) std::fill_n(cache->data(), cache->size(), char{-1});
  };
  clear();
  CHECK(cpu::cache_append(p, 0, sequences) == 1);
  for (int i = 0; i < 2; ++i) {
    expected[i].assign(caches[i]->data(), caches[i]->data() + caches[i]->size());
  }
  for_each_schedule([&](int) {
    clear();
    run_on_device([&] { return cuda::cache_append(p, nullptr); });
    for (int i = 0; i < 2; ++i) CHECK(same_bits(*caches[i], expected[i]));
  });
}

}  // namespace

int main() {
  return run_tests([] {
    every_shape<float>(Dtype::kFloat32);
    every_shape<BFloat16>(Dtype::kBFloat16);
    every_shape<Float16>(Dtype::kFloat16);
    every_shape<double>(Dtype::kFloat64);
    test_every_length();
    test_scores_that_rise();
    test_bad_spans_are_nan_and_empty_ones_zero();
    test_a_sink_may_be_all_there_is();
    test_a_row_that_is_none_gives_nan();
    test_what_is_not_finite_is_seen();
    check_append(32, 48, 0);
    check_append(32, 16, 16);
    check_append(3, 10, 1);
  });
}
