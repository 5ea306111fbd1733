// One CUDA thread as a fibre: a stack to switch to, and its ties to the sanitizers.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN(...) __VA_ARGS__
#else
#define EMULATION_ASAN(...)
#endif

// AML_EMULATION_TRACE: the code is instrumented as for ThreadSanitizer, and trace.h stands in for its library.
#if defined(__SANITIZE_THREAD__) && !defined(AML_EMULATION_TRACE)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define EMULATION_TSAN(...) __VA_ARGS__
namespace emulation { constexpr bool kDetectsRaces = true; }
#else
#define EMULATION_TSAN(...)
namespace emulation { constexpr bool kDetectsRaces = false; }
#endif

// The emulator's own code that runs on a CUDA thread's fibre: plain data only, and not seen by the sanitizers.
#define EMULATION_HIDDEN __attribute__((no_sanitize("thread"), no_sanitize("address"))) inline

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

// ASan's frames are larger, and it writes its reports there.
constexpr size_t kStackBytes = (EMULATION_ASAN(4 *) 64) << 10;

// What is needed to leave a stack and to come back to it.
struct Context {
  char* stack = nullptr;  // lowest address; nullptr for the scheduler until ASan has told where it is
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;     // ASan's
  void* race_detector = nullptr;  // TSan's fibre
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
};

#if defined(__x86_64__)
// Saves what a call has to preserve, stores the stack pointer in *from, and does the reverse with `to`.
__attribute__((naked, noinline, no_sanitize("thread"), no_sanitize("address"))) static void switch_stack(
    [[maybe_unused]] void** from, [[maybe_unused]] void* to) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

// `entry` runs when the context is first switched to; it must not return.
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  context.stack = stack;
  context.stack_bytes = bytes;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + bytes) - 1;  // the return address, aligned as by a call: 0 ends backtraces
  top[0] = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = bytes;
  makecontext(&context.machine, entry, 0);
#endif
}

EMULATION_HIDDEN void switch_context(Context& from, Context& to) {
  EMULATION_ASAN(__sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);)
  EMULATION_TSAN(__tsan_switch_to_fiber(to.race_detector, 1);)  // 1: the switch itself orders nothing
#if defined(__x86_64__)
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
  EMULATION_ASAN(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);)
}

// Called first thing on a new stack that was switched to from `from`.
EMULATION_HIDDEN void arrived_from([[maybe_unused]] Context& from) {
  EMULATION_ASAN(const void* stack; size_t bytes; __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
                 from.stack = const_cast<char*>(static_cast<const char*>(stack)); from.stack_bytes = bytes;)
}

// Stacks for `count` fibres in one piece, each with a page below it that must not be touched.
struct Stacks {
  explicit Stacks(size_t count) : bytes_(count * kStackBytes) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    EMULATION_ASAN(__asan_unpoison_memory_region(memory_, bytes_);)
    for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * kStackBytes, guard(), PROT_NONE);
  }
  Stacks(Stacks&& other) noexcept : memory_(other.memory_), bytes_(other.bytes_) { other.memory_ = nullptr; }
  Stacks& operator=(Stacks&&) = delete;
  ~Stacks() {
    if (!memory_) return;
    EMULATION_ASAN(__asan_unpoison_memory_region(memory_, bytes_);)
    munmap(memory_, bytes_);
  }

  char* stack(size_t i) const { return memory_ + i * kStackBytes + guard(); }
  static size_t guard() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  static size_t stack_bytes() { return kStackBytes - guard(); }

 private:
  char* memory_;
  size_t bytes_;
};

}  // namespace emulation
