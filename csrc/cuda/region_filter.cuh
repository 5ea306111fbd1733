// filter_regions in one cooperative launch of four steps, a grid barrier between them: the samples' thresholds; which
// blocks hold a weak or a protected pixel; which of the weak ones are dropped; the copy of the image.
//
// "Block" is a thread block here; the squares of the image that are dropped or kept are regions.
#pragma once

#include "../common/philox.h"
#include "few_values.cuh"
#include "resize.cuh"

namespace aml::cuda {

constexpr int kFilterThreads = 256;
constexpr int kMostColours = 64;  // that a launch carries along; one colour serves any number of channels
constexpr uint32_t kWeak = 1, kProtected = 2;

struct FilterCall {
  const void* image;  // [samples, channels, rows, columns] of any strides
  int element_bytes;
  int64_t sample_stride, channel_stride, row_stride, column_stride;
  uint32_t samples, channels, rows, columns;
  Plane similarity, protect;  // `protect` may be absent
  Axis map_rows, map_columns;
  // The threshold: a quantile of the map, or one per sample, or one for all.
  bool by_quantile, rank_in_fp64;
  float limit;          // or the quantile
  const float* limits;  // may be null
  int64_t limits_stride;
  float ratio;
  uint64_t seed;
  uint32_t region, region_rows, region_columns;  // edge, and how many there are
  uint64_t colour[kMostColours];                 // bits of an element of the image
  uint32_t colours;                              // as many as channels, or one
  void* result;                                  // contiguous
  bool* dropped;                                 // [samples, region_rows, region_columns]

  __host__ __device__ uint32_t regions() const { return region_rows * region_columns; }
};

// Memory between the steps, not initialised.
struct FilterScratch {
  float* limit;     // [samples]
  uint32_t* flags;  // [samples, regions]

  static int64_t elements(const FilterCall& call) { return call.samples * (int64_t(1) + call.regions()); }
  static FilterScratch divide(const FilterCall& call, uint32_t* memory) {
    return {reinterpret_cast<float*>(memory), memory + call.samples};
  }
};

// ---- thresholds

__device__ inline void find_limits(const FilterCall& call, const FilterScratch& scratch, Selection& selection) {
  for (uint32_t b = blockIdx.x; b < call.samples; b += gridDim.x) {
    float limit = call.limits ? call.limits[b * call.limits_stride] : call.limit;
    if (call.by_quantile) {
      with_float_type(call.similarity.type, call.similarity.data, [&](auto* data) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        limit = block_quantile<kFilterThreads>(SampleValues<T>(call.similarity, Plane{}, b), call.limit, Interpolation::linear,
                                               call.rank_in_fp64, selection);
      });
    }
    if (threadIdx.x == 0) scratch.limit[b] = limit;
    for (uint32_t i = threadIdx.x; i < call.regions(); i += kFilterThreads) scratch.flags[int64_t(b) * call.regions() + i] = 0;
  }
}

// ---- weak and protected regions

// A thread goes down one column of pixels of one row of regions.
__device__ inline void find_weak(const FilterCall& call, const FilterScratch& scratch) {
  const int64_t items = int64_t(call.samples) * call.region_rows * call.columns, step = int64_t(gridDim.x) * kFilterThreads;
  for (int64_t item = int64_t(blockIdx.x) * kFilterThreads + threadIdx.x; item < items; item += step) {
    const int64_t strip = item / call.columns, sample = strip / call.region_rows;
    const uint32_t x = uint32_t(item - strip * call.columns), region_row = uint32_t(strip - sample * call.region_rows);
    const uint32_t first = region_row * call.region, last = min(first + call.region, call.rows);
    const float limit = scratch.limit[sample];
    ResizedColumns<1> map(call.similarity, call.map_rows, call.map_columns, sample, first, x);
    float above = 0, below = 0;
    uint32_t flags = 0;
    for (uint32_t y = first; y < last; ++y) {
      const float weight = map.next_row(call.similarity, call.map_rows, [&](int, float a, float b) { above = a, below = b; });
      if (interpolate(above, below, weight) < limit) flags |= kWeak;
      if (call.protect.data && load_element(call.protect, sample, y, x) != 0) flags |= kProtected;
    }
    if (flags) atomicOr(&scratch.flags[strip * call.region_columns + x / call.region], flags);
  }
}

// ---- the choice

// The random keys of a sample's weak regions.
struct WeakRegions {
  const uint32_t* flags;
  uint64_t seed;
  uint32_t sample, count;

  __device__ bool is_weak(uint32_t region) const { return flags[region] == kWeak; }
  __device__ uint32_t key(uint32_t region) const { return philox_key(seed, sample, region); }

  template <class F>
  __device__ void visit(int64_t first, int64_t threads, F f) const {
    for (int64_t i = first; i < count; i += threads) {
      f(is_weak(uint32_t(i)), key(uint32_t(i)));
    }
  }
  // How many of the regions before this one are weak and have the same key.
  __device__ uint32_t equal_before(uint32_t region) const {
    uint32_t equal = 0;
    for (uint32_t i = 0; i < region; ++i) equal += is_weak(i) && key(i) == key(region);
    return equal;
  }
};

// Of a sample's n weak regions the round(ratio n) with the smallest keys are dropped, the first of equal ones.
__device__ inline void choose_dropped(const FilterCall& call, const FilterScratch& scratch, Selection& s) {
  for (uint32_t b = blockIdx.x; b < call.samples; b += gridDim.x) {
    const WeakRegions weak{scratch.flags + int64_t(b) * call.regions(), call.seed, b, call.regions()};
    const uint32_t last = select_key<kFilterThreads>(weak, OneBlock{}, [&](int64_t all, int64_t) {
      return int64_t(floorf(call.ratio * float(all) + 0.5f)) - 1;  // -1: none
    }, s);
    const bool any = s.wanted >= 0, all_equal_ones = s.place == s.in_bin - 1;
    const int64_t equal_ones = s.place + 1;
    for (uint32_t i = threadIdx.x; i < call.regions(); i += kFilterThreads) {
      const uint32_t key = weak.key(i);
      bool dropped = any && weak.is_weak(i) && key <= last;
      if (dropped && key == last && !all_equal_ones) dropped = weak.equal_before(i) < equal_ones;
      call.dropped[int64_t(b) * call.regions() + i] = dropped;
    }
    __syncthreads();  // `s` is free again
  }
}

// ---- the copy

// E: an unsigned integer of the size of an element. A warp takes one row after the other.
template <class E>
__device__ void copy_image(const FilterCall& call) {
  constexpr int kWidth = 16 / int(sizeof(E));
  const uint32_t rows = call.samples * call.channels * call.rows, lane = threadIdx.x % kWarp;
  const uint32_t warps = gridDim.x * (kFilterThreads / kWarp);
  for (uint32_t row = blockIdx.x * (kFilterThreads / kWarp) + threadIdx.x / kWarp; row < rows; row += warps) {
    const uint32_t plane = row / call.rows, y = row - plane * call.rows, sample = plane / call.channels, channel = plane - sample * call.channels;
    const E* from = static_cast<const E*>(call.image) + sample * call.sample_stride + channel * call.channel_stride + y * call.row_stride;
    E* to = static_cast<E*>(call.result) + int64_t(row) * call.columns;
    const bool* dropped = call.dropped + (int64_t(sample) * call.region_rows + y / call.region) * call.region_columns;
    const E colour = E(call.colour[call.colours == 1 ? 0 : channel]);
    const bool packs = call.column_stride == 1 && call.columns % kWidth == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
    const int width = packs ? kWidth : 1;
#pragma unroll 2
    for (uint32_t x = lane * width; x < call.columns; x += kWarp * width) {
      uint32_t region = x / call.region, end = (region + 1) * call.region;
      bool drop = dropped[region];
      if (!packs) {
        to[x] = drop ? colour : from[x * call.column_stride];
        continue;
      }
      Pack<E> pack = load_input<kWidth>(from + x);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (x + e == end) {
          ++region, end += call.region;
          drop = dropped[region];
        }
        if (drop) pack.value[e] = colour;
      }
      store<kWidth>(to + x, pack);
    }
  }
}

static __global__ void __launch_bounds__(kFilterThreads, 4) filter_image_regions(FilterCall call, FilterScratch scratch) {
  AML_SHARED(selection, Selection);
  find_limits(call, scratch, selection);
  grid_barrier();
  find_weak(call, scratch);
  grid_barrier();
  choose_dropped(call, scratch, selection);
  grid_barrier();
  switch (call.element_bytes) {
    case 1: return copy_image<uint8_t>(call);
    case 2: return copy_image<uint16_t>(call);
    case 4: return copy_image<uint32_t>(call);
    default: return copy_image<uint64_t>(call);
  }
}

// One launch.
inline cudaError_t launch_filter_regions(const FilterCall& call, const FilterScratch& scratch, cudaStream_t stream) {
  const int64_t rows = int64_t(call.samples) * call.channels * call.rows, warps = kFilterThreads / kWarp;
  const int64_t resident = AML_RESIDENT_BLOCKS(kFilterThreads, 0, filter_image_regions), useful = (rows + warps - 1) / warps;
  return AML_LAUNCH_COOPERATIVE(dim3(unsigned(useful < resident ? useful : resident)), dim3(kFilterThreads), 0, stream,
                                filter_image_regions, call, scratch);
}

}  // namespace aml::cuda
