// masked_loss on a GPU, backward, in one launch: what was kept and p are computed again, and only the gradient of the
// logits is written. This kernel is for logits of the target's size; masked_loss_gather.cuh for those that are resized.
#pragma once

#include "loss_division.cuh"

namespace aml::cuda {

struct GradientCall : PixelCall {
  LossOptions<float> options;
  Reduction reduction;
  const float* grad;  // [samples] with a stride, or one number
  int64_t grad_stride;
  const float* sums;  // of the forward
  void* gradient;     // contiguous, type and size of the logits
  int strips;         // of a sample

  __device__ __forceinline__ float limit(int64_t sample) const { return sums[sample * kSumColumns + kThreshold]; }

  __device__ __forceinline__ LossGradient<float> loss_gradient_of(int64_t sample) const {
    const float* s = sums + sample * kSumColumns;
    const float g = reduction == kMean ? *grad / float(samples) : grad[reduction == kNone ? sample * grad_stride : 0];
    return loss_gradient(g, s[kWeight], s[kP], s[kY], s[kPy], options);
  }
};

template <class Label>
__device__ __forceinline__ float gradient_of(const GradientCall& call, const Pixel<Label>& pixel, const LossGradient<float>& g) {
  const float y = float(pixel.label), step = call.options.positive_weight - call.options.negative_weight;
  const float slope = pixel_gradient(fast_sigmoid(pixel.z), y, g, call.options.negative_weight, step);
  return pixel.keep ? slope : 0.0f;
}

template <class Way>
__global__ void __launch_bounds__(kLossThreads, Way::kBlocksPerProcessor)
    masked_loss_backward_pixels(const GradientCall call) {
  const int64_t strip = int64_t(blockIdx.x) * kLossWarps + threadIdx.x / kWarp;
  const int64_t sample = strip / call.strips;
  const uint32_t index = uint32_t(strip - sample * call.strips) * kWarp + threadIdx.x % kWarp;
  if (sample >= call.samples || index >= call.items) return;
  const Item item(call, index, Way::kColumns);
  const LossGradient<float> g = call.loss_gradient_of(sample);
  const int64_t start = sample * call.rows * call.columns + item.x;
  Pack<float, Way::kColumns> row;
  Way::walk(
      call, sample, item, call.limit(sample), [&](int k, const auto& pixel) { row.value[k] = gradient_of(call, pixel, g); },
      [&](uint32_t y) {
        const int64_t offset = start + int64_t(y) * call.columns;
        if constexpr (std::is_same_v<Way, General>) {
          with_float_type(call.logits.type, call.gradient, [&](auto* to) {
            using T = std::decay_t<decltype(*to)>;
#pragma unroll
            for (int k = 0; k < Way::kColumns; ++k) {
              if (item.x + k < call.columns) const_cast<T*>(to)[offset + k] = from_float<T>(row.value[k]);
            }
          });
        } else {
          Pack<typename Way::Stored, Way::kColumns> pack;
#pragma unroll
          for (int k = 0; k < Way::kColumns; ++k) pack.value[k] = from_float<typename Way::Stored>(row.value[k]);
          store(static_cast<typename Way::Stored*>(call.gradient) + offset, pack);
        }
      });
}

template <class Way>
cudaError_t launch_masked_loss_backward(GradientCall& call, cudaStream_t stream) {
  const int resident = AML_RESIDENT_BLOCKS(kLossThreads, 0, masked_loss_backward_pixels<Way>);
  call.strips = cut(call, Way::kColumns, int64_t(resident) * kLossWarps);
  const int64_t blocks = (call.samples * call.strips + kLossWarps - 1) / kLossWarps;
  return AML_LAUNCH(dim3(unsigned(blocks)), dim3(kLossThreads), 0, stream, masked_loss_backward_pixels<Way>, call);
}

}  // namespace aml::cuda
