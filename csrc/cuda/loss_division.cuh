// How the host divides the pixels of masked_loss and aml_loss among threads, and which way to read them it chooses.
#pragma once

#include <algorithm>

#include "loss_strips.cuh"

namespace aml::cuda {

constexpr int64_t kFewestRows = 8, kMostRows = 64;  // of an item: to set one up costs as much as two or three rows
static_assert(kMostRows * General::kColumns < 4096, "see TwoCounts");

// Cuts the image so that all warps that the device runs have one strip, or as few as possible the same number of them;
// returns the strips of a sample. (So the sums are the same in every bit for the same call on the same device.)
inline int cut(PixelCall& call, int item_columns, int64_t warps) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t across = divide_up(call.columns, item_columns);
  const int64_t fewest = divide_up(call.rows, kMostRows), most = divide_up(call.rows, kFewestRows);  // items down
  const int64_t rounds = divide_up(call.samples * divide_up(across * fewest, kWarp), warps);
  const int64_t down = std::min(std::max(rounds * warps / call.samples * kWarp / across, fewest), most);
  call.items_across = uint32_t(across);
  call.item_rows = uint32_t(divide_up(call.rows, down));
  call.items = uint32_t(across * divide_up(call.rows, call.item_rows));
  return int(divide_up(call.items, kWarp));
}

// Whether `columns` neighbouring elements can be loaded at once, wherever a multiple of them begins.
inline bool is_packed(const PixelCall& call, const Plane& plane, int64_t columns, int64_t bytes) {
  return plane.column_stride == 1 && reinterpret_cast<uintptr_t>(plane.data) % (columns * bytes) == 0 &&
      plane.row_stride % columns == 0 && (call.samples == 1 || plane.sample_stride % columns == 0);
}

// A target and `valid` of packed bytes, a map of packed floats.
inline bool has_packed_planes(const PixelCall& call, int64_t columns) {
  const auto packed_bytes = [&](const Plane& plane) { return plane.type == Type::u8 && is_packed(call, plane, columns, 1); };
  return call.columns % columns == 0 && packed_bytes(call.target) && (!call.valid.data || packed_bytes(call.valid)) &&
      (!call.similarity.data || (call.similarity.type == Type::f32 &&
                                 (call.similarity.column_stride == 1 || call.similarity.columns == 1)));
}

inline bool has_resized_logits(const PixelCall& call) {
  return call.logits.rows != call.rows || call.logits.columns != call.columns;
}

template <class Logit>
bool is_direct(const PixelCall& call) {
  constexpr int kColumns = Direct<Logit, false>::kColumns;
  return !has_resized_logits(call) && has_packed_planes(call, kColumns) && is_packed(call, call.logits, kColumns, sizeof(Logit));
}

inline bool is_resized(const PixelCall& call) {
  return has_resized_logits(call) && has_packed_planes(call, Resized::kColumns) &&
      (call.logits.column_stride == 1 || call.logits.columns == 1);
}

// Calls f(Way) with the way to read the call's pixels.
template <class F>
auto with_way(const PixelCall& call, F f) {
  const auto direct = [&](auto logit) {
    using Logit = decltype(logit);
    if (is_direct<Logit>(call)) return call.valid.data ? f(Direct<Logit, true>()) : f(Direct<Logit, false>());
    return is_resized(call) ? f(Resized()) : f(General());
  };
  switch (call.logits.type) {
    case Type::f32: return direct(float());
    case Type::bf16: return direct(bf16());
    default: return direct(f16());
  }
}

// Divides the work among the `resident` blocks that the device runs at once; returns the bytes of scratch it takes.
template <class Way>
int64_t divide_loss(LossCall& call, int resident, bool teams) {
  // As many blocks to each sample, where that leaves few idle: none then looks for two thresholds.
  const int64_t each = resident / call.samples;
  const bool long_map = call.similarity.rows * call.similarity.columns > kValuesPerBlock;
  call.teams = teams && call.limit.by_quantile && long_map && each > 1;
  const bool grouped = call.teams || each * call.samples * 10 >= int64_t(resident) * 9;
  call.strips = cut(call, Way::kColumns, (grouped ? each * call.samples : resident) * kLossWarps);
  call.group_strips = grouped ? call.strips : int(call.samples) * call.strips;
  call.group_blocks = int(std::min<int64_t>(grouped ? each : resident, call.group_strips));
  call.teams = call.teams && call.group_blocks > 1;
  call.blocks = grouped ? int(call.samples) * call.group_blocks : call.group_blocks;
  return call.samples * (call.strips * sizeof(StripSums) + sizeof(float) + (call.teams ? sizeof(TeamCounts) : 0)) + sizeof(unsigned);
}

inline void use_scratch(LossCall& call, void* scratch) {
  call.strip_sums = static_cast<StripSums*>(scratch);
  call.team_counts = reinterpret_cast<TeamCounts*>(call.strip_sums + call.samples * call.strips);
  call.losses = reinterpret_cast<float*>(call.team_counts + (call.teams ? call.samples : 0));
  call.ticket = reinterpret_cast<unsigned*>(call.losses + call.samples);
}

}  // namespace aml::cuda
