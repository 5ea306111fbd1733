// What the CUDA kernels are written with. nvcc compiles them for a GPU; g++ with AML_EMULATED compiles the same source
// against tests/emulation/emulator.h, which runs every CUDA thread on the CPU.
//
// A kernel source (.cuh) is ordinary CUDA but for five names:
//   AML_SHARED(name, float[32]);            a shared array (an array, so that its bounds can be checked)
//   AML_DYNAMIC_SHARED(float, name);        float* to the launch's dynamic shared memory, 16-byte aligned
//   AML_LAUNCH(grid, block, shared_bytes, stream, kernel<A, B>, arguments...)              -> cudaError_t
//   AML_LAUNCH_COOPERATIVE(grid, block, shared_bytes, stream, kernel<A, B>, arguments...)  -> cudaError_t
//   AML_RESIDENT_BLOCKS(threads, shared_bytes, kernel<A, B>)  -> int: blocks that the device runs at once, at least 1
// Arguments are converted to the kernel's parameter types. Inline PTX stands under __CUDACC__ with a C++ branch beside it.
// Everything is compiled with -fmad=false: a * b + c rounds twice, multiply_add() once (see common/platform.h).
#pragma once

#ifdef AML_EMULATED
#include "emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#endif

#include <type_traits>

#include "../common/plane.h"
#include "../common/platform.h"

#ifndef AML_EMULATED
namespace aml::cuda::platform {

template <class T>
using Same = T;
template <class T>
struct Identity { using type = T; };

template <class... P>
cudaError_t launch(bool cooperative, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   void (*kernel)(P...), typename Identity<P>::type... parameters) {
  const void* address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {  // more than that has to be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {&parameters...};
  return cooperative ? cudaLaunchCooperativeKernel(address, grid, block, arguments, shared_bytes, stream)
                     : cudaLaunchKernel(address, grid, block, arguments, shared_bytes, stream);
}

// The driver's answer is kept per kernel and device: asking costs microseconds. 1 where the device cannot run the kernel:
// its launch says why.
template <auto kernel>
int resident_blocks(int threads, size_t shared_bytes) {
  static std::atomic<uint64_t> known[8];
  int device = 0, processors = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  const uint64_t question = uint64_t(shared_bytes + 1) << 40 | uint64_t(uint8_t(device)) << 32;
  uint64_t entry = known[device % 8].load(std::memory_order_relaxed);
  if (entry >> 32 << 32 != question) {
    const void* address = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024) {
      cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, address, threads, shared_bytes) != cudaSuccess) {
      return 1;
    }
    entry = question | uint32_t(blocks > 0 ? blocks * processors : 1);
    known[device % 8].store(entry, std::memory_order_relaxed);
  }
  return int(uint32_t(entry));
}

}  // namespace aml::cuda::platform

#define AML_SHARED(name, ...) __shared__ aml::cuda::platform::Same<__VA_ARGS__> name
#define AML_DYNAMIC_SHARED(type, name)                      \
  extern __shared__ __align__(16) unsigned char aml_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(aml_dynamic_shared)
#define AML_LAUNCH(grid, block, shared_bytes, stream, ...) \
  aml::cuda::platform::launch(false, grid, block, shared_bytes, stream, __VA_ARGS__)
#define AML_LAUNCH_COOPERATIVE(grid, block, shared_bytes, stream, ...) \
  aml::cuda::platform::launch(true, grid, block, shared_bytes, stream, __VA_ARGS__)
#define AML_RESIDENT_BLOCKS(threads, shared_bytes, ...) \
  aml::cuda::platform::resident_blocks<__VA_ARGS__>(threads, shared_bytes)
#endif  // AML_EMULATED

namespace aml::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- numbers

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(uint8_t x) { return float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// ---- memory
// Plain loads, because a kernel may read what other blocks wrote before a grid barrier (the similarity map).
// `load_input` is for what nothing in the kernel writes: it takes the read-only path.

template <class T, int N = 16 / int(sizeof(T))>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <size_t bytes>
struct WordOf;
template <>
struct WordOf<4> { using type = unsigned; };
template <>
struct WordOf<8> { using type = uint2; };
template <>
struct WordOf<16> { using type = uint4; };
template <class T, int N>
using Word = typename WordOf<sizeof(T) * N>::type;

// Number k of a pack. A bf16 is the upper half of a float: one instruction, of either half of a word.
template <class T, int N>
__device__ __forceinline__ float element(const Pack<T, N>& pack, int k) {
  if constexpr (std::is_same_v<T, bf16>) {
    const unsigned word = bit_cast<Pack<unsigned, N / 2>>(pack).value[k / 2];
    return bit_cast<float>(k % 2 ? word & 0xFFFF0000u : word << 16);
  } else {
    return to_float(pack.value[k]);
  }
}

// N elements in one instruction; `from` is aligned to their size.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_input(const T* from) {
  return bit_cast<Pack<T, N>>(__ldg(reinterpret_cast<const Word<T, N>*>(from)));
}
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return bit_cast<Pack<T, N>>(*reinterpret_cast<const Word<T, N>*>(from));
}
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Word<T, N>*>(to) = bit_cast<Word<T, N>>(pack);
}

__host__ __device__ __forceinline__ int bytes_of(Type type) {
  return type == Type::u8 ? 1 : type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
}

// One element of a plane of any type; `offset` in elements.
__device__ __forceinline__ float load_element(const void* data, Type type, int64_t offset) {
  switch (type) {
    case Type::f32: return static_cast<const float*>(data)[offset];
    case Type::bf16: return to_float(static_cast<const bf16*>(data)[offset]);
    case Type::f16: return to_float(static_cast<const f16*>(data)[offset]);
    default: return to_float(static_cast<const uint8_t*>(data)[offset]);
  }
}
__device__ __forceinline__ float load_element(const Plane& plane, int64_t sample, int64_t row, int64_t column) {
  return load_element(plane.data, plane.type,
                      sample * plane.sample_stride + row * plane.row_stride + column * plane.column_stride);
}

// Calls f(const T*) with the element type of `data`: one branch for many elements.
template <class F>
__device__ __forceinline__ void with_float_type(Type type, const void* data, F f) {
  switch (type) {
    case Type::f32: return f(static_cast<const float*>(data));
    case Type::bf16: return f(static_cast<const bf16*>(data));
    default: return f(static_cast<const f16*>(data));
  }
}
template <class F>
__device__ __forceinline__ void with_type(Type type, const void* data, F f) {
  type == Type::u8 ? f(static_cast<const uint8_t*>(data)) : with_float_type(type, data, f);
}

// Asks for a 128-byte line to be brought to the L2 cache.
__device__ __forceinline__ void prefetch(const void* line) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#elif defined(AML_EMULATED)
  emulation::prefetch(line);
#else
  (void)line;
#endif
}

// Copies 16 bytes from global to shared memory while the thread goes on; both addresses are aligned to that. What a thread
// copies up to commit_copies() is a group, and wait_for_copies<n>() waits for all its groups but the n last; others see it
// behind a barrier.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
  const unsigned shared = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
#elif defined(AML_EMULATED)
  emulation::copy_async(to, from);
#else
  (void)to, (void)from;
#endif
}
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(AML_EMULATED)
  emulation::commit_copies();
#endif
}
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#elif defined(AML_EMULATED)
  emulation::wait_for_copies(kLeft);
#endif
}

// ---- threads together

// The sum over a warp, in every lane; always added in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Stays in its register: what costs a few instructions, compilers compute again in every turn of a loop.
__device__ __forceinline__ int kept(int value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// The same shared memory, whose address stays in a register as well.
template <class T>
__device__ __forceinline__ T& kept(T& shared) {
#if defined(__CUDA_ARCH__)
  return *static_cast<T*>(__cvta_shared_to_generic(unsigned(kept(int(__cvta_generic_to_shared(&shared))))));
#else
  return shared;
#endif
}

// sum += a b by tensor cores: `a` of 16 x 16 and `b` of 16 x 8 numbers of type T, two of 16 bits in a register, and sums in
// fp32. All lanes of a warp take part. Its lane holds, with group = lane / 4 and quad = lane % 4 (PTX ISA, "Matrix
// fragments for mma.m16n8k16"):
//   a[i]    row group + 8 (i % 2), columns 8 (i / 2) + 2 quad and the next
//   b[i]    column group, rows 8 i + 2 quad and the next
//   sum[i]  row group + 8 (i / 2), column 2 quad + i % 2
template <class T>
__device__ __forceinline__ void multiply(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sum)[4]) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif defined(AML_EMULATED)
  emulation::multiply<T>(a, b, sum);
#else
  (void)a, (void)b, (void)sum;
#endif
}

// The sum over a block of kThreads, in every thread; always added in the same order.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value) {
  constexpr int kWarps = kThreads / kWarp;
  AML_SHARED(parts, T[kWarps]);
  value = warp_sum(value);
  __syncthreads();  // `parts` may still be read from the sum before
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = parts[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += parts[warp];
  return sum;
}

// All threads of a cooperative launch wait for each other; what they wrote before is seen by all after. Its counter
// belongs to the launch and is set up by the driver: nothing has to be zeroed, and a captured graph can be replayed.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

}  // namespace aml::cuda
