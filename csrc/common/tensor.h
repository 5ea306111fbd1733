// Tensors of PyTorch's stable interface as planes, for the operators of every kind of kernel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>

#include "plane.h"

namespace aml {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);  // ValueError in Python
}

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Byte:
    case ScalarType::Bool: return Type::u8;
    default: throw std::invalid_argument("expected dtype float32, bfloat16, float16, float64, uint8 or bool");
  }
}

// [B, rows, columns], or [B, 1, rows, columns].
inline Plane plane(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  return {tensor.const_data_ptr(), type_of(tensor), tensor.stride(0), tensor.stride(dims - 2), tensor.stride(dims - 1),
          tensor.size(dims - 2), tensor.size(dims - 1)};
}
inline Plane plane(const OptionalTensor& tensor) { return tensor ? plane(*tensor) : Plane{}; }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

// [B, ...] as rows and columns: dimensions that lie next to each other in memory become one.
inline Plane rows_of(const Tensor& tensor, Tensor& holder) {
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0}, found = 0;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (found && tensor.stride(d) == sizes[found - 1] * strides[found - 1]) {
      sizes[found - 1] *= tensor.size(d);
    } else if (found == 2) {
      holder = torch::stable::contiguous(tensor);  // more than two strides: the one copy
      return rows_of(holder, holder);
    } else {
      sizes[found] = tensor.size(d), strides[found] = tensor.stride(d), ++found;
    }
  }
  return {tensor.const_data_ptr(), type_of(tensor), tensor.stride(0), strides[1], strides[0], sizes[1], sizes[0]};
}

// `valid` seen with the rows and columns of `values`: where the two do not fold alike, both are copied.
inline void matching_rows(Tensor values, OptionalTensor valid, Plane& v, Plane& m, Tensor& values_copy, Tensor& valid_copy) {
  v = rows_of(values, values_copy);
  if (!valid) return;
  m = rows_of(*valid, valid_copy);
  if (v.rows == m.rows && v.columns == m.columns) return;
  values_copy = torch::stable::contiguous(values), valid_copy = torch::stable::contiguous(*valid);
  v = rows_of(values_copy, values_copy), m = rows_of(valid_copy, valid_copy);
}

}  // namespace aml
