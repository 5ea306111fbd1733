// Bilinear resizing with one exact order of operations; see aml_kernels/reference/resize.py, its definition.
#pragma once

#include "platform.h"

namespace aml {

template <class T>
struct Coordinate {
  int64_t below;  // source index
  int64_t above;  // the next one; `below` itself where that is the last or has no weight
  T weight;       // of `above`
};

// Where destination index `i` lies among `source` elements: an exact fraction, one rounding at the end.
template <class T>
AML_INLINE Coordinate<T> coordinate(int64_t i, int64_t source, int64_t destination, bool align_corners) {
  if (source == destination) return {i, i, T(0)};
  int64_t numerator, denominator;
  if (align_corners) {
    numerator = i * (source - 1);
    denominator = destination > 1 ? destination - 1 : 1;
  } else {
    numerator = (2 * i + 1) * source - destination;
    denominator = 2 * destination;
    if (numerator < 0) numerator = 0;
  }
  const int64_t below = numerator / denominator;
  const int64_t remainder = numerator - below * denominator;
  return {below, remainder > 0 && below + 1 < source ? below + 1 : below, T(remainder) / T(denominator)};
}

// a + weight (b - a), never below the smaller of the two; NaN if either is NaN. Between equal infinities: that.
template <class T>
AML_INLINE T interpolate(T a, T b, T weight) {
  const T product = weight * (b - a);
  const T value = a + product;
  const T least = b < a ? b : a;
  return a == b ? a : value < least ? least : value;
}

}  // namespace aml
