// Pixels compared with words: norms and dot products out of one reading of `visual`, in plain multiply-adds rather than by
// tensor cores: fp32 features keep all their bits, and sums are in fp32 and in one order on every device. On an H100 it is
// these instructions, not the reading, that take the time.
//
// A block takes a tile of 32 cells. Its warps divide the channels, 32 bytes of them at a time, and each has a pipeline of
// its own: features come past the registers to its part of shared memory, two steps ahead, and words through registers,
// one step ahead. So no warp waits for another before the sums over all channels, at the end.
#pragma once

#include "features.cuh"

namespace aml::cuda {

constexpr int kTileCells = 32, kTileWarps = kSimilarityThreads / kWarp;
constexpr int kStages = 3;        // of a warp's pipeline
constexpr int kPart = 8;          // channels of the words that a warp has at once
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

// Shared memory of a tile: of each warp's pipeline, and then of the sums.
struct ComparisonTile {
  static constexpr int kStepBytes = sizeof(StepFeatures<bf16>);
  static_assert(sizeof(StepFeatures<float>) <= kStepBytes && sizeof(StepFeatures<f16>) == kStepBytes, "room for any type");
  struct Pipeline {
    alignas(16) unsigned char features[kStages][kStepBytes];
    alignas(16) float words[kTileWords][kPart + 4];
  };
  union {
    Pipeline pipeline[kTileWarps];
    float sums[kTileWarps][kTileWords + 1][kTileCells];  // of each warp's channels; then sums[0]: see below
  };
  float word_squares[kTileWarps][kTileWords];
  float inverse_norm[kTileWords];  // of the words
  int32_t index[kTileWords];       // of the real words in `text`

  __device__ __forceinline__ float& product(int word, int cell) { return sums[0][word][cell]; }  // of a word and a cell
  __device__ __forceinline__ float square(int cell) const { return sums[0][kTileWords][cell]; }  // of a cell's features
};

// ---- a warp's features

template <class T>
class WarpFeatures {
 public:
  using Step = StepFeatures<T>;
  static constexpr int kWidth = Step::kWidth, kChannels = Step::kChannels;

  // Of the tile's cells, from `first` on.
  __device__ WarpFeatures(const SimilarityCall& call, int sample, int first)
      : call_(call), data_(static_cast<const T*>(call.visual.data) + sample * call.visual.sample_stride), first_(first) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) shift_[c] = shift(c);
  }

  // Channels from `channel` on, zero where there are none. Of cells that there are not, anything.
  __device__ __forceinline__ void fetch(Step& step, int channel) const {
    const int lane = threadIdx.x % kWarp;
    if (call_.reading == Reading::channels) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int cell = lane / 2 + i * 16, pack = lane % 2, c = channel + pack * kWidth;
        if (first_ + cell >= call_.cells) break;
        const T* from = data_ + (first_ + cell) * call_.visual.column_stride + c;
        copy_pack(step.along_channels[cell][Step::place(cell, pack)], from, call_.channels - c);
      }
    } else if (call_.reading == Reading::single) {
      const int cell = first_ + lane;
      const T* from = data_ + (cell < call_.cells ? call_.offset_of(cell) : 0) + channel * call_.channel_stride;
      const int left = cell < call_.cells ? call_.channels - channel : 0;
#pragma unroll 1
      for (int c = 0; c < kChannels; ++c) {
        step.along_cells[c][lane] = c < left ? from[c * call_.channel_stride] : from_float<T>(0);
      }
    } else {
      constexpr int kAcross = kTileCells / kWidth, kRows = kWarp / kAcross;
#pragma unroll
      for (int i = 0; i < kChannels / kRows; ++i) copy_row(step, channel, lane / kAcross + i * kRows, lane % kAcross);
      if (call_.reading == Reading::shifted_cells && lane < kChannels) copy_row(step, channel, lane, kAcross);
    }
  }

  // Eight channels of the lane's cell.
  __device__ __forceinline__ void read(const Step& step, int part, float (&values)[kPart]) const {
    const int cell = threadIdx.x % kWarp;
    if (call_.reading == Reading::channels) {
#pragma unroll
      for (int pack = 0; pack < kPart / kWidth; ++pack) {
        const auto packed = load<kWidth>(step.along_channels[cell][Step::place(cell, part * (kPart / kWidth) + pack)]);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) values[pack * kWidth + e] = element(packed, e);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kPart; ++c) values[c] = to_float(step.along_cells[part * kPart + c][shift_[c % kWidth] + cell]);
    }
  }

 private:
  // One pack of a row of cells, if there is a cell of the tile in it. It may begin before its row, and end behind it where
  // another follows: what it holds of other cells is not used.
  __device__ __forceinline__ void copy_row(Step& step, int channel, int row, int pack) const {
    const int before = shift(row), cell = first_ + pack * kWidth - before, c = channel + row;
    if (cell >= min(call_.cells, first_ + kTileCells)) return;
    const bool followed = c + 1 < call_.channels && call_.channel_stride >= kWidth;
    copy_pack(&step.along_cells[row][pack * kWidth], data_ + cell + c * call_.channel_stride,
              followed ? kWidth : c < call_.channels ? call_.cells - cell : 0);
  }

  // Which number of a pack is the first cell in that row. Steps begin with a multiple of kWidth channels.
  __device__ __forceinline__ int shift(int row) const {
    if (call_.reading != Reading::shifted_cells) return 0;
    const unsigned begin = unsigned(reinterpret_cast<uintptr_t>(data_) / sizeof(T)) + unsigned(first_);
    return int((begin + unsigned(row) * unsigned(call_.channel_stride)) % unsigned(kWidth));
  }

  const SimilarityCall& call_;
  const T* data_;
  const int first_;
  int shift_[kWidth];  // of the rows, again and again
};

// ---- a warp's words

// Lists the real words among [first, first + kTileWords) and returns how many there are. Ends with a barrier.
__device__ inline int list_words(const SimilarityCall& call, int sample, int first, int32_t (&index)[kTileWords]) {
  const int lane = threadIdx.x % kWarp;
  const unsigned real = __ballot_sync(kAllLanes, call.is_word(sample, first + lane));
  if (threadIdx.x < kWarp && (real >> lane & 1)) index[__popc(real & ((1u << lane) - 1))] = first + lane;
  __syncthreads();
  return __popc(real);
}

// A lane's word, eight channels at a time. Its squares are added up on the way.
class WarpWord {
 public:
  __device__ WarpWord(const SimilarityCall& call, int sample, const int32_t* index, int count)
      : call_(call), exists_(int(threadIdx.x) % kWarp < count),
        offset_(exists_ ? sample * call.text.sample_stride + index[threadIdx.x % kWarp] * call.text.row_stride : 0) {}

  __device__ __forceinline__ void fetch(int channel) {
    const bool wide = call_.text.type == Type::f32;
    const int left = exists_ ? call_.channels - channel : 0;
    const int64_t from = offset_ + channel * call_.text.column_stride;
    bits_[0] = bits_[1] = {};
    if (call_.text_packed && left >= kPart) {
      const auto* at = static_cast<const uint32_t*>(call_.text.data) + (wide ? from : from / 2);
      bits_[0] = load_input<4>(at);
      if (wide) bits_[1] = load_input<4>(at + 4);
      return;
    }
#pragma unroll
    for (int c = 0; c < kPart; ++c) {
      if (c >= left) break;
      const int64_t at = from + c * call_.text.column_stride;
      if (wide) bits_[c / 4].value[c % 4] = static_cast<const uint32_t*>(call_.text.data)[at];
      if (!wide) bits_[0].value[c / 2] |= uint32_t(static_cast<const uint16_t*>(call_.text.data)[at]) << c % 2 * 16;
    }
  }

  __device__ __forceinline__ void put(float (&words)[kTileWords][kPart + 4]) {
    Pack<float, 4> values[2];
#pragma unroll
    for (int c = 0; c < kPart; ++c) {
      const float value = element_of(c);
      square_ = multiply_add(value, value, square_);
      values[c / 4].value[c % 4] = value;
    }
    float* const to = words[threadIdx.x % kWarp];
    store(to, values[0]);
    store(to + 4, values[1]);
  }

  __device__ float square() const { return square_; }

 private:
  __device__ __forceinline__ float element_of(int c) const {
    const uint32_t half = bits_[0].value[c / 2] >> c % 2 * 16;
    switch (call_.text.type) {
      case Type::f32: return bit_cast<float>(bits_[c / 4].value[c % 4]);
      case Type::bf16: return bit_cast<float>(half << 16);
      default: return to_float(bit_cast<f16>(uint16_t(half)));
    }
  }

  const SimilarityCall& call_;
  const bool exists_;
  const int64_t offset_;
  Pack<uint32_t, 4> bits_[2];  // as they lie in memory: converting would wait for the load
  float square_ = 0;
};

// ---- sums

// Of a lane's cell, over a warp's channels.
struct Products {
  float dot[kTileWords] = {}, square = 0;

  __device__ __forceinline__ void add(const float (&v)[kPart], const float (&words)[kTileWords][kPart + 4], int count) {
#pragma unroll
    for (int c = 0; c < kPart; ++c) square = multiply_add(v[c], v[c], square);
    Pack<float, 4> low = load<4>(&words[0][0]), high = load<4>(&words[0][4]);
#pragma unroll
    for (int j = 0; j < kTileWords; ++j) {
      if (j % 2 == 0 && j >= count) break;
      const auto u = low, w = high;
      if (j + 1 < kTileWords) low = load<4>(&words[j + 1][0]), high = load<4>(&words[j + 1][4]);  // before it is waited for
#pragma unroll
      for (int c = 0; c < kPart; ++c) dot[j] = multiply_add(c < 4 ? u.value[c] : w.value[c - 4], v[c], dot[j]);
    }
  }

  __device__ __forceinline__ void put(float (&sums)[kTileWords + 1][kTileCells], int count) const {
#pragma unroll
    for (int j = 0; j < kTileWords; ++j) {
      if (j < count) sums[j][threadIdx.x % kWarp] = dot[j];
    }
    sums[kTileWords][threadIdx.x % kWarp] = square;
  }
};

// Compares the cells from `first` on with the real words among [first_word, first_word + kTileWords), and returns how
// many there are. If any: the tile's products, squares and inverse norms are set. Begins where the tile is free, and ends
// with a barrier.
template <class T>
__device__ int compare_words(const SimilarityCall& call, int sample, int first, int first_word, ComparisonTile& tile) {
  using Step = StepFeatures<T>;
  const int count = list_words(call, sample, first_word, tile.index);
  if (count == 0) return 0;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  auto& pipeline = tile.pipeline[warp];
  const auto step_of = [&](int step) -> Step& { return *reinterpret_cast<Step*>(pipeline.features[step % kStages]); };
  constexpr int kStride = kTileWarps * Step::kChannels;
  const WarpFeatures<T> features(call, sample, first);
  WarpWord word(call, sample, tile.index, count);
  Products products;

  const int begin = warp * Step::kChannels;
  for (int step = 0; step < kStages - 1; ++step) {
    if (begin + step * kStride < call.channels) features.fetch(step_of(step), begin + step * kStride);
    commit_copies();
  }
  word.fetch(begin);
  for (int step = 0, channel = begin; channel < call.channels; ++step, channel += kStride) {
    wait_for_copies<kStages - 2>();
    __syncwarp();  // this step's features are here, and the words and the features before are done with
    const int next = channel + (kStages - 1) * kStride;
    if (next < call.channels) features.fetch(step_of(step + kStages - 1), next);
    commit_copies();
#pragma unroll
    for (int part = 0; part < Step::kChannels / kPart; ++part) {
      if (part > 0) __syncwarp();  // the words before are done with
      word.put(pipeline.words);
      __syncwarp();
      word.fetch(part + 1 < Step::kChannels / kPart ? channel + kPart : channel + kStride);
      float values[kPart];
      features.read(step_of(step), part, values);
      products.add(values, pipeline.words, count);
    }
  }

  __syncthreads();  // all pipelines are done with
  products.put(tile.sums[warp], count);
  tile.word_squares[warp][lane] = word.square();
  __syncthreads();
  for (int i = threadIdx.x; i < (kTileWords + 1) * kTileCells; i += kSimilarityThreads) {
    const int row = i / kTileCells, cell = i % kTileCells;
    if (row >= count && row < kTileWords) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kTileWarps; ++w) sum += tile.sums[w][row][cell];
    tile.sums[0][row][cell] = sum;
  }
  if (threadIdx.x < kTileWords) {
    float square = 0;
#pragma unroll
    for (int w = 0; w < kTileWarps; ++w) square += tile.word_squares[w][threadIdx.x];
    // NaN is no small number: it stays, and makes the word's scores NaN.
    tile.inverse_norm[threadIdx.x] = square <= kSmallestSquare ? 0.0f : 1.0f / sqrtf(square);
  }
  __syncthreads();
  return count;
}

}  // namespace aml::cuda
