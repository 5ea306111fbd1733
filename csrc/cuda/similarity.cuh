// Similarity of pixels and words. A block works on a tile of cells of one sample: 32 channels at a time pass through
// shared memory, so that each feature is read from global memory once, whatever the layout and however many words.
#pragma once

#include "../common/loss.h"
#include "device.cuh"

namespace aml::cuda {

constexpr int kSimilarityThreads = 256;
constexpr int kTileCells = 128;
constexpr int kTileChannels = 32;
constexpr int kTileWords = 32;  // real words compared in one reading of the features

struct SimilarityCall {
  Plane visual;  // of one channel: rows and columns are those of the grid
  int64_t channel_stride, channels;
  Plane text;       // [samples, words, channels]
  Plane text_mask;  // [samples, 1, words]; may be absent
  bool normalize, softmax;
  float scale;
  int64_t cells() const { return visual.rows * visual.columns; }
};

// Shared memory of a tile.
struct SimilarityTile {
  float features[kTileChannels][kTileCells + 4];
  float words[kTileChannels][kTileWords + 4];
  float square[kTileCells];
  float inverse_norm[kTileWords];
  int32_t index[kTileWords];
};

// Writes similarity[first, first + kTileCells) of a sample, up to its last cell. T: type of `visual`. All
// kSimilarityThreads threads of the block take part. Ends with a barrier of the block.
template <class T>
__device__ void similarity_tile(const SimilarityCall& call, int64_t sample, int64_t first, float* similarity, SimilarityTile& tile);

}  // namespace aml::cuda
