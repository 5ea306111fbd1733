// What pixel_text_similarity reads: features in blocks of 64 cells and 64 channels, and words in blocks of 32 and 64
// channels, on their way from global to shared memory while the blocks before are worked on.
#pragma once

#include "device.cuh"

namespace aml::cuda {

constexpr int kSimilarityThreads = 256;
constexpr int kTileCells = 64;
constexpr int kTileChannels = 64;
constexpr int kTileWords = 32;  // real words compared in one reading; there are more in few sentences
constexpr int kRow = 64 + 4;    // of shared arrays: rows lie 4 banks apart, and stay aligned to 16 bytes

constexpr float kSmallestSquare = 1e-24f;  // of a vector that has a direction, as in aml_kernels/reference/similarity.py

// Where a cell stands in a channel's row of shared memory: fours of cells change places from one eight of channels to the
// next, so that packs of channels are written to, as packs of cells are read from, different banks.
__device__ __forceinline__ int feature_column(int channel, int cell) { return cell ^ (channel / 8 % 8 * 4); }

// How a thread reads `visual`: 16 bytes along the cells, 16 bytes along the channels, or single features.
enum class Reading : int { cells, channels, single };

struct SimilarityCall {
  Plane visual;  // of one channel: rows and columns are those of the grid
  int64_t channel_stride, channel_count;
  Plane text;       // [samples, words, channels]
  Plane text_mask;  // [samples, 1, words]; may be absent
  bool normalize, softmax;
  float scale;

  // Set by prepare().
  int channels, words, columns, cells, tiles;
  Reading reading;
  bool linear;  // cells are column_stride apart, also from one row to the next

  // False if a sample has more cells, words or channels than an int counts.
  bool prepare() {
    constexpr int64_t most = (int64_t(1) << 31) - 2 * kTileCells;
    if (visual.rows * visual.columns > most || text.rows > most || channel_count > most) return false;
    channels = int(channel_count), words = int(text.rows), columns = int(visual.columns);
    cells = int(visual.rows * visual.columns);
    tiles = (cells + kTileCells - 1) / kTileCells;
    linear = visual.rows == 1 || visual.row_stride == visual.columns * visual.column_stride;
    reading = widest_reading();
    return true;
  }

  __device__ bool is_word(int sample, int word) const {
    if (word >= words) return false;
    return !text_mask.data || static_cast<const uint8_t*>(text_mask.data)[sample * text_mask.sample_stride + word * text_mask.column_stride];
  }

 private:
  // That strides, sizes and alignment allow.
  Reading widest_reading() const {
    const int64_t width = visual.type == Type::f32 ? 4 : 8;
    const bool aligned = reinterpret_cast<uintptr_t>(visual.data) % 16 == 0 && visual.sample_stride % width == 0;
    if (!aligned || !linear) return Reading::single;
    if (visual.column_stride == 1 && channel_stride % width == 0 && cells % width == 0) return Reading::cells;
    if (channel_stride == 1 && visual.column_stride % width == 0 && channels % width == 0) return Reading::channels;
    return Reading::single;
  }
};

// A block of features.
template <class T>
class FeatureBlock {
 public:
  __device__ FeatureBlock(const SimilarityCall& call, int sample)
      : call_(call), data_(static_cast<const T*>(call.visual.data) + sample * call.visual.sample_stride) {}

  // Cells from `first` on, channels from `channel` on; zero where there are none.
  __device__ __forceinline__ void fetch(int first, int channel) {
    const bool along_cells = call_.reading == Reading::cells, single = call_.reading == Reading::single;
    const int cell = first + (single ? single_cell() : along_cells ? packed() : other(0));
    const int c = channel + (single ? single_channel(0) : along_cells ? other(0) : packed());
    const bool inside = cell < call_.cells && c < call_.channels;
    const T* from = data_ + (inside ? offset_of(cell) + c * call_.channel_stride : 0);
    if (single) {
      const int left = inside ? call_.channels - c : 0;
      const int64_t step = kSingleStep * call_.channel_stride;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        Pack<T> pack;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const int at = i * kWidth + e;
          pack.value[e] = at * kSingleStep < left ? from[at * step] : from_float<T>(0);
        }
        raw_[i] = bit_cast<Raw>(pack);
      }
    } else {
      const int left = inside ? (along_cells ? call_.channels - c : call_.cells - cell) : 0;
      const int64_t step = kStep * (along_cells ? call_.channel_stride : call_.visual.column_stride);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        raw_[i] = i * kStep < left ? __ldg(reinterpret_cast<const Raw*>(from + i * step)) : Raw{};
      }
    }
  }

  // A cell has one column in all channels of a pack, which lie within eight.
  __device__ __forceinline__ void put(float (&features)[kTileChannels][kRow]) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const Pack<T> pack = bit_cast<Pack<T>>(raw_[i]);
      if (call_.reading == Reading::cells) {
        const int column = feature_column(other(i), packed());
#pragma unroll
        for (int e = 0; e < kWidth; e += 4) {
          Pack<float, 4> four;
#pragma unroll
          for (int k = 0; k < 4; ++k) four.value[k] = to_float(pack.value[e + k]);
          store<4>(&features[other(i)][column ^ e], four);
        }
      } else if (call_.reading == Reading::channels) {
        const int column = feature_column(packed(), other(i));
#pragma unroll
        for (int e = 0; e < kWidth; ++e) features[packed() + e][column] = to_float(pack.value[e]);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const int at = i * kWidth + e;
          features[single_channel(at)][feature_column(at * kSingleStep, single_cell())] = to_float(pack.value[e]);
        }
      }
    }
  }

 private:
  static constexpr int kWidth = 16 / int(sizeof(T));
  using Raw = Word<T, kWidth>;
  static constexpr int kPacks = kTileCells * kTileChannels / kSimilarityThreads / kWidth;
  static constexpr int kPacksAcross = kTileCells / kWidth;
  static_assert(kTileCells == kTileChannels, "a pack lies along either");

  __device__ int64_t offset_of(int cell) const {
    if (call_.linear) return cell * call_.visual.column_stride;
    const int y = int(unsigned(cell) / unsigned(call_.columns)), x = cell - y * call_.columns;
    return y * call_.visual.row_stride + x * call_.visual.column_stride;
  }
  // Where pack i of a thread lies in the block, along the packed axis and along the other one.
  static constexpr int kStep = kSimilarityThreads / kPacksAcross;
  static __device__ int packed() { return threadIdx.x % kPacksAcross * kWidth; }
  static __device__ int other(int i) { return threadIdx.x / kPacksAcross + i * kStep; }
  // The same for single features.
  static constexpr int kSingleStep = kSimilarityThreads / kTileCells;
  static __device__ int single_cell() { return threadIdx.x % kTileCells; }
  static __device__ int single_channel(int i) { return threadIdx.x / kTileCells + i * kSingleStep; }

  const SimilarityCall& call_;
  const T* data_;
  Raw raw_[kPacks];  // as they lie in memory: converting, or taking apart, would wait for the load
};

// Lists the real words among [first, first + kTileWords) and returns how many there are. Ends with a barrier.
__device__ inline int list_words(const SimilarityCall& call, int sample, int first, int32_t (&index)[kTileWords]) {
  const int lane = threadIdx.x % kWarp;
  const unsigned real = __ballot_sync(kAllLanes, call.is_word(sample, first + lane));
  if (threadIdx.x < kWarp && (real >> lane & 1)) index[__popc(real & ((1u << lane) - 1))] = first + lane;
  __syncthreads();
  return __popc(real);
}

// A block of the listed words. Their squares are added up on the way.
class WordBlock {
 public:
  __device__ WordBlock(const SimilarityCall& call, int sample, const int32_t* index, int count)
      : call_(call), index_(index), count_(count), sample_(sample) {}

  __device__ __forceinline__ void fetch(int channel) {
    const int c = channel + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i * kWarps >= count_) break;
      const bool real = word(i) < count_;
      const int64_t offset = real ? sample_ * call_.text.sample_stride + index_[word(i)] * call_.text.row_stride + c * call_.text.column_stride : 0;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        bits_[i][k] = real && c + k * kWarp < call_.channels ? load_bits(offset + k * kWarp * call_.text.column_stride) : 0;
      }
    }
  }

  __device__ __forceinline__ void put(float (&words)[kTileChannels][kTileWords + 4]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i * kWarps >= count_) break;
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
  static constexpr int kWarps = kSimilarityThreads / kWarp, kOwn = kTileWords / kWarps;  // words of a warp

  static __device__ int word(int i) { return threadIdx.x / kWarp + i * kWarps; }
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
  const int32_t* index_;
  const int count_;
  const int sample_;
  uint32_t bits_[kOwn][2];
  float square_[kOwn] = {};
};

}  // namespace aml::cuda
