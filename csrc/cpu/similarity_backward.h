// The backward loops of pixel_text_similarity: products once more, their coefficients, and both gradients in one reading
// of the features.
#pragma once

#include "features.h"
#include "lanes.h"

namespace aml::cpu {
namespace {

// From dot products to what the gradients are made of, a strip of pixels at a time. Of the largest similarity, each
// pixel's word and the coefficient of that unit word in the gradient of the feature (and of the feature in that of the
// word); with softmax such a coefficient for every word, in score[j]. In best, the coefficient of the feature itself.
template <class T>
inline void tile_coefficients(const SimilarityCall<T>& call, int64_t words, const T* grad, int64_t count, Tile<T>& tile) {
  typedef Lanes<T> V;
  const int64_t pixels = tile.pixels, lanes = kLanes<T>, strips = tile.used(count) / lanes;
  const V zero, one(1), scale(call.scale);
  tile.active[0] = 0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t i = strip * lanes;
    T* score = tile.score + i;
    T padded[kLanes<T>] = {};
    for (int64_t lane = 0; lane < lanes && i + lane < count; ++lane) padded[lane] = grad[i + lane];
    const V g = load_lanes(padded), factor = load_lanes(tile.factor + i);
    const auto similarity = [&](int64_t j) { return scale * (load_lanes(score + j * pixels) * factor); };
    V best = similarity(0), best_word, best_score = load_lanes(score);
    for (int64_t j = 1; j < words; ++j) {
      const V s = similarity(j);
      const Mask<T> better = (s > best) | (s != s);
      best_word = select(better, V(j), best_word);
      best_score = select(better, load_lanes(score + j * pixels), best_score);
      best = select(better, s, best);
    }
    // 0 times infinity is no reason for NaN.
    const Mask<T> real = g != zero;
    if (any(real)) tile.active[++tile.active[0]] = int32_t(strip);
    V along;
    if (call.softmax) {
      V total;
      for (int64_t j = 0; j < words; ++j) total += exp_nonpositive(similarity(j) - best);
      for (int64_t j = 0; j < words; ++j) {
        const V first = select(best_word != V(j), zero, one);
        const V slope = (first.v - exp_nonpositive(similarity(j) - best).v / total.v) / total.v;
        const V coefficient = select(real & (slope != zero), g * slope * scale * factor, zero);
        along += select(coefficient != zero, coefficient * load_lanes(score + j * pixels), zero);
        store(score + j * pixels, coefficient.v);
      }
    } else {
      const V coefficient = select(real, g * scale * factor, zero);
      along = select(coefficient != zero, coefficient * best_score, zero);
      store(tile.coefficient + i, coefficient.v);
      store(tile.word + i, __builtin_convertvector(best_word.v, Indices<T>));
    }
    store(tile.best + i, call.normalize ? (-along * factor * factor).v : zero.v);
  }
}

// Where the gradient of a block's features goes: whole strips to where they belong if they are T, the rest by way of
// the tile.
template <class T>
struct BlockGradient {
  BlockGradient(const SimilarityCall<T>& call, int64_t sample, int64_t channel, int64_t first, int64_t count,
                const Tile<T>& tile, void* grad_visual)
      : tile(tile), grid(call.visual.rows * call.visual.columns) {
    if (!call.gradient_channels_first || call.visual.type != native_type<T>) return;
    out = (T*)grad_visual + (sample * call.channels + channel) * grid + first;
    pixels = count / kLanes<T> * kLanes<T>;
  }
  AML_MEMBER T* row(int64_t channel, int64_t i) const {
    return i < pixels ? out + channel * grid + i : tile.out + channel * tile.pixels + i;
  }

  const Tile<T>& tile;
  const int64_t grid;
  T* out = nullptr;
  int64_t pixels = 0;
};

// gradient[c] = coefficient word[c] + best feature[c], for M channels. The words' c-th elements are a table in two
// registers, from which each pixel picks that of its word.
template <int M, class T>
inline void best_feature_gradient(const Tile<T>& tile, const Block<T>& block, int64_t channel, const T* panel, int64_t words,
                                  int64_t used, const BlockGradient<T>& gradient) {
  constexpr int64_t lanes = kLanes<T>, entries = 2 * lanes;
  const int64_t padded = padded_words(words);
  for (int64_t first = 0; first < words; first += entries) {
    Vector<T> low[M], high[M];
    for (int c = 0; c < M; ++c) {
      low[c] = load(panel + (channel + c) * padded + first);
      high[c] = load(panel + (channel + c) * padded + first + lanes);
    }
    for (int64_t i = 0; i < used; i += lanes) {
      const Indices<T> word = load(tile.word + i) - spread(LaneInt<T>(first));
      const Vector<T> along = load(tile.best + i), coefficient = load(tile.coefficient + i);
      for (int c = 0; c < M; ++c) {
        Vector<T> of_word = __builtin_shuffle(low[c], high[c], word);
        if (words > entries) of_word = word >= 0 && word < entries ? of_word : Vector<T>{};
        T* out = gradient.row(channel + c, i);
        __builtin_prefetch(gradient.row(channel + c + M, i), 0, 2);  // what is written is in the L2 cache by then
        const Vector<T> others = first == 0 ? along * load(block.row(channel + c, i)) : load(out);
        store(out, multiply_add(coefficient, of_word, others));
      }
    }
  }
}

// sums[word][c] += coefficient feature[c] for each pixel, whose features are brought next to each other.
template <class T>
inline void best_word_gradient(const Tile<T>& tile, const Block<T>& block, int64_t size, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  T features[kLanes<T> * kChannelBlock] = {};
  for (int32_t k = 1; k <= tile.active[0]; ++k) {
    const int64_t i = tile.active[k] * lanes;
    for (int64_t c = 0; c < size; c += lanes) {
      if (c + lanes <= size) {
        transpose_square(block.row(c, i), i < block.pixels ? block.stride : block.copies_stride, features + c, kChannelBlock);
      } else {
        for (int64_t last = c; last < size; ++last) {
          for (int64_t lane = 0; lane < lanes; ++lane) features[lane * kChannelBlock + last] = block.row(last, i)[lane];
        }
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const T coefficient = tile.coefficient[i + lane];
      if (coefficient == 0) continue;
      T* sum = sums + tile.word[i + lane] * kChannelBlock;
      for (int64_t c = 0; c < kChannelBlock; c += lanes) {
        store(sum + c, multiply_add(spread(coefficient), load(features + lane * kChannelBlock + c), load(sum + c)));
      }
    }
  }
}

// With softmax, all words: gradient[c] = sum_j coefficient_j word_j[c] + best feature[c], and
// sums[j][c] += coefficient_j feature[c], for M channels.
template <int M, class T>
inline void softmax_gradients(const Tile<T>& tile, const Block<T>& block, int64_t channel, const T* panel, int64_t words,
                              int64_t used, const BlockGradient<T>& gradient, T* sums) {
  const int64_t padded = padded_words(words);
  for (int64_t i = 0; i < used; i += kLanes<T>) {
    Vector<T> g[M];
    for (int c = 0; c < M; ++c) g[c] = load(tile.best + i) * load(block.row(channel + c, i));
    for (int64_t j = 0; j < words; ++j) {
      const Vector<T> coefficient = load(tile.score + j * tile.pixels + i);
      for (int c = 0; c < M; ++c) g[c] = multiply_add(coefficient, spread(panel[(channel + c) * padded + j]), g[c]);
    }
    for (int c = 0; c < M; ++c) store(gradient.row(channel + c, i), g[c]);
  }
  for (int64_t j = 0; j < words; ++j) {
    Vector<T> sum[M] = {};
    for (int32_t k = 1; k <= tile.active[0]; ++k) {
      const int64_t i = tile.active[k] * kLanes<T>;
      const Vector<T> coefficient = load(tile.score + j * tile.pixels + i);
      for (int c = 0; c < M; ++c) sum[c] = multiply_add(coefficient, load(block.row(channel + c, i)), sum[c]);
    }
    for (int c = 0; c < M; ++c) sums[j * kChannelBlock + channel + c] += horizontal_sum(sum[c]);
  }
}

// Both gradients of a block of channels of a tile. `panel` is that of its first channel.
template <class T>
inline void block_gradients(const SimilarityCall<T>& call, const Tile<T>& tile, const Block<T>& block, int64_t size,
                            const T* panel, int64_t words, int64_t used, const BlockGradient<T>& gradient, T* sums) {
  const auto channels = [&](auto&& some, auto&& one) {
    int64_t c = 0;
    for (; c + 4 <= size; c += 4) some(c);
    for (; c < size; ++c) one(c);
  };
  if (call.softmax) {
    channels([&](int64_t c) { softmax_gradients<4>(tile, block, c, panel, words, used, gradient, sums); },
             [&](int64_t c) { softmax_gradients<1>(tile, block, c, panel, words, used, gradient, sums); });
  } else {
    channels([&](int64_t c) { best_feature_gradient<4>(tile, block, c, panel, words, used, gradient); },
             [&](int64_t c) { best_feature_gradient<1>(tile, block, c, panel, words, used, gradient); });
    best_word_gradient(tile, block, size, sums);
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
      const BlockGradient<T> gradient(call, sample, channel, start, count, tile, grad_visual);
      T* sums = tile.word_sums;
      for (int64_t k = 0; k < words * kChannelBlock; ++k) sums[k] = 0;
      block_gradients(call, tile, block, size, panel + channel * padded_words(words), words, used, gradient, sums);
      for (int64_t j = 0; j < words; ++j) {
        for (int64_t c = 0; c < size; ++c) grad_text[j * call.channels + channel + c] += sums[j * kChannelBlock + c];
      }
      if (call.gradient_channels_first) {
        for (int64_t c = 0; c < size; ++c) {
          write(tile.out + c * pixels + gradient.pixels, count - gradient.pixels, grad_visual, call.visual.type,
                (sample * call.channels + channel + c) * grid + start + gradient.pixels);
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
