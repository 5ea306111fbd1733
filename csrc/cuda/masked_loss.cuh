// masked_loss on a GPU, forward, in one launch.
#pragma once

#include "loss_strips.cuh"

namespace aml::cuda {

template <class Way, Search kSearch>
__global__ void __launch_bounds__(kLossThreads, Way::kBlocksPerProcessor) masked_loss_forward(const LossCall call) {
  AML_SHARED(selection, Selection);
  AML_SHARED(run, StripRun);
  if (blockIdx.x == 0 && threadIdx.x == 0) *call.ticket = 0;  // the barrier lets all see it
  begin_strips(call, run);
  run_strips<!std::is_same_v<Way, General>, kSearch, true>(call, run, selection, [&](int begin, int end, const auto& limits) {
    sum_strips<Way>(call, begin, end, limits);
  });
  finish_loss(call);
}

// Calls f(kernel's Way, its Search).
template <class F>
auto with_kernel(const LossCall& call, F f) {
  return with_way(call, [&](auto way) {
    return has_few_values(call.similarity) ? f(way, std::integral_constant<Search, Search::few>())
                                           : f(way, std::integral_constant<Search, Search::teams>());
  });
}

// Divides the work and returns the bytes of scratch that launch_masked_loss needs.
inline int64_t prepare_masked_loss(LossCall& call) {
  return with_kernel(call, [&]([[maybe_unused]] auto way, [[maybe_unused]] auto search) {
    using Way = decltype(way);
    return divide_loss<Way>(call, AML_RESIDENT_BLOCKS(kLossThreads, 0, masked_loss_forward<Way, search()>), true);
  });
}

// One launch. `scratch`: 16-byte aligned, not initialised.
inline cudaError_t launch_masked_loss(LossCall call, void* scratch, cudaStream_t stream) {
  use_scratch(call, scratch);
  return with_kernel(call, [&]([[maybe_unused]] auto way, [[maybe_unused]] auto search) {
    return AML_LAUNCH_COOPERATIVE(dim3(unsigned(call.blocks)), dim3(kLossThreads), 0, stream,
                                  masked_loss_forward<decltype(way), search()>, call);
  });
}

}  // namespace aml::cuda
