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

// The same with no fp64 instruction, which a GPU does slowly: q is a whole number of 24 bits times a power of two, so
// that its product with n - 1 is one of 64 bits, rounded here to the 53 of a double as the multiplication would.
// Bit-equal to the above for q in [0, 1] and n <= 2^40.
AML_INLINE Rank<float> quantile_rank_in_integers(float q, int64_t n, Interpolation interpolation, bool in_fp64) {
  const uint32_t bits = bit_cast<uint32_t>(in_fp64 ? q : q * float(n - 1));
  const uint32_t fraction = bits & 0x7FFFFFu, biased = bits >> 23;
  uint64_t whole = biased ? fraction | 0x800000u : fraction;  // the rank is whole * 2^-places
  const int places = 150 - int(biased ? biased : 1);
  if (in_fp64) {
    whole *= uint64_t(n - 1);
    int spare = 0;  // bits that a double has no room for
    while (spare < 11 && whole >> (53 + spare)) ++spare;
    if (spare > 0) {
      const uint64_t half = uint64_t(1) << (spare - 1), kept = whole >> spare, left = whole - (kept << spare);
      whole = (kept + (left > half || (left == half && (kept & 1)))) << spare;
    }
  }
  int64_t below = places <= 0 ? int64_t(whole << -places) : places < 64 ? int64_t(whole >> places) : 0;
  const uint64_t rest = places <= 0 ? 0 : places < 64 ? whole & ((uint64_t(1) << places) - 1) : whole;
  int64_t above = below + (rest > 0);
  if (interpolation == Interpolation::lower) above = below;
  if (interpolation == Interpolation::higher) below = above;
  if (interpolation == Interpolation::nearest) {  // a half goes to the even one
    const uint64_t half = places > 0 && places <= 64 ? uint64_t(1) << (places - 1) : ~uint64_t(0);
    below = above = rest > half || (rest == half && (below & 1)) ? above : below;
  }
  float weight = 0.5f;
  if (interpolation != Interpolation::midpoint) {
    // One rounding, in the conversion: what is subnormal in the end has few bits and is exact.
    const float unit = bit_cast<float>(places < 127 ? uint32_t(127 - places) << 23 : uint32_t(1) << (149 - places));
    weight = above > below ? float(rest) * unit : 0.0f;
  }
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
