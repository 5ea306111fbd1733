// aml_loss on a GPU, forward, in one launch: similarity tile by tile, a barrier, then what masked_loss does. Of each
// sample's map, which stays in the L2 cache, every block that needs the threshold finds it by itself, also where the
// map is long: there are no teams as in masked_loss.
//
// On every architecture the launch is cooperative and the barrier is the grid's; loss_strips.cuh says why no clusters.
// The grid is what the device runs at once, whatever the input: blocks take tiles, and then strips, in turn.
//
// One kernel for all types: its three parts follow each other, so that registers are shared and no part is compiled
// more often than there are types of what it reads.
#pragma once

#include "loss_strips.cuh"
#include "similarity.cuh"

namespace aml::cuda {

static_assert(kSimilarityThreads == kLossThreads, "one block does both");

struct AmlCall {
  SimilarityCall similarity;
  LossCall loss;  // its map is `map`, or absent where nothing is left out
  float* map;     // contiguous [samples, cells]
  int way;        // how the pixels are read
};

union AmlShared {
  SimilarityTile tile;
  Selection selection;
};

// ---- kernel

// Calls f(Way) with the way of that number.
template <class F>
__host__ __device__ __forceinline__ void with_way_number(int way, F f) {
  switch (way) {
    case 0: return f(Direct<float, false>());
    case 1: return f(Direct<bf16, false>());
    case 2: return f(Direct<f16, false>());
    case 3: return f(Direct<float, true>());
    case 4: return f(Direct<bf16, true>());
    case 5: return f(Direct<f16, true>());
    default: return f(General());
  }
}

__global__ void __launch_bounds__(kLossThreads, 2) aml_loss_forward(const AmlCall call) {
  AML_SHARED(shared, AmlShared);
  AML_SHARED(run, StripRun);
  if (blockIdx.x == 0 && threadIdx.x == 0) *call.loss.ticket = 0;  // the barrier lets all see it
  with_float_type(call.similarity.visual.type, call.similarity.visual.data, [&](auto* visual) {
    using T = std::decay_t<decltype(*visual)>;
    const int tiles = call.similarity.tiles, all = int(call.loss.samples) * tiles;
    for (int i = blockIdx.x; i < all; i += gridDim.x) {
      const int sample = i / tiles;
      similarity_tile<T>(call.similarity, sample, (i - sample * tiles) * kTileCells, call.map, shared.tile);
    }
  });
  begin_strips(call.loss, run, true);
  grid_barrier();

  with_way_number(call.way, [&](auto way) {
    run_strips<true, false>(call.loss, run, shared.selection, [&](int sample, int begin, int end, float limit) {
      sum_strips<decltype(way)>(call.loss, sample, begin, end, limit);
    });
  });
  finish_loss(call.loss);
}

// ---- host

// Divides the work and returns the bytes of scratch that launch_aml_loss needs.
inline int64_t prepare_aml_loss(AmlCall& call) {
  const int resident = AML_RESIDENT_BLOCKS(kLossThreads, 0, aml_loss_forward);
  int64_t bytes = 0;
  with_way(call.loss, [&](auto way) {
    call.way = way.kNumber;
    bytes = divide_loss<decltype(way)>(call.loss, resident, false);
  });
  return bytes;
}

// One launch. `scratch`: 16-byte aligned, not initialised.
inline cudaError_t launch_aml_loss(AmlCall call, void* scratch, cudaStream_t stream) {
  use_scratch(call.loss, scratch);
  return AML_LAUNCH_COOPERATIVE(dim3(unsigned(call.loss.blocks)), dim3(kLossThreads), 0, stream, aml_loss_forward, call);
}

}  // namespace aml::cuda
