// The arguments of masked_loss as its kernels take them, for the operator, its gradient and aml_loss.
#pragma once

#include "loss_strips.cuh"
#include "tensors.h"

namespace aml::cuda {

struct LossWeights {
  double bce, dice, negative, positive, smooth;

  LossOptions<float> options() const { return {float(bce), float(dice), float(negative), float(positive), float(smooth)}; }
};

struct LimitArguments {
  OptionalTensor thresholds;
  std::optional<double> threshold, quantile;
  bool rank_in_fp64;
};

// Pixels, map and sizes; `similarity` may be absent.
inline void set_pixels(PixelCall& call, const Tensor& logits, const Tensor& target, const Plane& similarity,
                       const OptionalTensor& valid, bool protect_target) {
  require(logits.dim() == 3 || (logits.dim() == 4 && logits.size(1) == 1), "logits: expected [B, h', w'] or [B, 1, h', w']");
  require_float("logits", logits);
  require(target.dim() == 3 && target.size(0) == logits.size(0), "target: expected [B, H, W] with the batch of logits");
  if (type_of(target) != Type::u8) require_float("target", target);
  require(logits.numel() > 0 && target.numel() > 0, "logits, target: expected no empty dimension");
  require(!similarity.data || similarity.rows * similarity.columns > 0, "similarity: expected [B, h, w] with no empty dimension");
  require(!valid || (valid->scalar_type() == ScalarType::Bool && same_shape(*valid, target)),
          "valid: expected bool of the shape of target");
  call.logits = plane(logits), call.target = plane(target), call.similarity = similarity, call.valid = plane(valid);
  const int64_t rows = target.size(1), columns = target.size(2), most = int64_t(1) << 30;
  require(rows <= most && columns <= most && logits.size(0) <= most && rows * columns <= most * 128,
          "target: expected at most 2^30 samples, rows and columns, and 2^37 pixels in a sample");
  require(fits_axis(call.logits.rows, rows) && fits_axis(call.logits.columns, columns) &&
              (!similarity.data || (fits_axis(similarity.rows, rows) && fits_axis(similarity.columns, columns))),
          "logits, similarity: expected (2 * to + 1) * from + to < 2^32 and both < 2^21 for rows, and for columns, that are "
          "resized on a GPU; resize to the target's size before");
  call.samples = logits.size(0), call.rows = uint32_t(rows), call.columns = uint32_t(columns);
  call.logit_rows = make_axis(call.logits.rows, rows, true), call.logit_columns = make_axis(call.logits.columns, columns, true);
  call.map_rows = make_axis(std::max<int64_t>(similarity.rows, 1), rows, false);
  call.map_columns = make_axis(std::max<int64_t>(similarity.columns, 1), columns, false);
  call.protect_target = protect_target;
}

// What a call returns, and what has to live as long as it.
struct LossMemory {
  Tensor loss, sums, counts, thresholds, scratch;
};

// All of a call but the division of the work.
inline void set_loss(LossCall& call, LossMemory& memory, const Tensor& logits, const OptionalTensor& map_valid,
                     const LimitArguments& limit, const LossWeights& weights, int64_t reduction) {
  require(0 <= reduction && reduction <= kNone, "reduction: expected 0, 1 or 2");
  require(!map_valid || (map_valid->scalar_type() == ScalarType::Bool && map_valid->dim() == 3 && map_valid->size(0) == call.samples),
          "map_valid: expected bool [B, h, w] with the batch of logits");
  if (limit.quantile) {
    require(call.similarity.data, "similarity: expected [B, h, w] where quantile is given, got None");
    require(!map_valid || (map_valid->size(1) == call.similarity.rows && map_valid->size(2) == call.similarity.columns),
            "map_valid: expected the shape of similarity");
    call.limit.by_quantile = true, call.limit.quantile = float(*limit.quantile), call.limit.rank_in_fp64 = limit.rank_in_fp64;
    call.limit.map_valid = plane(map_valid);
  } else if (limit.thresholds) {
    require(limit.thresholds->dim() == 1 && limit.thresholds->size(0) == call.samples, "threshold: expected a number or [B]");
    memory.thresholds = to_float32(*limit.thresholds);
    call.limit.thresholds = memory.thresholds.const_data_ptr<float>(), call.limit.threshold_stride = memory.thresholds.stride(0);
  } else if (limit.threshold) {
    call.limit.threshold = float(*limit.threshold);
  }
  call.options = weights.options(), call.reduction = Reduction(reduction);
  const int64_t loss_size[] = {call.samples};
  memory.loss = torch::stable::new_empty(logits, {loss_size, size_t(reduction == kNone)}, ScalarType::Float);
  memory.sums = empty(logits, {call.samples, kSumColumns});
  memory.counts = empty(logits, {call.samples, kCountColumns}, ScalarType::Long);
  call.loss = memory.loss.mutable_data_ptr<float>(), call.sums = memory.sums.mutable_data_ptr<float>();
  call.counts = memory.counts.mutable_data_ptr<int64_t>();
}

}  // namespace aml::cuda
