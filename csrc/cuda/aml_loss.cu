// aml_loss on a GPU; its gradient is that of masked_loss.
#include "aml_loss.cuh"
#include "masked_loss_op.h"
#include "similarity_op.h"

namespace aml::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> aml_loss(
    Tensor logits, Tensor target, Tensor visual, Tensor text, OptionalTensor text_mask, OptionalTensor valid,
    OptionalTensor map_valid, bool normalize, double scale, bool softmax, OptionalTensor thresholds,
    std::optional<double> threshold, std::optional<double> quantile, bool rank_in_fp64, bool protect_target,
    double bce_weight, double dice_weight, double negative_weight, double positive_weight, double smooth,
    int64_t reduction) {
  require(visual.dim() == 4 && visual.size(0) == logits.size(0), "visual: expected [B, C, h, w] with the batch of logits");
  const OnDevice stream(logits);
  AmlCall call{};
  LossMemory memory;
  call.similarity = similarity_call(visual, text, text_mask, normalize, scale, softmax);
  Tensor similarity = empty(logits, {visual.size(0), visual.size(2), visual.size(3)});
  call.map = similarity.mutable_data_ptr<float>();
  const bool filtered = thresholds || threshold || quantile;
  set_pixels(call.loss, logits, target, filtered ? plane(similarity) : Plane{}, valid, protect_target);
  set_loss(call.loss, memory, logits, map_valid, {thresholds, threshold, quantile, rank_in_fp64},
           {bce_weight, dice_weight, negative_weight, positive_weight, smooth}, reduction);
  const cudaError_t error = with_float_tag(call.similarity.visual.type, [&](auto tag) {
    using T = decltype(tag);
    memory.scratch = empty(logits, {prepare_aml_loss<T>(call)}, ScalarType::Byte);
    return launch_aml_loss<T>(call, memory.scratch.mutable_data_ptr(), stream);
  });
  require_launched(error, "aml_loss", {{"logits", &logits}, {"target", &target}, {"visual", &visual}, {"text", &text}});
  return {memory.loss, memory.sums, memory.counts, similarity};
}

}  // namespace aml::cuda

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CUDA, library) {
  library.impl("aml_loss", TORCH_BOX(&aml::cuda::aml_loss));
}
