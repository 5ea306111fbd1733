// A tile of pixels, its features, read from memory once, 32 channels at a time, and their products with the words.
#pragma once

#include "rows.h"
#include "vector.h"

namespace aml::cpu {
namespace {

constexpr int64_t kChannelBlock = 32;
constexpr int kWordStep = 4;
#if defined(AML_AVX512)
constexpr int kWordBlock = 24;  // words at a time: so many sums, a feature and its square stay in registers
#else
constexpr int kWordBlock = 12;
#endif
constexpr double kSmallestNorm = 1e-12;  // as in aml_kernels/reference/similarity.py

inline int64_t padded_words(int64_t words) { return (words + kWordStep - 1) / kWordStep * kWordStep; }

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
    coefficient = take(scratch, pixels);
    word = reinterpret_cast<LaneInt<T>*>(take(scratch, pixels));
    word_sums = take(scratch, call.words * kChannelBlock);
    active = reinterpret_cast<int32_t*>(take(scratch, 1 + pixels / kLanes<T>));
  }
  static int64_t elements(const SimilarityCall<T>& call, bool backward) {
    const int64_t words = padded_words(call.words), pixels = call.tile_pixels;
    const int64_t forward = (words + 2 + kChannelBlock) * pixels;
    if (!backward) return forward;
    return forward + (kChannelBlock + 2) * pixels + call.words * kChannelBlock + 1 + pixels / kLanes<T>;
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
  T* coefficient = nullptr;    // [pixels]: of the word with the largest similarity, and
  LaneInt<T>* word = nullptr;  // [pixels]: which that is
  T* word_sums = nullptr;      // [words][kChannelBlock]: gradient of the unit words
  int32_t* active = nullptr;  // [1 + strips]: how many strips (vectors of pixels) have a gradient, and which
};

inline bool linear(const Plane& grid) { return grid.rows == 1 || grid.row_stride == grid.columns * grid.column_stride; }

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
  for (int64_t i = 0; i < count;) {  // a row of the grid, or all rows as if they were one
    const int64_t columns = linear(v) ? v.rows * v.columns : v.columns, y = (first + i) / columns, x = (first + i) % columns;
    const int64_t run = count - i < columns - x ? count - i : columns - x;
    const bool more = channel + 2 * kChannelBlock <= call.channels && v.column_stride == 1;
    for (int64_t c = 0; c < size; ++c) {
      const int64_t at = base + c * call.channel_stride + y * v.row_stride + x * v.column_stride;
      if (more) prefetch(v.data, v.type, at + kChannelBlock * call.channel_stride, run);
      read(v.data, v.type, at, v.column_stride, run, buffer + c * pixels + i);
    }
    i += run;
  }
  for (int64_t c = 0; c < size; ++c) {
    for (int64_t i = count; i % kLanes<T>; ++i) buffer[c * pixels + i] = 0;
  }
}

// A block of channels of a tile. Whole strips are read where they lie if they are T, next to each other, and only the
// pixels of the last strip are copied; else all are.
template <class T>
struct Block {
  Block(const SimilarityCall<T>& call, int64_t sample, int64_t channel, int64_t size, int64_t first, int64_t count,
        const Tile<T>& tile)
      : features(tile.features), stride(tile.pixels), pixels(tile.used(count)), copies(tile.features), copies_stride(tile.pixels) {
    const Plane& v = call.visual;
    in_place = v.type == native_type<T> && v.column_stride == 1 && linear(v);
    if (!in_place) {
      copy_features(call, sample, channel, size, first, count, tile.features);
      return;
    }
    pixels = count / kLanes<T> * kLanes<T>;
    features = (const T*)v.data + sample * v.sample_stride + channel * call.channel_stride + first;
    stride = call.channel_stride;
    if (pixels == count) return;
    for (int64_t c = 0; c < size; ++c) {
      store(tile.features + c * tile.pixels + pixels, load_first(features + c * stride + pixels, count - pixels));
    }
  }
  AML_MEMBER const T* row(int64_t channel, int64_t i) const {  // from pixel i of the tile on
    return i < pixels ? features + channel * stride + i : copies + channel * copies_stride + i;
  }

  bool in_place;
  const T* features;  // [channels][pixels], channels `stride` apart
  int64_t stride, pixels;
  const T* copies;  // of pixels beyond, at the same places
  int64_t copies_stride;
};

// <a, b> in fp64, in sums that do not wait for each other.
template <class T>
inline double dot(const T* a, const T* b, int64_t count) {
  constexpr int64_t lanes = kLanes<double>;
  typedef T Few __attribute__((vector_size(lanes * sizeof(T))));
  Vector<double> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    for (int k = 0; k < 4; ++k) {
      Few x, y;
      __builtin_memcpy(&x, a + i + k * lanes, sizeof(x));
      __builtin_memcpy(&y, b + i + k * lanes, sizeof(y));
      sum[k] = multiply_add(__builtin_convertvector(x, Vector<double>), __builtin_convertvector(y, Vector<double>), sum[k]);
    }
  }
  double rest = 0;
  for (; i < count; ++i) rest += double(a[i]) * double(b[i]);
  return horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

// The real words of a sample as unit vectors, [channels][padded words]; returns how many there are.
template <class T>
int64_t similarity_prepare(const SimilarityCall<T>& call, int64_t sample, T* panel, int32_t* word_index, T* inverse_norm,
                           T* row) {
  int64_t words = 0;
  for (int64_t j = 0; j < call.words; ++j) {
    T real = 1;
    if (call.text_mask.data) real = *read_row(call.text_mask, sample, 0, j, 1, &real);
    if (real == 0) continue;
    const T* word = read_row(call.text, sample, j, 0, call.channels, row);
    const double square = dot(word, word, call.channels);
    const bool direction = !(square <= kSmallestNorm * kSmallestNorm);
    inverse_norm[words] = call.normalize ? (direction ? T(1 / __builtin_sqrt(square)) : T(0)) : T(1);
    word_index[words++] = int32_t(j);
  }
  const int64_t padded = padded_words(words);
  for (int64_t first = 0; first < call.channels; first += kChannelBlock) {  // a block of the panel stays in the L1 cache
    const int64_t size = call.channels - first < kChannelBlock ? call.channels - first : kChannelBlock;
    T* block = panel + first * padded;
    for (int64_t k = 0; k < words; ++k) {
      const T* word = read_row(call.text, sample, word_index[k], first, size, row);
      for (int64_t c = 0; c < size; ++c) block[c * padded + k] = word[c] * inverse_norm[k];
    }
    for (int64_t k = words; k < padded; ++k) {
      for (int64_t c = 0; c < size; ++c) block[c * padded + k] = 0;
    }
  }
  return words;
}

// A block of channels of kLanes pixels times N words, and times themselves; sums of a block are added up apart, which
// halves the digits lost in long sums.
template <int N, class T>
inline void multiply_strip(const T* features, int64_t stride, int64_t channels, const T* words, int64_t word_stride,
                           int64_t prefetch, T* score, int64_t score_stride, T* square) {
  Vector<T> sum[N] = {}, squares = {};
  for (int64_t c = 0; c < channels; ++c) {
    const Vector<T> v = load(features + c * stride);
    if (prefetch) __builtin_prefetch(features + c * stride + prefetch, 0, 2);  // to the L2 cache: L1 is full
#pragma GCC unroll 24
    for (int j = 0; j < N; ++j) sum[j] = multiply_add(v, spread(words[c * word_stride + j]), sum[j]);
    squares = multiply_add(v, v, squares);
  }
#pragma GCC unroll 24
  for (int j = 0; j < N; ++j) store(score + j * score_stride, load(score + j * score_stride) + sum[j]);
  if (square) store(square, load(square) + squares);
}

template <class T>
using MultiplyStrip = void (*)(const T*, int64_t, int64_t, const T*, int64_t, int64_t, T*, int64_t, T*);

// That for `words` words, at most kWordBlock.
template <class T, int N = kWordBlock>
inline MultiplyStrip<T> choose_multiply_strip(int64_t words) {
  if constexpr (N > kWordStep) {
    if (words < N) return choose_multiply_strip<T, N - kWordStep>(words);
  }
  return multiply_strip<N, T>;
}

// Dot products of a tile with all words, and the factor that turns them into cosines (1 if not normalised).
template <class T>
inline void tile_scores(const SimilarityCall<T>& call, int64_t sample, const T* panel, int64_t words, int64_t first,
                        int64_t count, Tile<T>& tile) {
  const int64_t padded = padded_words(words), pixels = tile.pixels, used = tile.used(count);
  const MultiplyStrip<T> last = choose_multiply_strip<T>(padded % kWordBlock);
  for (int64_t j = 0; j < padded; ++j) {
    for (int64_t i = 0; i < used; ++i) tile.score[j * pixels + i] = 0;
  }
  for (int64_t i = 0; i < used; ++i) tile.factor[i] = 0;
  for (int64_t channel = 0; channel < call.channels; channel += kChannelBlock) {
    const int64_t size = call.channels - channel < kChannelBlock ? call.channels - channel : kChannelBlock;
    const Block<T> block(call, sample, channel, size, first, count, tile);
    const bool more = channel + 2 * kChannelBlock <= call.channels;
    for (int64_t i = 0; i < used; i += kLanes<T>) {
      const bool here = i < block.pixels;
      const T* features = (here ? block.features : block.copies) + i;
      const int64_t stride = here ? block.stride : block.copies_stride;
      // In place, the next block of channels is fetched while this one is multiplied.
      const int64_t prefetch = more && here && block.in_place ? kChannelBlock * stride : 0;
      for (int64_t j = 0; j < padded; j += kWordBlock) {
        const auto multiply = j + kWordBlock <= padded ? multiply_strip<kWordBlock, T> : last;
        multiply(features, stride, size, panel + channel * padded + j, padded, j == 0 ? prefetch : 0,
                 tile.score + j * pixels + i, pixels, j == 0 ? tile.factor + i : nullptr);
      }
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
