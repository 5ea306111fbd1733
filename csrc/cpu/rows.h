// Reading and writing rows of any type and stride.
#pragma once

#include "kernels.h"

namespace aml::cpu {
namespace {

AML_INLINE float from_bf16(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

AML_INLINE float from_f16(uint16_t bits) {
  const uint32_t magnitude = uint32_t(bits & 0x7FFF) << 13;
  const float scaled = bit_cast<float>(magnitude) * 5.192296858534828e33f;  // 2^112: moves the exponent's bias
  const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;     // inf and NaN
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | uint32_t(bits & 0x8000) << 16);
}

AML_INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return uint16_t(value != value ? 0x7FC0u : rounded);
}

AML_INLINE uint16_t to_f16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits & 0x80000000u, u = bits ^ sign;
  const uint32_t normal = (u + 0xC8000FFFu + ((u >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(u) + 0.5f) - 0x3F000000u;
  const uint32_t large = u > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t magnitude = u >= 0x47800000u ? large : u < 0x38800000u ? subnormal : normal;
  return uint16_t(magnitude | sign >> 16);
}

// `count` elements of `source`, `stride` apart, as T.
template <class T, class Source, class Convert>
AML_INLINE void convert(const Source* source, int64_t stride, int64_t count, T* out, Convert one) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = T(one(source[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = T(one(source[i * stride]));
  }
}

template <class T>
inline void read(const void* data, Type type, int64_t offset, int64_t stride, int64_t count, T* out) {
  switch (type) {
    case Type::f32: return convert((const float*)data + offset, stride, count, out, [](float v) { return v; });
    case Type::f64: return convert((const double*)data + offset, stride, count, out, [](double v) { return v; });
    case Type::bf16: return convert((const uint16_t*)data + offset, stride, count, out, [](uint16_t v) { return from_bf16(v); });
    case Type::f16: return convert((const uint16_t*)data + offset, stride, count, out, [](uint16_t v) { return from_f16(v); });
    case Type::u8: return convert((const uint8_t*)data + offset, stride, count, out, [](uint8_t v) { return T(v); });
  }
}

template <class T>
inline void write(const T* values, int64_t count, void* data, Type type, int64_t offset) {
  switch (type) {
    case Type::f32: for (int64_t i = 0; i < count; ++i) ((float*)data)[offset + i] = float(values[i]); return;
    case Type::f64: for (int64_t i = 0; i < count; ++i) ((double*)data)[offset + i] = double(values[i]); return;
    case Type::bf16: for (int64_t i = 0; i < count; ++i) ((uint16_t*)data)[offset + i] = to_bf16(float(values[i])); return;
    case Type::f16: for (int64_t i = 0; i < count; ++i) ((uint16_t*)data)[offset + i] = to_f16(float(values[i])); return;
    case Type::u8: return;  // no output has this type
  }
}

template <class T>
constexpr Type native_type = sizeof(T) == 4 ? Type::f32 : Type::f64;

// Asks for `count` elements to be brought to the L2 cache.
inline void prefetch(const void* data, Type type, int64_t offset, int64_t count) {
  const int64_t size = type == Type::f64 ? 8 : type == Type::f32 ? 4 : type == Type::u8 ? 1 : 2;
  const char* from = (const char*)data + offset * size;
  for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Columns [first, first + count) of a row: in place where they are T next to each other, else through `buffer`.
template <class T>
inline const T* read_row(const Plane& plane, int64_t sample, int64_t row, int64_t first, int64_t count, T* buffer) {
  const int64_t offset = sample * plane.sample_stride + row * plane.row_stride + first * plane.column_stride;
  if (plane.type == native_type<T> && plane.column_stride == 1) return (const T*)plane.data + offset;
  read(plane.data, plane.type, offset, plane.column_stride, count, buffer);
  return buffer;
}

// The same of a plane of bytes.
inline const uint8_t* read_bytes(const Plane& plane, int64_t sample, int64_t row, int64_t first, int64_t count, uint8_t* buffer) {
  const uint8_t* from = (const uint8_t*)plane.data + sample * plane.sample_stride + row * plane.row_stride + first * plane.column_stride;
  if (plane.column_stride == 1) return from;
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i * plane.column_stride];
  return buffer;
}

}  // namespace
}  // namespace aml::cpu
