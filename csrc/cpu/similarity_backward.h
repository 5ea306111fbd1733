// The backward loops of pixel_text_similarity: products once more, their coefficients, and both gradients in one reading
// of the features.
#pragma once

#include "features.h"

namespace aml::cpu {
namespace {

// From dot products to the coefficients of the gradient: score[j] becomes that of unit word j in the gradient of the
// feature (and of the feature in that of the unit word), best that of the feature itself.
template <class T>
inline void tile_coefficients(const SimilarityCall<T>& call, int64_t words, const T* grad, int64_t count, Tile<T>& tile) {
  const int64_t pixels = tile.pixels, used = tile.used(count), lanes = kLanes<T>;
  for (int64_t i = 0; i < used; ++i) {
    const T factor = tile.factor[i], g = i < count ? grad[i] : T(0);
    T* score = tile.score + i;
    int64_t word = 0;
    T best = call.scale * (score[0] * factor);
    for (int64_t j = 1; j < words; ++j) {
      const T s = call.scale * (score[j * pixels] * factor);
      if (s > best) best = s, word = j;
    }
    T total = 0;
    for (int64_t j = 0; call.softmax && j < words; ++j) {
      total += exp_nonpositive(call.scale * (score[j * pixels] * factor) - best);
    }
    T along = 0;
    for (int64_t j = 0; j < words; ++j) {
      T slope = j == word ? T(1) : T(0);
      if (call.softmax) slope = (slope - exp_nonpositive(call.scale * (score[j * pixels] * factor) - best) / total) / total;
      const T coefficient = g == 0 || slope == 0 ? T(0) : g * slope * call.scale * factor;
      if (coefficient != 0) along += coefficient * score[j * pixels];
      score[j * pixels] = coefficient;
    }
    tile.best[i] = call.normalize ? -along * factor * factor : T(0);
  }
  const int64_t strips = used / lanes;
  for (int64_t strip = 0; strip < strips; ++strip) tile.strip_words[strip * (words + 1)] = 0;
  for (int64_t j = 0; j < words; ++j) {
    int32_t* of_word = tile.word_strips + j * (strips + 1);
    of_word[0] = 0;
    for (int64_t strip = 0; strip < strips; ++strip) {
      bool any = false;
      for (int64_t lane = 0; lane < lanes; ++lane) any |= tile.score[j * pixels + strip * lanes + lane] != 0;
      if (!any) continue;
      int32_t* of_strip = tile.strip_words + strip * (words + 1);
      of_strip[++of_strip[0]] = int32_t(j);
      of_word[++of_word[0]] = int32_t(strip);
    }
  }
}

// out[c] = sum_j coefficient_j word_j[c] + best feature[c], for N channels of a strip of pixels.
template <int N, class T>
inline void feature_gradient(const Tile<T>& tile, const int32_t* words, const T* features, int64_t stride, const T* panel,
                             int64_t padded, T* out, int64_t i) {
  Vector<T> g[N];
  const Vector<T> along = load(tile.best + i);
  for (int c = 0; c < N; ++c) g[c] = along * load(features + c * stride + i);
  for (int32_t k = 1; k <= words[0]; ++k) {
    const Vector<T> coefficient = load(tile.score + words[k] * tile.pixels + i);
    for (int c = 0; c < N; ++c) g[c] = multiply_add(coefficient, spread(panel[c * padded + words[k]]), g[c]);
  }
  for (int c = 0; c < N; ++c) store(out + c * tile.pixels + i, g[c]);
}

// gradient[c] += sum over the pixels of coefficient times feature[c], for N channels and one word.
template <int N, class T>
inline void word_gradient(const T* coefficients, const int32_t* strips, const T* features, int64_t stride, T* gradient) {
  Vector<T> sum[N] = {};
  for (int32_t k = 1; k <= strips[0]; ++k) {
    const int64_t i = strips[k] * kLanes<T>;
    const Vector<T> coefficient = load(coefficients + i);
    for (int c = 0; c < N; ++c) sum[c] = multiply_add(coefficient, load(features + c * stride + i), sum[c]);
  }
  if constexpr (N == kLanes<T>) {
    store(gradient, load(gradient) + sums_of<T>(sum));
  } else {
    for (int c = 0; c < N; ++c) gradient[c] += horizontal_sum(sum[c]);
  }
}

// Both for N channels of a tile, M at a time. `out` and `gradient` are those of the first of these channels.
template <int N, int M, class T>
inline void channel_gradients(const SimilarityCall<T>& call, const Tile<T>& tile, const T* features, int64_t stride,
                              const T* panel, int64_t words, int64_t used, T* out, T* gradient) {
  const int64_t padded = padded_words(words), strips = used / kLanes<T>;
  for (int c = 0; c < N; c += M) {
    for (int64_t strip = 0; strip < strips; ++strip) {
      feature_gradient<M>(tile, tile.strip_words + strip * (words + 1), features + c * stride, stride, panel + c * padded,
                          padded, out + c * tile.pixels, strip * kLanes<T>);
    }
  }
  for (int64_t j = 0; j < words; ++j) {
    const int32_t* of_word = tile.word_strips + j * (strips + 1);
    if (of_word[0]) word_gradient<N>(tile.score + j * tile.pixels, of_word, features, stride, gradient + j * call.channels);
  }
}

template <class T>
void similarity_backward(const SimilarityCall<T>& call, int64_t sample, const T* panel, int64_t words, int64_t first,
                         int64_t last, const T* grad, void* grad_visual, T* grad_text, T* scratch) {
  Tile<T> tile(call, true, scratch);
  const int64_t padded = padded_words(words), pixels = tile.pixels, lanes = kLanes<T>;
  const int64_t grid = call.visual.rows * call.visual.columns;
  int64_t count;
  for (int64_t start = first; start < last; start += count) {
    count = tile_count(call, last - start);
    const int64_t used = tile.used(count);
    tile_scores(call, sample, panel, words, start, count, tile);
    tile_coefficients(call, words, grad + start, count, tile);
    for (int64_t channel = 0; channel < call.channels; channel += kChannelBlock) {
      const int64_t size = call.channels - channel < kChannelBlock ? call.channels - channel : kChannelBlock;
      int64_t stride;
      const T* features = block_features(call, sample, channel, size, start, count, tile, stride);
      for (int64_t c = 0; c < size;) {
        const T* feature = features + c * stride;
        const T* word = panel + (channel + c) * padded;
        T* out = tile.out + c * pixels;
        T* gradient = grad_text + channel + c;
        if (size - c >= lanes) {
          channel_gradients<kLanes<T>, (kLanes<T> < 4 ? kLanes<T> : 4)>(call, tile, feature, stride, word, words, used, out, gradient);
          c += lanes;
        } else {
          channel_gradients<1, 1>(call, tile, feature, stride, word, words, used, out, gradient);
          c += 1;
        }
      }
      if (call.gradient_channels_first) {
        for (int64_t c = 0; c < size; ++c) {
          write(tile.out + c * pixels, count, grad_visual, call.visual.type, (sample * call.channels + channel + c) * grid + start);
        }
      } else {
        T strip[kLanes<T> * kChannelBlock];
        for (int64_t i = 0; i < count; i += lanes) {
          for (int64_t c = 0; c < kChannelBlock; c += lanes) transpose_square(tile.out + c * pixels + i, pixels, strip + c, kChannelBlock);
          for (int64_t lane = 0; lane < lanes && i + lane < count; ++lane) {
            write(strip + lane * kChannelBlock, size, grad_visual, call.visual.type,
                  (sample * grid + start + i + lane) * call.channels + channel);
          }
        }
      }
    }
  }
}

// Through the normalisation of the words, and to where the real words stand in `text`.
template <class T>
void similarity_finish_text(const SimilarityCall<T>& call, int64_t sample, const T* panel, int64_t words,
                            const int32_t* word_index, const T* inverse_norm, T* grad_text, void* gradient) {
  const int64_t padded = padded_words(words);
  int64_t k = 0;
  for (int64_t j = 0; j < call.words; ++j) {
    T* g = grad_text + k * call.channels;
    const bool real = k < words && word_index[k] == j;
    T* out = real ? g : grad_text + words * call.channels;  // one row more than there are words: zeros
    if (real && call.normalize) {
      const T along = T(dot(g, panel + k, padded, call.channels));
      for (int64_t c = 0; c < call.channels; ++c) g[c] = inverse_norm[k] * (g[c] - along * panel[c * padded + k]);
    }
    write(out, call.channels, gradient, call.text.type, (sample * call.words + j) * call.channels);
    k += real;
  }
}

}  // namespace
}  // namespace aml::cpu
