// sample_quantile on a GPU.
#include "quantile.cuh"
#include "tensors.h"

namespace aml::cuda {

Tensor sample_quantile(Tensor values, double q, OptionalTensor q_per_sample, OptionalTensor valid, int64_t interpolation,
                       bool rank_in_fp64) {
  require(values.dim() >= 1 && values.numel() > 0, "values: expected [B, ...] with no empty dimension");
  require_float("values", values);
  require(!valid || (same_shape(*valid, values) && valid->scalar_type() == ScalarType::Bool),
          "valid: expected bool of the shape of values");
  require(!q_per_sample || (q_per_sample->dim() == 1 && q_per_sample->size(0) == values.size(0)), "q: expected a number or [B]");
  const OnDevice stream(values);
  const int64_t samples = values.size(0);
  QuantileCall call{};
  Tensor values_copy, valid_copy, fractions;
  matching_rows(values, valid, call.values, call.valid, values_copy, valid_copy);
  call.samples = samples;
  call.q = float(q);
  if (q_per_sample) {
    fractions = to_float32(*q_per_sample);
    call.q_per_sample = fractions.const_data_ptr<float>(), call.q_stride = fractions.stride(0);
  }
  call.interpolation = Interpolation(interpolation);
  call.rank_in_fp64 = rank_in_fp64;
  Tensor result = empty(values, {samples});
  call.result = result.mutable_data_ptr<float>();

  const cudaError_t error = with_float_tag(call.values.type, [&](auto tag) {
    using T = decltype(tag);
    const int blocks = quantile_blocks<T>(call);
    const int64_t bytes = blocks > 1 ? samples * int64_t(sizeof(TeamCounts)) : 0;
    Tensor totals = empty(values, {bytes}, ScalarType::Byte);
    return launch_sample_quantile<T>(call, blocks, static_cast<TeamCounts*>(totals.mutable_data_ptr()), stream);
  });
  require_launched(error, "sample_quantile", {{"values", &values}});
  return result;
}

}  // namespace aml::cuda

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CUDA, library) {
  library.impl("sample_quantile", TORCH_BOX(&aml::cuda::sample_quantile));
}
