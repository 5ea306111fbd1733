// fp32 pixels compared with words in plain multiply-adds, a cell to each lane: they keep all their bits, and sums are in one
// order on every device. On an H100 it is these instructions, not the reading, that take the time.
#pragma once

#include "comparison_features.cuh"

namespace aml::cuda {

constexpr int kPart = 8;  // channels of the words that a warp has at once

// A lane's word, eight channels at a time. Its squares are added up on the way.
class LaneWord {
 public:
  __device__ LaneWord(const SimilarityCall& call, int sample, const int32_t* index, int count)
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

// Sums of a lane's cell over a warp's channels. Words come through registers, one part ahead.
class LaneProducts {
 public:
  using Step = StepFeatures<float>;
  using Words = float[kTileWords][kPart + 4];  // of a warp, in shared memory

  // For the words index[0 ... count - 1].
  __device__ LaneProducts(const SimilarityCall& call, int sample, const int32_t* index, int count,
                          const WarpFeatures<float>& features, Words& words)
      : along_channels_(call.reading == Reading::channels), count_(count), words_(words), word_(call, sample, index, count) {
#pragma unroll
    for (int c = 0; c < 4; ++c) shift_[c] = features.shift(c);
  }

  // The words' channels of the next step, which begins with `channel`.
  __device__ __forceinline__ void fetch(int channel) { word_.fetch(channel); }

  // Adds the step of features that begins with `channel`, and fetches the words of the one that begins with `next`.
  __device__ __forceinline__ void add(const Step& step, int, int next) {
    word_.put(words_);
    __syncwarp();
    word_.fetch(next);
    float values[kPart];
    read(step, values);
    add(values);
  }

  // A warp's share of the tile's sums: [word][cell], squares of the cells last; and squares of the words.
  template <class Sums>
  __device__ void put(Sums& sums, float* word_squares) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < kTileWords; ++j) {
      if (j < count_) sums[j][lane] = dot_[j];
    }
    sums[kTileWords][lane] = square_;
    word_squares[lane] = word_.square();
  }

 private:
  static_assert(Step::kChannels == kPart, "a step is a part");

  // The lane's cell.
  __device__ __forceinline__ void read(const Step& step, float (&values)[kPart]) const {
    const int cell = threadIdx.x % kWarp;
    if (along_channels_) {
#pragma unroll
      for (int pack = 0; pack < 2; ++pack) {
        const auto packed = load<4>(step.along_channels[cell][Step::place(cell, pack)]);
#pragma unroll
        for (int e = 0; e < 4; ++e) values[pack * 4 + e] = packed.value[e];
      }
    } else {
#pragma unroll
      for (int c = 0; c < kPart; ++c) values[c] = step.along_cells[c][shift_[c % 4] + cell];
    }
  }

  __device__ __forceinline__ void add(const float (&v)[kPart]) {
#pragma unroll
    for (int c = 0; c < kPart; ++c) square_ = multiply_add(v[c], v[c], square_);
    Pack<float, 4> low = load<4>(&words_[0][0]), high = load<4>(&words_[0][4]);
#pragma unroll
    for (int j = 0; j < kTileWords; ++j) {
      if (j % 2 == 0 && j >= count_) break;
      const auto u = low, w = high;
      if (j + 1 < kTileWords) low = load<4>(&words_[j + 1][0]), high = load<4>(&words_[j + 1][4]);  // before it is waited for
#pragma unroll
      for (int c = 0; c < kPart; ++c) dot_[j] = multiply_add(c < 4 ? u.value[c] : w.value[c - 4], v[c], dot_[j]);
    }
  }

  const bool along_channels_;
  const int count_;
  Words& words_;
  LaneWord word_;
  int shift_[4];  // of the rows, again and again
  float dot_[kTileWords] = {}, square_ = 0;
};

}  // namespace aml::cuda
