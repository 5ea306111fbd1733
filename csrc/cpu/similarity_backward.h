// The backward loops of pixel_text_similarity: products once more, their coefficients, and both gradients in one reading
// of the features.
#pragma once

#include "features.h"
#include "lanes.h"

namespace aml::cpu {
namespace {

// From dot products to the coefficients of the gradient, a strip of pixels at a time: score[j] becomes that of unit word
// j in the gradient of the feature (and of the feature in that of the unit word), best that of the feature itself.
template <class T>
inline void tile_coefficients(const SimilarityCall<T>& call, int64_t words, const T* grad, int64_t count, Tile<T>& tile) {
  typedef Lanes<T> V;
  const int64_t pixels = tile.pixels, lanes = kLanes<T>, strips = tile.used(count) / lanes;
  const V zero, one(1), scale(call.scale);
  for (int64_t j = 0; j < words; ++j) tile.word_strips[j * (strips + 1)] = 0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t i = strip * lanes;
    T* score = tile.score + i;
    T padded[kLanes<T>] = {};
    for (int64_t lane = 0; lane < lanes && i + lane < count; ++lane) padded[lane] = grad[i + lane];
    const V g = load_lanes(padded), factor = load_lanes(tile.factor + i);
    const auto similarity = [&](int64_t j) { return scale * (load_lanes(score + j * pixels) * factor); };
    V best = similarity(0), best_word;
    for (int64_t j = 1; j < words; ++j) {
      const V s = similarity(j);
      best_word = select(s > best, V(j), best_word);
      best = select(s > best, s, best);
    }
    V total;
    for (int64_t j = 0; call.softmax && j < words; ++j) total += exp_nonpositive(similarity(j) - best);
    V along;
    int32_t* of_strip = tile.strip_words + strip * (words + 1);
    of_strip[0] = 0;
    for (int64_t j = 0; j < words; ++j) {
      V slope = select(best_word != V(j), zero, one);
      if (call.softmax) slope = (slope.v - exp_nonpositive(similarity(j) - best).v / total.v) / total.v;
      // 0 times infinity is no reason for NaN.
      const V coefficient = select((g != zero) & (slope != zero), g * slope * scale * factor, zero);
      const Mask<T> real = coefficient != zero;
      along += select(real, coefficient * load_lanes(score + j * pixels), zero);
      store(score + j * pixels, coefficient.v);
      if (!any(real)) continue;
      int32_t* of_word = tile.word_strips + j * (strips + 1);
      of_strip[++of_strip[0]] = int32_t(j);
      of_word[++of_word[0]] = int32_t(strip);
    }
    store(tile.best + i, call.normalize ? (-along * factor * factor).v : zero.v);
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

// gradient[c] += sum over the pixels of coefficient times feature[c], for N channels, from `channel` on, and one word.
template <int N, class T>
inline void word_gradient(const T* coefficients, const int32_t* strips, const Block<T>& block, int64_t channel, T* gradient) {
  Vector<T> sum[N] = {};
  const auto add = [&](int64_t i, const T* features, int64_t stride) {
    const Vector<T> coefficient = load(coefficients + i);
    for (int c = 0; c < N; ++c) sum[c] = multiply_add(coefficient, load(features + c * stride + i), sum[c]);
  };
  const int64_t last = strips[strips[0]] * kLanes<T>;
  const int32_t in_block = strips[0] - (last >= block.pixels);
  const int64_t stride = block.stride;
  const T* features = block.features + channel * stride;
  for (int32_t k = 1; k <= in_block; ++k) add(strips[k] * kLanes<T>, features, stride);
  if (last >= block.pixels) add(last, block.copies + channel * block.copies_stride, block.copies_stride);
  if constexpr (N == kLanes<T>) {
    store(gradient, load(gradient) + sums_of<T>(sum));
  } else {
    for (int c = 0; c < N; ++c) gradient[c] += horizontal_sum(sum[c]);
  }
}

// Both for N channels of a tile, from `channel` of the block on, M at a time. `gradient` is that of the first of them.
template <int N, int M, class T>
inline void channel_gradients(const SimilarityCall<T>& call, const Tile<T>& tile, const Block<T>& block, int64_t channel,
                              const T* panel, int64_t words, int64_t used, T* gradient) {
  const int64_t padded = padded_words(words), strips = used / kLanes<T>, in_block = block.pixels / kLanes<T>;
  for (int64_t c = channel; c < channel + N; c += M) {
    const auto add = [&](int64_t strip, const T* features, int64_t stride) {
      feature_gradient<M>(tile, tile.strip_words + strip * (words + 1), features + c * stride, stride, panel + c * padded,
                          padded, tile.out + c * tile.pixels, strip * kLanes<T>);
    };
    const T* features = block.features;
    const int64_t stride = block.stride;
    for (int64_t strip = 0; strip < in_block; ++strip) add(strip, features, stride);
    if (in_block < strips) add(in_block, block.copies, block.copies_stride);
  }
  for (int64_t j = 0; j < words; ++j) {
    const int32_t* of_word = tile.word_strips + j * (strips + 1);
    if (of_word[0]) word_gradient<N>(tile.score + j * tile.pixels, of_word, block, channel, gradient + j * call.channels);
  }
}

template <class T>
void similarity_backward(const SimilarityCall<T>& call, int64_t sample, const T* panel, int64_t words, int64_t first,
                         int64_t last, const T* grad, void* grad_visual, T* grad_text, T* scratch) {
  Tile<T> tile(call, true, scratch);
  const int64_t pixels = tile.pixels, lanes = kLanes<T>, grid = call.visual.rows * call.visual.columns;
  for (int64_t start = first; start < last; start += pixels) {
    const int64_t count = last - start < pixels ? last - start : pixels;
    const int64_t used = tile.used(count);
    tile_scores(call, sample, panel, words, start, count, tile);
    tile_coefficients(call, words, grad + start, count, tile);
    for (int64_t channel = 0; channel < call.channels; channel += kChannelBlock) {
      const int64_t size = call.channels - channel < kChannelBlock ? call.channels - channel : kChannelBlock;
      const Block<T> block(call, sample, channel, size, start, count, tile);
      const T* words_of_block = panel + channel * padded_words(words);
      for (int64_t c = 0; c < size;) {
        T* gradient = grad_text + channel + c;
        if (size - c >= lanes) {
          channel_gradients<kLanes<T>, (kLanes<T> < 8 ? kLanes<T> : 8)>(call, tile, block, c, words_of_block, words, used, gradient);
          c += lanes;
        } else {
          channel_gradients<1, 1>(call, tile, block, c, words_of_block, words, used, gradient);
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
void similarity_finish_text(const SimilarityCall<T>& call, int64_t sample, int64_t words, const int32_t* word_index,
                            const T* inverse_norm, T* row, T* grad_text, void* gradient) {
  int64_t k = 0;
  for (int64_t j = 0; j < call.words; ++j) {
    T* g = grad_text + k * call.channels;
    const bool real = k < words && word_index[k] == j;
    T* out = real ? g : grad_text + words * call.channels;  // one row more than there are words: zeros
    if (real && call.normalize) {
      const T* word = read_row(call.text, sample, j, 0, call.channels, row);
      const T inverse = inverse_norm[k], along = T(dot(g, word, call.channels) * inverse);
      for (int64_t c = 0; c < call.channels; ++c) g[c] = inverse * (g[c] - along * (word[c] * inverse));
    }
    write(out, call.channels, gradient, call.text.type, (sample * call.words + j) * call.channels);
    k += real;
  }
}

}  // namespace
}  // namespace aml::cpu
