// masked_loss on a GPU, forward, in one launch.
#pragma once

#include "loss_division.cuh"

namespace aml::cuda {

// kFew: the map has few values.
template <class Way, bool kFew>
__global__ void __launch_bounds__(kLossThreads, Way::kBlocksPerProcessor) masked_loss_forward(const LossCall call) {
  AML_SHARED(selection, Selection);
  AML_SHARED(run, StripRun);
  if (blockIdx.x == 0 && threadIdx.x == 0) *call.ticket = 0;  // the barrier lets all see it
  begin_strips(call, run);
  constexpr Search kSearch = kFew ? Search::few : Search::teams;
  run_strips<!std::is_same_v<Way, General>, kSearch>(call, run, selection, [&](const auto& limits) {
    sum_strips<Way>(call, run, limits);
  });
  finish_loss(call);
}

// Calls f(Way, kFew) with what the kernel for this call is made of.
template <class F>
auto with_kernel(const LossCall& call, F f) {
  return with_way(call, [&](auto way) {
    const bool few = is_few<kLossThreads>(call.similarity.rows * call.similarity.columns);
    return few ? f(way, std::true_type()) : f(way, std::false_type());
  });
}

// Divides the work and returns the bytes of scratch that launch_masked_loss needs.
inline int64_t prepare_masked_loss(LossCall& call) {
  return with_kernel(call, [&]([[maybe_unused]] auto way, [[maybe_unused]] auto few) {
    using Way = decltype(way);
    return divide_loss<Way>(call, AML_RESIDENT_BLOCKS(kLossThreads, 0, masked_loss_forward<Way, few()>), true);
  });
}

// One launch. `scratch`: 16-byte aligned, not initialised.
inline cudaError_t launch_masked_loss(LossCall call, void* scratch, cudaStream_t stream) {
  use_scratch(call, scratch);
  return with_kernel(call, [&]([[maybe_unused]] auto way, [[maybe_unused]] auto few) {
    return AML_LAUNCH_COOPERATIVE(dim3(unsigned(call.blocks)), dim3(kLossThreads), 0, stream,
                                  masked_loss_forward<decltype(way), few()>, call);
  });
}

}  // namespace aml::cuda
