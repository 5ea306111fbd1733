// masked_loss with a map that is already there, for aml_loss.
#pragma once

#include "tensors.h"

namespace aml::cpu {

struct LossWeights {
  double bce, dice, negative, positive, smooth;
};

std::tuple<Tensor, Tensor, Tensor> masked_loss_of_map(
    const Tensor& logits, const Tensor& target, const Plane& similarity, const OptionalTensor& valid,
    const Plane& map_valid, const Limit& limit, bool protect_target, const LossWeights& weights, int64_t reduction);

}  // namespace aml::cpu
