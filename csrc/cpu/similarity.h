// The loops of pixel_text_similarity. A tile of pixels is multiplied with all words, 32 channels at a time: vectors run
// along the pixels, eight or four words at a time stay in registers, and each feature is read from memory once.
#pragma once

#include "rows.h"
#include "vector.h"

namespace aml::cpu {
namespace {

constexpr int64_t kChannelBlock = 32;
constexpr int kWordBlock = 8, kLastWordBlock = 4;
constexpr double kSmallestNorm = 1e-12;  // as in aml_kernels/reference/similarity.py

inline int64_t padded_words(int64_t words) { return (words + kLastWordBlock - 1) / kLastWordBlock * kLastWordBlock; }

// Scratch of one tile. Rows of pixels are `tile_pixels` long; the last vector of a sample is padded with zeros.
template <class T>
struct Tile {
  Tile(const SimilarityCall<T>& call, bool backward, T* scratch) : pixels(call.tile_pixels) {
    const int64_t words = padded_words(call.words);
    score = take(scratch, words * pixels);
    factor = take(scratch, pixels);
    best = take(scratch, pixels);
    features = take(scratch, kChannelBlock * pixels);
    if (!backward) return;
    out = take(scratch, kChannelBlock * pixels);
    strip_words = reinterpret_cast<int32_t*>(take(scratch, (words + 1) * (pixels / kLanes<T>)));
    word_strips = reinterpret_cast<int32_t*>(take(scratch, words * (pixels / kLanes<T> + 1)));
  }
  static int64_t elements(const SimilarityCall<T>& call, bool backward) {
    const int64_t words = padded_words(call.words), pixels = call.tile_pixels;
    const int64_t forward = (words + 2 + kChannelBlock) * pixels;
    if (!backward) return forward;
    return forward + kChannelBlock * pixels + (words + 1) * (pixels / kLanes<T>) + words * (pixels / kLanes<T> + 1);
  }
  static T* take(T*& scratch, int64_t count) {
    T* here = scratch;
    scratch += count;
    return here;
  }

  // Pixels up to the next full vector are computed, whatever lies there beyond `count`.
  int64_t used(int64_t count) const { return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

  const int64_t pixels;
  T* score;               // [words][pixels]: dot products, in the backward then coefficients of the unit words
  T* factor;              // [pixels]: squared norm of the features, then the factor from dot product to cosine
  T* best;                // [pixels]: the similarity; in the backward the coefficient of the feature itself
  T* features;            // [kChannelBlock][pixels], where they cannot be used in place
  T* out = nullptr;       // [kChannelBlock][pixels]: gradient of the features
  // A strip is a vector of pixels. Most strips have to do with few words: how many, and which.
  int32_t* strip_words = nullptr;  // [strips][1 + words]
  int32_t* word_strips = nullptr;  // [words][1 + strips], the same seen from the words
};

inline bool linear(const Plane& grid) { return grid.rows == 1 || grid.row_stride == grid.columns * grid.column_stride; }

// Features of a tile can be read where they lie: T, next to each other, whole vectors.
template <class T>
inline bool in_place(const SimilarityCall<T>& call, int64_t count) {
  return call.visual.type == native_type<T> && call.visual.column_stride == 1 && linear(call.visual) && count % kLanes<T> == 0;
}

// Pixels of the next tile of `left`: a full tile, or whole vectors, or what remains.
template <class T>
inline int64_t tile_count(const SimilarityCall<T>& call, int64_t left) {
  const int64_t count = left < call.tile_pixels ? left : call.tile_pixels;
  return count > kLanes<T> ? count / kLanes<T> * kLanes<T> : count;
}

// Copies channels [channel, channel + size) of pixels [first, first + count) to `buffer [size][tile_pixels]`, as T.
template <class T>
inline void copy_features(const SimilarityCall<T>& call, int64_t sample, int64_t channel, int64_t size, int64_t first,
                          int64_t count, T* buffer) {
  const Plane& v = call.visual;
  const int64_t base = sample * v.sample_stride + channel * call.channel_stride, pixels = call.tile_pixels;
  if (call.channel_stride == 1) {  // channels-last: read along the channels, a square at a time
    T strip[kLanes<T> * kChannelBlock] = {};
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        T* feature = strip + lane * kChannelBlock;
        const int64_t pixel = first + i + lane, y = pixel / v.columns, x = pixel % v.columns;
        if (i + lane < count) {
          read(v.data, v.type, base + y * v.row_stride + x * v.column_stride, 1, size, feature);
        } else {
          for (int64_t c = 0; c < size; ++c) feature[c] = 0;
        }
      }
      for (int64_t c = 0; c < size; c += kLanes<T>) {
        if (c + kLanes<T> <= size) {
          transpose_square(strip + c, kChannelBlock, buffer + c * pixels + i, pixels);
        } else {
          for (int64_t k = c; k < size; ++k) {
            for (int64_t lane = 0; lane < kLanes<T>; ++lane) buffer[k * pixels + i + lane] = strip[lane * kChannelBlock + k];
          }
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < size; ++c) {
    T* row = buffer + c * pixels;
    for (int64_t i = 0; i < count;) {
      const int64_t y = (first + i) / v.columns, x = (first + i) % v.columns;
      const int64_t run = linear(v) || count - i < v.columns - x ? count - i : v.columns - x;
      read(v.data, v.type, base + c * call.channel_stride + y * v.row_stride + x * v.column_stride, v.column_stride, run,
           row + i);
      i += run;
    }
    for (int64_t i = count; i % kLanes<T>; ++i) row[i] = 0;
  }
}

// A block of channels of a tile: in place where it can be read there, else copied.
template <class T>
inline const T* block_features(const SimilarityCall<T>& call, int64_t sample, int64_t channel, int64_t size, int64_t first,
                               int64_t count, const Tile<T>& tile, int64_t& stride) {
  if (in_place(call, count)) {
    stride = call.channel_stride;
    return (const T*)call.visual.data + sample * call.visual.sample_stride + channel * stride + first;
  }
  stride = tile.pixels;
  copy_features(call, sample, channel, size, first, count, tile.features);
  return tile.features;
}

// A block of channels of kLanes pixels times N words; sums of a block are added up apart, which halves the
// digits lost in long sums.
template <int N, class T>
inline void multiply_strip(const T* features, int64_t stride, int64_t channels, const T* words, int64_t word_stride,
                           int64_t prefetch, T* score, int64_t score_stride) {
  Vector<T> sum[N] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const Vector<T> v = load(features + c * stride);
    if (prefetch) __builtin_prefetch(features + c * stride + prefetch);
    for (int j = 0; j < N; ++j) sum[j] = multiply_add(v, spread(words[c * word_stride + j]), sum[j]);
  }
  for (int j = 0; j < N; ++j) store(score + j * score_stride, load(score + j * score_stride) + sum[j]);
}

// Dot products of a tile with all words, and the factor that turns them into cosines (1 if not normalised).
template <class T>
inline void tile_scores(const SimilarityCall<T>& call, int64_t sample, const T* panel, int64_t words, int64_t first,
                        int64_t count, Tile<T>& tile) {
  const int64_t padded = padded_words(words), pixels = tile.pixels, used = tile.used(count);
  for (int64_t j = 0; j < padded; ++j) {
    for (int64_t i = 0; i < used; ++i) tile.score[j * pixels + i] = 0;
  }
  for (int64_t i = 0; i < used; ++i) tile.factor[i] = 0;
  for (int64_t channel = 0; channel < call.channels; channel += kChannelBlock) {
    const int64_t size = call.channels - channel < kChannelBlock ? call.channels - channel : kChannelBlock;
    int64_t stride;
    const T* features = block_features(call, sample, channel, size, first, count, tile, stride);
    // In place, the next block of channels is fetched while this one is multiplied.
    const bool more = features != tile.features && channel + 2 * kChannelBlock <= call.channels;
    const int64_t prefetch = more ? kChannelBlock * stride : 0;
    for (int64_t i = 0; i < used; i += kLanes<T>) {
      for (int64_t j = 0; j < padded;) {
        const bool whole = j + kWordBlock <= padded;
        const auto multiply = whole ? multiply_strip<kWordBlock, T> : multiply_strip<kLastWordBlock, T>;
        multiply(features + i, stride, size, panel + channel * padded + j, padded, j == 0 ? prefetch : 0,
                 tile.score + j * pixels + i, pixels);
        j += whole ? kWordBlock : kLastWordBlock;
      }
      if (!call.normalize) continue;
      Vector<T> square = {};
      for (int64_t c = 0; c < size; ++c) {
        const Vector<T> v = load(features + c * stride + i);
        square = multiply_add(v, v, square);
      }
      store(tile.factor + i, load(tile.factor + i) + square);
    }
  }
  for (int64_t i = 0; i < used; ++i) {
    const T square = tile.factor[i];
    const T inverse = square > T(kSmallestNorm * kSmallestNorm) ? T(1) / sqrt_of(square) : T(0);
    tile.factor[i] = call.normalize ? inverse : T(1);
  }
}

template <class T>
void similarity_forward(const SimilarityCall<T>& call, int64_t sample, const T* panel, int64_t words, int64_t first,
                        int64_t last, T* similarity, T* scratch) {
  Tile<T> tile(call, false, scratch);
  const int64_t pixels = tile.pixels;
  int64_t count;
  for (int64_t start = first; start < last; start += count) {
    count = tile_count(call, last - start);
    const int64_t used = tile.used(count);
    tile_scores(call, sample, panel, words, start, count, tile);
    for (int64_t j = 0; j < words; ++j) {
      T* score = tile.score + j * pixels;
      for (int64_t i = 0; i < used; ++i) {
        score[i] = call.scale * (score[i] * tile.factor[i]);
        tile.best[i] = j == 0 || score[i] > tile.best[i] ? score[i] : tile.best[i];
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

// <a, b> in fp64, in eight sums that do not wait for each other.
template <class T>
inline double dot(const T* a, const T* b, int64_t b_stride, int64_t count) {
  double sum[8] = {};
  int64_t c = 0;
  for (; c + 8 <= count; c += 8) {
    for (int lane = 0; lane < 8; ++lane) sum[lane] += double(a[c + lane]) * double(b[(c + lane) * b_stride]);
  }
  for (; c < count; ++c) sum[0] += double(a[c]) * double(b[c * b_stride]);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// The real words of a sample as unit vectors, [channels][padded words]; returns how many there are.
template <class T>
int64_t similarity_prepare(const SimilarityCall<T>& call, int64_t sample, T* panel, int32_t* word_index, T* inverse_norm,
                           T* row) {
  int64_t words = 0;
  for (int64_t j = 0; j < call.words; ++j) {
    T real = 1;
    if (call.text_mask.data) real = *read_row(call.text_mask, sample, 0, j, 1, &real);
    if (real != 0) word_index[words++] = int32_t(j);
  }
  const int64_t padded = padded_words(words);
  for (int64_t i = 0; i < call.channels * padded; ++i) panel[i] = 0;
  bool poisoned = false;
  for (int64_t k = 0; k < words; ++k) {
    const T* word = read_row(call.text, sample, word_index[k], 0, call.channels, row);
    const double square = dot(word, word, 1, call.channels);
    const bool direction = !(square <= kSmallestNorm * kSmallestNorm);
    inverse_norm[k] = call.normalize ? (direction ? T(1 / __builtin_sqrt(square)) : T(0)) : T(1);
    for (int64_t c = 0; c < call.channels; ++c) panel[c * padded + k] = word[c] * inverse_norm[k];
    poisoned |= square != square;
  }
  // A comparison with NaN is never true, so that NaN in any word but the first would pass unseen.
  if (poisoned) panel[0] = __builtin_nan("");
  return words;
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

template <class T>
constexpr SimilarityKernels<T> similarity_table() {
  return {Tile<T>::elements, similarity_prepare<T>, similarity_forward<T>, similarity_backward<T>, similarity_finish_text<T>};
}

}  // namespace
}  // namespace aml::cpu
