// Several numbers at once, with the arithmetic that ../common/loss.h is written in. The compiler's own vectoriser makes
// twice the instructions of the same formulas: it keeps conditions in vectors and repeats selections.
#pragma once

#include "../common/loss.h"
#include "vector.h"

namespace aml::cpu {
namespace {

using aml::exp_nonpositive;  // not hidden by the overloads below
using aml::larger;
using aml::log1p_slope;
using aml::sigmoid;

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
  friend AML_MEMBER Mask and_not(Mask a, Mask b) { return {MaskBits<T>(a.bits & ~b.bits)}; }
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
// How many lanes were true; popcnt is faster than a masked addition, as the vector units are the busy ones.
template <class T> using Tally = int64_t;
template <class T> AML_INLINE int64_t count(int64_t n, Mask<T> m) { return n + __builtin_popcount(m.bits); }
AML_INLINE int64_t total(int64_t n) { return n; }
AML_INLINE Floats add_where(Mask<float> m, Floats a, Floats b) { return lanes(_mm512_mask_add_ps(raw(a), m.bits, raw(a), raw(b))); }
AML_INLINE Doubles add_where(Mask<double> m, Doubles a, Doubles b) { return lanes(_mm512_mask_add_pd(raw(a), m.bits, raw(a), raw(b))); }
AML_INLINE Floats multiply_add_where(Mask<float> m, Floats a, Floats b, Floats c) { return lanes(_mm512_mask3_fmadd_ps(raw(a), raw(b), raw(c), m.bits)); }
AML_INLINE Doubles multiply_add_where(Mask<double> m, Doubles a, Doubles b, Doubles c) { return lanes(_mm512_mask3_fmadd_pd(raw(a), raw(b), raw(c), m.bits)); }
AML_INLINE Floats negate_where(Mask<float> m, Floats a) { return lanes(_mm512_mask_xor_ps(raw(a), m.bits, raw(a), _mm512_set1_ps(-0.0f))); }
AML_INLINE Doubles negate_where(Mask<double> m, Doubles a) { return lanes(_mm512_mask_xor_pd(raw(a), m.bits, raw(a), _mm512_set1_pd(-0.0))); }
AML_INLINE Mask<float> at_least(uint8_t least, const uint8_t* bytes, float) {
  return {_mm_cmpge_epu8_mask(_mm_loadu_si128((const __m128i*)bytes), _mm_set1_epi8(char(least)))};
}
AML_INLINE Mask<double> at_least(uint8_t least, const uint8_t* bytes, double) {
  return {__mmask8(_mm_cmpge_epu8_mask(_mm_loadl_epi64((const __m128i*)bytes), _mm_set1_epi8(char(least))))};
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
template <class T> using Tally = Vector<LaneInt<T>>;
template <class T> AML_INLINE Tally<T> count(Tally<T> n, Mask<T> m) { return n - m.bits; }
template <class V> AML_INLINE int64_t total(V n) { return horizontal_sum(n); }
// `a`, with b added (a * b added to c, the sign changed) where `m` says so.
template <class T> AML_INLINE Lanes<T> add_where(Mask<T> m, Lanes<T> a, Lanes<T> b) { return select(m, a + b, a); }
template <class T> AML_INLINE Lanes<T> multiply_add_where(Mask<T> m, Lanes<T> a, Lanes<T> b, Lanes<T> c) { return select(m, multiply_add(a, b, c), c); }
template <class T> AML_INLINE Lanes<T> negate_where(Mask<T> m, Lanes<T> a) { return select(m, -a, a); }
// Which of the next bytes are `least` or more. The last argument only tells how many there are.
template <class T>
AML_INLINE Mask<T> at_least(uint8_t least, const uint8_t* bytes, T) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes b;
  __builtin_memcpy(&b, bytes, sizeof(b));
  return {__builtin_convertvector(b, Vector<LaneInt<T>>) >= LaneInt<T>(least)};
}
#endif
template <class T> AML_INLINE Lanes<T> reciprocal(Lanes<T> x) { return Vector<T>(T(1) / x.v); }

template <class T> AML_INLINE Lanes<T> magnitude(Lanes<T> x) {
  typedef Vector<LaneInt<T>> Bits;
  return Lanes<T>((Vector<T>)((Bits)x.v & ~(Bits)spread(T(-0.0))));
}
template <class T> AML_INLINE Lanes<T> if_negative(Lanes<T> x, Lanes<T> a, Lanes<T> b) { return select(Lanes<T>() > x, a, b); }
AML_INLINE Lanes<float> from_exponent(Lanes<float> x) { return (Vector<float>)((Vector<int32_t>)x.v << 23); }
#if defined(AML_AVX512)
// exp_nonpositive() of ../common/loss.h with a power of 2 in sixteenths: the registers hold a table of 2^(i/16), which
// leaves a polynomial of degree 3. Within 2 ulp down to -10, 3.2 down to -40 and 5.2 down to -87; what is subnormal is
// not exact.
alignas(64) constexpr uint32_t kSixteenths[16] = {  // the fractions of 2^(i/16)
    0x000000, 0x05AAC3, 0x0B95C2, 0x11C3D3, 0x1837F0, 0x1EF532, 0x25FED7, 0x2D583F,
    0x3504F3, 0x3D08A4, 0x45672A, 0x4E248C, 0x5744FD, 0x60CCDF, 0x6AC0C7, 0x75257D};
AML_INLINE Floats exp_nonpositive(Floats x) {
  const Floats clamped = larger(Floats(-88.0296919f), x);  // -127 ln 2, which stands for 0; NaN passes
  const Floats magic(12584944.0f);                         // 1.5 * 2^23 + 16 * 127: rounds to sixteenths, plus the bias
  const Floats shifted = multiply_add(clamped, Floats(23.0831207f), magic);
  const Floats r = multiply_add(shifted - magic, Floats(-0.0433216989f), clamped);
  Floats p(0.166667f);
  p = multiply_add(p, r, Floats(0.5f));
  p = multiply_add(p, r, Floats(1.0f));
  p = multiply_add(p, r, Floats(1.0f));
  const __m512i bits = (__m512i)shifted.v;
  const __m512i fraction = _mm512_permutexvar_epi32(bits, _mm512_load_si512(kSixteenths));
  const __m512i power = _mm512_ternarylogic_epi32(  // (bits << 19 & 0xFF800000) | fraction
      _mm512_slli_epi32(bits, 19), _mm512_set1_epi32(int(0xFF800000)), fraction, 0xEA);
  return p * lanes((__m512)power);
}
#endif
// fp64 is for checking derivatives.
AML_INLINE Lanes<double> exp_nonpositive(Lanes<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x.v[lane] = exp_nonpositive(x.v[lane]);
  return x;
}
AML_INLINE Lanes<double> log1p_slope(Lanes<double> e) {
  for (int lane = 0; lane < kLanes<double>; ++lane) e.v[lane] = log1p_slope(e.v[lane]);
  return e;
}

// log(1 + q) for 0 <= q < 2^64, without 1 + q in which a small q is lost: 1 + q = 2^n (1 + f).
AML_INLINE Lanes<float> log1p(Lanes<float> q) {
  const Vector<int32_t> n = ((Vector<int32_t>)(q + Lanes<float>(1)).v >> 23) - 127;
  const Lanes<float> scale((Vector<float>)((127 - n) << 23));  // 2^-n
  const Lanes<float> f = multiply_add(q, scale, scale - Lanes<float>(1));
  return multiply_add(Lanes<float>(__builtin_convertvector(n, Vector<float>)), Lanes<float>(0.693147182f), f * log1p_slope(f));
}
AML_INLINE Lanes<double> log1p(Lanes<double> q) {
  for (int lane = 0; lane < kLanes<double>; ++lane) q.v[lane] = ::log1p(q.v[lane]);
  return q;
}

// sigmoid() of ../common/loss.h where the sign of z is known; at 0 either does.
template <class T>
AML_INLINE Sigmoid<Lanes<T>> sigmoid(Lanes<T> z, Mask<T> positive) {
  typedef Vector<LaneInt<T>> Bits;
  const Lanes<T> minus_magnitude((Vector<T>)((Bits)z.v | (Bits)spread(T(-0.0))));
  const Lanes<T> e = exp_nonpositive(minus_magnitude), r = reciprocal(Lanes<T>(1) + e);
  return {e, r, select(positive, r, e * r)};
}

}  // namespace
}  // namespace aml::cpu
