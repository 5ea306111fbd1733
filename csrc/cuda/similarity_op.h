// The arguments of pixel_text_similarity as a kernel takes them, for the operator and for aml_loss.
#pragma once

#include "comparison.cuh"
#include "tensors.h"

namespace aml::cuda {

inline SimilarityCall similarity_call(const Tensor& visual, const Tensor& text, const OptionalTensor& text_mask, bool normalize,
                                      double scale, bool softmax) {
  const bool grid = visual.dim() == 4;
  require(grid || visual.dim() == 3, "visual: expected [B, C, h, w] or [B, N, C]");
  require_float("visual", visual);
  require_float("text", text);
  const int64_t channels = visual.size(grid ? 1 : 2);
  require(text.dim() == 3 && text.size(0) == visual.size(0) && text.size(2) == channels,
          "text: expected [B, L, C] with batch and width of visual");
  require(visual.numel() > 0 && text.numel() > 0, "visual, text: expected no empty dimension");
  SimilarityCall call{};
  call.visual = grid ? plane(visual)
      : Plane{visual.const_data_ptr(), type_of(visual), visual.stride(0), 0, visual.stride(1), 1, visual.size(1)};
  call.channel_stride = visual.stride(grid ? 1 : 2);
  call.channel_count = channels;
  call.text = plane(text);
  if (text_mask) {
    require(text_mask->dim() == 2 && text_mask->size(0) == text.size(0) && text_mask->size(1) == text.size(1) &&
                text_mask->scalar_type() == ScalarType::Bool, "text_mask: expected bool [B, L]");
    call.text_mask = {text_mask->const_data_ptr(), Type::u8, text_mask->stride(0), 0, text_mask->stride(1), 1, text.size(1)};
  }
  call.normalize = normalize, call.softmax = softmax, call.scale = float(scale);
  require(call.prepare(), "visual, text: expected fewer than 2^31 cells, words and channels in a sample");
  require(visual.size(0) * call.blocks_of(kTileCells) < (int64_t(1) << 31), "visual: expected fewer than 2^31 tiles of 32 cells");
  return call;
}

}  // namespace aml::cuda
