// check.h: what a tensor must be before a kernel gets its pointer, and what the caller reads when
// it is not: which op, which argument, what was expected, what came.
//
//   Arguments args("token_logprob", "logits", logits);             // the others must be on its
//   device p.target = args.vector<int64_t>("target", target, rows);       // (rows,) int64
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fdpg/params.h"  // Dtype

namespace fdpg::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Not STD_TORCH_CHECK: it puts the function and the path of the source before the message.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

inline std::string name_of(const torch::stable::Device& device) {
  const std::string type = device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another device";
  return device.has_index() ? type + ":" + std::to_string(device.index()) : type;
}

inline std::string list_of(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream out;
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "[") << values[i];
  out << (values.empty() ? "[]" : "]");
  return out.str();
}

template <class T>
constexpr ScalarType scalar_type();
template <>
constexpr ScalarType scalar_type<int64_t>() {
  return ScalarType::Long;
}
template <>
constexpr ScalarType scalar_type<double>() {
  return ScalarType::Double;
}
template <>
constexpr ScalarType scalar_type<bool>() {
  return ScalarType::Bool;
}

// A matrix of logits as the kernels take it: any row stride, unit stride along the vocabulary.
struct Matrix {
  void* data;
  ScalarType type;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
};

// The arguments of one call of one op. Vectors, and factors of products, are copied where they lie
// otherwise than a kernel takes them, and the copies live as long as this object, so keep it until
// the kernel has run (or was enqueued).
class Arguments {
 public:
  Arguments(const char* op, const char* lead_name, const Tensor& lead)
      : op_(op), lead_name_(lead_name), lead_(lead) {}

  const char* op() const { return op_; }

  // (N, V) floating point.
  Matrix logits(const char* name, const Tensor& t) const {
    same_device(name, t);
    const ScalarType type = t.scalar_type();
    one_of(name, type,
           {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
    if (t.dim() != 2) {
      fail(op_, ": `", name, "` must be a matrix [N, V], got shape ", list_of(t.sizes()));
    }
    const int64_t rows = t.size(0), columns = t.size(1);
    if (columns == 0)
      fail(op_, ": `", name, "` has an empty vocabulary, got shape [", rows, ", 0]");
    if (columns > 1 && t.stride(1) != 1) {
      fail(op_, ": `", name, "` must be contiguous along vocab, got strides ", list_of(t.strides()),
           ". Call .contiguous() on it");
    }
    const int64_t row_stride = rows > 1 ? t.stride(0) : columns;
    if (row_stride < columns) {
      fail(op_, ": `", name, "` has rows that overlap, got strides ", list_of(t.strides()),
           " for shape ", list_of(t.sizes()), ". Call .contiguous() on it");
    }
    return {t.data_ptr(), type, rows, columns, row_stride};
  }

  // (size,) of element type T.
  template <class T>
  const T* vector(const char* name, const Tensor& t, int64_t size) {
    return static_cast<const T*>(vector(name, t, size, scalar_type<T>()));
  }

  const void* vector(const char* name, const Tensor& t, int64_t size, ScalarType type) {
    same_device(name, t);
    one_of(name, t.scalar_type(), {type});
    shape(name, t, {size});
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().data_ptr();
  }

  // The same, or null when it was not given.
  template <class T>
  const T* optional_vector(const char* name, const std::optional<Tensor>& t, int64_t size) {
    return t ? vector<T>(name, *t, size) : nullptr;
  }

  const void* optional_vector(const char* name, const std::optional<Tensor>& t, int64_t size,
                              ScalarType type) {
    return t ? vector(name, *t, size, type) : nullptr;
  }

  // Of this type, and contiguous along its last dimension.
  const void* unit_stride(const char* name, const Tensor& t, ScalarType type) const {
    same_device(name, t);
    one_of(name, t.scalar_type(), {type});
    const int64_t last = t.dim() - 1;
    if (t.size(last) > 1 && t.stride(last) != 1) {
      fail(op_, ": `", name, "` must be contiguous along its last dimension, got strides ",
           list_of(t.strides()), ". Call .contiguous() on it");
    }
    return t.data_ptr();
  }

  // A matrix of this type, and its strides: contiguous along one of its dimensions or the other,
  // or copied.
  const void* factor(const char* name, const Tensor& t, ScalarType type, int64_t (&strides)[2]) {
    same_device(name, t);
    one_of(name, t.scalar_type(), {type});
    // A dimension of one element has any stride: that of a contiguous one, if that helps.
    strides[0] = t.size(0) > 1 ? t.stride(0) : 1;
    strides[1] = t.size(1) > 1 ? t.stride(1) : 1;
    if (strides[0] == 1 || strides[1] == 1) return t.data_ptr();
    strides[0] = t.size(1);
    strides[1] = 1;
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().data_ptr();
  }

  // A factor (depth, columns) as matmul_pack_ writes it: see MatmulPackParams.
  void* packed(const char* name, const Tensor& t, int64_t depth, int64_t columns) const {
    same_device(name, t);
    one_of(name, t.scalar_type(), {ScalarType::BFloat16});
    const int64_t panels = (columns + kVocabularyTile - 1) / kVocabularyTile;
    shape(name, t, {panels, (depth + 31) / 32 * 16, kVocabularyTile, 2});
    if (!t.is_contiguous()) {
      fail(op_, ": `", name, "` is packed and must be contiguous, got strides ",
           list_of(t.strides()));
    }
    return t.data_ptr();
  }

  // State that the op writes: fp64, contiguous, of exactly this shape.
  double* state(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) const {
    same_device(name, t);
    one_of(name, t.scalar_type(), {ScalarType::Double});
    shape(name, t, sizes);
    if (!t.is_contiguous()) {
      fail(op_, ": `", name, "` is written in place and must be contiguous, got strides ",
           list_of(t.strides()));
    }
    return static_cast<double*>(t.data_ptr());
  }

  void one_of(const char* name, ScalarType got, std::initializer_list<ScalarType> expected) const {
    std::string names;
    for (const ScalarType type : expected) {
      if (type == got) return;
      names += (names.empty() ? "" : " or ") + name_of(type);
    }
    fail(op_, ": `", name, "` must be ", names, ", got ", name_of(got));
  }

  // What logits of this type are multiplied by. Kernels multiply two such numbers, and that by
  // log2 e, and divide by them: fp32 has room for it all.
  double factor_of_logits(const char* name, double value, ScalarType type) const {
    if (!(value > 0) || value == std::numeric_limits<double>::infinity()) {
      fail(op_, ": `", name, "` must be positive and finite, got ", value);
    }
    if (type != ScalarType::Double && !(value >= 1e-18 && value <= 1e18)) {
      fail(op_, ": `", name, "` must be in [1e-18, 1e+18] where `", lead_name_,
           "` is not float64, got ", value, ". Convert `", lead_name_, "` to float64");
    }
    return value;
  }

  // 0: none.
  double softcap(double value, ScalarType type) const {
    return value == 0 ? 0 : factor_of_logits("softcap", value, type);
  }

  void dimensions(const char* name, const Tensor& t, int64_t expected) const {
    if (t.dim() == expected) return;
    fail(op_, ": `", name, "` must have ", expected, expected == 1 ? " dimension" : " dimensions",
         ", got shape ", list_of(t.sizes()));
  }

  void shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) const {
    bool equal = t.dim() == static_cast<int64_t>(expected.size());
    for (size_t i = 0; equal && i < expected.size(); ++i) {
      equal = t.size(static_cast<int64_t>(i)) == expected.begin()[i];
    }
    if (equal) return;
    fail(op_, ": `", name, "` must have shape ", list_of({expected.begin(), expected.size()}),
         ", got ", list_of(t.sizes()));
  }

  void same_device(const char* name, const Tensor& t) const {
    if (t.device() == lead_.device()) return;
    fail(op_, ": `", name, "` must be on the device of `", lead_name_, "` (",
         name_of(lead_.device()), "), got ", name_of(t.device()));
  }

 private:
  const char* op_;
  const char* lead_name_;
  Tensor lead_;
  std::vector<Tensor> kept_;
};

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      return Dtype::kFloat32;
  }
}

// Per-token results are fp32, or fp64 when the logits are.
inline ScalarType result_type(ScalarType logits) {
  return logits == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace fdpg::binding
