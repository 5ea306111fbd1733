// aml_loss on a GPU, forward, in one launch: similarity tile by tile, a barrier, then what masked_loss does. Of each
// sample's map, which stays in the L2 cache, every block that needs the threshold finds it by itself, also where the
// map is long: there are no teams as in masked_loss.
//
// On every architecture the launch is cooperative and the barrier is the grid's; loss_strips.cuh says why no clusters.
// The grid is what the device runs at once, whatever the input: blocks take tiles, and then strips, in turn.
//
// One kernel for each type of features and way to read pixels, rather than one that branches: half the code to fetch, and
// no registers for what the branches have in common.
#pragma once

#include "loss_division.cuh"
#include "similarity.cuh"

namespace aml::cuda {

static_assert(kSimilarityThreads == kLossThreads, "one block does both");

struct AmlCall {
  SimilarityCall similarity;
  LossCall loss;  // its map is `map`, or absent where nothing is left out
  float* map;     // contiguous [samples, cells]
};

union AmlShared {
  ComparisonTile tile;
  Selection selection;
};

// ---- kernel

template <class T, class Way>
__global__ void __launch_bounds__(kLossThreads, 2) aml_loss_forward(const AmlCall call) {
  AML_SHARED(shared, AmlShared);
  AML_SHARED(run, StripRun);
  if (blockIdx.x == 0 && threadIdx.x == 0) *call.loss.ticket = 0;  // the barrier lets all see it
  const int tiles = call.similarity.blocks_of(kTileCells), all = int(call.loss.samples) * tiles;
  for (int i = blockIdx.x; i < all; i += gridDim.x) {
    const int sample = i / tiles;
    similarity_tile<T>(call.similarity, sample, (i - sample * tiles) * kTileCells, call.map, shared.tile);
  }
  begin_strips(call.loss, run);
  prefetch_rows(call.loss, run);
  grid_barrier();

  run_strips<true, Search::alone>(call.loss, run, shared.selection, [&](const auto& limits) {
    sum_strips<Way>(call.loss, run, limits);
  });
  finish_loss(call.loss);
}

// ---- host

// Divides the work and returns the bytes of scratch that launch_aml_loss needs.
template <class T>
int64_t prepare_aml_loss(AmlCall& call) {
  return with_way(call.loss, [&](auto way) {
    using Way = decltype(way);
    return divide_loss<Way>(call.loss, AML_RESIDENT_BLOCKS(kLossThreads, 0, aml_loss_forward<T, Way>), false);
  });
}

// One launch. `scratch`: 16-byte aligned, not initialised.
template <class T>
cudaError_t launch_aml_loss(AmlCall call, void* scratch, cudaStream_t stream) {
  use_scratch(call.loss, scratch);
  return with_way(call.loss, [&](auto way) {
    return AML_LAUNCH_COOPERATIVE(dim3(unsigned(call.loss.blocks)), dim3(kLossThreads), 0, stream,
                                  aml_loss_forward<T, decltype(way)>, call);
  });
}

// Instantiated in a file for each type of features: the 24 kernels in one would take most of the time of a build.
extern template int64_t prepare_aml_loss<float>(AmlCall&);
extern template int64_t prepare_aml_loss<bf16>(AmlCall&);
extern template int64_t prepare_aml_loss<f16>(AmlCall&);
extern template cudaError_t launch_aml_loss<float>(AmlCall, void*, cudaStream_t);
extern template cudaError_t launch_aml_loss<bf16>(AmlCall, void*, cudaStream_t);
extern template cudaError_t launch_aml_loss<f16>(AmlCall, void*, cudaStream_t);

}  // namespace aml::cuda
