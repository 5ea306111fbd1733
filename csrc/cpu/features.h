// A tile of pixels, its features, read from memory once, 32 channels at a time, and their products with the words.
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

}  // namespace
}  // namespace aml::cpu
