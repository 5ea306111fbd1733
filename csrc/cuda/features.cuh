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
constexpr int kBlockCells = 64, kBlockChannels = 64;
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
  int channels, words, columns, cells;
  Reading reading;
  bool linear;       // cells are column_stride apart, also from one row to the next
  bool text_packed;  // words begin with 16 bytes, their channels lie side by side, and an int reaches all of a sample

  // False if a sample has more cells, words or channels than an int counts.
  bool prepare() {
    constexpr int64_t most = (int64_t(1) << 31) - 1024;  // with room to look a few steps ahead
    if (visual.rows * visual.columns > most || text.rows > most || channel_count > most) return false;
    channels = int(channel_count), words = int(text.rows), columns = int(visual.columns);
    cells = int(visual.rows * visual.columns);
    linear = visual.rows == 1 || visual.row_stride == visual.columns * visual.column_stride;
    reading = widest_reading();
    const int64_t width = text.type == Type::f32 ? 4 : 8;
    text_packed = text.column_stride == 1 && reinterpret_cast<uintptr_t>(text.data) % 16 == 0 &&
        text.sample_stride % width == 0 && text.row_stride % width == 0 &&
        text.row_stride <= most / text.rows - channel_count;
    return true;
  }

  // Blocks of so many cells in a sample.
  __host__ __device__ int blocks_of(int block_cells) const { return (cells + block_cells - 1) / block_cells; }

  __device__ int64_t offset_of(int cell) const {
    if (linear) return cell * visual.column_stride;
    const int y = int(unsigned(cell) / unsigned(columns)), x = cell - y * columns;
    return y * visual.row_stride + x * visual.column_stride;
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

// Copies `elements` of them past the registers, at most a pack; the rest of the pack is zero. Nothing is read beyond them,
// where the tensor may end. But a pack may begin before what is asked for: what shares 16 aligned bytes with a feature was
// allocated with it.
template <class T>
__device__ __forceinline__ void copy_pack(T* to, const T* from, int elements) {
  constexpr int kWidth = 16 / int(sizeof(T));
  if (elements >= kWidth) return copy_async(to, from);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.value[i] = i < elements ? from[i] : from_float<T>(0);
  store(to, pack);
}

// Which number of an aligned pack is cell `first` of a channel; `data` is of a sample. That of channel + a pack's width is
// the same.
template <class T>
__device__ __forceinline__ int shift_in_pack(const SimilarityCall& call, const T* data, int first, int channel) {
  if (call.reading != Reading::shifted_cells) return 0;
  const unsigned begin = unsigned(reinterpret_cast<uintptr_t>(data) / sizeof(T)) + unsigned(first);
  return int((begin + unsigned(channel) * unsigned(call.channel_stride)) % unsigned(16 / sizeof(T)));
}

// A block of features as they lie in memory: [channel][cell], or [cell][channel] where they are read along the channels.
// A row has room for one pack more than a block is wide: it may begin within a pack.
template <class T>
struct RawFeatures {
  static constexpr int kWidth = 16 / int(sizeof(T));
  alignas(16) T value[kBlockChannels][kBlockCells + kWidth];
};

template <class T>
class FeatureBlock {
 public:
  using Raw = RawFeatures<T>;
  __device__ FeatureBlock(const SimilarityCall& call, int sample)
      : call_(call), data_(static_cast<const T*>(call.visual.data) + sample * call.visual.sample_stride) {}

  // Cells from `first` on, channels from `channel` on; zero where there are none. Single features are read to registers.
  __device__ __forceinline__ void fetch(Raw& raw, int first, int channel) {
    if (call_.reading == Reading::single) return fetch_single(first, channel);
    const bool along_channels = call_.reading == Reading::channels;
    const int cell = first + (along_channels ? other(0) : packed() - shift(first, other(0)));
    const int c = channel + (along_channels ? packed() : other(0));
    const T* from = data_ + cell * call_.visual.column_stride + c * call_.channel_stride;
    const int64_t step = kStep * (along_channels ? call_.visual.column_stride : call_.channel_stride);
    const int rows = along_channels ? call_.cells - cell : call_.channels - c;
    const int inside = along_channels ? call_.channels - c : call_.cells - cell;
    const bool one_more = call_.reading == Reading::shifted_cells && packed() == 0 && shift(first, other(0)) > 0;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int elements = i * kStep < rows ? inside : 0;
      copy_pack(&raw.value[other(i)][packed()], from + i * step, elements);
      if (one_more) copy_pack(&raw.value[other(i)][kBlockCells], from + i * step + kBlockCells, elements - kBlockCells);
    }
  }

  // Everything is loaded before anything is stored: one may be the other, as far as a compiler can tell.
  __device__ __forceinline__ void put(const Raw& raw, int first, float (&features)[kBlockChannels][kRow]) const {
    switch (call_.reading) {
      case Reading::cells: return put_along_cells(packs(raw), features);
      case Reading::channels: return put_along_channels(packs(raw), features);
      case Reading::shifted_cells: return put_singles(shifted(raw, first), features);
      default: return put_singles(singles_, features);
    }
  }

 private:
  static constexpr int kWidth = Raw::kWidth;
  static constexpr int kPacks = kBlockCells * kBlockChannels / kSimilarityThreads / kWidth, kPacksAcross = kBlockCells / kWidth;
  static_assert(kBlockCells == kBlockChannels, "a pack lies along either");
  // What a thread moves: packs, or as many single features.
  struct Packs {
    Pack<T> pack[kPacks];
  };

  // Blocks begin with a multiple of kWidth channels.
  __device__ __forceinline__ int shift(int first, int row) const { return shift_in_pack(call_, data_, first, row); }

  __device__ __forceinline__ Packs packs(const Raw& raw) const {
    Packs packs;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs.pack[i] = load<kWidth>(&raw.value[other(i)][packed()]);
    return packs;
  }
  // A cell has one column in all channels of a pack, which lie within eight.
  static __device__ __forceinline__ void put_along_cells(const Packs& packs, float (&features)[kBlockChannels][kRow]) {
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
  static __device__ __forceinline__ void put_along_channels(const Packs& packs, float (&features)[kBlockChannels][kRow]) {
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
  static __device__ __forceinline__ void put_singles(const Packs& singles, float (&features)[kBlockChannels][kRow]) {
#pragma unroll
    for (int i = 0; i < kSingles; ++i) {
      const int column = feature_column(i * kSingleStep, single_cell());
      features[single_channel(i)][column] = to_float(singles.pack[i / kWidth].value[i % kWidth]);
    }
  }

  __device__ __forceinline__ void fetch_single(int first, int channel) {
    const int cell = first + single_cell(), c = channel + single_channel(0);
    const bool exists = cell < call_.cells;
    const T* from = data_ + (exists ? call_.offset_of(cell) : 0) + c * call_.channel_stride;
    const int left = exists ? call_.channels - c : 0;
    const int64_t step = kSingleStep * call_.channel_stride;
#pragma unroll
    for (int i = 0; i < kSingles; ++i) {
      singles_.pack[i / kWidth].value[i % kWidth] = i * kSingleStep < left ? from[i * step] : from_float<T>(0);
    }
  }

  // Where pack i of a thread lies in the block, along the packed axis and along the other one.
  static constexpr int kStep = kSimilarityThreads / kPacksAcross;
  static_assert(kStep % kWidth == 0, "all packs of a thread are shifted alike");
  static __device__ int packed() { return threadIdx.x % kPacksAcross * kWidth; }
  static __device__ int other(int i) { return threadIdx.x / kPacksAcross + i * kStep; }
  // The same for single features.
  static constexpr int kSingleStep = kSimilarityThreads / kBlockCells, kSingles = kBlockCells * kBlockChannels / kSimilarityThreads;
  static_assert(2 * kSingleStep % kWidth == 0, "every other row of a thread is shifted alike");
  static __device__ int single_cell() { return threadIdx.x % kBlockCells; }
  static __device__ int single_channel(int i) { return threadIdx.x / kBlockCells + i * kSingleStep; }

  const SimilarityCall& call_;
  const T* data_;
  Packs singles_;  // as they lie in memory: converting, or taking apart, would wait for the load
};

}  // namespace aml::cuda
