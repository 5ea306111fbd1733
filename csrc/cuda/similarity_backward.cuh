// Gradients of pixel_text_similarity, in two launches that read `visual` once each.
//
//   similarity_coefficients   compares again and writes, per cell, what its gradient depends on: the chosen word and its
//                             coefficient (with softmax the coefficients of all words), and that of the feature itself
//   similarity_gradients      a block takes 64 channels of a sample: every cell's gradient is local to it, and the words'
//                             gradients are sums over the cells; the sample's last block finishes them
//
// With unit words u, coefficients a and b = -sum_j a_j <v, u_j> / |v|^2:  d v = sum_j a_j u_j + b v;  d u_j = sum_cells a_j v.
#pragma once

#include "similarity_gradient_ways.cuh"

namespace aml::cuda {

// Dynamic: it is more than a kernel may have without asking.
template <class T, class Way>
struct GradientShared {
  GradientTile tile;
  typename Way::Shared way;
  RawFeatures<T> raw;  // of the next tile, on their way
};
static_assert(2 * (sizeof(GradientShared<float, BestWordGradient>) + 1024) <= 164 * 1024, "two blocks on sm_80, which takes 1 KB of each");

__device__ inline void store_element(void* data, Type type, int64_t offset, float value) {
  switch (type) {
    case Type::f32: static_cast<float*>(data)[offset] = value; return;
    case Type::bf16: static_cast<bf16*>(data)[offset] = from_float<bf16>(value); return;
    default: static_cast<f16*>(data)[offset] = from_float<f16>(value);
  }
}

// Adds up the parts of a sample's words, and goes through their normalisation. A warp takes one word after the other, and
// a lane several channels at once: one by one, it would wait for each.
__device__ inline void finish_words(const SimilarityBackwardCall& backward, const SimilarityScratch& scratch, int sample) {
  constexpr int kAtOnce = 8;
  const SimilarityCall& call = backward.forward;
  const int64_t words = call.words, channels = call.channels;
  for (int word = threadIdx.x / kWarp; word < words; word += kSimilarityThreads / kWarp) {
    const bool real = call.is_word(sample, word);
    const float norm = real ? scratch.inverse_norm[sample * words + word] : 0.0f;
    const auto visit = [&](auto f) {  // f(channel, sum, number of the unit word)
      for (int64_t first = threadIdx.x % kWarp; first < channels; first += kAtOnce * kWarp) {
        float sum[kAtOnce] = {}, unit[kAtOnce] = {};
        if (real && call.normalize) {
          with_float_type(call.text.type, call.text.data, [&](auto text) {
            text += sample * call.text.sample_stride + word * call.text.row_stride;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
              if (first + i * kWarp < channels) unit[i] = to_float(text[(first + i * kWarp) * call.text.column_stride]);
            }
          });
        }
        for (int64_t part = 0; real && part < backward.parts; ++part) {
          const float* from = scratch.sum + ((sample * backward.parts + part) * words + word) * channels + first;
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) sum[i] += first + i * kWarp < channels ? __ldcg(from + i * kWarp) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i * kWarp < channels) f(first + i * kWarp, sum[i], unit[i] * norm);
        }
      }
    };
    float along = 0;
    if (real && call.normalize) visit([&](int64_t, float sum, float unit) { along = multiply_add(sum, unit, along); });
    along = warp_sum(along);
    visit([&](int64_t channel, float sum, float unit) {
      const float gradient = real && call.normalize ? norm * (sum - along * unit) : sum;
      store_element(backward.grad_text, call.text.type, (sample * words + word) * channels + channel, gradient);
    });
  }
}

// Blocks of a sample: word blocks x parts x channel blocks. With more than kTileWords words the first word block's
// blocks write the cells' gradients, from all words, and every word block sums those of its own words.
template <class T, class Way>
__global__ void __launch_bounds__(kSimilarityThreads, 2) similarity_gradients(SimilarityBackwardCall backward, SimilarityScratch scratch) {
  using Shared = GradientShared<T, Way>;
  AML_DYNAMIC_SHARED(Shared, shared);
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
  FeatureBlock<T> features(call, sample);
  if (first_tile < last_tile) features.fetch(shared->raw, first_tile * kBlockCells, channel);
  const unsigned own_words = list_words(call, sample, own * kTileWords, tile.index);
  const int own_count = __popc(own_words);
  Way way(call, scratch, sample, own_count, shared->way);
  for (int t = first_tile; t < last_tile; ++t) {
    const int first = t * kBlockCells;
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();  // the tile is done with, and the next features are here
    if (word_blocks > 1) list_words(call, sample, own * kTileWords, tile.index);
    if (own == 0 && (t == first_tile || word_blocks > 1)) stage_words(call, scratch, sample, channel, own_count, tile);
    way.stage(tile, first, own * kTileWords, own_words);
    if (threadIdx.x < kBlockCells) {
      const int cell = first + int(threadIdx.x);
      tile.along[threadIdx.x] = cell < call.cells ? scratch.along[int64_t(sample) * call.cells + cell] : 0.0f;
    }
    features.put(shared->raw, first, tile.features);
    __syncthreads();
    if (t + 1 < last_tile) features.fetch(shared->raw, first + kBlockCells, channel);
    if (own_count > 0) way.add_to_words(tile);
    if (own > 0) continue;
    FeatureGradient gradient(tile);
    way.add_to_features(gradient, tile, own_count);
    for (int w = 1; w < word_blocks; ++w) {
      __syncthreads();
      const unsigned others = list_words(call, sample, w * kTileWords, tile.index);
      stage_words(call, scratch, sample, channel, __popc(others), tile);
      way.stage(tile, first, w * kTileWords, others);
      __syncthreads();
      way.add_to_features(gradient, tile, __popc(others));
    }
    gradient.template write<T>(backward, sample, first, channel, tile);
  }

  way.combine(tile, own_count);
  if (word_blocks > 1) list_words(call, sample, own * kTileWords, tile.index);
  for (int i = threadIdx.x; i < own_count * kBlockChannels; i += kSimilarityThreads) {
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
  const dim3 blocks(unsigned(call.samples * call.word_blocks * call.parts * call.channel_blocks));
  if (call.forward.softmax) {
    using Way = AllWordsGradient;
    return AML_LAUNCH(blocks, threads, sizeof(GradientShared<T, Way>), stream, similarity_gradients<T, Way>, call, scratch);
  }
  using Way = BestWordGradient;
  return AML_LAUNCH(blocks, threads, sizeof(GradientShared<T, Way>), stream, similarity_gradients<T, Way>, call, scratch);
}

}  // namespace aml::cuda
