// Stands in for ThreadSanitizer's library: the compiler calls its functions before each access to memory (interface.cpp
// has them). They switch to another thread now and then, so that what is not atomic comes apart, and count the bytes of
// known buffers.
#pragma once

#include <array>

#include "threads.h"

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
  if (!running.self || counting) return;  // the scheduler's own
  if (running.random() % 8 == 0) ask(Request::go_on);
  count(address, bytes, write);
}

}  // namespace emulation
