// 16-bit pixels compared with words by tensor cores: a step of 16 channels is one product of 32 cells and 32 words. Products
// are exact and sums are in fp32. Squares, of which the norms are made, are plain multiply-adds.
//
// What a lane holds of the matrices (see multiply() in device.cuh): with `group` = lane / 4 and `quad` = lane % 4, channels
// 2 quad, 2 quad + 1, and these + 8, of the cells and the words group, group + 8, + 16, + 24. Words of the features' type go
// from global memory to these registers, a step ahead. Words of another type are read when they are needed, and are the
// sum of up to three bf16 numbers, as a feature of fp16 is that of two: their products are exact, too. (But not those of
// infinity, where not normalised: NaN, if a part is 0.)
#pragma once

#include "comparison_features.cuh"

namespace aml::cuda {

template <class T>
class FragmentProducts {
 public:
  using Step = StepFeatures<T>;

  // For the words index[0 ... count - 1].
  __device__ FragmentProducts(const SimilarityCall& call, int sample, const int32_t* index, int count,
                              const WarpFeatures<T>& features)
      : call_(call), index_(index), count_(count),
        text_(static_cast<const char*>(call.text.data) + sample * call.text.sample_stride * bytes_of(call.text.type)) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) offset_[t] = int(unsigned(word_of(t)) * unsigned(call.text.row_stride));
#pragma unroll
    for (int k = 0; k < 2; ++k) corner_[k] = kept((2 * quad() + k) * kRowCells + features.shift(2 * quad() + k) + group());
  }

  // The words' channels of the next step, which begins with `channel`.
  __device__ __forceinline__ void fetch(int channel) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t * 8 >= count_ || call_.text.type != call_.visual.type) break;
      fetch(t, channel);
    }
  }

  // Adds the step of features that begins with `channel`, and fetches the words of the one that begins with `next`.
  __device__ __forceinline__ void add(const Step& step, int channel, int next) {
    if (call_.text.type != call_.visual.type) return add_with_other_words(step, channel);
    uint32_t cells[2][4];
    read(step, 0, cells[0]);
    read(step, 1, cells[1]);
#pragma unroll
    for (int i = 0; i < 8; ++i) add_squares(cells[i / 4][i % 4], square_[i / 4 * 2 + i % 2]);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t * 8 >= count_) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) add_squares(words_[t][i], word_square_[t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) multiply<T>(cells[half], words_[t], dot_[half][t]);
      fetch(t, next);
    }
  }

  // A warp's share of the tile's sums: [word][cell], squares of the cells last; and squares of the words.
  template <class Sums>
  __device__ void put(Sums& sums, float* word_squares) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int word = t * 8 + 2 * quad() + i % 2;
        if (word < count_) sums[word][i / 2 * 8 + group()] = dot_[i / 4][t][i % 4];
      }
      const float square = sum_of_quads(word_square_[t]);
      if (quad() == 0) word_squares[t * 8 + group()] = square;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float square = sum_of_quads(square_[i]);
      if (quad() == 0) sums[kTileWords][i * 8 + group()] = square;
    }
  }

 private:
  static_assert(sizeof(T) == 2 && StepFeatures<T>::kChannels == 16);
  static constexpr int kTiles = kTileWords / 8, kRowCells = kTileCells + Step::kWidth;
  static __device__ __forceinline__ int group() { return threadIdx.x % kWarp / 4; }
  static __device__ __forceinline__ int quad() { return threadIdx.x % 4; }

  // The lane's word among eight; where there is none, the last one, whose products nobody reads.
  __device__ __forceinline__ int word_of(int t) const { return index_[min(t * 8 + group(), count_ - 1)]; }

  __device__ __forceinline__ void fetch(int t, int channel) {
    const bool whole = call_.text_packed && channel + Step::kChannels <= call_.channels;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int first = channel + i * 8 + 2 * quad();
      const uint16_t* from = static_cast<const uint16_t*>(text_) + (offset_[t] + first);
      words_[t][i] = whole ? bit_cast<uint32_t>(load_input<2>(from)) : up_to_two(t, first);
    }
  }

  // Two channels of a word; zero where there are none.
  __device__ __forceinline__ uint32_t up_to_two(int t, int channel) const {
    const int64_t step = call_.text.column_stride;
    const uint16_t* from = static_cast<const uint16_t*>(text_) + word_of(t) * call_.text.row_stride + channel * step;
    return (channel < call_.channels ? from[0] : 0u) | (channel + 1 < call_.channels ? uint32_t(from[step]) << 16 : 0u);
  }

  // A lane's numbers of the cells 0 to 15 or 16 to 31, for multiply().
  __device__ __forceinline__ void read(const Step& step, int half, uint32_t (&cells)[4]) const {
    if (call_.reading == Reading::channels) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int cell = half * 16 + i % 2 * 8 + group();
        cells[i] = bit_cast<uint32_t>(load<2>(&step.along_channels[cell][Step::place(cell, i / 2)][2 * quad()]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* from = &step.along_cells[0][0] + (i / 2 * 8 * kRowCells + half * 16 + i % 2 * 8);
        const Pack<T, 2> both{from[corner_[0]], from[corner_[1]]};
        cells[i] = bit_cast<uint32_t>(both);
      }
    }
  }

  static __device__ __forceinline__ void add_squares(uint32_t channels, float& sum) {
    const auto both = bit_cast<Pack<T, 2>>(channels);
#pragma unroll
    for (int k = 0; k < 2; ++k) sum = multiply_add(element(both, k), element(both, k), sum);
  }

  // Slower, in few registers: features of fp16 by 16 cells, whose words are read again.
  __device__ __forceinline__ void add_with_other_words(const Step& step, int channel) {
    constexpr int kTerms = std::is_same_v<T, bf16> ? 1 : 2, kTogether = 2 / kTerms;
#pragma unroll
    for (int first = 0; first < 2; first += kTogether) {
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        uint32_t part[kTogether][4];
#pragma unroll
        for (int half = 0; half < kTogether; ++half) {
          read(step, first + half, part[half]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (term == 0) add_squares(part[half][i], square_[(first + half) * 2 + i % 2]);
            part[half][i] = bf16_of(part[half][i], term);
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (t * 8 >= count_) break;
          float words[2][2];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int c = channel + 2 * quad() + i / 2 * 8 + i % 2;
            const int64_t at = word_of(t) * call_.text.row_stride + c * call_.text.column_stride;
            const float value = c < call_.channels ? load_element(text_, call_.text.type, at) : 0.0f;
            words[i / 2][i % 2] = value;
            if (first == 0 && term == 0) word_square_[t] = multiply_add(value, value, word_square_[t]);
          }
#pragma unroll 1
          for (int word_term = 0; word_term < 3; ++word_term) {
            const uint32_t upper[2] = {take_bf16(words[0]), take_bf16(words[1])};
#pragma unroll
            for (int half = 0; half < kTogether; ++half) add_product(part[half], upper, dot_[first + half][t]);
          }
        }
      }
    }
  }

  // Of a part with a part. Tensor cores cut off of a product what is far below the sum, which for all the parts would be
  // too much: each is made by itself and then added.
  static __device__ __forceinline__ void add_product(const uint32_t (&cells)[4], const uint32_t (&words)[2], float (&sum)[4]) {
    float product[4] = {};
    multiply<bf16>(cells, words, product);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += product[i];
  }

  // The upper halves of two floats, which are bf16 numbers; what is less stays.
  static __device__ __forceinline__ uint32_t take_bf16(float (&values)[2]) {
    uint32_t upper[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      upper[k] = values[k] != values[k] ? 0x7FC00000u : bit_cast<uint32_t>(values[k]) & 0xFFFF0000u;
      const bool finite = (upper[k] & 0x7F800000u) != 0x7F800000u;
      values[k] = finite ? values[k] - bit_cast<float>(upper[k]) : 0.0f;
    }
    return upper[0] >> 16 | upper[1];
  }

  // One of the bf16 numbers that each of two features is the sum of: itself, or the first or second of two.
  static __device__ __forceinline__ uint32_t bf16_of(uint32_t features, int term) {
    if constexpr (std::is_same_v<T, bf16>) return features;
    const auto both = bit_cast<Pack<T, 2>>(features);
    float values[2] = {to_float(both.value[0]), to_float(both.value[1])};
    const uint32_t first = take_bf16(values);
    return term == 0 ? first : take_bf16(values);
  }

  static __device__ __forceinline__ float sum_of_quads(float value) {
    value += __shfl_xor_sync(kAllLanes, value, 1);
    return value + __shfl_xor_sync(kAllLanes, value, 2);
  }

  const SimilarityCall& call_;
  const int32_t* index_;
  const int count_;
  int corner_[2];  // where the lane's first cell stands in a step, in its first two channels
  const void* text_;  // of the sample
  int offset_[kTiles];  // of the lane's words, where they are packed
  uint32_t words_[kTiles][2] = {};
  float dot_[2][kTiles][4] = {}, square_[4] = {}, word_square_[kTiles] = {};
};

}  // namespace aml::cuda
