// masked_loss on the CPU: thresholds, one pass over the pixels, the loss from the sums.
#include "masked_loss_op.h"

namespace aml::cpu {

namespace {

constexpr int64_t kTaskPixels = 32768;  // of the target, in a task, about
enum Reduction : int64_t { kMean, kSum, kNone };
enum SumColumn : int64_t { kThreshold, kBce, kDice, kWeight, kP, kY, kPy, kSumColumns };

// The call and the tables that it points to.
template <class T>
class Prepared {
 public:
  Prepared(const Plane& logits, const Plane& target, const Plane& similarity, const Plane& valid, bool protect,
           const LossWeights& weights, const T* limits)
      : rows_(target.rows), columns_(target.columns), logits_(logits, true, *this), similarity_(similarity, false, *this) {
    // The rows of a sample in tasks of the same size, however many threads there are: that decides the order of sums.
    const int64_t tasks = (rows_ * columns_ + kTaskPixels - 1) / kTaskPixels;
    const LossOptions<T> options{T(weights.bce), T(weights.dice), T(weights.negative), T(weights.positive), T(weights.smooth)};
    call = {logits, target, similarity, valid, rows_, columns_, logits_.rows.axis(), logits_.columns.axis(),
            similarity_.rows.axis(), similarity_.columns.axis(), limits, protect, options,
            (rows_ + tasks - 1) / tasks};
  }

  MaskedLossCall<T> call;

 private:
  struct Tables {
    Tables(const Plane& plane, bool align_corners, const Prepared& p)
        : rows(plane.rows, p.rows_, align_corners, resizes(plane, p.rows_, p.columns_)),
          columns(plane.columns, p.columns_, align_corners, resizes(plane, p.rows_, p.columns_)) {}
    AxisTable<T> rows, columns;
  };
  const int64_t rows_, columns_;
  const Tables logits_, similarity_;
};

void check_shapes(const Tensor& logits, const Tensor& target, const Plane& similarity, const OptionalTensor& valid) {
  require(logits.dim() == 3 || (logits.dim() == 4 && logits.size(1) == 1), "logits: expected [B, h', w'] or [B, 1, h', w']");
  require(target.dim() == 3 && target.size(0) == logits.size(0), "target: expected [B, H, W] with the batch of logits");
  require(logits.numel() > 0 && target.numel() > 0, "logits, target: expected no empty dimension");
  require(!similarity.data || similarity.rows * similarity.columns > 0, "similarity: expected [B, h, w] with no empty dimension");
  require(!valid || same_shape(*valid, target), "valid: expected the shape of target");
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, const Plane& similarity,
                                           const OptionalTensor& valid, const Plane& map_valid, const Limit& limit,
                                           bool protect, const LossWeights& weights, int64_t reduction) {
  const int64_t samples = logits.size(0);
  Scratch<T> limits(samples);
  sample_limits<T>(limit, similarity, map_valid, samples, limits);
  const Prepared<T> prepared(plane(logits), plane(target), similarity, plane(valid), protect, weights, limits);
  const MaskedLossCall<T>& call = prepared.call;
  const auto& kernel = masked_loss_kernels<T>();

  const int64_t tasks = (call.rows + call.rows_per_task - 1) / call.rows_per_task;
  std::vector<SampleSums<double>> partial(samples * tasks, SampleSums<double>{});
  parallel_tasks<T>(samples * tasks, kernel.scratch(call), [&](int64_t i, T* scratch) {
    const int64_t first = i % tasks * call.rows_per_task;
    kernel.forward(call, i / tasks, first, std::min(first + call.rows_per_task, call.rows), &partial[i], scratch);
  });

  Tensor sums = empty<T>(logits, {samples, kSumColumns});
  const int64_t count_size[] = {samples, 4};
  Tensor counts = torch::stable::new_empty(logits, {count_size, 2}, ScalarType::Long);
  const int64_t loss_size[] = {samples};
  Tensor loss = torch::stable::new_empty(logits, {loss_size, size_t(reduction == kNone)},
                                         sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double);
  T *sum_out = sums.mutable_data_ptr<T>(), *loss_out = loss.mutable_data_ptr<T>();
  int64_t* count_out = counts.mutable_data_ptr<int64_t>();
  const LossOptions<double> options{weights.bce, weights.dice, weights.negative, weights.positive, weights.smooth};
  double total = 0;
  for (int64_t b = 0; b < samples; ++b) {
    SampleSums<double> s{};
    for (int64_t i = b * tasks; i < (b + 1) * tasks; ++i) {
      const SampleSums<double>& p = partial[i];
      s.weight += p.weight, s.weighted_bce += p.weighted_bce, s.p += p.p, s.y += p.y, s.py += p.py;
      s.kept += p.kept, s.kept_target += p.kept_target, s.intersection += p.intersection, s.union_ += p.union_;
      s.bad_target += p.bad_target;
    }
    if (s.bad_target > 0) {
      throw std::invalid_argument(
          "target: expected 0 and 1, or probabilities in [0, 1], at every kept pixel; sample " + std::to_string(b) +
          " has " + std::to_string(s.bad_target) + " others. Pass target > 0 for a 0/255 mask, and pixels to ignore as "
          "valid = target != 255");
    }
    const SampleLoss<double> result = sample_loss<double>(s, options);
    const double columns[kSumColumns] = {limits[b], result.bce, result.dice, s.weight, s.p, s.y, s.py};
    for (int64_t j = 0; j < kSumColumns; ++j) sum_out[b * kSumColumns + j] = T(columns[j]);
    const int64_t numbers[4] = {s.kept, s.kept_target, s.intersection, s.union_};
    std::copy(numbers, numbers + 4, count_out + b * 4);
    total += result.loss;
    if (reduction == kNone) loss_out[b] = T(result.loss);
  }
  if (reduction != kNone) loss_out[0] = T(reduction == kMean ? total / double(samples) : total);
  return {loss, sums, counts};
}

template <class T>
Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Plane& similarity,
                const OptionalTensor& valid, const Tensor& sums, bool protect, const LossWeights& weights,
                int64_t reduction) {
  const int64_t samples = logits.size(0);
  require(sums.dim() == 2 && sums.size(0) == samples && sums.size(1) == kSumColumns && sums.scalar_type() ==
          (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double), "sums: expected the second output of the forward");
  require(grad.scalar_type() == sums.scalar_type() && grad.numel() == (reduction == kNone ? samples : 1),
          "grad: expected the shape and dtype of the loss");
  const Tensor sum_rows = sums.is_contiguous() ? sums : torch::stable::contiguous(sums);  // the call takes longer than asking
  const T *sum = sum_rows.const_data_ptr<T>(), *grad_in = grad.const_data_ptr<T>();
  const int64_t grad_stride = reduction == kNone && samples > 1 ? grad.stride(0) : 0;
  Scratch<T> limits(samples);
  for (int64_t b = 0; b < samples; ++b) limits[b] = sum[b * kSumColumns + kThreshold];
  const Prepared<T> prepared(plane(logits), plane(target), similarity, plane(valid), protect, weights, limits);
  MaskedLossCall<T> call = prepared.call;
  // A task computes the pixels between its rows of logits and one row of neighbours on each side.
  if (resizes(call.logits, call.rows, call.columns)) {
    call.rows_per_task = std::max<int64_t>(1, call.rows_per_task * call.logits.rows / call.rows);
  }
  Tensor result = torch::stable::new_empty(logits, logits.sizes());
  void* out = result.mutable_data_ptr();
  const auto& kernel = masked_loss_kernels<T>();
  const int64_t tasks = (call.logits.rows + call.rows_per_task - 1) / call.rows_per_task;
  parallel_tasks<T>(samples * tasks, kernel.scratch(call), [&](int64_t i, T* scratch) {
    const int64_t b = i / tasks, first = i % tasks * call.rows_per_task;
    const T* s = sum + b * kSumColumns;
    const T g = reduction == kMean ? grad_in[0] / T(samples) : grad_in[b * grad_stride];
    const LossGradient<T> gradient = loss_gradient(g, s[kWeight], s[kP], s[kY], s[kPy], call.options);
    kernel.backward(call, gradient, b, first, std::min(first + call.rows_per_task, call.logits.rows), out, scratch);
  });
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> masked_loss_of_map(
    const Tensor& logits, const Tensor& target, const Plane& similarity, const OptionalTensor& valid,
    const Plane& map_valid, const Limit& limit, bool protect_target, const LossWeights& weights, int64_t reduction) {
  check_shapes(logits, target, similarity, valid);
  return with_compute_type(type_of(logits), [&](auto t) {
    return forward<decltype(t)>(logits, target, similarity, valid, map_valid, limit, protect_target, weights, reduction);
  });
}

std::tuple<Tensor, Tensor, Tensor> masked_loss(
    Tensor logits, Tensor target, OptionalTensor similarity, OptionalTensor valid, OptionalTensor map_valid,
    OptionalTensor thresholds, std::optional<double> threshold, std::optional<double> quantile, bool rank_in_fp64,
    bool protect_target, double bce_weight, double dice_weight, double negative_weight, double positive_weight,
    double smooth, int64_t reduction) {
  require(!similarity || (similarity->dim() == 3 && similarity->size(0) == logits.size(0)),
          "similarity: expected [B, h, w] with the batch of logits");
  require(!map_valid || (map_valid->dim() == 3 && map_valid->size(0) == logits.size(0)),
          "map_valid: expected [B, h, w] with the batch of logits");
  return masked_loss_of_map(logits, target, plane(similarity), valid, plane(map_valid),
                            {thresholds, threshold, quantile, rank_in_fp64}, protect_target,
                            {bce_weight, dice_weight, negative_weight, positive_weight, smooth}, reduction);
}

Tensor masked_loss_backward(
    Tensor grad, Tensor logits, Tensor target, OptionalTensor similarity, OptionalTensor valid, Tensor sums,
    bool protect_target, double bce_weight, double dice_weight, double negative_weight, double positive_weight,
    double smooth, int64_t reduction) {
  require(!similarity || (similarity->dim() == 3 && similarity->size(0) == logits.size(0)),
          "similarity: expected [B, h, w] with the batch of logits");
  const Plane map = plane(similarity);
  check_shapes(logits, target, map, valid);
  const LossWeights weights{bce_weight, dice_weight, negative_weight, positive_weight, smooth};
  return with_compute_type(type_of(logits), [&](auto t) {
    return backward<decltype(t)>(grad, logits, target, map, valid, sums, protect_target, weights, reduction);
  });
}

}  // namespace aml::cpu

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CPU, library) {
  library.impl("masked_loss", TORCH_BOX(&aml::cpu::masked_loss));
  library.impl("masked_loss_backward", TORCH_BOX(&aml::cpu::masked_loss_backward));
}
