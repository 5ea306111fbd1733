// What pixel_text_similarity reads: features in blocks of 64 cells and 64 channels, and words in blocks of 32 and 64
// channels, on their way from global to shared memory while the blocks before are worked on.
#pragma once

#include "device.cuh"

namespace aml::cuda {

constexpr int kSimilarityThreads = 256;
constexpr int kTileCells = 64;
constexpr int kTileChannels = 64;
constexpr int kTileWords = 32;  // real words compared in one reading; there are more in few sentences
constexpr int kRow = 64 + 4;    // of shared arrays: rows 4 banks apart, 16-byte aligned

constexpr float kSmallestSquare = 1e-24f;  // of a vector that has a direction, as in aml_kernels/reference/similarity.py

// How a thread reads `visual`: 16 bytes along the cells, 16 bytes along the channels, or single features.
enum class Reading : int { cells, channels, single };

struct SimilarityCall {
  Plane visual;  // of one channel: rows and columns are those of the grid
  int64_t channel_stride;
  int channels;
  Reading reading;
  Plane text;       // [samples, words, channels]
  Plane text_mask;  // [samples, 1, words]; may be absent
  bool normalize, softmax;
  float scale;

  __host__ __device__ int64_t cells() const { return visual.rows * visual.columns; }
  __host__ __device__ int64_t tiles() const { return (cells() + kTileCells - 1) / kTileCells; }
  __device__ bool is_word(int64_t sample, int64_t word) const {
    if (word >= text.rows) return false;
    return !text_mask.data || static_cast<const uint8_t*>(text_mask.data)[sample * text_mask.sample_stride + word * text_mask.column_stride];
  }
};

// The widest reading that strides, sizes and alignment allow.
inline Reading reading_of(const SimilarityCall& call) {
  const Plane& v = call.visual;
  const int64_t width = v.type == Type::f32 ? 4 : 8;
  if (reinterpret_cast<uintptr_t>(v.data) % 16 || v.sample_stride % width) return Reading::single;
  const bool linear = v.rows == 1 || v.row_stride == v.columns * v.column_stride;
  if (linear && v.column_stride == 1 && call.channel_stride % width == 0 && call.cells() % width == 0) return Reading::cells;
  const bool aligned = v.column_stride % width == 0 && v.row_stride % width == 0 && call.channels % width == 0;
  return call.channel_stride == 1 && aligned ? Reading::channels : Reading::single;
}

// A block of features.
template <class T>
class FeatureBlock {
 public:
  __device__ FeatureBlock(const SimilarityCall& call, int64_t sample)
      : call_(call), data_(static_cast<const T*>(call.visual.data) + sample * call.visual.sample_stride) {}

  // Cells from `first` on, channels from `channel` on; zero where there are none.
  __device__ __forceinline__ void fetch(int64_t first, int channel) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (call_.reading == Reading::single) {
        const int64_t cell = first + threadIdx.x % kTileCells;
        const int64_t offset = cell < call_.cells() ? offset_of(cell) : 0;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const int c = channel + single_channel(i * kWidth + e);
          pack_[i].value[e] = cell < call_.cells() && c < call_.channels ? data_[offset + c * call_.channel_stride] : from_float<T>(0);
        }
      } else {
        const bool along_cells = call_.reading == Reading::cells;
        const int64_t cell = first + (along_cells ? packed() : other(i));
        const int c = channel + (along_cells ? other(i) : packed());
        pack_[i] = Pack<T>{};
        if (cell < call_.cells() && c < call_.channels) {
          const int64_t offset = along_cells ? cell : offset_of(cell);
          pack_[i] = load_input<kWidth>(data_ + offset + c * call_.channel_stride);
        }
      }
    }
  }

  __device__ __forceinline__ void put(float (&features)[kTileChannels][kRow]) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (call_.reading == Reading::cells) {
#pragma unroll
        for (int e = 0; e < kWidth; e += 4) {
          Pack<float, 4> four;
#pragma unroll
          for (int k = 0; k < 4; ++k) four.value[k] = to_float(pack_[i].value[e + k]);
          store<4>(&features[other(i)][packed() + e], four);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float value = to_float(pack_[i].value[e]);
          if (call_.reading == Reading::channels) {
            features[packed() + e][other(i)] = value;
          } else {
            features[single_channel(i * kWidth + e)][threadIdx.x % kTileCells] = value;
          }
        }
      }
    }
  }

 private:
  static constexpr int kWidth = 16 / int(sizeof(T));
  static constexpr int kPacks = kTileCells * kTileChannels / kSimilarityThreads / kWidth;
  static constexpr int kPacksAcross = kTileCells / kWidth;
  static_assert(kTileCells == kTileChannels, "a pack lies along either");

  __device__ int64_t offset_of(int64_t cell) const {
    const int64_t y = cell / call_.visual.columns, x = cell - y * call_.visual.columns;
    return y * call_.visual.row_stride + x * call_.visual.column_stride;
  }
  // Along the packed axis and along the other one.
  static __device__ int packed() { return threadIdx.x % kPacksAcross * kWidth; }
  static __device__ int other(int i) { return threadIdx.x / kPacksAcross + i * (kSimilarityThreads / kPacksAcross); }
  static __device__ int single_channel(int i) { return threadIdx.x / kTileCells + i * (kSimilarityThreads / kTileCells); }

  const SimilarityCall& call_;
  const T* data_;
  Pack<T> pack_[kPacks];
};

// Lists the real words among [first, first + kTileWords) and returns how many there are. Ends with a barrier.
__device__ inline int list_words(const SimilarityCall& call, int64_t sample, int64_t first, int32_t (&index)[kTileWords]) {
  const int lane = threadIdx.x % kWarp;
  const unsigned real = __ballot_sync(kAllLanes, call.is_word(sample, first + lane));
  if (threadIdx.x < kWarp && (real >> lane & 1)) index[__popc(real & ((1u << lane) - 1))] = int32_t(first) + lane;
  __syncthreads();
  return __popc(real);
}

// A block of the listed words. Their squares are added up on the way.
class WordBlock {
 public:
  __device__ WordBlock(const SimilarityCall& call, int64_t sample, const int32_t* index, int count)
      : call_(call), sample_(sample), index_(index), count_(count) {}

  __device__ __forceinline__ void fetch(int channel) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const bool real = word(i) < count_;
      const int64_t offset = sample_ * call_.text.sample_stride + (real ? index_[word(i)] : 0) * call_.text.row_stride;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int c = channel + threadIdx.x % kWarp + k * kWarp;
        bits_[i][k] = real && c < call_.channels ? load_bits(offset + c * call_.text.column_stride) : 0;
      }
    }
  }

  __device__ __forceinline__ void put(float (&words)[kTileChannels][kTileWords + 4]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float value = from_bits(bits_[i][k]);
        square_[i] = multiply_add(value, value, square_[i]);
        words[threadIdx.x % kWarp + k * kWarp][word(i)] = value;
      }
    }
  }

  __device__ void put_norms(float (&inverse_norm)[kTileWords]) const {
    for (int i = 0; i < kOwn; ++i) {
      const float square = warp_sum(square_[i]);
      // NaN is no small number: it stays, and makes the word's scores NaN.
      if (threadIdx.x % kWarp == 0) inverse_norm[word(i)] = square <= kSmallestSquare ? 0.0f : 1.0f / sqrtf(square);
    }
  }

 private:
  static constexpr int kOwn = kTileWords / (kSimilarityThreads / kWarp);  // words of a warp

  static __device__ int word(int i) { return threadIdx.x / kWarp + i * (kSimilarityThreads / kWarp); }
  // As they lie in memory: converting would wait for the load.
  __device__ uint32_t load_bits(int64_t offset) const {
    return call_.text.type == Type::f32 ? static_cast<const uint32_t*>(call_.text.data)[offset]
                                        : static_cast<const uint16_t*>(call_.text.data)[offset];
  }
  __device__ float from_bits(uint32_t bits) const {
    switch (call_.text.type) {
      case Type::f32: return bit_cast<float>(bits);
      case Type::bf16: return bit_cast<float>(bits << 16);
      default: return to_float(bit_cast<f16>(uint16_t(bits)));
    }
  }

  const SimilarityCall& call_;
  const int64_t sample_;
  const int32_t* index_;
  const int count_;
  uint32_t bits_[kOwn][2];
  float square_[kOwn] = {};
};

}  // namespace aml::cuda
