// Bilinear resizing on the fly: a thread walks down columns of the target and holds the two source rows around it,
// already blended along the row, so that a pixel costs one blend. Equal to common/resize.h in every bit.
#pragma once

#include <limits>

#include "../common/resize.h"
#include "device.cuh"

namespace aml::cuda {

// coordinate() of common/resize.h for the indices of an axis in turn, without a division for each: index i lies at
// source element (i * multiplier + offset) / denominator - 1, of which whole and remaining part are stepped.
struct Axis {
  uint32_t source = 1;
  uint32_t multiplier = 1, offset = 1, denominator = 1;
  int32_t whole = 1;  // multiplier = whole * denominator + part
  float part = 0;
  float length = 1;                           // the denominator
  float reciprocal = 1, reciprocal_rest = 0;  // their sum is 1 / denominator
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kLongestResizedAxis = (int64_t(1) << 21) - 1;

// Whether everything fits in 32 bits, and weight_of() is exact.
inline bool fits_axis(int64_t source, int64_t destination) {
  return source == destination || (source <= kLongestResizedAxis && destination <= kLongestResizedAxis &&
                                   (2 * destination + 1) * source + destination < (int64_t(1) << 32));
}

inline Axis make_axis(int64_t source, int64_t destination, bool align_corners) {
  Axis axis;
  axis.source = uint32_t(source);
  if (source == destination) return axis;
  axis.denominator = uint32_t(align_corners ? (destination > 1 ? destination - 1 : 1) : 2 * destination);
  axis.multiplier = uint32_t(align_corners ? source - 1 : 2 * source);
  axis.offset = uint32_t(align_corners ? axis.denominator : source + destination);
  axis.whole = int32_t(axis.multiplier / axis.denominator);
  axis.part = float(axis.multiplier % axis.denominator);
  axis.length = float(axis.denominator);
  const double reciprocal = 1.0 / axis.denominator;
  axis.reciprocal = float(reciprocal);
  axis.reciprocal_rest = float(reciprocal - axis.reciprocal);
  return axis;
}

// Where a row or column of the target lies. The part is a whole number below 2^22, and as a float exact.
struct Position {
  int32_t below;  // -1: before the first source element
  float part;     // of the denominator, behind `below`

  __device__ __forceinline__ Position(const Axis& axis, uint32_t index) {
    const uint32_t numerator = index * axis.multiplier + axis.offset, quotient = numerator / axis.denominator;
    below = int32_t(quotient) - 1;
    part = float(numerator - quotient * axis.denominator);
  }
  // After the part of one index was added: the rest of the step.
  __device__ __forceinline__ void carry(const Axis& axis) {
    below += axis.whole;
    if (part >= axis.length) part -= axis.length, ++below;
  }
  // With the element after `below`? Where not, there is nothing to blend with, and a neighbour is not looked at.
  __device__ __forceinline__ bool blends(const Axis& axis) const {
    return (part > 0) & (below >= 0) & (below + 1 < int32_t(axis.source));
  }
};

// part / denominator as IEEE division rounds it: the sum of two products below is within 2^-47 of it (relatively), and
// no fraction with a denominator below 2^22 is that near to a place where rounding changes.
__device__ __forceinline__ float weight_of(float part, const Axis& axis) {
  return multiply_add(part, axis.reciprocal, part * axis.reciprocal_rest);
}

// What is known of a source plane when a kernel is compiled: nothing; that its rows are contiguous; of floats, too.
enum class Rows { any, packed, packed_floats };

// kColumns neighbouring columns of the target, as seen in a source plane, row by row.
// kKeep: keeps the lower of the two source rows, which is the upper one of the next two where there are several rows of
// the target to one of the source. Costs registers, and pays where source rows change often.
// Where there is no such plane (`exists`), no row is ever read.
template <int kColumns, Rows kRows = Rows::any, bool kKeep = false>
class ResizedColumns {
 public:
  __device__ __forceinline__ ResizedColumns(const Plane& plane, const Axis& rows, const Axis& columns, int64_t sample,
                                            uint32_t y, uint32_t x, bool exists = true)
      : start_(sample * plane.sample_stride), row_(rows, y), change_(exists ? 0.0f : kInfinity) {
    row_.below -= rows.whole;  // next_row() carries first
    Position column(columns, x);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      // A column beyond the target's last lies beyond the source's too.
      left_[k] = min(uint32_t(column.below < 0 ? 0 : column.below), columns.source - 1);
      weight_[k] = column.blends(columns) ? weight_of(column.part, columns) : 0.0f;
      column.part += columns.part;
      column.carry(columns);
    }
  }

  // To the next row, the first time to row y; returns the weight of the second of its two source rows. Where these are
  // other ones than those of the row before, blends them along the row and calls change(k, first, second) for each
  // column; with the first twice where there is nothing to blend with.
  template <class F>
  __device__ __forceinline__ float next_row(const Plane& plane, const Axis& rows, F change) {
    if (row_.part >= change_) {
      row_.carry(rows);
      change_ = (rows.whole > 0) | (row_.part == 0) ? 0.0f : rows.length;
      const int32_t first = row_.below < 0 ? 0 : row_.below;
      const bool blends = row_.blends(rows);
      // (The kernel itself may have written a plane of floats: plain loads.)
      if constexpr (kRows == Rows::packed_floats) {
        blend_rows(static_cast<const float*>(plane.data), plane.row_stride, 1, first, blends, change);
      } else {
        const int64_t column_stride = kRows == Rows::packed ? 1 : plane.column_stride;
        with_float_type(plane.type, plane.data, [&](auto* data) {
          blend_rows(data, plane.row_stride, column_stride, first, blends, change);
        });
      }
    }
    const float weight = weight_of(row_.part, rows);
    row_.part += rows.part;
    return weight;
  }

 private:
  template <class T, class F>
  __device__ __forceinline__ void blend_rows(const T* data, int64_t row_stride, int64_t column_stride, int32_t row, bool blends, F change) {
    const T* const top = data + start_ + row * row_stride;
    const T* const bottom = blends ? top + row_stride : top;
    if constexpr (kKeep) {
      if (row != kept_row_) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) kept_[k] = blended(top, column_stride, k);
      }
      kept_row_ = row + blends;
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float first = kKeep ? kept_[k] : blended(top, column_stride, k);
      kept_[k] = blended(bottom, column_stride, k);
      change(k, first, kept_[k]);
    }
  }

  template <class T>
  __device__ __forceinline__ float blended(const T* row, int64_t column_stride, int k) const {
    const T* const at = row + left_[k] * column_stride;
    const bool has_right = weight_[k] > 0;
    const float a = to_float(at[0]);
    float b = 0;
    if (has_right) b = to_float(at[column_stride]);
    return interpolate(a, has_right ? b : a, weight_[k]);
  }

  int64_t start_;  // of the sample
  Position row_;
  float change_;  // from this part on the source rows change
  uint32_t left_[kColumns];
  float weight_[kColumns];
  int32_t kept_row_ = -1;  // unused but for kKeep, and so are the numbers of that row
  float kept_[kColumns];
};

}  // namespace aml::cuda
