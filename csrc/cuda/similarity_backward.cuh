// Gradients of pixel_text_similarity, in two launches that read `visual` once each.
//
//   similarity_coefficients   compares again and writes, per cell, what its gradient depends on: the chosen word and its
//                             coefficient (with softmax the coefficients of all words), and that of the feature itself
//   similarity_gradients      a block takes 64 channels of a sample: every cell's gradient is local to it, and the words'
//                             gradients are sums over the cells, in registers; the sample's last block finishes them
//
// With unit words u, coefficients a and b = -sum_j a_j <v, u_j> / |v|^2:  d v = sum_j a_j u_j + b v;  d u_j = sum_cells a_j v.
#pragma once

#include "similarity_coefficients.cuh"

namespace aml::cuda {

constexpr int kWordGroup = 8;  // a thread adds up the gradients of one group

struct GradientTile {
  alignas(16) float features[kBlockChannels][kRow];  // [channel][feature_column]; in the end [word][channel]: sums
  alignas(16) float words[kTileWords][kRow];        // [word][channel], unit vectors
  alignas(16) float coefficient[kTileWords][kRow];  // [word][cell]
  alignas(16) float along[kBlockCells];
  int32_t index[kTileWords];
  bool last;
};

// Dynamic: for fp32 it is more than a kernel may have without asking.
template <class T>
struct GradientShared {
  GradientTile tile;
  RawFeatures<T> raw;  // of the next tile, on their way
};
static_assert(2 * (sizeof(GradientShared<float>) + 1024) <= 164 * 1024, "two blocks on sm_80, which takes 1 KB of each");

__device__ __forceinline__ int padded(int count) { return (count + kWordGroup - 1) / kWordGroup * kWordGroup; }

// The listed words' coefficients for the cells from `first` on; zero where there is no cell or no word.
__device__ inline void stage_coefficients(const SimilarityCall& call, const SimilarityScratch& scratch, int sample,
                                          int first, int count, GradientTile& tile) {
  const int cell = first + int(threadIdx.x) % kBlockCells;
  const int64_t cells = call.cells, at = sample * cells + cell;
  const bool exists = cell < cells;
  const int32_t word = exists && !call.softmax ? scratch.word[at] : -1;
  const float coefficient = exists && !call.softmax ? scratch.coefficient[at] : 0.0f;
  for (int j = threadIdx.x / kBlockCells; j < padded(count); j += kSimilarityThreads / kBlockCells) {
    float value = 0;
    if (exists && j < count) {
      value = call.softmax ? scratch.coefficient[(int64_t(sample) * call.words + tile.index[j]) * cells + cell]
          : word == tile.index[j] ? coefficient : 0.0f;
    }
    tile.coefficient[j][threadIdx.x % kBlockCells] = value;
  }
  if (threadIdx.x < kBlockCells) tile.along[threadIdx.x] = exists ? scratch.along[at] : 0.0f;
}

__device__ __forceinline__ float unit_word(const SimilarityCall& call, const SimilarityScratch& scratch, int sample,
                                           int word, int channel) {
  return load_element(call.text, sample, word, channel) * scratch.inverse_norm[int64_t(sample) * call.words + word];
}

// Unit vectors of the listed words, 64 channels from `channel` on.
__device__ inline void stage_words(const SimilarityCall& call, const SimilarityScratch& scratch, int sample, int channel,
                                   int count, GradientTile& tile) {
  const int c = channel + threadIdx.x % kBlockChannels;
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

  __device__ __forceinline__ void add(const GradientTile& tile, int count) {
#pragma unroll 2
    for (int j = 0; j < count; ++j) {
      const Pack<float, 4> a = load<4>(&tile.coefficient[j][cell]), u = load<4>(&tile.words[j][channel]);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) value[c][k] = multiply_add(a.value[k], u.value[c], value[c][k]);
      }
    }
  }

  template <class T>
  __device__ void write(const SimilarityBackwardCall& backward, int sample, int first, int first_channel) const {
    const int cells = backward.forward.cells, channels = backward.forward.channels;
    T* out = static_cast<T*>(backward.grad_visual) + int64_t(sample) * cells * channels;
    const int length = backward.channels_first ? cells : channels;  // of the contiguous axis
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
};

// The gradient of eight unit words in two channels, summed over a share of the cells.
struct WordGradient {
  float value[kWordGroup][2] = {};
  int group, share, shares, channel;

  __device__ WordGradient(int count) {
    const int groups = count > 0 ? padded(count) / kWordGroup : 1;
    shares = kSimilarityThreads / kWarp / groups;
    group = threadIdx.x / kWarp % groups;
    share = threadIdx.x / kWarp / groups;
    channel = threadIdx.x % kWarp;
  }

  __device__ __forceinline__ void add(const GradientTile& tile) {
    if (share >= shares) return;
#pragma unroll 1
    for (int cell = share * 4; cell < kBlockCells; cell += shares * 4) {
      const Pack<float, 4> v = load<4>(&tile.features[channel][feature_column(channel, cell)]);
      const Pack<float, 4> w = load<4>(&tile.features[channel + kWarp][feature_column(channel + kWarp, cell)]);
#pragma unroll
      for (int j = 0; j < kWordGroup; ++j) {
        const Pack<float, 4> a = load<4>(&tile.coefficient[group * kWordGroup + j][cell]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          value[j][0] = multiply_add(a.value[k], v.value[k], value[j][0]);
          value[j][1] = multiply_add(a.value[k], w.value[k], value[j][1]);
        }
      }
    }
  }

  // The sum of all shares, one after the other: tile.features[word][channel]. Begins and ends with a barrier.
  __device__ void combine(GradientTile& tile) const {
    for (int turn = 0; turn < shares; ++turn) {
      __syncthreads();
      if (turn != share) continue;
#pragma unroll
      for (int j = 0; j < kWordGroup; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& sum = tile.features[group * kWordGroup + j][channel + k * kWarp];
          sum = turn == 0 ? value[j][k] : sum + value[j][k];
        }
      }
    }
    __syncthreads();
  }
};

__device__ inline void store_element(void* data, Type type, int64_t offset, float value) {
  switch (type) {
    case Type::f32: static_cast<float*>(data)[offset] = value; return;
    case Type::bf16: static_cast<bf16*>(data)[offset] = from_float<bf16>(value); return;
    default: static_cast<f16*>(data)[offset] = from_float<f16>(value);
  }
}

// Adds up the parts of a sample's words, and goes through their normalisation. A warp takes one word after the other.
__device__ inline void finish_words(const SimilarityBackwardCall& backward, const SimilarityScratch& scratch, int sample) {
  const SimilarityCall& call = backward.forward;
  const int64_t words = call.words, channels = call.channels, parts = backward.parts;
  for (int word = threadIdx.x / kWarp; word < words; word += kSimilarityThreads / kWarp) {
    const bool real = call.is_word(sample, word);
    const float norm = real ? scratch.inverse_norm[sample * words + word] : 0.0f;
    auto sum = [&](int channel) {
      float total = 0;
      for (int part = 0; part < parts; ++part) total += __ldcg(&scratch.sum[((sample * parts + part) * words + word) * channels + channel]);
      return total;
    };
    float along = 0;
    for (int c = threadIdx.x % kWarp; real && call.normalize && c < channels; c += kWarp) {
      along = multiply_add(sum(c), unit_word(call, scratch, sample, word, c), along);
    }
    along = warp_sum(along);
    for (int c = threadIdx.x % kWarp; c < channels; c += kWarp) {
      float gradient = real ? sum(c) : 0.0f;
      if (real && call.normalize) gradient = norm * (gradient - along * unit_word(call, scratch, sample, word, c));
      store_element(backward.grad_text, call.text.type, (sample * words + word) * channels + c, gradient);
    }
  }
}

// Blocks of a sample: word blocks x parts x channel blocks. With more than kTileWords words the first word block's
// blocks write the cells' gradients, from all words, and every word block sums those of its own words.
template <class T>
__global__ void __launch_bounds__(kSimilarityThreads, 2) similarity_gradients(SimilarityBackwardCall backward, SimilarityScratch scratch) {
  AML_DYNAMIC_SHARED(GradientShared<T>, shared);
  GradientTile& tile = shared->tile;
  const SimilarityCall& call = backward.forward;
  const int word_blocks = backward.word_blocks, parts = backward.parts;
  const int channel = int(blockIdx.x) % backward.channel_blocks * kBlockChannels;
  int block = int(blockIdx.x) / backward.channel_blocks;
  const int part = block % parts;
  block /= parts;
  const int own = block % word_blocks;
  const int sample = block / word_blocks;

  const int tiles = call.blocks_of(kBlockCells), share = (tiles + parts - 1) / parts;
  const int first_tile = part * share, last_tile = min(first_tile + share, tiles);
  const int own_count = list_words(call, sample, own * kTileWords, tile.index);
  WordGradient word_gradient(own_count);
  FeatureBlock<T> features(call, sample);
  if (first_tile < last_tile) features.fetch(shared->raw, first_tile * kBlockCells, channel);
  for (int t = first_tile; t < last_tile; ++t) {
    const int first = t * kBlockCells;
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();  // the tile is done with, and the next features are here
    if (word_blocks > 1) list_words(call, sample, own * kTileWords, tile.index);
    if (own == 0 && (t == first_tile || word_blocks > 1)) stage_words(call, scratch, sample, channel, own_count, tile);
    stage_coefficients(call, scratch, sample, first, own_count, tile);
    features.put(shared->raw, first, tile.features);
    __syncthreads();
    if (t + 1 < last_tile) features.fetch(shared->raw, first + kBlockCells, channel);
    if (own_count > 0) word_gradient.add(tile);
    if (own > 0) continue;
    FeatureGradient gradient(tile);
    gradient.add(tile, own_count);
    for (int w = 1; w < word_blocks; ++w) {
      __syncthreads();
      const int count = list_words(call, sample, w * kTileWords, tile.index);
      stage_words(call, scratch, sample, channel, count, tile);
      stage_coefficients(call, scratch, sample, first, count, tile);
      __syncthreads();
      gradient.add(tile, count);
    }
    gradient.template write<T>(backward, sample, first, channel);
  }

  word_gradient.combine(tile);
  const int own_listed = word_blocks == 1 ? own_count : list_words(call, sample, own * kTileWords, tile.index);
  for (int i = threadIdx.x; i < own_listed * kBlockChannels; i += kSimilarityThreads) {
    const int j = i / kBlockChannels, c = i % kBlockChannels;
    if (channel + c < call.channels) {
      scratch.sum[((int64_t(sample) * parts + part) * call.words + tile.index[j]) * call.channels + channel + c] = tile.features[j][c];
    }
  }
  // The last block of a sample sees what all have written.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t blocks = uint32_t(backward.channel_blocks * parts * word_blocks);
    tile.last = atomicAdd(&scratch.done[sample], 1u) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (tile.last) finish_words(backward, scratch, sample);
}

// Two launches; `scratch` divided up for this call.
template <class T>
cudaError_t launch_similarity_backward(const SimilarityBackwardCall& call, const SimilarityScratch& scratch, cudaStream_t stream) {
  const dim3 threads(kSimilarityThreads);
  const int64_t tiles = call.samples * call.forward.blocks_of(kTileCells);
  const cudaError_t error = AML_LAUNCH(dim3(unsigned(tiles)), threads, 0, stream, similarity_coefficients<T>, call, scratch);
  if (error != cudaSuccess) return error;
  const int64_t blocks = call.samples * call.word_blocks * call.parts * call.channel_blocks;
  return AML_LAUNCH(dim3(unsigned(blocks)), threads, sizeof(GradientShared<T>), stream, similarity_gradients<T>, call, scratch);
}

}  // namespace aml::cuda
