// Runs a kernel's blocks, in an order drawn from a seed: resumes one fibre after the other, and answers their requests.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "threads.h"

namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// seed 0: threads in reverse order; odd: each warp has a random priority, so that some run far ahead of others;
// even: a random thread each time. The seed also says how many blocks of an ordinary launch are alive together.
struct Settings {
  uint64_t seed = 1;
};
inline Settings settings;

constexpr size_t kSharedBytes = 163 << 10;  // of a block, on sm_80
constexpr size_t kRaceDetectorThreads = 6000;  // gcc 12's TSan has 8128 ids; reused ones hide races

class Scheduler {
 public:
  void launch(const Shape& launch_shape, void (*call)(void*), void* call_arguments);

 private:
  EMULATION_HIDDEN void resume(Fibre& fibre) {
    running.self = &fibre;
    switch_context(running.host, fibre);
    running.self = nullptr;
  }
  void start_block(unsigned rank);
  void retire(Block& block);
  void* race_detector();
  Fibre* next();
  void make_ready(Fibre& fibre);
  void answer(Fibre& fibre);
  void arrive(Meeting& meeting, Fibre& fibre, size_t members);
  void release_if_complete(Meeting& meeting, size_t members);
  void finished(Fibre& fibre);
  void allocate_shared(Fibre& fibre);
  void fail(const std::string& why, const Fibre& fibre);
  std::string deadlock() const;

  std::string failure_;
  std::deque<std::unique_ptr<Block>> blocks_, retired_;
  std::vector<Fibre*> ready_, spinning_;
  std::vector<Stacks> free_stacks_;
  size_t free_stacks_of_ = 0;  // for how many threads each
  std::vector<void*> race_detectors_;
  size_t race_detectors_used_ = 0;
  unsigned live_ = 0, finished_blocks_ = 0, fruitless_rounds_ = 0;
};
inline Scheduler scheduler;

template <class Function>
void launch(const Shape& shape, Function&& body) {
  scheduler.launch(shape, [](void* f) { (*static_cast<std::remove_reference_t<Function>*>(f))(); }, &body);
}

inline void Scheduler::fail(const std::string& why, const Fibre& fibre) {
  if (failure_.empty()) failure_ = why + ": " + name(fibre);
}

inline void Scheduler::make_ready(Fibre& fibre) {
  const bool interrupted = fibre.request == Request::go_on;
  fibre.priority = interrupted ? running.random() : settings.seed == 0 ? fibre.index.x : settings.seed % 2 ? fibre.warp->priority : running.random();
  ready_.push_back(&fibre);
  std::push_heap(ready_.begin(), ready_.end(), [](Fibre* a, Fibre* b) { return a->priority < b->priority; });
}

// Threads that spin run when nothing else can.
inline Fibre* Scheduler::next() {
  if (ready_.empty() && !spinning_.empty()) {
    if (++fruitless_rounds_ > 1000) fail("endless wait: all that still run only poll", *spinning_.front());
    for (Fibre* fibre : spinning_) make_ready(*fibre);
    spinning_.clear();
  }
  if (ready_.empty()) return nullptr;
  std::pop_heap(ready_.begin(), ready_.end(), [](Fibre* a, Fibre* b) { return a->priority < b->priority; });
  Fibre* fibre = ready_.back();
  ready_.pop_back();
  return fibre;
}

inline void Scheduler::release_if_complete(Meeting& meeting, size_t members) {
  if (meeting.waiting.empty() || meeting.waiting.size() != members) return;
  for (Fibre* fibre : meeting.waiting) {
    fibre->turn = meeting.turn;
    make_ready(*fibre);
  }
  meeting.waiting.clear();
  meeting.turn ^= 1;
}

inline void Scheduler::arrive(Meeting& meeting, Fibre& fibre, size_t members) {
  if (meeting.waiting.empty()) {
    meeting.at = fibre.at;
    meeting.count[meeting.turn] = meeting.arrived[meeting.turn] = 0;
  } else if (meeting.at.line() != fibre.at.line() || std::strcmp(meeting.at.file_name(), fibre.at.file_name())) {
    return fail("divergent barrier: others wait at " + place(meeting.at), fibre);
  }
  meeting.waiting.push_back(&fibre);
  if (fibre.request == Request::warp) meeting.values[meeting.turn][fibre.lane] = fibre.value;
  meeting.count[meeting.turn] += fibre.request == Request::block && fibre.mask;
  ++meeting.arrived[meeting.turn];
  release_if_complete(meeting, members);
}

constexpr const char* kGridWaitsForFinished = "a barrier of the grid waits for a block that has finished";

inline void Scheduler::finished(Fibre& fibre) {
  Block& block = *fibre.block;
  --live_;
  --block.live;
  fibre.warp->live &= ~(1u << fibre.lane);
  if (block.live == 0) {
    ++finished_blocks_;
    if (!running.grid_meeting.waiting.empty()) return fail(kGridWaitsForFinished, fibre);
  }
  for (const Meeting& meeting : fibre.warp->meetings) {
    if (!meeting.waiting.empty() && meeting.mask >> fibre.lane & 1) {
      return fail("a lane finished that is named in the mask others wait with at " + place(meeting.at), fibre);
    }
  }
  release_if_complete(block.meeting, block.live);  // a thread that has finished is not waited for
  release_if_complete(running.grid_meeting, live_);
  if (block.live == 0) retire(block);
}

inline void Scheduler::allocate_shared(Fibre& fibre) {
  Block& block = *fibre.block;
  block.shared_bytes += fibre.bytes;
  if (block.n_shared == std::size(block.shared)) return fail("more shared arrays than the emulator has room for", fibre);
  if (block.shared_bytes > kSharedBytes) {
    return fail(std::to_string(block.shared_bytes) + " bytes of shared memory, a block has " + std::to_string(kSharedBytes), fibre);
  }
  void* data;
  if (posix_memalign(&data, 128, std::max<size_t>(fibre.bytes, 1))) throw std::bad_alloc();
  std::memset(data, 0xFF, fibre.bytes);  // NaN, or -1
  block.shared[block.n_shared++] = {fibre.id, static_cast<char*>(data), fibre.bytes};
  EMULATION_TSAN(__tsan_release(&running.begin);)
  fibre.memory = data;
  make_ready(fibre);
}

inline void Scheduler::answer(Fibre& fibre) {
  if (fibre.request != Request::spin && fibre.request != Request::go_on) fruitless_rounds_ = 0;
  switch (fibre.request) {
    case Request::done: return finished(fibre);
    case Request::spin: return spinning_.push_back(&fibre);
    case Request::block: return arrive(*fibre.meeting, fibre, fibre.block->live);
    case Request::grid:
      if (!running.shape.cooperative) return fail("a barrier of the grid in a launch that is not cooperative", fibre);
      if (finished_blocks_) return fail(kGridWaitsForFinished, fibre);
      return arrive(*fibre.meeting, fibre, live_);
    case Request::meeting: {
      Warp& warp = *fibre.warp;
      if (warp.n_known == std::size(warp.known)) return fail("more different masks than the emulator has room for", fibre);
      Meeting& meeting = warp.meetings.emplace_back();
      meeting.mask = fibre.mask;
      warp.known[warp.n_known++] = {fibre.mask, &meeting};
      fibre.meeting = &meeting;
      return make_ready(fibre);
    }
    case Request::warp:
      if (!(fibre.mask >> fibre.lane & 1)) return fail("the mask does not name the calling lane", fibre);
      if (fibre.mask & ~fibre.warp->live) return fail("the mask names a lane that has finished or never was", fibre);
      return arrive(*fibre.meeting, fibre, static_cast<size_t>(__builtin_popcount(fibre.mask)));
    case Request::shared: return allocate_shared(fibre);
    case Request::trap: return fail("trap", fibre);
    default: return make_ready(fibre);
  }
}

// To make one costs TSan a megabyte of memory to clear. They are used again by the next launch, as it comes after this one.
EMULATION_TSAN(inline void* Scheduler::race_detector() {
  if (race_detectors_used_ == race_detectors_.size()) race_detectors_.push_back(__tsan_create_fiber(0));
  return race_detectors_[race_detectors_used_++];
})

inline void Scheduler::start_block(unsigned rank) {
  const dim3 grid = running.shape.grid, size = running.shape.block;
  const unsigned threads = size.x * size.y * size.z;
  Block& block = *blocks_.emplace_back(std::make_unique<Block>());
  block.index = {rank % grid.x, rank / grid.x % grid.y, rank / grid.x / grid.y};
  block.rank = rank;
  block.live = threads;
  live_ += threads;
  block.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
  for (Warp& warp : block.warps) warp.priority = running.random();
  if (free_stacks_.empty()) {
    block.stacks.emplace(threads);
  } else {
    block.stacks.emplace(std::move(free_stacks_.back()));
    free_stacks_.pop_back();
  }
  block.fibres = std::vector<Fibre>(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& fibre = block.fibres[t];
    prepare(fibre, block.stacks->stack(t), Stacks::stack_bytes(), run_thread);
    fibre.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    fibre.lane = t % kWarp;
    fibre.block = &block;
    fibre.warp = &block.warps[t / kWarp];
    fibre.warp->live |= 1u << fibre.lane;
    EMULATION_TSAN(fibre.race_detector = race_detector();)
    make_ready(fibre);
  }
}

// TSan: blocks share no history by which a race between them could seem ordered, so nothing is used again in a launch.
inline void Scheduler::retire(Block& block) {
  auto mine = std::find_if(blocks_.begin(), blocks_.end(), [&](auto& other) { return other.get() == &block; });
  if constexpr (kDetectsRaces) {
    retired_.push_back(std::move(*mine));
  } else {
    free_stacks_.push_back(std::move(*block.stacks));
  }
  blocks_.erase(mine);
}

inline std::string Scheduler::deadlock() const {
  std::map<std::string, unsigned> where;
  for (const auto& block : blocks_) {
    for (const Fibre& fibre : block->fibres) {
      if (fibre.request == Request::done) continue;
      ++where["of block " + std::to_string(block->rank) + " at " + place(fibre.at)];
    }
  }
  std::string text = "deadlock: " + std::to_string(live_) + " threads wait for ever";
  unsigned shown = 0;
  for (const auto& [at, count] : where) {
    if (++shown <= 4) text += "; " + std::to_string(count) + " " + at;
  }
  return text;
}

inline void Scheduler::launch(const Shape& launch_shape, void (*call)(void*), void* call_arguments) {
  running.shape = launch_shape;
  running.kernel = call;
  running.arguments = call_arguments;
  running.random_state = (settings.seed + 1) * 0x9E3779B97F4A7C15u;
  failure_.clear();
  fruitless_rounds_ = finished_blocks_ = 0;
  running.grid_meeting.waiting.clear();
  const uint64_t blocks = uint64_t(running.shape.grid.x) * running.shape.grid.y * running.shape.grid.z;
  const uint64_t threads = uint64_t(running.shape.block.x) * running.shape.block.y * running.shape.block.z;
  if (!blocks || !threads || threads > 1024) {
    throw Error("launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads: expected at least 1, and at most 1024 threads");
  }
  EMULATION_TSAN(if (blocks * threads > kRaceDetectorThreads) {
    throw Error("launch of " + std::to_string(blocks * threads) + " threads: TSan tells " + std::to_string(kRaceDetectorThreads) + " apart; test with fewer blocks");
  })
  if (free_stacks_of_ != threads) free_stacks_.clear();
  free_stacks_of_ = threads;
  race_detectors_used_ = 0;
  EMULATION_TSAN(running.host.race_detector = __tsan_get_current_fiber(); __tsan_release(&running.begin);)

  std::vector<unsigned> order(blocks);
  for (unsigned rank = 0; rank < blocks; ++rank) order[rank] = rank;
  if (settings.seed) {
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[running.random() % i]);
  }
  const size_t resident = running.shape.cooperative ? blocks : 1 + settings.seed / 2 % 4;
  size_t started = 0;
  while (failure_.empty()) {
    while (started < blocks && blocks_.size() < resident) start_block(order[started++]);
    Fibre* fibre = next();
    if (!fibre || !failure_.empty()) break;
    resume(*fibre);
    answer(*fibre);
  }
  if (live_ && failure_.empty()) failure_ = deadlock();

  EMULATION_TSAN(__tsan_acquire(&running.end);)
  for (auto& block : retired_) free_stacks_.push_back(std::move(*block->stacks));
  retired_.clear();
  blocks_.clear();
  ready_.clear();
  spinning_.clear();
  live_ = 0;
  if (failure_.empty()) return;
  EMULATION_TSAN(for (void* fibre : race_detectors_) __tsan_destroy_fiber(fibre);)  // they are in the middle of something
  race_detectors_.clear();
  throw Error(failure_);
}

}  // namespace emulation
