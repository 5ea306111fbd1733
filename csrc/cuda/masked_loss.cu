// masked_loss and its gradient on a GPU.
#include "masked_loss.cuh"
#include "masked_loss_gather.cuh"
#include "masked_loss_op.h"

namespace aml::cuda {

namespace {

void check_similarity(const OptionalTensor& similarity, const Tensor& logits) {
  if (!similarity) return;
  require(similarity->dim() == 3 && similarity->size(0) == logits.size(0), "similarity: expected [B, h, w] with the batch of logits");
  require_float("similarity", *similarity);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> masked_loss(
    Tensor logits, Tensor target, OptionalTensor similarity, OptionalTensor valid, OptionalTensor map_valid,
    OptionalTensor thresholds, std::optional<double> threshold, std::optional<double> quantile, bool rank_in_fp64,
    bool protect_target, double bce_weight, double dice_weight, double negative_weight, double positive_weight,
    double smooth, int64_t reduction) {
  check_similarity(similarity, logits);
  const OnDevice stream(logits);
  LossCall call{};
  LossMemory memory;
  set_pixels(call, logits, target, plane(similarity), valid, protect_target);
  set_loss(call, memory, logits, map_valid, {thresholds, threshold, quantile, rank_in_fp64},
           {bce_weight, dice_weight, negative_weight, positive_weight, smooth}, reduction);
  memory.scratch = empty(logits, {prepare_masked_loss(call)}, ScalarType::Byte);
  require_launched(launch_masked_loss(call, memory.scratch.mutable_data_ptr(), stream), "masked_loss",
                   {{"logits", &logits}, {"target", &target}});
  return {memory.loss, memory.sums, memory.counts};
}

Tensor masked_loss_backward(
    Tensor grad, Tensor logits, Tensor target, OptionalTensor similarity, OptionalTensor valid, Tensor sums,
    bool protect_target, double bce_weight, double dice_weight, double negative_weight, double positive_weight,
    double smooth, int64_t reduction) {
  check_similarity(similarity, logits);
  const OnDevice stream(logits);
  GradientCall call{};
  set_pixels(call, logits, target, plane(similarity), valid, protect_target);
  require(0 <= reduction && reduction <= kNone, "reduction: expected 0, 1 or 2");
  require(sums.dim() == 2 && sums.size(0) == call.samples && sums.size(1) == kSumColumns && sums.scalar_type() == ScalarType::Float,
          "sums: expected the second output of the forward");
  require(grad.scalar_type() == ScalarType::Float && grad.numel() == (reduction == kNone ? call.samples : 1),
          "grad: expected the shape and dtype of the loss");
  const Tensor sum_rows = torch::stable::contiguous(sums);
  Tensor result = torch::stable::new_empty(logits, logits.sizes());
  call.options = LossWeights{bce_weight, dice_weight, negative_weight, positive_weight, smooth}.options();
  call.reduction = Reduction(reduction);
  call.grad = grad.const_data_ptr<float>(), call.grad_stride = grad.dim() > 0 ? grad.stride(0) : 0;
  call.sums = sum_rows.const_data_ptr<float>(), call.gradient = result.mutable_data_ptr();
  require_launched(launch_backward(call, stream), "masked_loss_backward", {{"logits", &logits}, {"target", &target}});
  return result;
}

}  // namespace aml::cuda

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CUDA, library) {
  library.impl("masked_loss", TORCH_BOX(&aml::cuda::masked_loss));
  library.impl("masked_loss_backward", TORCH_BOX(&aml::cuda::masked_loss_backward));
}
