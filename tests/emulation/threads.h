// The threads of a launch, one fibre each, and what they may do: ask the scheduler, and wait for its answer.
//
// A fibre runs until it needs others (a barrier, a shuffle), finishes, or touches an atomic. It then leaves a request
// and switches to the scheduler, which answers on the caller's stack: no fibre ever runs the emulator's containers,
// so ThreadSanitizer sees the kernel's own accesses and nothing else.
#pragma once

#include <cstdlib>
#include <deque>
#include <optional>
#include <source_location>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "fibre.h"

#define EMULATION_HERE std::source_location at = std::source_location::current()

namespace emulation {

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks alive together, and they may wait for each other
};

constexpr unsigned kWarp = 32;

struct alignas(16) Value {
  char bytes[32];
};

struct Fibre;
struct Block;

// Where the members of a group wait for the last one. Two turns: those who leave may still read when others arrive.
struct Meeting {
  unsigned mask = 0, turn = 0;
  std::vector<Fibre*> waiting;
  std::source_location at;
  Value values[2][kWarp];     // of a warp, one per lane
  unsigned count[2] = {0, 0};  // of a block: for how many threads the predicate holds, of how many
  unsigned arrived[2] = {0, 0};
  char order[2];               // addresses by which TSan is told what the barrier orders
};

struct Warp {
  unsigned live = 0;
  uint64_t priority = 0;
  std::deque<Meeting> meetings;
  struct { unsigned mask; Meeting* meeting; } known[kWarp];  // the same for the fibres, which read plain data only
  unsigned n_known = 0;
};

enum class Request { start, done, go_on, spin, warp, block, grid, meeting, shared, trap };

// A copy to shared memory that may still be on its way.
struct Copy {
  void* to;
  const void* from;
  unsigned group;
};

struct Fibre : Context {
  uint3 index;
  unsigned lane;
  Warp* warp;
  Block* block;
  uint64_t priority;
  // The request ...
  Request request = Request::start;
  std::source_location at;
  Value value;
  unsigned mask;
  const void* id;
  size_t bytes;
  // ... and its answer.
  Meeting* meeting;
  unsigned turn;
  void* memory;
  // For TSan: a fence came since the last barrier; the atomics that a fence would make this thread see.
  bool fenced = false;
  void* touched[8] = {};
  unsigned n_touched = 0;
  // In the order in which they were asked for; the group that is not committed yet.
  Copy copies[kWarp];
  unsigned n_copies = 0, copy_group = 0;
};

struct Block {
  uint3 index;
  unsigned rank, live;
  std::vector<Warp> warps;
  std::vector<Fibre> fibres;
  Meeting meeting;
  struct { const void* id; char* data; size_t bytes; } shared[kWarp];
  unsigned n_shared = 0;
  size_t shared_bytes = 0;
  std::optional<Stacks> stacks;
  Block() = default;
  Block(Block&&) = delete;
  ~Block() { for (unsigned i = 0; i < n_shared; ++i) std::free(shared[i].data); }
};

// For messages of the scheduler.
inline std::string place(const std::source_location& at) {
  const std::string file = at.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line());
}

inline std::string name(const Fibre& fibre) {
  auto tuple = [](uint3 i) {
    return i.y || i.z ? "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")" : std::to_string(i.x);
  };
  return "block " + tuple(fibre.block->index) + " thread " + tuple(fibre.index) + " at " + place(fibre.at);
}

// The launch that runs: what fibres read.
struct Launch {
  Shape shape;
  Fibre* self = nullptr;  // the one that runs
  Context host;
  Meeting grid_meeting;
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;
  char begin, end;  // TSan: the launch, and its completion
  uint64_t random_state = 1;

  EMULATION_HIDDEN uint64_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
  }
};
inline Launch running;

EMULATION_HIDDEN void ask(Request request) {
  Fibre* fibre = running.self;
  fibre->request = request;
  switch_context(*fibre, running.host);
}

EMULATION_HIDDEN void run_thread() {
  arrived_from(running.host);
  EMULATION_TSAN(__tsan_acquire(&running.begin);)
  running.kernel(running.arguments);
  EMULATION_TSAN(__tsan_release(&running.end);)
  ask(Request::done);
}

EMULATION_HIDDEN Meeting& meeting_of_warp(unsigned mask) {
  Fibre* fibre = running.self;
  for (unsigned i = 0; i < fibre->warp->n_known; ++i) {
    if (fibre->warp->known[i].mask == mask) return *fibre->warp->known[i].meeting;
  }
  ask(Request::meeting);
  return *fibre->meeting;
}

EMULATION_HIDDEN void wait(Request request, Meeting& meeting, bool orders_memory, std::source_location at) {
  Fibre* fibre = running.self;
  fibre->at = at;
  fibre->meeting = &meeting;
  EMULATION_TSAN(if (orders_memory) __tsan_release(&meeting.order[meeting.turn]);)
  ask(request);
  EMULATION_TSAN(if (orders_memory) __tsan_acquire(&meeting.order[fibre->turn]);)
  if (orders_memory) fibre->fenced = false;  // what was just seen has to be fenced anew to be passed on
}

struct Vote {
  unsigned count, of;
};
EMULATION_HIDDEN Vote wait_for_block(bool predicate, std::source_location at) {
  Fibre* fibre = running.self;
  fibre->mask = predicate;
  wait(Request::block, fibre->block->meeting, true, at);
  return {fibre->meeting->count[fibre->turn], fibre->meeting->arrived[fibre->turn]};
}
EMULATION_HIDDEN void wait_for_grid(std::source_location at) {
  wait(Request::grid, running.grid_meeting, true, at);
}
EMULATION_HIDDEN void wait_for_warp(unsigned mask, std::source_location at) {
  running.self->mask = mask;
  running.self->at = at;
  wait(Request::warp, meeting_of_warp(mask), true, at);
}
// The values of all lanes in the mask. Orders no memory, as CUDA's shuffles and votes do not.
template <class T>
EMULATION_HIDDEN const Value* exchange(unsigned mask, T value, std::source_location at) {
  static_assert(sizeof(T) <= sizeof(Value));
  Fibre* fibre = running.self;
  fibre->mask = mask;
  fibre->at = at;
  __builtin_memcpy(fibre->value.bytes, &value, sizeof(T));
  wait(Request::warp, meeting_of_warp(mask), false, at);
  return fibre->meeting->values[fibre->turn];
}

EMULATION_HIDDEN void* shared_memory(const void* id, size_t bytes, std::source_location at) {
  Fibre* fibre = running.self;
  const Block& block = *fibre->block;
  void* found = nullptr;
  for (unsigned i = 0; i < block.n_shared; ++i) {
    if (block.shared[i].id == id) found = block.shared[i].data;
  }
  if (!found) {
    fibre->id = id, fibre->bytes = bytes, fibre->at = at;
    ask(Request::shared);
    found = fibre->memory;
  }
  EMULATION_TSAN(__tsan_acquire(&running.begin);)  // the scheduler filled it
  return found;
}

[[noreturn]] EMULATION_HIDDEN void trap(std::source_location at) {
  running.self->at = at;
  ask(Request::trap);
  __builtin_unreachable();
}

}  // namespace emulation
