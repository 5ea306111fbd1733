// sample_quantile: one block per sample, or all blocks of the device where samples are few and long; one launch either way.
#pragma once

#include "few_values.cuh"

namespace aml::cuda {

constexpr int kQuantileThreads = 512;
constexpr int64_t kValuesPerBlock = 16384;  // shorter samples are one block's: barriers between blocks cost more

struct QuantileCall {
  Plane values, valid;  // `valid` may be absent
  int64_t samples;
  const float* q_per_sample;  // may be null
  int64_t q_stride;
  float q;
  Interpolation interpolation;
  bool rank_in_fp64;
  float* result;

  __device__ float q_of(int64_t sample) const { return q_per_sample ? q_per_sample[sample * q_stride] : q; }
};

template <class T>
__global__ void __launch_bounds__(kQuantileThreads, 2) quantile_by_block(QuantileCall call) {
  AML_SHARED(selection, Selection);
  const int64_t sample = blockIdx.x;
  const float quantile = block_quantile<kQuantileThreads>(SampleValues<T>(call.values, call.valid, sample), call.q_of(sample),
                                                          call.interpolation, call.rank_in_fp64, selection);
  if (threadIdx.x == 0) call.result[sample] = quantile;
}

template <class T>
__global__ void __launch_bounds__(kQuantileThreads, 2) quantile_by_team(QuantileCall call, int blocks, TeamCounts* totals) {
  AML_SHARED(selection, Selection);
  const int64_t sample = blockIdx.x / blocks;
  const SeveralBlocks team{totals + sample, int(blockIdx.x % blocks), blocks};
  clear_team_counts(team);
  grid_barrier();
  const float quantile =
      team_quantile<kQuantileThreads>(SampleValues<T>(call.values, call.valid, sample), team, call.q_of(sample),
                                      call.interpolation, call.rank_in_fp64, selection);
  if (team.first() == 0) call.result[sample] = quantile;
}

// How many blocks work on a sample: all of the device's where the samples are few and long.
template <class T>
int quantile_blocks(const QuantileCall& call) {
  const int64_t count = call.values.rows * call.values.columns, useful = (count + kValuesPerBlock - 1) / kValuesPerBlock;
  const int64_t resident = AML_RESIDENT_BLOCKS(kQuantileThreads, 0, quantile_by_team<T>);
  const int64_t blocks = useful < resident / call.samples ? useful : resident / call.samples;
  return blocks > 1 ? int(blocks) : 1;
}

// One launch. `totals`, for more than one block: TeamCounts of every sample, not initialised.
template <class T>
cudaError_t launch_sample_quantile(const QuantileCall& call, int blocks, TeamCounts* totals, cudaStream_t stream) {
  if (blocks == 1) return AML_LAUNCH(dim3(unsigned(call.samples)), dim3(kQuantileThreads), 0, stream, quantile_by_block<T>, call);
  return AML_LAUNCH_COOPERATIVE(dim3(unsigned(call.samples * blocks)), dim3(kQuantileThreads), 0, stream, quantile_by_team<T>,
                                call, blocks, totals);
}

}  // namespace aml::cuda
