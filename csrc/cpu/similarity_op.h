// The similarity map of a call, for the operator and for aml_loss.
#pragma once

#include "tensors.h"

namespace aml::cpu {

struct SimilarityOptions {
  bool normalize;
  double scale;
  bool softmax;
};

// [B, h, w] for visual [B, C, h, w], [B, N] for [B, N, C]; in fp32, or fp64 for fp64.
Tensor similarity_map(const Tensor& visual, const Tensor& text, const OptionalTensor& text_mask,
                      const SimilarityOptions& options);

}  // namespace aml::cpu
