// What pixel_text_similarity reads: features in blocks of 64 cells and 64 channels, and words in blocks of 32 and 64
// channels, on their way from global to shared memory while the blocks before are worked on.
//
// Features are copied to shared memory as they are, 16 bytes at a time and past the registers, and spread out as floats
// from there. So a row of cells may begin anywhere, as the rows of 15 x 15 cells do: the aligned packs of 16 bytes that
// hold it are copied, which may be one more than it fills.
#pragma once

#include "device.cuh"

namespace aml::cuda {

constexpr int kSimilarityThreads = 256;
constexpr int kTileCells = 64, kTileChannels = 64;
constexpr int kTileWords = 32;  // real words compared in one reading; there are more in few sentences
constexpr int kRow = 64 + 4;    // of shared arrays: rows lie 4 banks apart, and stay aligned to 16 bytes

constexpr float kSmallestSquare = 1e-24f;  // of a vector that has a direction, as in aml_kernels/reference/similarity.py

// Where a cell stands in a channel's row of shared memory: fours of cells change places from one eight of channels to the
// next, so that packs of channels are written to, as packs of cells are read from, different banks.
__device__ __forceinline__ int feature_column(int channel, int cell) { return cell ^ (channel / 8 % 8 * 4); }

// How a thread reads `visual`: 16 bytes along the cells, where each row of cells begins with 16 bytes, or anywhere; 16
// bytes along the channels; or single features.
enum class Reading : int { cells, shifted_cells, channels, single };

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
  // That strides and alignment allow.
  Reading widest_reading() const {
    const int64_t width = visual.type == Type::f32 ? 4 : 8;
    const bool aligned = reinterpret_cast<uintptr_t>(visual.data) % 16 == 0 && visual.sample_stride % width == 0;
    if (!linear) return Reading::single;
    if (visual.column_stride == 1) return aligned && channel_stride % width == 0 ? Reading::cells : Reading::shifted_cells;
    return aligned && channel_stride == 1 && visual.column_stride % width == 0 ? Reading::channels : Reading::single;
  }
};

// A block of features as they lie in memory: [channel][cell], or [cell][channel] where they are read along the channels.
// A row has room for one pack more than a block is wide: it may begin within a pack.
template <class T>
struct RawFeatures {
  static constexpr int kWidth = 16 / int(sizeof(T));
  // How many of them are on their way at once: 16 KB.
  static constexpr int kAhead = kTileCells * kTileChannels * int(sizeof(T)) > 8192 ? 1 : 2;
  alignas(16) T value[kTileChannels][kTileCells + kWidth];
};
constexpr int kRawBytes = 2 * sizeof(RawFeatures<bf16>);
static_assert(kRawBytes >= sizeof(RawFeatures<float>), "holds what is on its way of either");

template <class T>
class FeatureBlock {
 public:
  using Raw = RawFeatures<T>;
  __device__ FeatureBlock(const SimilarityCall& call, int sample)
      : call_(call), data_(static_cast<const T*>(call.visual.data) + sample * call.visual.sample_stride) {}

  // How many blocks ahead to fetch.
  __device__ __forceinline__ int ahead() const { return call_.reading == Reading::single ? 1 : Raw::kAhead; }

  // Cells from `first` on, channels from `channel` on; zero where there are none. Single features are read to registers.
  __device__ __forceinline__ void fetch(Raw& raw, int first, int channel) {
    if (call_.reading == Reading::single) return fetch_single(first, channel);
    const bool along_channels = call_.reading == Reading::channels;
    const int cell = first + (along_channels ? other(0) : packed() - shift(first, other(0)));
    const int c = channel + (along_channels ? packed() : other(0));
    const T* from = data_ + cell * call_.visual.column_stride + c * call_.channel_stride;
    const int64_t step = kStep * (along_channels ? call_.visual.column_stride : call_.channel_stride);
    const int rows = along_channels ? call_.cells - cell : call_.channels - c;
    const int inside = along_channels ? call_.channels - c : min(call_.cells, first + kTileCells) - cell;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int elements = i * kStep < rows ? inside : 0;
      copy(&raw.value[other(i)][packed()], from + i * step, elements);
      if (call_.reading == Reading::shifted_cells && packed() == 0) {
        copy(&raw.value[other(i)][kTileCells], from + i * step + kTileCells, elements - kTileCells);
      }
    }
  }

  // Everything is loaded before anything is stored: one may be the other, as far as a compiler can tell.
  __device__ __forceinline__ void put(const Raw& raw, int first, float (&features)[kTileChannels][kRow]) const {
    switch (call_.reading) {
      case Reading::cells: return put_along_cells(packs(raw), features);
      case Reading::channels: return put_along_channels(packs(raw), features);
      case Reading::shifted_cells: return put_singles(shifted(raw, first), features);
      default: return put_singles(singles_, features);
    }
  }

 private:
  static constexpr int kWidth = Raw::kWidth;
  static constexpr int kPacks = kTileCells * kTileChannels / kSimilarityThreads / kWidth, kPacksAcross = kTileCells / kWidth;
  static_assert(kTileCells == kTileChannels, "a pack lies along either");
  // What a thread moves: packs, or as many single features.
  struct Packs {
    Pack<T> pack[kPacks];
  };

  // `elements` of them, at most a pack; the rest is zero. A pack may begin before its row: what shares 16 aligned bytes
  // with a feature was allocated with it. It is not read beyond its row, which may be where the tensor ends.
  static __device__ __forceinline__ void copy(T* to, const T* from, int elements) {
    copy_async(to, from, max(0, min(elements, kWidth)) * int(sizeof(T)));
  }

  // Which number of a pack is the first cell in that row of the block. Blocks begin with a multiple of kWidth channels.
  __device__ __forceinline__ int shift(int first, int row) const {
    if (call_.reading != Reading::shifted_cells) return 0;
    const unsigned begin = unsigned(reinterpret_cast<uintptr_t>(data_) / sizeof(T)) + unsigned(first);
    return int((begin + unsigned(row) * unsigned(call_.channel_stride)) % unsigned(kWidth));
  }

  __device__ __forceinline__ Packs packs(const Raw& raw) const {
    Packs packs;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs.pack[i] = load<kWidth>(&raw.value[other(i)][packed()]);
    return packs;
  }
  // A cell has one column in all channels of a pack, which lie within eight.
  static __device__ __forceinline__ void put_along_cells(const Packs& packs, float (&features)[kTileChannels][kRow]) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = feature_column(other(i), packed());
#pragma unroll
      for (int e = 0; e < kWidth; e += 4) {
        Pack<float, 4> four;
#pragma unroll
        for (int k = 0; k < 4; ++k) four.value[k] = to_float(packs.pack[i].value[e + k]);
        store<4>(&features[other(i)][column ^ e], four);
      }
    }
  }
  static __device__ __forceinline__ void put_along_channels(const Packs& packs, float (&features)[kTileChannels][kRow]) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = feature_column(packed(), other(i));
#pragma unroll
      for (int e = 0; e < kWidth; ++e) features[packed() + e][column] = to_float(packs.pack[i].value[e]);
    }
  }

  // A warp takes 32 cells of one row: no two threads meet in a bank, wherever rows begin. Every other row of a thread
  // begins at the same place of a pack.
  __device__ __forceinline__ Packs shifted(const Raw& raw, int first) const {
    const bool exists = first + single_cell() < call_.cells;
    const int column[2] = {shift(first, single_channel(0)) + single_cell(), shift(first, single_channel(1)) + single_cell()};
    Packs singles;
#pragma unroll
    for (int i = 0; i < kSingles; ++i) {
      singles.pack[i / kWidth].value[i % kWidth] = exists ? raw.value[single_channel(i)][column[i % 2]] : from_float<T>(0);
    }
    return singles;
  }
  static __device__ __forceinline__ void put_singles(const Packs& singles, float (&features)[kTileChannels][kRow]) {
#pragma unroll
    for (int i = 0; i < kSingles; ++i) {
      const int column = feature_column(i * kSingleStep, single_cell());
      features[single_channel(i)][column] = to_float(singles.pack[i / kWidth].value[i % kWidth]);
    }
  }

  __device__ __forceinline__ void fetch_single(int first, int channel) {
    const int cell = first + single_cell(), c = channel + single_channel(0);
    const bool exists = cell < call_.cells;
    const T* from = data_ + (exists ? offset_of(cell) : 0) + c * call_.channel_stride;
    const int left = exists ? call_.channels - c : 0;
    const int64_t step = kSingleStep * call_.channel_stride;
#pragma unroll
    for (int i = 0; i < kSingles; ++i) {
      singles_.pack[i / kWidth].value[i % kWidth] = i * kSingleStep < left ? from[i * step] : from_float<T>(0);
    }
  }

  __device__ int64_t offset_of(int cell) const {
    if (call_.linear) return cell * call_.visual.column_stride;
    const int y = int(unsigned(cell) / unsigned(call_.columns)), x = cell - y * call_.columns;
    return y * call_.visual.row_stride + x * call_.visual.column_stride;
  }
  // Where pack i of a thread lies in the block, along the packed axis and along the other one.
  static constexpr int kStep = kSimilarityThreads / kPacksAcross;
  static_assert(kStep % kWidth == 0, "all packs of a thread are shifted alike");
  static __device__ int packed() { return threadIdx.x % kPacksAcross * kWidth; }
  static __device__ int other(int i) { return threadIdx.x / kPacksAcross + i * kStep; }
  // The same for single features.
  static constexpr int kSingleStep = kSimilarityThreads / kTileCells, kSingles = kTileCells * kTileChannels / kSimilarityThreads;
  static_assert(2 * kSingleStep % kWidth == 0, "every other row of a thread is shifted alike");
  static __device__ int single_cell() { return threadIdx.x % kTileCells; }
  static __device__ int single_channel(int i) { return threadIdx.x / kTileCells + i * kSingleStep; }

  const SimilarityCall& call_;
  const T* data_;
  Packs singles_;  // as they lie in memory: converting, or taking apart, would wait for the load
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
