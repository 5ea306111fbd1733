// masked_loss on a GPU, forward, in one launch.
#pragma once

#include "loss_strips.cuh"

namespace aml::cuda {

template <class Way>
__global__ void __launch_bounds__(kLossThreads, Way::kBlocksPerProcessor) masked_loss_forward(const LossCall call) {
  AML_SHARED(selection, Selection);
  AML_SHARED(run, StripRun);
  if (blockIdx.x == 0 && threadIdx.x == 0) *call.ticket = 0;  // the barrier lets all see it
  begin_strips(call, run);
  run_strips<!std::is_same_v<Way, General>, true, true>(call, run, selection, [&](int first, int begin, int end, const auto& limits) {
    sum_strips<Way>(call, first, begin, end, limits);
  });
  finish_loss(call);
}

// Divides the work and returns the bytes of scratch that launch_masked_loss needs.
inline int64_t prepare_masked_loss(LossCall& call) {
  return with_way(call, [&](auto way) {
    using Way = decltype(way);
    return divide_loss<Way>(call, AML_RESIDENT_BLOCKS(kLossThreads, 0, masked_loss_forward<Way>), true);
  });
}

// One launch. `scratch`: 16-byte aligned, not initialised.
inline cudaError_t launch_masked_loss(LossCall call, void* scratch, cudaStream_t stream) {
  use_scratch(call, scratch);
  return with_way(call, [&](auto way) {
    return AML_LAUNCH_COOPERATIVE(dim3(unsigned(call.blocks)), dim3(kLossThreads), 0, stream,
                                  masked_loss_forward<decltype(way)>, call);
  });
}

}  // namespace aml::cuda
