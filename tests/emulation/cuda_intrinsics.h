// Atomics, cached loads, arithmetic and the few calls of the CUDA runtime that a launch function makes.
#pragma once

// ---- Atomics: relaxed, as CUDA's. Integers only: sums of floats by atomics depend on the order.

namespace emulation {

// Sometimes another thread comes first; a thread whose atomic changes nothing is taken to poll, and waits its turn.
EMULATION_HIDDEN void before_atomic([[maybe_unused]] void* address) {
  if (running.random() % 16 == 0) ask(Request::go_on);
  EMULATION_TSAN(if (running.self->fenced) __tsan_release(address);)
}
EMULATION_HIDDEN void after_atomic([[maybe_unused]] void* address, bool changed) {
  EMULATION_TSAN(Fibre* fibre = running.self; fibre->touched[fibre->n_touched++ % 8] = address;)
  if (!changed) ask(Request::spin);
}

#if defined(__SANITIZE_THREAD__) && !defined(AML_EMULATION_TRACE)
template <class T, class Function>
T exchange_for(T* address, Function function) {
  std::atomic_ref<T> word(*address);
  T old = word.load(std::memory_order_relaxed);
  while (!word.compare_exchange_weak(old, function(old), std::memory_order_relaxed)) {}
  return old;
}
#elif defined(AML_EMULATION_TRACE)
template <class T, class Function>
EMULATION_HIDDEN T exchange_for(T* address, Function function) {
  count(address, sizeof(T), false);
  count(address, sizeof(T), true);
  counting = true;  // no other thread comes between
  const T old = *address;
  *address = function(old);
  counting = false;
  return old;
}
#else
template <class T, class Function>
T exchange_for(T* address, Function function) {  // fibres share one OS thread: nothing comes between
  const T old = *address;
  *address = function(old);
  return old;
}
#endif

template <class T, class Function>
T atomic_update(T* address, Function function) {
  static_assert(std::is_integral_v<T>, "atomics of floats are not deterministic");
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  before_atomic(address);
  const T old = exchange_for(address, function);
  after_atomic(address, function(old) != old);
  return old;
}

}  // namespace emulation

#define EMULATION_ATOMIC(name, expression)                                      \
  template <class T>                                                            \
  T name(T* address, std::type_identity_t<T> value) {                           \
    return emulation::atomic_update(address, [=](T old) -> T { return expression; }); \
  }
EMULATION_ATOMIC(atomicAdd, T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value)))
EMULATION_ATOMIC(atomicSub, T(std::make_unsigned_t<T>(old) - std::make_unsigned_t<T>(value)))
EMULATION_ATOMIC(atomicMax, old < value ? value : old)
EMULATION_ATOMIC(atomicMin, value < old ? value : old)
EMULATION_ATOMIC(atomicOr, old | value)
EMULATION_ATOMIC(atomicAnd, old & value)
EMULATION_ATOMIC(atomicXor, old ^ value)
EMULATION_ATOMIC(atomicExch, (static_cast<void>(old), value))
EMULATION_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef EMULATION_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulation::atomic_update(address, [=](T old) -> T { return old == expected ? value : old; });
}

inline void __nanosleep(unsigned) { emulation::ask(emulation::Request::spin); }
inline void __trap(EMULATION_HERE) { emulation::trap(at); }

// ---- Loads and stores with a caching hint.

namespace emulation {
#if defined(AML_EMULATION_TRACE)
// Left to the compiler, the load of a vector that is then copied would count twice.
template <class T>
EMULATION_HIDDEN T loaded(const T* address) {
  access(address, sizeof(T), false);
  return *address;
}
#else
template <class T>
T loaded(const T* address) { return *address; }
#endif
}  // namespace emulation
template <class T> T __ldg(const T* address) { return emulation::loaded(address); }
template <class T> T __ldcs(const T* address) { return emulation::loaded(address); }
template <class T> T __ldcg(const T* address) { return emulation::loaded(address); }
template <class T> T __ldca(const T* address) { return emulation::loaded(address); }
template <class T> T __ldlu(const T* address) { return emulation::loaded(address); }
template <class T> void __stcs(T* address, std::type_identity_t<T> value) { *address = value; }
template <class T> void __stcg(T* address, std::type_identity_t<T> value) { *address = value; }
template <class T> void __stwt(T* address, std::type_identity_t<T> value) { *address = value; }

// ---- Copies to shared memory while the thread goes on (cp.async of 16 bytes). A copy is made at once, or when it is
// waited for, by chance: so both what is read too early and what is overwritten too early shows.

namespace emulation {

inline void copy(const Copy& copy) { *static_cast<uint4*>(copy.to) = loaded(static_cast<const uint4*>(copy.from)); }

// The next copy that has to be there when all groups but `left` are; none: no place.
EMULATION_HIDDEN Copy next_copy(unsigned left) {
  Fibre* fibre = running.self;
  if (fibre->n_copies == 0 || fibre->copies[0].group + left >= fibre->copy_group) return {};
  const Copy first = fibre->copies[0];
  __builtin_memmove(fibre->copies, fibre->copies + 1, --fibre->n_copies * sizeof(Copy));
  return first;
}

EMULATION_HIDDEN bool comes_later(const Copy& copy, std::source_location at) {
  Fibre* fibre = running.self;
  const uintptr_t places = reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from);
  if (places % sizeof(uint4)) trap(at);
  if (fibre->n_copies == std::size(fibre->copies) || running.random() % 2) return false;
  fibre->copies[fibre->n_copies++] = {copy.to, copy.from, fibre->copy_group};
  return true;
}

inline void copy_async(void* to, const void* from, EMULATION_HERE) {
  const Copy asked{to, from, 0};
  if (!comes_later(asked, at)) copy(asked);
}
EMULATION_HIDDEN void commit_copies() { ++running.self->copy_group; }
inline void wait_for_copies(int left) {
  for (Copy next = next_copy(unsigned(left)); next.to; next = next_copy(unsigned(left))) copy(next);
}

}  // namespace emulation

// A prefetch changes nothing, but its address has to be one of the input: looked at where bounds are checked.
namespace emulation {
inline void prefetch([[maybe_unused]] const void* line) {
#if defined(__SANITIZE_ADDRESS__)
  static_cast<void>(*static_cast<const volatile char*>(line));
#endif
}
}  // namespace emulation

// ---- Arithmetic. The approximate functions are exact here: what they cost in accuracy shows on a GPU only.

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmaf_rd(float, float, float) = delete;
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1.0f : 0.0f; }

inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return emulation::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulation::bits_as<float>(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline int __float2int_rz(float x) { return int(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) result |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return result;
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) { using T = std::common_type_t<A, B>; return T(b) < T(a) ? T(b) : T(a); }
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) { using T = std::common_type_t<A, B>; return T(a) < T(b) ? T(b) : T(a); }

// ---- The CUDA runtime of an emulated device: small, so that a grid that fills it is small too.

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emulation {

inline int resident_blocks = 4;
inline std::vector<std::string> launches;  // kernels and memory operations, in order

template <class... Parameters>
cudaError_t launch_kernel(const Shape& shape, cudaStream_t, const char* text, void (*kernel)(Parameters...),
                          std::type_identity_t<Parameters>... parameters) {
  const std::string all = text;
  launches.push_back(all.substr(0, all.find_first_of("<,)")));
  if (shape.shared_bytes > kSharedBytes) {
    throw Error(launches.back() + ": " + std::to_string(shape.shared_bytes) + " bytes of dynamic shared memory, a block has " +
                std::to_string(kSharedBytes));
  }
  const uint64_t blocks = uint64_t(shape.grid.x) * shape.grid.y * shape.grid.z;
  if (shape.cooperative && blocks > uint64_t(resident_blocks)) {
    throw Error(launches.back() + ": a cooperative launch of " + std::to_string(blocks) + " blocks, " +
                std::to_string(resident_blocks) + " are resident together");
  }
  launch(shape, [&] { kernel(parameters...); });
  return cudaSuccess;
}

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  emulation::launches.push_back("memset");
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
