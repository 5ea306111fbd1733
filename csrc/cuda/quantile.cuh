// The quantile of a sample by radix selection: numbers become integers of the same order, and three histograms, over
// 11, 11 and 10 bits, find the one at a given place. Integers only, so that no order of threads changes the result.
//
// A sample belongs to a team: one block, whose histograms stay in shared memory, or several, which add theirs up in
// global memory. Every thread of a team's blocks gets the quantile.
#pragma once

#include "../common/quantile.h"
#include "device.cuh"

namespace aml::cuda {

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kPasses = 3;                 // over bits 21 to 31, 10 to 20 and 0 to 9
constexpr uint32_t kNaNKey = 0xFFFFFFFFu;  // behind all numbers, in a bin of the first pass where no number is

__device__ __forceinline__ uint32_t selection_key(float value) { return value == value ? ordered_key(value) : kNaNKey; }

// Shared memory of a block that takes part in a selection.
struct Selection {
  uint32_t bins[kBins];
  int64_t warp_sum[kWarp];
  int64_t place;    // of the wanted number, among those that agree with the digits found so far
  int64_t all;      // numbers in the sample, NaN among them
  int64_t in_bin;   // of them in the bin that was found
  uint32_t digit;   // found in this pass
  uint32_t next;    // smallest key above the wanted one
  uint32_t any_nan;
};

// The members of a team: the digit counts of a pass over the whole sample come from `count` once `merge` has returned.
struct OneBlock {
  __device__ int64_t first() const { return threadIdx.x; }
  __device__ int64_t threads() const { return blockDim.x; }
  __device__ void merge(Selection&, int) const { __syncthreads(); }
  __device__ int64_t count(const Selection& s, int, int bin) const { return s.bins[bin]; }
};

// What several blocks need in global memory per sample, all zero but `next`, which is ~0.
struct TeamCounts {
  unsigned long long bins[kPasses][kBins];
  uint32_t next;
};

// A sample's values in memory of any strides. `valid`, where given, says which exist.
template <class T>
struct SampleValues {
  const T* values;
  const bool* valid;
  int64_t rows, columns;
  int64_t row_stride, column_stride, valid_row_stride, valid_column_stride;

  __device__ SampleValues(const Plane& v, const Plane& m, int64_t sample);

  // Calls f(key) for each value that exists; thread `first` of `threads` takes its share.
  template <class F>
  __device__ void visit(int64_t first, int64_t threads, F f) const;
};

// The q-quantile of a sample's values, as torch.quantile computes it: NaN if there is no value, one is NaN, or q is
// outside [0, 1]. Ends with a barrier of the block: `s` can be used for something else.
template <int kThreads, class Values, class Team>
__device__ float sample_quantile(const Values& values, const Team& team, float q, Interpolation interpolation,
                                 bool rank_in_fp64, Selection& s);

}  // namespace aml::cuda
