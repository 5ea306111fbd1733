// What the arithmetic shared by the CPU and the CUDA kernels is written with.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define AML_INLINE static __host__ __device__ __forceinline__
#else
// Always inlined: the same function is compiled for several instruction sets and must never be shared between them.
#define AML_INLINE static inline __attribute__((always_inline))
#endif

namespace aml {

// The whole extension is compiled without contraction of a * b + c, because a pixel is kept or left out by comparing
// two computed numbers, and that has to come out the same on every back end. Where fusing helps it is asked for.
#if defined(__CUDACC__) || defined(AML_EMULATED) || defined(AML_FMA) || defined(__aarch64__)
AML_INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
AML_INLINE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
AML_INLINE float multiply_add(float a, float b, float c) { return a * b + c; }
AML_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

template <class To, class From>
AML_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace aml
