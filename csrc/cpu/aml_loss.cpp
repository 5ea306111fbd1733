// aml_loss on the CPU: the map, then thresholds and loss, without leaving the operator.
#include "masked_loss_op.h"
#include "similarity_op.h"

namespace aml::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> aml_loss(
    Tensor logits, Tensor target, Tensor visual, Tensor text, OptionalTensor text_mask, OptionalTensor valid,
    OptionalTensor map_valid, bool normalize, double scale, bool softmax, OptionalTensor thresholds,
    std::optional<double> threshold, std::optional<double> quantile, bool rank_in_fp64, bool protect_target,
    double bce_weight, double dice_weight, double negative_weight, double positive_weight, double smooth,
    int64_t reduction) {
  require(visual.dim() == 4 && visual.size(0) == logits.size(0), "visual: expected [B, C, h, w] with the batch of logits");
  require(!map_valid || (map_valid->dim() == 3 && map_valid->size(0) == logits.size(0)),
          "map_valid: expected [B, h, w] with the batch of logits");
  const Tensor similarity = similarity_map(visual, text, text_mask, {normalize, scale, softmax});
  const bool filtered = thresholds || threshold || quantile;
  auto [loss, sums, counts] = masked_loss_of_map(
      logits, target, filtered ? plane(similarity) : Plane{}, valid, plane(map_valid),
      {thresholds, threshold, quantile, rank_in_fp64}, protect_target,
      {bce_weight, dice_weight, negative_weight, positive_weight, smooth}, reduction);
  return {loss, sums, counts, similarity};
}

}  // namespace aml::cpu

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CPU, library) {
  library.impl("aml_loss", TORCH_BOX(&aml::cpu::aml_loss));
}
