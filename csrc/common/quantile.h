// Order statistics without sorting: numbers as integers of the same order, and the arithmetic of torch.quantile.
#pragma once

#include <cmath>

#include "platform.h"

namespace aml {

enum class Interpolation : int64_t { linear, lower, higher, midpoint, nearest };

// Unsigned keys in the order of the numbers (-0.0 just before +0.0); NaN is for the caller to find.
AML_INLINE uint32_t ordered_key(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
AML_INLINE uint64_t ordered_key(double value) {
  const uint64_t bits = bit_cast<uint64_t>(value);
  return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | 0x8000000000000000u);
}
AML_INLINE float from_ordered_key(uint32_t key) {
  return bit_cast<float>(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}
AML_INLINE double from_ordered_key(uint64_t key) {
  return bit_cast<double>(key & 0x8000000000000000u ? key ^ 0x8000000000000000u : ~key);
}

template <class T>
struct Rank {
  int64_t below, above;  // places in the order; the quantile lies between them
  T weight;              // of `above`, where the interpolation blends
};

// Where the q-quantile of n numbers lies. PyTorch computes q (n - 1) in fp64 since 2.14 and in T before.
template <class T>
AML_INLINE Rank<T> quantile_rank(T q, int64_t n, Interpolation interpolation, bool in_fp64) {
  double rank = in_fp64 ? double(q) * double(n - 1) : double(q * T(n - 1));
  if (interpolation == Interpolation::lower) rank = ::floor(rank);
  if (interpolation == Interpolation::higher) rank = ::ceil(rank);
  if (interpolation == Interpolation::nearest) rank = ::nearbyint(rank);
  const int64_t below = int64_t(rank), above = int64_t(::ceil(rank));
  const T weight = interpolation == Interpolation::midpoint ? T(0.5) : T(rank - double(below));
  return {below < n ? below : n - 1, above < n ? above : n - 1, weight};
}

// torch.lerp, as its vectorised CPU code rounds it.
AML_INLINE float fused(float a, float b, float c) { return ::fmaf(a, b, c); }
AML_INLINE double fused(double a, double b, double c) { return ::fma(a, b, c); }
template <class T>
AML_INLINE T lerp(T low, T high, T weight) {
  return weight < T(0.5) ? fused(weight, high - low, low) : fused(weight - T(1), high - low, high);
}

}  // namespace aml
