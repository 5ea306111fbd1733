// sample_quantile on the CPU: one sample after the other on each thread.
#include "tensors.h"

namespace aml::cpu {

// [B, ...] as rows and columns: dimensions that lie next to each other in memory become one.
static Plane rows_of(const Tensor& tensor, Tensor& holder) {
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0}, found = 0;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (found && tensor.stride(d) == sizes[found - 1] * strides[found - 1]) {
      sizes[found - 1] *= tensor.size(d);
    } else if (found == 2) {
      holder = torch::stable::contiguous(tensor);  // more than two strides: the one copy
      return rows_of(holder, holder);
    } else {
      sizes[found] = tensor.size(d), strides[found] = tensor.stride(d), ++found;
    }
  }
  return {tensor.const_data_ptr(), type_of(tensor), tensor.stride(0), strides[1], strides[0], sizes[1], sizes[0]};
}

// `valid` seen with the rows and columns of `values`: where the two do not fold alike, both are copied.
static void matching_rows(Tensor values, OptionalTensor valid, Plane& v, Plane& m, Tensor& values_copy, Tensor& valid_copy) {
  v = rows_of(values, values_copy);
  if (!valid) return;
  m = rows_of(*valid, valid_copy);
  if (v.rows == m.rows && v.columns == m.columns) return;
  values_copy = torch::stable::contiguous(values), valid_copy = torch::stable::contiguous(*valid);
  v = rows_of(values_copy, values_copy), m = rows_of(valid_copy, valid_copy);
}

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
  require(!valid || valid->numel() == values.numel(), "valid: expected the shape of values");
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
