// Stands in for ThreadSanitizer's library: the compiler calls these functions before each access to memory. They switch
// to another thread now and then, so that what is not atomic comes apart, and count the accesses to known buffers.
#pragma once

#include <array>

#include "scheduler.h"

namespace emulation {

struct Buffer {
  Buffer(const void* data, size_t bytes) : data(static_cast<const char*>(data)), bytes(bytes), touched(bytes) {}

  const char* data;
  size_t bytes;
  uint64_t read = 0, written = 0;  // bytes of all accesses
  std::vector<uint8_t> touched;    // per byte: 1 read, 2 written

  uint64_t distinct(uint8_t kind) const {
    return uint64_t(std::count_if(touched.begin(), touched.end(), [&](uint8_t byte) { return byte & kind; }));
  }
};
inline std::vector<Buffer> buffers;
inline bool counting = false;  // these functions' own accesses are not

EMULATION_HIDDEN void count(const void* address, size_t bytes, bool write) {
  counting = true;
  const char* at = static_cast<const char*>(address);
  for (Buffer& buffer : buffers) {
    if (at < buffer.data || at >= buffer.data + buffer.bytes) continue;
    (write ? buffer.written : buffer.read) += bytes;
    for (size_t b = 0; b < bytes; ++b) buffer.touched[size_t(at - buffer.data) + b] |= write ? 2 : 1;
  }
  counting = false;
}

EMULATION_HIDDEN void access(const void* address, size_t bytes, bool write) {
  if (!scheduler.self || counting) return;  // the scheduler's own
  if (scheduler.random() % 8 == 0) ask(Request::go_on);
  count(address, bytes, write);
}

}  // namespace emulation

#define EMULATION_HOOKS(n)                                                                                    \
  void __tsan_read##n(void* p) { emulation::access(p, n, false); }                                            \
  void __tsan_write##n(void* p) { emulation::access(p, n, true); }                                            \
  void __tsan_unaligned_read##n(void* p) { emulation::access(p, n, false); }                                  \
  void __tsan_unaligned_write##n(void* p) { emulation::access(p, n, true); }
extern "C" {
EMULATION_HOOKS(1)
EMULATION_HOOKS(2)
EMULATION_HOOKS(4)
EMULATION_HOOKS(8)
EMULATION_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { emulation::access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulation::access(p, bytes, true); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
int __tsan_atomic32_fetch_add(int* p, int value, int) { return *p += value, *p - value; }  // of std::shared_ptr
}
#undef EMULATION_HOOKS
