// The quantile of few values, as a map of 15 x 15 has them: each thread of a block loads its own once and keeps them in
// registers. Four histograms over 8 bits each, of which every warp reads all, so that a digit costs one barrier.
#pragma once

#include "selection.cuh"

namespace aml::cuda {

constexpr int kFewPerThread = 4;
template <int kThreads>
__host__ __device__ constexpr bool is_few(int64_t values) { return values <= kThreads * kFewPerThread; }

constexpr int kByteBins = 256, kBytes = 4;
static_assert(kByteBins * kBytes < kBins, "the histograms, and a number behind them, fit where longer ones would be");

// A histogram of 256 bins, of at most 65535 values, in the lanes of a warp: eight bins to a lane.
struct WarpBins {
  uint32_t pairs[4];               // of counts: of bins i and i + 4
  uint32_t mine = 0, before, all;  // values in the lane's bins, in those before them, in all

  __device__ __forceinline__ uint32_t count(uint32_t bin) const { return bin < 4 ? pairs[bin] & 0xFFFF : pairs[bin - 4] >> 16; }

  __device__ __forceinline__ explicit WarpBins(const uint32_t* bins) {
    const int lane = threadIdx.x % kWarp;
    const auto low = load<4>(bins + lane * 8), high = load<4>(bins + lane * 8 + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = low.value[i] | high.value[i] << 16, mine += low.value[i] + high.value[i];
    uint32_t inclusive = mine;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, distance);
      if (lane >= distance) inclusive += other;
    }
    before = inclusive - mine;
    all = __shfl_sync(kAllLanes, inclusive, kWarp - 1);
  }

  // The bin of a place below `all`; leaves the place within it, and how many there are in it.
  __device__ __forceinline__ uint32_t find(uint32_t& place, uint32_t& in_bin) const {
    const bool here = before <= place && place - before < mine;
    uint32_t rest = place - before, bin = 0, here_in_bin = count(0);
#pragma unroll
    for (uint32_t i = 0; i < 7; ++i) {
      if (bin == i && rest >= count(i)) rest -= count(i), bin = i + 1, here_in_bin = count(i + 1);
    }
    const int lane = __ffs(int(__ballot_sync(kAllLanes, here))) - 1;
    place = __shfl_sync(kAllLanes, rest, lane), in_bin = __shfl_sync(kAllLanes, here_in_bin, lane);
    return uint32_t(lane) * 8 + __shfl_sync(kAllLanes, bin, lane);
  }
};

// The q-quantile of few values, in every thread: team_quantile of one block.
// Calls meanwhile() while the values are on their way.
template <int kThreads, class Values, class F>
__device__ __forceinline__ float quantile_of_few(const Values& values, float q, Interpolation interpolation, bool rank_in_fp64,
                                                 Selection& s, F meanwhile) {
  uint32_t* const nans = &s.bins[kBytes * kByteBins];
  uint32_t keys[kFewPerThread];
  unsigned exists = 0;  // bits
#pragma unroll
  for (int i = 0; i < kFewPerThread; ++i) exists |= unsigned(values.load_key(int(threadIdx.x) + i * kThreads, keys[i])) << i;
  for (int bin = threadIdx.x; bin <= kBytes * kByteBins; bin += kThreads) s.bins[bin] = 0;
  if (threadIdx.x == 0) s.next = ~0u;
  meanwhile();
  __syncthreads();

  float weight = 0;
  bool defined = false, between_two = false;
  uint32_t key = 0, place = 0, in_bin = 0;  // the key as far as it is known; the place among those that agree, and their number
  for (int byte = 0; byte < kBytes; ++byte) {
    const int shift = 24 - 8 * byte;
    uint32_t* const bins = s.bins + byte * kByteBins;
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) {
      if (!(exists >> i & 1)) continue;
      if ((uint64_t(keys[i]) >> (shift + 8)) == key) atomicAdd(&bins[keys[i] >> shift & 255], 1u);
      if (byte == 0 && keys[i] == kNaNKey) atomicAdd(nans, 1u);
    }
    __syncthreads();
    const WarpBins all(bins);
    if (byte == 0) {
      defined = q >= 0 && q <= 1 && all.all > 0 && *nans == 0;
      if (!defined) break;
      const Rank<float> rank = quantile_rank_in_integers(q, all.all, interpolation, rank_in_fp64);
      place = uint32_t(rank.below), between_two = rank.above > rank.below, weight = rank.weight;
    }
    key = key << 8 | all.find(place, in_bin);
  }

  uint32_t next = key;
  if (between_two && place + 1 >= in_bin) {  // the smallest key above
    uint32_t above = ~0u;
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) above = (exists >> i & 1) && keys[i] > key ? min(above, keys[i]) : above;
    above = __reduce_min_sync(kAllLanes, above);
    if (threadIdx.x % kWarp == 0 && above != ~0u) atomicMin(&s.next, above);
    __syncthreads();
    next = s.next;
  }
  __syncthreads();  // `s` is free again
  return defined ? between(key, next, weight, interpolation) : bit_cast<float>(0x7FC00000u);
}

// The q-quantile of a sample's values by one block: team_quantile of that block, the faster way.
template <int kThreads, class Values>
__device__ float block_quantile(const Values& values, float q, Interpolation interpolation, bool rank_in_fp64, Selection& s) {
  if (is_few<kThreads>(values.count())) {
    return quantile_of_few<kThreads>(values, q, interpolation, rank_in_fp64, s, [] {});
  }
  return team_quantile<kThreads>(values, OneBlock{}, q, interpolation, rank_in_fp64, s);
}

}  // namespace aml::cuda
