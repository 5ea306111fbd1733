// CUDA's vector and 16-bit types, with its names, sizes and alignments; no CUDA header is needed.
#pragma once

#include <cstdint>
#include <cstring>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATION_VECTORS(T, name, size1)                                                                     \
  struct alignas(2 * size1) name##2 { T x, y; };                                                             \
  struct name##3 { T x, y, z; };                                                                             \
  struct alignas(4 * size1 > 16 ? 16 : 4 * size1) name##4 { T x, y, z, w; };                                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                 \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTORS(float, float, 4)
EMULATION_VECTORS(int, int, 4)
EMULATION_VECTORS(unsigned, uint, 4)
EMULATION_VECTORS(short, short, 2)
EMULATION_VECTORS(unsigned short, ushort, 2)
EMULATION_VECTORS(signed char, char, 1)
EMULATION_VECTORS(unsigned char, uchar, 1)
EMULATION_VECTORS(long long, longlong, 8)
EMULATION_VECTORS(unsigned long long, ulonglong, 8)
#undef EMULATION_VECTORS

namespace emulation {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3FF;
  if (exponent == 31) return bits_as<float>(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) return bits_as<float>(sign | bits_as<uint32_t>(float(mantissa) * 0x1p-24f));
  return bits_as<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

// To the nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7FFF;
  if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and more
  if (magnitude < 0x38800000) {  // below 2^-14 halves are multiples of 2^-24: adding 0.5 rounds to one
    return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f)));
  }
  return uint16_t(sign | ((magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13));
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float bfloat16_to_float(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

}  // namespace emulation

#define EMULATION_HALF_TYPE(type, pair, widen, narrow)                               \
  struct type {                                                                      \
    uint16_t bits;                                                                   \
    type() = default;                                                                \
    explicit type(float value) : bits(emulation::narrow(value)) {}                   \
    explicit operator float() const { return emulation::widen(bits); }               \
  };                                                                                 \
  struct alignas(4) pair { type x, y; };
EMULATION_HALF_TYPE(__half, __half2, half_to_float, float_to_half)
EMULATION_HALF_TYPE(__nv_bfloat16, __nv_bfloat162, bfloat16_to_float, float_to_bfloat16)
#undef EMULATION_HALF_TYPE

inline float __half2float(__half x) { return float(x); }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
