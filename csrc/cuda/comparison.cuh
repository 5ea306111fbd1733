// Pixels compared with words: norms and dot products out of one reading of `visual`.
//
// A block takes a tile of 32 cells. Its warps divide the channels, 32 bytes of them at a time, and each has a pipeline of
// its own: features come past the registers to its part of shared memory, two steps ahead, and words through registers,
// one step ahead. So no warp waits for another before the sums over all channels, at the end.
#pragma once

#include "comparison_by_fragments.cuh"
#include "comparison_by_lanes.cuh"

namespace aml::cuda {

// Shared memory of a tile: of each warp's pipeline, and then of the sums.
struct ComparisonTile {
  static constexpr int kStepBytes = sizeof(StepFeatures<bf16>);
  static_assert(sizeof(StepFeatures<float>) <= kStepBytes && sizeof(StepFeatures<f16>) == kStepBytes, "room for any type");
  struct Pipeline {
    alignas(16) unsigned char features[kStages][kStepBytes];
    alignas(16) float words[kTileWords][kPart + 4];  // of LaneProducts
  };
  union {
    Pipeline pipeline[kTileWarps];
    float sums[kTileWarps][kTileWords + 1][kTileCells + 4];  // of each warp's channels; then sums[0]: see below
  };
  float word_squares[kTileWarps][kTileWords];
  float inverse_norm[kTileWords];  // of the words
  int32_t index[kTileWords];       // of the real words in `text`

  __device__ __forceinline__ float& product(int word, int cell) { return sums[0][word][cell]; }  // of a word and a cell
  __device__ __forceinline__ float square(int cell) const { return sums[0][kTileWords][cell]; }  // of a cell's features
};

// Lists the real words among [first, first + kTileWords) and returns a bit for each. Ends with a barrier.
__device__ inline unsigned list_words(const SimilarityCall& call, int sample, int first, int32_t (&index)[kTileWords]) {
  const int lane = threadIdx.x % kWarp;
  const unsigned real = __ballot_sync(kAllLanes, call.is_word(sample, first + lane));
  if (threadIdx.x < kWarp && (real >> lane & 1)) index[__popc(real & ((1u << lane) - 1))] = first + lane;
  __syncthreads();
  return real;
}

// Goes through a warp's channels, from `channel` on, and writes its sums. Begins where the tile is free, ends with a barrier.
template <class T, class Products>
__device__ __forceinline__ void run_pipeline(const SimilarityCall& call, int channel, WarpFeatures<T>& features,
                                             Products& products, ComparisonTile& tile) {
  using Step = StepFeatures<T>;
  constexpr int kStride = WarpFeatures<T>::kStride;
  const int warp = threadIdx.x / kWarp;
  const auto step_of = [&](int step) -> Step& { return *reinterpret_cast<Step*>(tile.pipeline[warp].features[step % kStages]); };
  for (int step = 0; step < kStages - 1; ++step) {
    features.fetch(step_of(step), channel + step * kStride);
    commit_copies();
  }
  products.fetch(channel);
  for (int step = 0; channel < call.channels; ++step, channel += kStride) {
    wait_for_copies<kStages - 2>();
    __syncwarp();  // this step's features are here, and the words and the features before are done with
    features.fetch(step_of(step + kStages - 1), channel + (kStages - 1) * kStride);
    commit_copies();
    products.add(step_of(step), channel, channel + kStride);
  }
  __syncthreads();  // all pipelines are done with
  products.put(tile.sums[warp], tile.word_squares[warp]);
  __syncthreads();
}

// Compares the cells from `first` on with the real words among [first_word, first_word + kTileWords), and returns how
// many there are. If any: the tile's products, squares and inverse norms are set. Begins where the tile is free, and ends
// with a barrier.
template <class T>
__device__ int compare_words(const SimilarityCall& call, int sample, int first, int first_word, ComparisonTile& tile) {
  const int count = __popc(list_words(call, sample, first_word, tile.index));
  if (count == 0) return 0;
  const int channel = int(threadIdx.x) / kWarp * StepFeatures<T>::kChannels;
  WarpFeatures<T> features(call, sample, first, channel);
  if constexpr (std::is_same_v<T, float>) {
    LaneProducts products(call, sample, tile.index, count, features, tile.pipeline[threadIdx.x / kWarp].words);
    run_pipeline(call, channel, features, products, tile);
  } else {
    FragmentProducts<T> products(call, sample, tile.index, count, features);
    run_pipeline(call, channel, features, products, tile);
  }

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
