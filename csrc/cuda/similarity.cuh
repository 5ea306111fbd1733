// Similarity of pixels and words. A block takes a tile of 64 cells of one sample and reads its features once, 64 channels
// at a time, through shared memory; norms and the dot products with up to 32 real words come out of that one reading.
//
// Plain multiply-adds rather than tensor cores: with the few real words of a sentence the reading of `visual` is what
// takes time, fp32 features keep all their bits, and sums are in fp32 and in one order on every device.
#pragma once

#include "../common/loss.h"
#include "features.cuh"

namespace aml::cuda {

constexpr int kWordGroup = 8;  // a thread multiplies four cells with the words of one group

// Shared memory of a tile.
struct SimilarityTile {
  alignas(16) float features[kTileChannels][kRow];  // [channel][feature_column]; in the end [word][cell]: dot products
  alignas(16) float words[kTileChannels][kTileWords + 4];
  alignas(16) unsigned char raw[kRawBytes];  // features on their way
  float square[kTileCells];  // of the features
  float inverse_norm[kTileWords];
  int32_t index[kTileWords];  // of the real words in `text`
};

// Dot products of a thread's four cells with its eight words, over its share of the channels.
struct Products {
  Pack<float, 4> dot[kWordGroup] = {};
  Pack<float, 4> square = {};
  int group, share, shares, cell;

  static __device__ int groups_of(int words) { return (words + kWordGroup - 1) / kWordGroup; }

  // Warps are divided among the groups of words; those of a group, and the halves of a warp, among the channels.
  __device__ explicit Products(int words) {
    const int groups = groups_of(words);
    group = threadIdx.x / kWarp % groups;
    shares = kSimilarityThreads / kWarp / groups * 2;
    share = threadIdx.x / kWarp / groups * 2 + threadIdx.x % kWarp / 16;
    cell = threadIdx.x % 16 * 4;
  }

  __device__ __forceinline__ void add(const SimilarityTile& tile, int channels) {
    if (share >= shares) return;
#pragma unroll 2
    for (int c = share; c < channels; c += shares) {
      const Pack<float, 4> v = load<4>(&tile.features[c][feature_column(c, cell)]);
      const Pack<float, 4> a = load<4>(&tile.words[c][group * kWordGroup]), b = load<4>(&tile.words[c][group * kWordGroup + 4]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          dot[j].value[k] = multiply_add(a.value[j], v.value[k], dot[j].value[k]);
          dot[j + 4].value[k] = multiply_add(b.value[j], v.value[k], dot[j + 4].value[k]);
        }
      }
      if (group == 0) {
#pragma unroll
        for (int k = 0; k < 4; ++k) square.value[k] = multiply_add(v.value[k], v.value[k], square.value[k]);
      }
    }
  }

  // The sums over all shares, in order: tile.features[word][cell] and tile.square. As many shares at a time as there is
  // room for where the features were. Begins and ends with a barrier.
  __device__ void combine(SimilarityTile& tile, int words) const {
    constexpr int kSums = (kTileWords + 1) * kTileCells / kSimilarityThreads + 1;
    const int rows = groups_of(words) * kWordGroup + 1, at_once = kTileChannels / rows;  // the last row: squares
    const int row = threadIdx.x / kTileCells, column = threadIdx.x % kTileCells;
    float sum[kSums] = {};
    for (int first = 0; first < shares; first += at_once) {
      const int last = min(first + at_once, shares);
      __syncthreads();
      if (first <= share && share < last) {
#pragma unroll
        for (int j = 0; j < kWordGroup; ++j) store<4>(&tile.features[(share - first) * rows + group * kWordGroup + j][cell], dot[j]);
        if (group == 0) store<4>(&tile.features[(share - first + 1) * rows - 1][cell], square);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        const int r = row + k * (kSimilarityThreads / kTileCells);
        for (int i = first; r < rows && i < last; ++i) sum[k] += tile.features[(i - first) * rows + r][column];
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      const int r = row + k * (kSimilarityThreads / kTileCells);
      if (r < rows - 1) tile.features[r][column] = sum[k];
      if (r == rows - 1) tile.square[column] = sum[k];
    }
    __syncthreads();
  }
};

// Compares the cells from `first` on with the real words among [first_word, first_word + kTileWords), and returns how
// many there are. If any: tile.features[word][cell] become dot products; norms and squares are those of their vectors.
template <class T>
__device__ int compare_words(const SimilarityCall& call, int sample, int first, int first_word, SimilarityTile& tile) {
  const int count = list_words(call, sample, first_word, tile.index);
  if (count == 0) return 0;
  FeatureBlock<T> features(call, sample);
  WordBlock words(call, sample, tile.index, count);
  Products products(count);
  auto* const raw = reinterpret_cast<RawFeatures<T>*>(tile.raw);
  constexpr int kAhead = RawFeatures<T>::kAhead;
  const int ahead = features.ahead() * kTileChannels;
  for (int channel = 0; channel < ahead; channel += kTileChannels) {
    features.fetch(raw[channel / kTileChannels], first, channel);
    commit_copies();
  }
  words.fetch(0);
  for (int channel = 0; channel < call.channels; channel += kTileChannels) {
    RawFeatures<T>& slot = raw[channel / kTileChannels % kAhead];
    wait_for_copies<kAhead - 1>();
    __syncthreads();  // the block before is done with, and this one is here
    features.put(slot, first, tile.features);
    words.put(tile.words);
    __syncthreads();
    if (channel + ahead < call.channels) features.fetch(slot, first, channel + ahead);
    commit_copies();
    if (channel + kTileChannels < call.channels) words.fetch(channel + kTileChannels);
    products.add(tile, min(kTileChannels, call.channels - channel));
  }
  words.put_norms(tile.inverse_norm);
  products.combine(tile, count);
  return count;
}

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
  __device__ void update(const SimilarityCall& call, SimilarityTile& tile, int count, float norm) {
    const float before = score;
    const bool any = word >= 0;
    for (int j = 0; j < count; ++j) {
      float& product = tile.features[j][threadIdx.x];
      if (call.normalize) product *= tile.inverse_norm[j];
      const float other = score_of(call, product, norm);
      if (word < 0 || other > score || other != other) word = tile.index[j], dot = product, score = other;
    }
    if (!call.softmax) return;
    total = any ? total * exp_nonpositive(before - score) : 0.0f;
    for (int j = 0; j < count; ++j) total += exp_nonpositive(score_of(call, tile.features[j][threadIdx.x], norm) - score);
  }
};

// Writes similarity[sample][first ...] for the cells of a tile. All threads of the block take part; `tile` may not be in
// use before, and may be afterwards.
template <class T>
__device__ void similarity_tile(const SimilarityCall& call, int sample, int first, float* similarity, SimilarityTile& tile) {
  const int cell = first + int(threadIdx.x);
  const bool has_cell = threadIdx.x < kTileCells && cell < call.cells;
  BestWord best;
  for (int word = 0; word < call.words; word += kTileWords) {
    const int count = compare_words<T>(call, sample, first, word, tile);
    if (has_cell && count > 0) best.update(call, tile, count, inverse_norm_of_cell(call, tile.square[threadIdx.x]));
    __syncthreads();  // the tile's memory is free again
  }
  if (has_cell) similarity[int64_t(sample) * call.cells + cell] = call.softmax && best.word >= 0 ? 1.0f / best.total : best.score;
}

template <class T>
__global__ void __launch_bounds__(kSimilarityThreads, 2) similarity_forward(SimilarityCall call, float* similarity) {
  AML_SHARED(tile, SimilarityTile);
  const int sample = int(blockIdx.x) / call.tiles, first = int(blockIdx.x) % call.tiles * kTileCells;
  similarity_tile<T>(call, sample, first, similarity, tile);
}

// One launch, no scratch. `similarity`: contiguous [samples, cells].
template <class T>
cudaError_t launch_similarity(const SimilarityCall& call, int64_t samples, float* similarity, cudaStream_t stream) {
  return AML_LAUNCH(dim3(unsigned(samples * call.tiles)), dim3(kSimilarityThreads), 0, stream, similarity_forward<T>, call, similarity);
}

}  // namespace aml::cuda
