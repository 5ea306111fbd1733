// Several numbers at once, with the arithmetic that ../common/loss.h is written in. The compiler's own vectoriser makes
// twice the instructions of the same formulas: it keeps conditions in vectors and repeats selections.
#pragma once

#include "../common/loss.h"
#include "vector.h"

#define AML_MEMBER inline __attribute__((always_inline))

namespace aml::cpu {
namespace {

using aml::exp_nonpositive;  // not hidden by the overloads below
using aml::larger;
using aml::log1p_slope;

template <class T> using LaneInt = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
#if defined(AML_AVX512)
template <class T> using MaskBits = typename std::conditional<sizeof(T) == 4, __mmask16, __mmask8>::type;
#else
template <class T> using MaskBits = Vector<LaneInt<T>>;
#endif

// A condition for each lane.
template <class T>
struct Mask {
  MaskBits<T> bits;

  friend AML_MEMBER Mask operator&(Mask a, Mask b) { return {MaskBits<T>(a.bits & b.bits)}; }
  friend AML_MEMBER Mask operator|(Mask a, Mask b) { return {MaskBits<T>(a.bits | b.bits)}; }
  static AML_MEMBER Mask all(bool value) { return {MaskBits<T>(MaskBits<T>{} - MaskBits<T>(MaskBits<T>{} + value))}; }
};

template <class T>
struct Lanes {
  Vector<T> v;

  AML_MEMBER Lanes() : v{} {}
  AML_MEMBER Lanes(Vector<T> v) : v(v) {}
  template <class U, class = std::enable_if_t<std::is_arithmetic_v<U>>>
  AML_MEMBER explicit Lanes(U x) : v(spread(T(x))) {}

  friend AML_MEMBER Lanes operator+(Lanes a, Lanes b) { return a.v + b.v; }
  friend AML_MEMBER Lanes operator-(Lanes a, Lanes b) { return a.v - b.v; }
  friend AML_MEMBER Lanes operator*(Lanes a, Lanes b) { return a.v * b.v; }
  friend AML_MEMBER Lanes operator-(Lanes a) { return -a.v; }
  AML_MEMBER Lanes& operator+=(Lanes a) { v += a.v; return *this; }
  friend AML_MEMBER Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return multiply_add(a.v, b.v, c.v); }
};

template <class T>
AML_MEMBER Lanes<T> load_lanes(const T* from) { return load(from); }

#if defined(AML_AVX512)
typedef Lanes<float> Floats;
typedef Lanes<double> Doubles;
AML_INLINE __m512 raw(Floats a) { return (__m512)a.v; }
AML_INLINE __m512d raw(Doubles a) { return (__m512d)a.v; }
AML_INLINE Floats lanes(__m512 a) { return (Vector<float>)a; }
AML_INLINE Doubles lanes(__m512d a) { return (Vector<double>)a; }

AML_INLINE Mask<float> operator>(Floats a, Floats b) { return {_mm512_cmp_ps_mask(raw(a), raw(b), _CMP_GT_OQ)}; }
AML_INLINE Mask<double> operator>(Doubles a, Doubles b) { return {_mm512_cmp_pd_mask(raw(a), raw(b), _CMP_GT_OQ)}; }
AML_INLINE Mask<float> operator>=(Floats a, Floats b) { return {_mm512_cmp_ps_mask(raw(a), raw(b), _CMP_GE_OQ)}; }
AML_INLINE Mask<double> operator>=(Doubles a, Doubles b) { return {_mm512_cmp_pd_mask(raw(a), raw(b), _CMP_GE_OQ)}; }
AML_INLINE Mask<float> operator!=(Floats a, Floats b) { return {_mm512_cmp_ps_mask(raw(a), raw(b), _CMP_NEQ_UQ)}; }
AML_INLINE Mask<double> operator!=(Doubles a, Doubles b) { return {_mm512_cmp_pd_mask(raw(a), raw(b), _CMP_NEQ_UQ)}; }
template <class T> AML_INLINE bool any(Mask<T> m) { return m.bits != 0; }
AML_INLINE Floats select(Mask<float> m, Floats a, Floats b) { return lanes(_mm512_mask_blend_ps(m.bits, raw(b), raw(a))); }
AML_INLINE Doubles select(Mask<double> m, Doubles a, Doubles b) { return lanes(_mm512_mask_blend_pd(m.bits, raw(b), raw(a))); }
AML_INLINE Floats larger(Floats a, Floats b) { return lanes(_mm512_max_ps(raw(a), raw(b))); }
AML_INLINE Doubles larger(Doubles a, Doubles b) { return lanes(_mm512_max_pd(raw(a), raw(b))); }
AML_INLINE Vector<int32_t> count(Vector<int32_t> n, Mask<float> m) {
  return (Vector<int32_t>)_mm512_mask_add_epi32((__m512i)n, m.bits, (__m512i)n, _mm512_set1_epi32(1));
}
AML_INLINE Vector<int64_t> count(Vector<int64_t> n, Mask<double> m) {
  return (Vector<int64_t>)_mm512_mask_add_epi64((__m512i)n, m.bits, (__m512i)n, _mm512_set1_epi64(1));
}
AML_INLINE Floats reciprocal(Floats x) {  // an estimate of 14 bits, and Newton's step: a third of a division's time
  const __m512 r = _mm512_rcp14_ps(raw(x));
  return lanes(_mm512_fmadd_ps(r, _mm512_fnmadd_ps(raw(x), r, _mm512_set1_ps(1)), r));
}
#else
template <class T> AML_INLINE Mask<T> operator>(Lanes<T> a, Lanes<T> b) { return {a.v > b.v}; }
template <class T> AML_INLINE Mask<T> operator>=(Lanes<T> a, Lanes<T> b) { return {a.v >= b.v}; }
template <class T> AML_INLINE Mask<T> operator!=(Lanes<T> a, Lanes<T> b) { return {a.v != b.v}; }
template <class T>
AML_INLINE bool any(Mask<T> m) {
  LaneInt<T> found = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) found |= m.bits[lane];
  return found != 0;
}
template <class T> AML_INLINE Lanes<T> select(Mask<T> m, Lanes<T> a, Lanes<T> b) { return m.bits ? a.v : b.v; }
template <class T> AML_INLINE Lanes<T> larger(Lanes<T> a, Lanes<T> b) { return a.v > b.v ? a.v : b.v; }
template <class T> AML_INLINE Vector<LaneInt<T>> count(Vector<LaneInt<T>> n, Mask<T> m) { return n - m.bits; }
AML_INLINE Lanes<float> reciprocal(Lanes<float> x) { return Vector<float>(1.0f / x.v); }
#endif
AML_INLINE Lanes<double> reciprocal(Lanes<double> x) { return Vector<double>(1.0 / x.v); }

template <class T> AML_INLINE Lanes<T> magnitude(Lanes<T> x) {
  typedef Vector<LaneInt<T>> Bits;
  return Lanes<T>((Vector<T>)((Bits)x.v & ~(Bits)spread(T(-0.0))));
}
template <class T> AML_INLINE Lanes<T> if_negative(Lanes<T> x, Lanes<T> a, Lanes<T> b) { return select(Lanes<T>() > x, a, b); }
AML_INLINE Lanes<float> from_exponent(Lanes<float> x) { return (Vector<float>)((Vector<int32_t>)x.v << 23); }
// fp64 is for checking derivatives.
AML_INLINE Lanes<double> exp_nonpositive(Lanes<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x.v[lane] = exp_nonpositive(x.v[lane]);
  return x;
}
AML_INLINE Lanes<double> log1p_slope(Lanes<double> e) {
  for (int lane = 0; lane < kLanes<double>; ++lane) e.v[lane] = log1p_slope(e.v[lane]);
  return e;
}

}  // namespace
}  // namespace aml::cpu
