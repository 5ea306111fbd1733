// The features that a warp compares with words: on their way past the registers to its part of shared memory, a step of 32
// bytes of channels after the other.
#pragma once

#include "features.cuh"

namespace aml::cuda {

constexpr int kTileCells = 32, kTileWarps = kSimilarityThreads / kWarp;
constexpr int kStages = 3;  // of a warp's pipeline
static_assert(kTileCells == kWarp, "a lane has one cell");

// A step's features as they lie in memory: [channel][cell], with room for one pack more, as a row may begin within a pack;
// or [cell][channel], two packs to a cell, which change places every four cells, so that reading meets all banks.
template <class T>
struct StepFeatures {
  static constexpr int kWidth = 16 / int(sizeof(T)), kChannels = 2 * kWidth;
  union {
    alignas(16) T along_cells[kChannels][kTileCells + kWidth];
    alignas(16) T along_channels[kTileCells][2][kWidth];
  };

  static __device__ __forceinline__ int place(int cell, int pack) { return pack ^ (cell / 4 % 2); }
};

// Steps come one after the other, kStride channels apart.
template <class T>
class WarpFeatures {
 public:
  using Step = StepFeatures<T>;
  static constexpr int kWidth = Step::kWidth, kChannels = Step::kChannels, kStride = kTileWarps * kChannels;

  // Of the tile's cells, from `first` on; the first step begins with `channel`.
  __device__ WarpFeatures(const SimilarityCall& call, int sample, int first, int channel)
      : call_(call), data_(static_cast<const T*>(call.visual.data) + sample * call.visual.sample_stride), first_(first),
        last_(min(call.cells, first + kTileCells)),
        whole_end_(call.channel_stride >= kWidth ? call.channels - kChannels : 0) {
    const T* begin = data_ + channel * call.channel_stride;
    if (call.reading == Reading::channels) {
      from_ = begin + (first + lane() / 2) * call.visual.column_stride + lane() % 2 * kWidth;
    } else {
      const int first_cell = cell_of(lane() / kAcross, lane() % kAcross), one_more = cell_of(lane(), kAcross);
      from_ = begin + first_cell + lane() / kAcross * call.channel_stride;
      more_ = begin + one_more + lane() * call.channel_stride;
      const bool takes_more = call.reading == Reading::shifted_cells && lane() < kChannels && one_more < last_;
      takes_ = kept((first_cell < last_ ? kPacks : 0) | (takes_more ? kOneMore : 0));
    }
  }

  // The next step, which begins with `channel`, if it has channels; zero where it has not. Of cells that there are not,
  // anything.
  __device__ __forceinline__ void fetch(Step& step, int channel) {
    if (channel >= call_.channels) return;
    if (call_.reading == Reading::channels) {
      fetch_along_channels(step, channel);
    } else if (call_.reading == Reading::single) {
      fetch_single(step, channel);
    } else {
      fetch_along_cells(step, channel);
    }
    from_ += kStride * call_.channel_stride;
    more_ += kStride * call_.channel_stride;
  }

  // Which number of a pack is the first cell in that row of a step. Steps begin with a multiple of kWidth channels.
  __device__ __forceinline__ int shift(int row) const { return shift_in_pack(call_, data_, first_, row); }

 private:
  static constexpr int kAcross = kTileCells / kWidth, kRows = kWarp / kAcross;  // packs in a row, rows that a warp copies at once
  static_assert(kRows % kWidth == 0, "all rows of a lane are shifted alike");
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }

  // The first cell in that pack of a row. It may lie before the tile, where the row begins within a pack.
  __device__ __forceinline__ int cell_of(int row, int pack) const { return first_ + pack * kWidth - shift(row); }

  // A lane copies one pack of some rows, and one more where rows are shifted; none where the tile has no cell.
  __device__ __forceinline__ void fetch_along_cells(Step& step, int channel) const {
    const int row = lane() / kAcross, pack = lane() % kAcross;
    if (channel < whole_end_) {  // another row follows the last one, so that all packs are whole
      if (takes_ & kPacks) {
#pragma unroll
        for (int i = 0; i < kChannels / kRows; ++i) {
          copy_async(&step.along_cells[row + i * kRows][pack * kWidth], from_ + i * kRows * call_.channel_stride);
        }
      }
      if (takes_ & kOneMore) copy_async(&step.along_cells[lane()][kTileCells], more_);
      return;
    }
    for (int i = 0; takes_ & kPacks && i < kChannels / kRows; ++i) {
      copy_to_end(step, channel, row + i * kRows, pack, from_ + i * kRows * call_.channel_stride);
    }
    if (takes_ & kOneMore) copy_to_end(step, channel, lane(), kAcross, more_);
  }

  // A pack may begin before its row, and end behind it where another follows: what it holds of other cells is not used.
  __device__ __forceinline__ void copy_to_end(Step& step, int channel, int row, int pack, const T* from) const {
    const bool followed = channel + row + 1 < call_.channels && call_.channel_stride >= kWidth;
    const int left = channel + row < call_.channels ? call_.cells - cell_of(row, pack) : 0;
    copy_pack(&step.along_cells[row][pack * kWidth], from, followed ? kWidth : left);
  }

  // A lane copies one of two packs of two cells.
  __device__ __forceinline__ void fetch_along_channels(Step& step, int channel) const {
    const int pack = lane() % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int cell = lane() / 2 + i * 16;
      if (first_ + cell >= last_) break;
      copy_pack(step.along_channels[cell][Step::place(cell, pack)], from_ + i * 16 * call_.visual.column_stride,
                call_.channels - channel - pack * kWidth);
    }
  }

  // A lane has a cell.
  __device__ __forceinline__ void fetch_single(Step& step, int channel) const {
    const int cell = first_ + lane();
    const T* from = data_ + (cell < last_ ? call_.offset_of(cell) : 0) + channel * call_.channel_stride;
    const int left = cell < last_ ? call_.channels - channel : 0;
#pragma unroll 1
    for (int c = 0; c < kChannels; ++c) step.along_cells[c][lane()] = c < left ? from[c * call_.channel_stride] : from_float<T>(0);
  }

  const SimilarityCall& call_;
  const T* data_;
  const T *from_ = data_, *more_ = data_;  // what a lane copies first, and the one pack more, in the next step
  const int first_, last_, whole_end_;
  enum { kPacks = 1, kOneMore = 2 };
  int takes_ = 0;  // which of both a lane copies, along the cells
};

}  // namespace aml::cuda
