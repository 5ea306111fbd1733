// The loops of pixel_text_similarity. A tile of pixels is multiplied with all words, 32 channels at a time: vectors run
// along the pixels, and the sums of up to 24 words stay in registers. The gradient is in similarity_backward.h.
#pragma once

#include "similarity_backward.h"

namespace aml::cpu {
namespace {

template <class T>
void similarity_forward(const SimilarityCall<T>& call, int64_t sample, const T* panel, int64_t words, int64_t first,
                        int64_t last, T* similarity, T* scratch) {
  Tile<T> tile(call, false, scratch);
  const int64_t pixels = tile.pixels;
  for (int64_t start = first; start < last; start += pixels) {
    const int64_t count = last - start < pixels ? last - start : pixels, used = tile.used(count);
    tile_scores(call, sample, panel, words, start, count, tile);
    for (int64_t j = 0; j < words; ++j) {
      T* score = tile.score + j * pixels;
      for (int64_t i = 0; i < used; ++i) {
        score[i] = call.scale * (score[i] * tile.factor[i]);
        // NaN, which no comparison finds, stays.
        tile.best[i] = (j == 0) | (score[i] > tile.best[i]) | (score[i] != score[i]) ? score[i] : tile.best[i];
      }
    }
    if (call.softmax) {
      T* total = tile.features;
      for (int64_t i = 0; i < used; ++i) total[i] = 0;
      for (int64_t j = 0; j < words; ++j) {
        const T* score = tile.score + j * pixels;
        for (int64_t i = 0; i < used; ++i) total[i] += exp_nonpositive(score[i] - tile.best[i]);
      }
      for (int64_t i = 0; i < used; ++i) tile.best[i] = T(1) / total[i];
    }
    for (int64_t i = 0; i < count; ++i) similarity[start + i] = tile.best[i];
  }
}

template <class T>
constexpr SimilarityKernels<T> similarity_table() {
  return {Tile<T>::elements, similarity_prepare<T>, similarity_forward<T>, similarity_backward<T>, similarity_finish_text<T>};
}

}  // namespace
}  // namespace aml::cpu
