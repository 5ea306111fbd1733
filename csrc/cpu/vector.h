// Vectors of the instruction set's width, for the loops that the compiler does not vectorise by itself.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/platform.h"

#define AML_MEMBER inline __attribute__((always_inline))

namespace aml::cpu {
namespace {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(AML_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = AML_VECTOR_BYTES / sizeof(T);

#if defined(AML_AVX512)
AML_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) { return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
AML_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) { return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(AML_FMA)
AML_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) { return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
AML_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) { return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
AML_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) { return a * b + c; }
AML_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) { return a * b + c; }
#endif

// `x` in every lane. x - 0 is x in every bit; of x + 0 the compiler cannot say so, and adds.
template <class T>
AML_INLINE Vector<T> spread(T x) { return x - Vector<T>{}; }

AML_INLINE float sqrt_of(float x) { return __builtin_sqrtf(x); }
AML_INLINE double sqrt_of(double x) { return __builtin_sqrt(x); }

template <class T>
AML_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
template <class T>
AML_INLINE void store(T* to, Vector<T> v) { __builtin_memcpy(to, &v, sizeof(v)); }
// The first `count` elements, and zeros: nothing behind them is touched.
#if defined(AML_AVX512)
AML_INLINE Vector<float> load_first(const float* from, int64_t count) { return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from); }
AML_INLINE Vector<double> load_first(const double* from, int64_t count) { return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), from); }
#else
template <class T>
AML_INLINE Vector<T> load_first(const T* from, int64_t count) {
  Vector<T> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}
#endif

#if defined(AML_AVX512)
AML_INLINE float horizontal_sum(Vector<float> v) { return _mm512_reduce_add_ps((__m512)v); }
AML_INLINE double horizontal_sum(Vector<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
#else
template <class V>
AML_INLINE auto horizontal_sum(V v) {
  auto sum = v[0];
  for (size_t lane = 1; lane < sizeof(v) / sizeof(sum); ++lane) sum += v[lane];
  return sum;
}
#endif

template <class T>
using LaneInt = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
template <class T>
using Indices = Vector<LaneInt<T>>;

// Lane i is lane index[i] of v.
template <class T>
AML_INLINE Vector<T> pick(Vector<T> v, Indices<T> index) { return __builtin_shuffle(v, index); }

// For the lanes of a pair (a, b): those without the bit `half` from a and then from b, and those with it. A table, as
// the compiler would put together vectors of indices lane by lane each time.
template <class T, int half>
struct Halves {
  typedef LaneInt<T> Index;
  alignas(AML_VECTOR_BYTES) Index low[kLanes<T>] = {}, high[kLanes<T>] = {};
  constexpr Halves() {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      low[lane] = (lane & half ? kLanes<T> : 0) + (lane & ~half);
      high[lane] = low[lane] + half;
    }
  }
};
template <class T, int half>
constexpr Halves<T, half> kHalves{};

// Exchanges ever smaller halves of the rows of a square.
template <class T, int half = kLanes<T> / 2>
AML_INLINE void exchange(Vector<T>* row) {
  const Indices<T> low = load(kHalves<T, half>.low), high = load(kHalves<T, half>.high);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & half) continue;
    const Vector<T> a = row[i], b = row[i + half];
    row[i] = __builtin_shuffle(a, b, low);
    row[i + half] = __builtin_shuffle(a, b, high);
  }
  if constexpr (half > 1) exchange<T, half / 2>(row);
}

// Transposes a square of kLanes x kLanes elements.
template <class T>
AML_INLINE void transpose_square(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  Vector<T> row[kLanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) row[i] = load(in + i * in_stride);
  exchange<T>(row);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) store(out + i * out_stride, row[i]);
}

}  // namespace
}  // namespace aml::cpu
