// CUDA kernels on the CPU: their own source, compiled by g++ with this header in place of CUDA's.
//
//   plain build                   wrong results, divergent or endless barriers, lanes missing from a mask
//   -fsanitize=address,undefined  accesses out of bounds, misaligned vectors
//   -fsanitize=thread             data races: only CUDA's own barriers and fences order anything
//   trace.h                       switches between threads at every access, and counts the bytes
//
// A kernel's source is ordinary CUDA but for the macros at the end. An intrinsic that is missing here does not compile.
#pragma once

#include <atomic>
#include <cmath>
#include <type_traits>

#include "scheduler.h"
#if defined(AML_EMULATION_TRACE)
#include "trace.h"
#endif

// ---- Words of the language.

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// No __shared__: AML_SHARED is the emulator's way in.

EMULATION_HIDDEN uint3 emulated_thread() { return emulation::running.self->index; }
EMULATION_HIDDEN uint3 emulated_block() { return emulation::running.self->block->index; }
#define threadIdx (emulated_thread())
#define blockIdx (emulated_block())
#define blockDim (emulation::running.shape.block)
#define gridDim (emulation::running.shape.grid)
constexpr int warpSize = 32;

// ---- Barriers and fences.

inline void __syncthreads(EMULATION_HERE) { emulation::wait_for_block(false, at); }
inline int __syncthreads_count(int p, EMULATION_HERE) { return int(emulation::wait_for_block(p, at).count); }
inline int __syncthreads_or(int p, EMULATION_HERE) { return emulation::wait_for_block(p, at).count != 0; }
inline int __syncthreads_and(int p, EMULATION_HERE) {
  const emulation::Vote vote = emulation::wait_for_block(p, at);
  return vote.count == vote.of;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, EMULATION_HERE) { emulation::wait_for_warp(mask, at); }

namespace cooperative_groups {
struct grid_group {
  static void sync(EMULATION_HERE) { emulation::wait_for_grid(at); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

// What orders memory between blocks: a fence before the atomic of the one that writes, a fence after the atomic of the
// one that reads, by the same threads. TSan is told this, and no more: a fence anywhere else orders nothing.
EMULATION_HIDDEN void __threadfence() {
  [[maybe_unused]] emulation::Fibre* fibre = emulation::running.self;
  EMULATION_TSAN(for (void* address : fibre->touched) if (address) __tsan_acquire(address);)
  fibre->fenced = true;
}

// ---- Between the lanes of a warp.

namespace emulation {

EMULATION_HIDDEN unsigned lane() { return running.self->lane; }

template <class T>
EMULATION_HIDDEN T of_lane(const Value* values, unsigned lane) {
  T value;
  __builtin_memcpy(&value, values[lane].bytes, sizeof(T));
  return value;
}

// A lane outside the mask has no value: all ones, so that using it shows.
template <class T>
EMULATION_HIDDEN T shuffle(unsigned mask, T value, unsigned source, std::source_location at) {
  const Value* values = exchange(mask, value, at);
  if (mask >> source & 1) return of_lane<T>(values, source);
  __builtin_memset(static_cast<void*>(&value), 0xFF, sizeof(T));
  return value;
}

// sum + the products, as tensor cores add up: what is more than 24 bits below the largest is cut off, and so is the result
// (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021; later ones keep a bit or two more).
EMULATION_HIDDEN float added_by_tensor_core(float sum, const float (&a)[8], const float (&b)[8]) {
  double terms[9] = {sum}, largest = std::fabs(sum), plain = sum;
  for (unsigned k = 0; k < 8; ++k) {
    terms[k + 1] = double(a[k]) * double(b[k]);
    plain += terms[k + 1];
    largest = std::fmax(largest, std::fabs(terms[k + 1]));
  }
  if (largest == 0 || !std::isfinite(plain)) return float(plain);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
  double total = 0;
  for (double term : terms) total += std::trunc(term / unit) * unit;
  const float rounded = float(total);
  return std::fabs(rounded) > std::fabs(total) ? std::nextafter(rounded, 0.0f) : rounded;
}

// mma.m16n8k16: sum += a b, where a lane holds two numbers of T in each register.
template <class T>
EMULATION_HIDDEN void multiply(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sum)[4], EMULATION_HERE) {
  struct Fragments {
    T a[4][2], b[2][2];
  } fragments;
  __builtin_memcpy(fragments.a, a, sizeof(a));
  __builtin_memcpy(fragments.b, b, sizeof(b));
  const Value* values = exchange(~0u, fragments, at);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (unsigned half = 0; half < 2; ++half) {
      float left[8], right[8];
      for (unsigned k = 0; k < 8; ++k) {
        left[k] = float(of_lane<Fragments>(values, row % 8 * 4 + k / 2).a[row / 8 + half * 2][k % 2]);
        right[k] = float(of_lane<Fragments>(values, column * 4 + k / 2).b[half][k % 2]);
      }
      sum[i] = added_by_tensor_core(sum[i], left, right);
    }
  }
}

template <class T, class Combine>
EMULATION_HIDDEN T reduce(unsigned mask, T value, Combine combine, std::source_location at) {
  const Value* values = exchange(mask, value, at);
  T result = of_lane<T>(values, unsigned(__builtin_ctz(mask)));
  for (unsigned i = unsigned(__builtin_ctz(mask)) + 1; i < kWarp; ++i) {
    if (mask >> i & 1) result = combine(result, of_lane<T>(values, i));
  }
  return result;
}

template <class T>
EMULATION_HIDDEN unsigned equal_lanes(unsigned mask, T value, T wanted, std::source_location at) {
  const Value* values = exchange(mask, value, at);
  unsigned lanes = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1 && of_lane<T>(values, i) == wanted) lanes |= 1u << i;
  }
  return lanes;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_HERE) {
  return emulation::shuffle(mask, value, (emulation::lane() & ~(width - 1u)) | (unsigned(source) & (width - 1u)), at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATION_HERE) {
  const unsigned lane = emulation::lane(), source = lane ^ unsigned(bits);
  return emulation::shuffle(mask, value, source < (lane & ~(width - 1u)) + width ? source : lane, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, value, (lane & (width - 1u)) + delta < unsigned(width) ? lane + delta : lane, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, value, (lane & (width - 1u)) >= delta ? lane - delta : lane, at);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATION_HERE) { return emulation::equal_lanes(mask, p != 0, true, at); }
inline int __any_sync(unsigned mask, int p, EMULATION_HERE) { return __ballot_sync(mask, p, at) != 0; }
inline int __all_sync(unsigned mask, int p, EMULATION_HERE) { return __ballot_sync(mask, p, at) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATION_HERE) { return emulation::equal_lanes(mask, value, value, at); }
#define EMULATION_REDUCE(name, expression)                                                             \
  template <class T>                                                                                   \
  T __reduce_##name##_sync(unsigned mask, T value, EMULATION_HERE) {                                   \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4);                                            \
    return emulation::reduce(mask, value, [](T a, T b) { return expression; }, at);                    \
  }
EMULATION_REDUCE(add, T(unsigned(a) + unsigned(b)))
EMULATION_REDUCE(min, b < a ? b : a)
EMULATION_REDUCE(max, a < b ? b : a)
EMULATION_REDUCE(and, a & b)
EMULATION_REDUCE(or, a | b)
EMULATION_REDUCE(xor, a ^ b)
#undef EMULATION_REDUCE

#include "cuda_intrinsics.h"

// ---- What a kernel's source may not spell the CUDA way.

// AML_SHARED(histogram, uint32_t[256]);
#define AML_SHARED(name, ...)          \
  using name##_shared = __VA_ARGS__;   \
  auto& name = *static_cast<name##_shared*>(::emulation::shared_memory( \
      [] { static char here; return static_cast<const void*>(&here); }(), sizeof(name##_shared), std::source_location::current()))

// AML_DYNAMIC_SHARED(float, row): as many bytes as the launch asked for.
#define AML_DYNAMIC_SHARED(T, name)                      \
  T* const name = static_cast<T*>(::emulation::shared_memory( \
      &::emulation::running, ::emulation::running.shape.shared_bytes, std::source_location::current()))

// AML_LAUNCH(blocks, threads, shared_bytes, stream, kernel<T, 4>, arguments...);
#define AML_LAUNCH(grid, block, shared_bytes, stream, ...) \
  ::emulation::launch_kernel(::emulation::Shape{grid, block, shared_bytes, false}, stream, #__VA_ARGS__, __VA_ARGS__)
#define AML_LAUNCH_COOPERATIVE(grid, block, shared_bytes, stream, ...) \
  ::emulation::launch_kernel(::emulation::Shape{grid, block, shared_bytes, true}, stream, #__VA_ARGS__, __VA_ARGS__)

// AML_RESIDENT_BLOCKS(threads, shared_bytes, kernel<T, 4>): few, so that grids that fill the device are small.
#define AML_RESIDENT_BLOCKS(threads, shared_bytes, ...) (::emulation::resident_blocks)
