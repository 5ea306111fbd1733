// filter_regions on the CPU: weak blocks from the resized map, a random choice of them, a copy of the image.
#include <cmath>

#include "../common/philox.h"
#define AML_VECTOR_BYTES 16  // compiled for any processor
#include "resize.h"
#include "tensors.h"

namespace aml::cpu {

namespace {

struct Blocks {
  int64_t size, rows, columns;
  int64_t count() const { return rows * columns; }
};

// Marks the blocks of a sample that hold a pixel below the limit and none that is protected.
template <class T>
void find_weak(const Plane& map, const Plane& protect, const Tensor& image, const Axis<T>& row_axis, const Axis<T>& column_axis,
               bool resized, const Blocks& blocks, int64_t sample, T limit, bool* weak, T* scratch) {
  const int64_t rows = image.size(2), columns = image.size(3);
  ResizedPlane<T> similarity(map, resized, row_axis, column_axis, scratch);
  for (int64_t first = 0; first < columns; first += kTileColumns) {
    const int64_t count = std::min(columns - first, kTileColumns);
    similarity.start_tile(sample, first, count);
    for (int64_t y = 0; y < rows; ++y) {
      const Blend<T> row = similarity.row(y);
      bool* here = weak + y / blocks.size * blocks.columns;
      for (int64_t x = 0; x < count;) {
        const int64_t block = (first + x) / blocks.size, end = std::min(count, (block + 1) * blocks.size - first);
        bool below = false;
        for (; x < end; ++x) below |= row[x] < limit;
        here[block] |= below;
      }
    }
  }
  if (!protect.data) return;
  for (int64_t y = 0; y < rows; ++y) {
    const uint8_t* row = static_cast<const uint8_t*>(protect.data) + sample * protect.sample_stride + y * protect.row_stride;
    bool* here = weak + y / blocks.size * blocks.columns;
    for (int64_t x = 0; x < columns; ++x) here[x / blocks.size] &= !row[x * protect.column_stride];
  }
}

// Of the n weak blocks, keeps round(ratio * n) marked: those with the smallest keys, the first of equals.
void choose_dropped(uint64_t seed, int64_t sample, float ratio, const Blocks& blocks, bool* weak) {
  std::vector<std::pair<uint32_t, int64_t>> keys;
  for (int64_t i = 0; i < blocks.count(); ++i) {
    if (weak[i]) keys.emplace_back(philox_key(seed, uint32_t(sample), uint32_t(i)), i);
    weak[i] = false;
  }
  const auto dropped = int64_t(std::floor(ratio * float(keys.size()) + 0.5f));
  std::sort(keys.begin(), keys.end());
  for (int64_t i = 0; i < dropped; ++i) weak[keys[i].second] = true;
}

// Copies one channel of a sample, elements of the size of E, with `fill` in the dropped blocks.
template <class E>
void copy_channel(const Tensor& image, int64_t sample, int64_t channel, const Blocks& blocks, const bool* dropped, E fill, void* out) {
  const int64_t channels = image.size(1), rows = image.size(2), columns = image.size(3), stride = image.stride(3);
  const E* in = static_cast<const E*>(image.const_data_ptr()) + sample * image.stride(0) + channel * image.stride(1);
  E* to = static_cast<E*>(out) + (sample * channels + channel) * rows * columns;
  for (int64_t y = 0; y < rows; ++y, to += columns) {
    const E* from = in + y * image.stride(2);
    if (stride == 1) {
      std::memcpy(to, from, columns * sizeof(E));
    } else {
      for (int64_t x = 0; x < columns; ++x) to[x] = from[x * stride];
    }
    const bool* here = dropped + y / blocks.size * blocks.columns;
    for (int64_t j = 0; j < blocks.columns; ++j) {
      if (here[j]) std::fill(to + j * blocks.size, to + std::min((j + 1) * blocks.size, columns), fill);
    }
  }
}

void copy_filtered(const Tensor& image, int64_t sample, int64_t channel, const Blocks& blocks, const bool* dropped, double fill, void* out) {
  switch (type_of(image)) {
    case Type::f32: return copy_channel<float>(image, sample, channel, blocks, dropped, float(fill), out);
    case Type::f64: return copy_channel<double>(image, sample, channel, blocks, dropped, fill, out);
    case Type::bf16: return copy_channel<uint16_t>(image, sample, channel, blocks, dropped, to_bf16(float(fill)), out);
    case Type::f16: return copy_channel<uint16_t>(image, sample, channel, blocks, dropped, to_f16(float(fill)), out);
    case Type::u8: return copy_channel<uint8_t>(image, sample, channel, blocks, dropped, uint8_t(fill), out);
  }
}

template <class T>
Tensor dropped_blocks(const Tensor& image, const Plane& map, const Plane& protect, const Limit& limit, float ratio,
                      const Blocks& blocks, uint64_t seed) {
  const int64_t samples = image.size(0), rows = image.size(2), columns = image.size(3);
  Scratch<T> limits(samples);
  sample_limits<T>(limit, map, {}, samples, limits);
  const bool resized = resizes(map, rows, columns);
  const AxisTable<T> row_table(map.rows, rows, false, resized), column_table(map.columns, columns, false, resized);
  const int64_t size[] = {samples, blocks.rows, blocks.columns};
  Tensor result = torch::stable::new_empty(image, {size, 3}, ScalarType::Bool);
  bool* out = static_cast<bool*>(result.mutable_data_ptr());
  std::fill(out, out + samples * blocks.count(), false);
  parallel_tasks<T>(samples, ResizedPlane<T>::scratch(map, resized), [&](int64_t b, T* scratch) {
    bool* weak = out + b * blocks.count();
    find_weak<T>(map, protect, image, row_table.axis(), column_table.axis(), resized, blocks, b, limits[b], weak, scratch);
    choose_dropped(seed, b, ratio, blocks, weak);
  });
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor> filter_regions(
    Tensor image, Tensor similarity, OptionalTensor protect, OptionalTensor thresholds, std::optional<double> threshold,
    std::optional<double> quantile, bool rank_in_fp64, double drop_ratio, int64_t block_size, std::vector<double> fill,
    int64_t seed) {
  require(image.dim() == 4 && image.numel() > 0, "image: expected [B, K, H, W] with no empty dimension");
  require(similarity.dim() == 3 && similarity.size(0) == image.size(0) && similarity.numel() > 0,
          "similarity: expected [B, h, w] with the batch of image");
  require(!protect || (protect->dim() == 3 && protect->scalar_type() == ScalarType::Bool && protect->size(0) == image.size(0) &&
                       protect->size(1) == image.size(2) && protect->size(2) == image.size(3)),
          "protect: expected bool [B, H, W]");
  require(block_size >= 1, "block_size: expected at least 1");
  const int64_t channels = image.size(1);
  require(int64_t(fill.size()) == channels, "fill: expected one number per channel");
  const Blocks blocks{block_size, (image.size(2) - 1) / block_size + 1, (image.size(3) - 1) / block_size + 1};
  const Plane map = plane(similarity);
  Tensor dropped = with_compute_type(map.type, [&](auto t) {
    return dropped_blocks<decltype(t)>(image, map, plane(protect), {thresholds, threshold, quantile, rank_in_fp64},
                                       float(drop_ratio), blocks, uint64_t(seed));
  });
  Tensor result = torch::stable::new_empty(image, image.sizes());
  void* out = result.mutable_data_ptr();
  const bool* marks = static_cast<const bool*>(dropped.const_data_ptr());
  torch::stable::parallel_for(0, image.size(0) * channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / channels, k = i % channels;
      copy_filtered(image, b, k, blocks, marks + b * blocks.count(), fill[k], out);
    }
  });
  return {result, dropped};
}

}  // namespace aml::cpu

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CPU, library) {
  library.impl("filter_regions", TORCH_BOX(&aml::cpu::filter_regions));
}
