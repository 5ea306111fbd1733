// filter_regions on a GPU.
#include "region_filter.cuh"
#include "tensors.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace aml::cuda {

// A number as an element of the image.
static uint64_t element_bits(Type type, double value) {
  switch (type) {
    case Type::f32: return bit_cast<uint32_t>(float(value));
    case Type::f64: return bit_cast<uint64_t>(value);
    case Type::bf16: return bit_cast<uint16_t>(__float2bfloat16_rn(float(value)));
    case Type::f16: return bit_cast<uint16_t>(__float2half_rn(float(value)));
    default: return uint8_t(value);
  }
}

std::tuple<Tensor, Tensor> filter_regions(
    Tensor image, Tensor similarity, OptionalTensor protect, OptionalTensor thresholds, std::optional<double> threshold,
    std::optional<double> quantile, bool rank_in_fp64, double drop_ratio, int64_t block_size, std::vector<double> fill,
    int64_t seed) {
  require(image.dim() == 4 && image.numel() > 0, "image: expected [B, K, H, W] with no empty dimension");
  require(similarity.dim() == 3 && similarity.size(0) == image.size(0) && similarity.numel() > 0,
          "similarity: expected [B, h, w] with the batch of image");
  require_float("similarity", similarity);
  const int64_t samples = image.size(0), channels = image.size(1), rows = image.size(2), columns = image.size(3);
  require(!protect || (protect->dim() == 3 && protect->scalar_type() == ScalarType::Bool && protect->size(0) == samples &&
                       protect->size(1) == rows && protect->size(2) == columns), "protect: expected bool [B, H, W]");
  require(!thresholds || (thresholds->dim() == 1 && thresholds->size(0) == samples), "threshold: expected a number or [B]");
  require(block_size >= 1, "block_size: expected at least 1");
  require(int64_t(fill.size()) == channels, "fill: expected one number per channel");
  require(samples * channels * rows < (int64_t(1) << 31), "image: expected fewer than 2^31 rows of pixels");
  require(fits_axis(similarity.size(1), rows) && fits_axis(similarity.size(2), columns),
          "image, similarity: expected fewer rows and columns");

  const OnDevice stream(image);
  FilterCall call{};
  const Type type = type_of(image);
  call.image = image.const_data_ptr(), call.element_bytes = bytes_of(type);
  call.sample_stride = image.stride(0), call.channel_stride = image.stride(1);
  call.row_stride = image.stride(2), call.column_stride = image.stride(3);
  call.samples = uint32_t(samples), call.channels = uint32_t(channels), call.rows = uint32_t(rows), call.columns = uint32_t(columns);
  call.similarity = plane(similarity), call.protect = plane(protect);
  call.map_rows = make_axis(similarity.size(1), rows, false), call.map_columns = make_axis(similarity.size(2), columns, false);
  Tensor limits;
  if (thresholds) {
    limits = to_float32(*thresholds);
    call.limits = limits.const_data_ptr<float>(), call.limits_stride = limits.stride(0);
  }
  call.by_quantile = quantile.has_value(), call.rank_in_fp64 = rank_in_fp64;
  call.limit = float(quantile ? *quantile : threshold.value_or(0));
  call.ratio = float(drop_ratio), call.seed = uint64_t(seed);
  call.region = uint32_t(std::min(block_size, std::max(rows, columns)));
  call.region_rows = (call.rows + call.region - 1) / call.region, call.region_columns = (call.columns + call.region - 1) / call.region;
  const bool one_colour = std::all_of(fill.begin(), fill.end(), [&](double f) { return element_bits(type, f) == element_bits(type, fill[0]); });
  call.colours = one_colour ? 1 : uint32_t(channels);
  require(call.colours <= kMostColours, "fill: expected one number for all channels, or at most 64 channels");
  for (uint32_t i = 0; i < call.colours; ++i) call.colour[i] = element_bits(type, fill[i]);

  Tensor result = torch::stable::new_empty(image, image.sizes());
  Tensor dropped = empty(image, {samples, call.region_rows, call.region_columns}, ScalarType::Bool);
  Tensor memory = empty(image, {FilterScratch::elements(call)}, ScalarType::Int);
  call.result = result.mutable_data_ptr(), call.dropped = static_cast<bool*>(dropped.mutable_data_ptr());
  const FilterScratch scratch = FilterScratch::divide(call, static_cast<uint32_t*>(memory.mutable_data_ptr()));
  require_launched(launch_filter_regions(call, scratch, stream), "filter_regions", {{"image", &image}, {"similarity", &similarity}});
  return {result, dropped};
}

}  // namespace aml::cuda

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CUDA, library) {
  library.impl("filter_regions", TORCH_BOX(&aml::cuda::filter_regions));
}
