// How gradients depend on the words: on the most similar one of each cell, or, with softmax, on all of them.
//
// Both have in shared memory what they know of 64 cells, and add up the words' gradients over them. add_to_words() needs
// features, add_to_features() needs words in the tile.
#pragma once

#include "similarity_gradient_tile.cuh"

namespace aml::cuda {

// Each cell has one word, so that its gradient is one multiplication, whatever the number of words. A warp goes through
// cells, 32 channels at once: the word is the same for all its lanes, and its sum stays in a register until another comes.
class BestWordGradient {
 public:
  static constexpr int kShares = kSimilarityThreads / kBlockChannels, kShareCells = kBlockCells / kShares;
  struct Shared {
    alignas(16) int32_t slot[kBlockCells];  // of the cell's word in the list; -1: it is not there, or has no gradient
    alignas(16) float coefficient[kBlockCells];
    float sums[kShares][kTileWords][kBlockChannels];
  };

  __device__ BestWordGradient(const SimilarityCall& call, const SimilarityScratch& scratch, int sample, int count, Shared& shared)
      : call_(call), scratch_(scratch), sample_(sample), shared_(shared) {
    for (int j = 0; j < count; ++j) shared.sums[share()][j][channel()] = 0;
  }

  // Cells from `first` on, and the words among [first_word, first_word + kTileWords) that `real` names.
  __device__ __forceinline__ void stage(const GradientTile&, int first, int first_word, unsigned real) {
    if (threadIdx.x >= kBlockCells) return;
    const int cell = first + int(threadIdx.x);
    const int64_t at = int64_t(sample_) * call_.cells + cell;
    const unsigned word = cell < call_.cells ? unsigned(scratch_.word[at] - first_word) : kTileWords;
    const float coefficient = word < kTileWords ? scratch_.coefficient[at] : 0.0f;
    shared_.slot[threadIdx.x] = coefficient != 0 ? __popc(real & ((1u << word) - 1)) : -1;
    shared_.coefficient[threadIdx.x] = coefficient;
  }

  __device__ __forceinline__ void add_to_words(const GradientTile& tile) {
#pragma unroll
    for (int i = 0; i < kShareCells; i += 4) {
      const int cell = share() * kShareCells + i;
      const auto slot = load<4>(&shared_.slot[cell]);
      const auto coefficient = load<4>(&shared_.coefficient[cell]);
      const auto v = load<4>(&tile.features[channel()][feature_column(channel(), cell)]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (slot.value[k] < 0) continue;
        if (slot.value[k] != slot_) put(), slot_ = slot.value[k];
        sum_ = multiply_add(coefficient.value[k], v.value[k], sum_);
      }
    }
  }

  __device__ __forceinline__ void add_to_features(FeatureGradient& gradient, const GradientTile& tile, int) const {
    const auto slot = load<4>(&shared_.slot[gradient.cell]);
    const auto coefficient = load<4>(&shared_.coefficient[gradient.cell]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (slot.value[k] < 0) continue;
      const auto u = load<4>(&tile.words[slot.value[k]][gradient.channel]);
#pragma unroll
      for (int c = 0; c < 4; ++c) gradient.value[c][k] = multiply_add(coefficient.value[k], u.value[c], gradient.value[c][k]);
    }
  }

  // The sum of all shares, one after the other: tile.features[word][channel]. Begins and ends with a barrier.
  __device__ void combine(GradientTile& tile, int count) {
    put();
    __syncthreads();
    for (int j = share(); j < count; j += kShares) {
      float sum = shared_.sums[0][j][channel()];
#pragma unroll
      for (int s = 1; s < kShares; ++s) sum += shared_.sums[s][j][channel()];
      tile.features[j][channel()] = sum;
    }
    __syncthreads();
  }

 private:
  static __device__ __forceinline__ int channel() { return threadIdx.x % kBlockChannels; }
  static __device__ __forceinline__ int share() { return threadIdx.x / kBlockChannels; }

  __device__ __forceinline__ void put() {
    if (slot_ >= 0) shared_.sums[share()][slot_][channel()] += sum_;
    sum_ = 0;
  }

  const SimilarityCall& call_;
  const SimilarityScratch& scratch_;
  const int sample_;
  Shared& shared_;
  int slot_ = -1;
  float sum_ = 0;
};

// With softmax: products of the coefficients of all words.
class AllWordsGradient {
 public:
  struct Shared {
    alignas(16) float coefficient[kTileWords][kRow];  // [word][cell]
  };

  __device__ AllWordsGradient(const SimilarityCall& call, const SimilarityScratch& scratch, int sample, int count, Shared& shared)
      : call_(call), scratch_(scratch), sample_(sample), shared_(shared) {
    const int groups = count > 0 ? padded(count) / kGroup : 1;
    shares_ = kSimilarityThreads / kWarp / groups;
    group_ = threadIdx.x / kWarp % groups;
    share_ = threadIdx.x / kWarp / groups;
  }

  // Zero where there is no cell or no word.
  __device__ __forceinline__ void stage(const GradientTile& tile, int first, int, unsigned real) {
    const int count = __popc(real), cell = first + int(threadIdx.x) % kBlockCells;
    for (int j = threadIdx.x / kBlockCells; j < padded(count); j += kSimilarityThreads / kBlockCells) {
      const bool exists = cell < call_.cells && j < count;
      shared_.coefficient[j][threadIdx.x % kBlockCells] =
          exists ? scratch_.coefficient[(int64_t(sample_) * call_.words + tile.index[j]) * call_.cells + cell] : 0.0f;
    }
  }

  // Of eight words in two channels, over a share of the cells.
  __device__ __forceinline__ void add_to_words(const GradientTile& tile) {
    if (share_ >= shares_) return;
    const int channel = threadIdx.x % kWarp;
#pragma unroll 1
    for (int cell = share_ * 4; cell < kBlockCells; cell += shares_ * 4) {
      const Pack<float, 4> v = load<4>(&tile.features[channel][feature_column(channel, cell)]);
      const Pack<float, 4> w = load<4>(&tile.features[channel + kWarp][feature_column(channel + kWarp, cell)]);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const Pack<float, 4> a = load<4>(&shared_.coefficient[group_ * kGroup + j][cell]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sums_[j][0] = multiply_add(a.value[k], v.value[k], sums_[j][0]);
          sums_[j][1] = multiply_add(a.value[k], w.value[k], sums_[j][1]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_to_features(FeatureGradient& gradient, const GradientTile& tile, int count) const {
#pragma unroll 2
    for (int j = 0; j < count; ++j) {
      const Pack<float, 4> a = load<4>(&shared_.coefficient[j][gradient.cell]), u = load<4>(&tile.words[j][gradient.channel]);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) gradient.value[c][k] = multiply_add(a.value[k], u.value[c], gradient.value[c][k]);
      }
    }
  }

  // The sum of all shares, one after the other: tile.features[word][channel]. Begins and ends with a barrier.
  __device__ void combine(GradientTile& tile, int) const {
    for (int turn = 0; turn < shares_; ++turn) {
      __syncthreads();
      if (turn != share_) continue;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& sum = tile.features[group_ * kGroup + j][threadIdx.x % kWarp + k * kWarp];
          sum = turn == 0 ? sums_[j][k] : sum + sums_[j][k];
        }
      }
    }
    __syncthreads();
  }

 private:
  static constexpr int kGroup = 8;  // words that a thread adds up
  static __device__ __forceinline__ int padded(int count) { return (count + kGroup - 1) / kGroup * kGroup; }

  const SimilarityCall& call_;
  const SimilarityScratch& scratch_;
  const int sample_;
  Shared& shared_;
  int group_, share_, shares_;
  float sums_[kGroup][2] = {};
};

}  // namespace aml::cuda
