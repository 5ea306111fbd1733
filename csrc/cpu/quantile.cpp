// sample_quantile on the CPU: one sample after the other on each thread.
#include "tensors.h"

namespace aml::cpu {

template <class T>
static Tensor quantiles(const Tensor& values, double q, const OptionalTensor& q_per_sample, const QuantileCall<T>& call) {
  const int64_t samples = values.size(0);
  Tensor result = empty<T>(values, {samples});
  T* out = result.template mutable_data_ptr<T>();
  // As thresholds are: one number, or one for each sample.
  Scratch<T> fraction(samples);
  sample_limits<T>({q_per_sample, q, std::nullopt, false}, {}, {}, samples, fraction);
  const auto& kernel = quantile_kernels<T>();
  parallel_tasks<T>(samples, kernel.scratch(call), [&](int64_t b, T* scratch) {
    out[b] = kernel.quantile(call, b, fraction[b], scratch);
  });
  return result;
}

Tensor sample_quantile(Tensor values, double q, OptionalTensor q_per_sample, OptionalTensor valid, int64_t interpolation,
                       bool rank_in_fp64) {
  require(values.dim() >= 1 && values.numel() > 0, "values: expected [B, ...] with no empty dimension");
  require(!valid || same_shape(*valid, values), "valid: expected the shape of values");
  require(!q_per_sample || (q_per_sample->dim() == 1 && q_per_sample->size(0) == values.size(0)), "q: expected a number or [B]");
  Plane rows, there;
  Tensor values_copy, valid_copy;
  matching_rows(values, valid, rows, there, values_copy, valid_copy);
  return with_compute_type(type_of(values), [&](auto t) {
    using T = decltype(t);
    return quantiles<T>(values, q, q_per_sample, {rows, there, rank_in_fp64, Interpolation(interpolation)});
  });
}

}  // namespace aml::cpu

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CPU, library) {
  library.impl("sample_quantile", TORCH_BOX(&aml::cpu::sample_quantile));
}
