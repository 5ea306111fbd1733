// What a block of the similarity's gradients works on: 64 cells in 64 channels, and its words.
#pragma once

#include "similarity_coefficients.cuh"

namespace aml::cuda {

struct GradientTile {
  alignas(16) float features[kBlockChannels][kRow];  // [channel][feature_column]; in the end [word][channel]: sums
  alignas(16) float words[kTileWords][kRow];         // [word][channel], unit vectors
  alignas(16) float along[kBlockCells];              // the coefficients of the features themselves
  int32_t index[kTileWords];
  bool last;
};

__device__ __forceinline__ float unit_word(const SimilarityCall& call, const SimilarityScratch& scratch, int sample,
                                           int word, int channel) {
  return load_element(call.text, sample, word, channel) * scratch.inverse_norm[int64_t(sample) * call.words + word];
}

// Unit vectors of the listed words, 64 channels from `channel` on.
__device__ inline void stage_words(const SimilarityCall& call, const SimilarityScratch& scratch, int sample, int channel,
                                   int count, GradientTile& tile) {
  const int c = channel + threadIdx.x % kBlockChannels;
#pragma unroll 4
  for (int j = threadIdx.x / kBlockChannels; j < count; j += kSimilarityThreads / kBlockChannels) {
    tile.words[j][threadIdx.x % kBlockChannels] = c < call.channels ? unit_word(call, scratch, sample, tile.index[j], c) : 0.0f;
  }
}

// The gradient of four features of each of four cells.
struct FeatureGradient {
  float value[4][4];  // [channel][cell]
  const int cell = threadIdx.x % 16 * 4, channel = threadIdx.x / 16 * 4;

  __device__ explicit FeatureGradient(const GradientTile& tile) {
    const Pack<float, 4> along = load<4>(&tile.along[cell]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Pack<float, 4> v = load<4>(&tile.features[channel + c][feature_column(channel + c, cell)]);
#pragma unroll
      for (int k = 0; k < 4; ++k) value[c][k] = along.value[k] * v.value[k];
    }
  }

  // By all threads of the block; the tile's features are done with.
  template <class T>
  __device__ __forceinline__ void write(const SimilarityBackwardCall& backward, int sample, int first, int first_channel,
                                        GradientTile& tile) const {
    const int cells = backward.forward.cells, channels = backward.forward.channels;
    T* out = static_cast<T*>(backward.grad_visual) + int64_t(sample) * cells * channels;
    const int length = backward.channels_first ? cells : channels;  // of the contiguous axis
    if (backward.channels_first && length % 4 != 0) return write_rows(out, first, first_channel, cells, channels, tile);
    const int outer = backward.channels_first ? first_channel + channel : first + cell;
    const int inner = backward.channels_first ? first + cell : first_channel + channel;
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      if (outer + o >= (backward.channels_first ? channels : cells)) continue;
      Pack<T, 4> four;
#pragma unroll
      for (int i = 0; i < 4; ++i) four.value[i] = from_float<T>(backward.channels_first ? value[o][i] : value[i][o]);
      T* to = out + int64_t(outer + o) * length + inner;
      if (length % 4 == 0) {
        if (inner < length) store<4>(to, four);
      } else {
        for (int i = 0; i < 4; ++i) {
          if (inner + i < length) to[i] = four.value[i];
        }
      }
    }
  }

 private:
  // Rows of cells that begin anywhere, an element to a lane: by way of shared memory, where a warp has its eight channels.
  template <class T>
  __device__ __forceinline__ void write_rows(T* out, int first, int first_channel, int cells, int channels,
                                             GradientTile& tile) const {
    __syncthreads();  // the features are done with
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      Pack<float, 4> four;
#pragma unroll
      for (int k = 0; k < 4; ++k) four.value[k] = value[c][k];
      store<4>(&tile.features[channel + c][cell], four);
    }
    __syncwarp();
    const int begin = threadIdx.x / kWarp * 8, lane = threadIdx.x % kWarp;
#pragma unroll 4
    for (int i = 0; i < 16; ++i) {
      const int row = begin + i / 2, at = i % 2 * kWarp + lane;
      if (first_channel + row < channels && first + at < cells) {
        out[int64_t(first_channel + row) * cells + first + at] = from_float<T>(tile.features[row][at]);
      }
    }
  }
};

}  // namespace aml::cuda
