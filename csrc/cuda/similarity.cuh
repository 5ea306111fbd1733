// Similarity of pixels and words: the most similar word of each cell, out of the comparisons of a tile.
#pragma once

#include "../common/loss.h"
#include "comparison.cuh"

namespace aml::cuda {

// 1 / |v|, and 1 where nothing is normalised.
__device__ __forceinline__ float inverse_norm_of_cell(const SimilarityCall& call, float square) {
  if (!call.normalize) return 1.0f;
  return square > kSmallestSquare ? 1.0f / sqrtf(square) : 0.0f;
}

// What the words seen so far are to one cell.
struct BestWord {
  int32_t word = -1;                    // the most similar one; -1: there was no word
  float dot = 0, score = 0, total = 0;  // its product as a unit vector, its score; sum of exp(score of a word - score)

  static __device__ float score_of(const SimilarityCall& call, float dot, float norm) { return call.scale * (dot * norm); }

  // The words that were compared last; their unit vectors' products stay in the tile.
  __device__ void update(const SimilarityCall& call, ComparisonTile& tile, int count, float norm) {
    const float before = score;
    const bool any = word >= 0;
    for (int j = 0; j < count; ++j) {
      float& product = tile.product(j, threadIdx.x);
      if (call.normalize) product *= tile.inverse_norm[j];
      const float other = score_of(call, product, norm);
      if (word < 0 || other > score || other != other) word = tile.index[j], dot = product, score = other;
    }
    if (!call.softmax) return;
    total = any ? total * exp_nonpositive(before - score) : 0.0f;
    for (int j = 0; j < count; ++j) total += exp_nonpositive(score_of(call, tile.product(j, threadIdx.x), norm) - score);
  }
};

// Writes similarity[sample][first ...] for the cells of a tile. All threads of the block take part; `tile` may not be in
// use before, and may be afterwards.
template <class T>
__device__ void similarity_tile(const SimilarityCall& call, int sample, int first, float* similarity, ComparisonTile& tile) {
  const int cell = first + int(threadIdx.x);
  const bool has_cell = threadIdx.x < kTileCells && cell < call.cells;
  BestWord best;
  for (int word = 0; word < call.words; word += kTileWords) {
    const int count = compare_words<T>(call, sample, first, word, tile);
    if (has_cell && count > 0) best.update(call, tile, count, inverse_norm_of_cell(call, tile.square(threadIdx.x)));
    __syncthreads();  // the tile's memory is free again
  }
  if (has_cell) similarity[int64_t(sample) * call.cells + cell] = call.softmax && best.word >= 0 ? 1.0f / best.total : best.score;
}

template <class T>
__global__ void __launch_bounds__(kSimilarityThreads, 2) similarity_forward(SimilarityCall call, float* similarity) {
  AML_SHARED(tile, ComparisonTile);
  const int tiles = call.blocks_of(kTileCells), sample = int(blockIdx.x) / tiles;
  similarity_tile<T>(call, sample, int(blockIdx.x) % tiles * kTileCells, similarity, tile);
}

// One launch, no scratch. `similarity`: contiguous [samples, cells].
template <class T>
cudaError_t launch_similarity(const SimilarityCall& call, int64_t samples, float* similarity, cudaStream_t stream) {
  return AML_LAUNCH(dim3(unsigned(samples * call.blocks_of(kTileCells))), dim3(kSimilarityThreads), 0, stream, similarity_forward<T>, call, similarity);
}

}  // namespace aml::cuda
