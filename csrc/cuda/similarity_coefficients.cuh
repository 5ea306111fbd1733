// The first launch of pixel_text_similarity's backward: compares again and writes, per cell, what the gradients depend on.
// What both launches need is here too.
#pragma once

#include "similarity.cuh"

namespace aml::cuda {

struct SimilarityBackwardCall {
  SimilarityCall forward;
  int64_t samples;
  const float* grad;  // contiguous [samples, cells]
  void* grad_visual;  // contiguous [samples, channels, cells], or [samples, cells, channels] where not `channels_first`
  bool channels_first;
  void* grad_text;  // contiguous, of the type of `text`
  int channel_blocks, word_blocks, parts;  // of the second launch; divide() sets them

  // The cells of a sample are divided into parts where samples and channels alone are too few blocks. By shape only, so
  // that sums are the same on every device.
  void divide() {
    channel_blocks = (forward.channels + kBlockChannels - 1) / kBlockChannels;
    word_blocks = (forward.words + kTileWords - 1) / kTileWords;
    const int64_t wanted = 512 / (samples * channel_blocks * word_blocks);
    parts = wanted < 1 ? 1 : int(wanted < forward.blocks_of(kBlockCells) ? wanted : forward.blocks_of(kBlockCells));
  }
};

// Memory between the launches: 4-byte numbers, not initialised.
struct SimilarityScratch {
  int32_t* word;        // [samples, cells]; none with softmax
  float* coefficient;   // [samples, cells]; with softmax [samples, words, cells]
  float* along;         // [samples, cells]
  float* inverse_norm;  // [samples, words]
  float* sum;           // [samples, parts, words, channels]
  uint32_t* done;       // [samples]: blocks that have added up their share

  // Divides up `memory`; returns how many numbers that takes.
  int64_t divide(const SimilarityBackwardCall& call, float* memory) {
    const int64_t b = call.samples, cells = call.forward.cells, words = call.forward.words;
    int64_t used = 0;
    auto take = [&](int64_t count) { return memory + (used += count) - count; };
    word = reinterpret_cast<int32_t*>(take(call.forward.softmax ? 0 : b * cells));
    coefficient = take(b * cells * (call.forward.softmax ? words : 1));
    along = take(b * cells);
    inverse_norm = take(b * words);
    sum = take(b * call.parts * words * call.forward.channels);
    done = reinterpret_cast<uint32_t*>(take(b));
    return used;
  }
};

template <class T>
__global__ void __launch_bounds__(kSimilarityThreads, 2) similarity_coefficients(SimilarityBackwardCall backward, SimilarityScratch scratch) {
  AML_SHARED(tile, ComparisonTile);
  const SimilarityCall& call = backward.forward;
  const int tiles = call.blocks_of(kTileCells), sample = int(blockIdx.x) / tiles, words = call.words;
  const int64_t cells = call.cells;
  const int first = int(blockIdx.x) % tiles * kTileCells, cell = first + int(threadIdx.x);
  // With softmax, [words] x cells apart. Found anew where it is used: kept, it would cost registers in the comparison.
  const auto products = [&] { return scratch.coefficient + int64_t(sample) * words * cells + cell; };
  float norm = 0;
  BestWord best;
  for (int word = 0; word < words; word += kTileWords) {
    const int count = compare_words<T>(call, sample, first, word, tile);
    if (threadIdx.x < kTileCells && count > 0) {  // whether there is a cell or not
      norm = inverse_norm_of_cell(call, tile.square(threadIdx.x));
      best.update(call, tile, count, norm);
      for (int j = 0; call.softmax && cell < cells && j < count; ++j) products()[tile.index[j] * cells] = tile.product(j, threadIdx.x);
    }
    if (first == 0 && int(threadIdx.x) < count) {
      scratch.inverse_norm[int64_t(sample) * words + tile.index[threadIdx.x]] = call.normalize ? tile.inverse_norm[threadIdx.x] : 1.0f;
    }
    __syncthreads();  // the tile's memory is free again
  }
  if (first == 0 && threadIdx.x == 0) scratch.done[sample] = 0;
  if (threadIdx.x >= kTileCells || cell >= cells) return;

  const int64_t at = sample * cells + cell;
  const float grad = best.word < 0 ? 0.0f : backward.grad[at];
  float along = 0;
  if (call.softmax) {
    for (int word = 0; word < words; ++word) {
      if (!call.is_word(sample, word)) continue;
      float& product = products()[word * cells];
      const float share = exp_nonpositive(BestWord::score_of(call, product, norm) - best.score) / best.total;
      const float slope = ((word == best.word ? 1.0f : 0.0f) - share) / best.total;
      const float coefficient = grad == 0 || slope == 0 ? 0.0f : grad * slope * call.scale * norm;
      if (coefficient != 0) along += coefficient * product;
      product = coefficient;
    }
  } else {
    const float coefficient = grad == 0 ? 0.0f : grad * call.scale * norm;
    if (coefficient != 0) along = coefficient * best.dot;
    scratch.word[at] = best.word;
    scratch.coefficient[at] = coefficient;
  }
  scratch.along[at] = call.normalize ? -along * norm * norm : 0.0f;
}

}  // namespace aml::cuda
