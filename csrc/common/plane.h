// A tensor as kernels see it: address, element type, strides.
#pragma once

#include <cstdint>

namespace aml {

enum class Type : uint8_t { f32, bf16, f16, f64, u8 };  // u8 also stands for bool

// A tensor [samples, rows, columns] of any strides, in elements. Null data: the argument was not given.
struct Plane {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t sample_stride = 0, row_stride = 0, column_stride = 0;
  int64_t rows = 0, columns = 0;
};

}  // namespace aml
