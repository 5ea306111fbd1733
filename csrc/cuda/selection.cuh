// The quantile of a sample by radix selection: numbers become integers of the same order, and three histograms, over
// 11, 11 and 10 bits, find the one at a given place. Integers only, so that no order of threads changes the result.
//
// A sample belongs to a team: one block, whose histogram stays in shared memory, or several, which add theirs up in
// global memory. Every thread of a team's blocks gets the quantile.
#pragma once

#include "../common/quantile.h"
#include "device.cuh"

namespace aml::cuda {

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kPasses = 3;                 // over bits 21 to 31, 10 to 20 and 0 to 9
constexpr uint32_t kNaNKey = 0xFFFFFFFFu;  // behind all numbers, in a bin of the first pass where no number is

// Shared memory of a block that takes part in a selection.
struct Selection {
  uint32_t bins[kBins];
  int64_t warp_sum[kWarp];
  int64_t wanted;  // place of the key that is looked for
  int64_t place;   // the same among those that agree with the digits found so far
  int64_t in_bin;  // how many these are
  uint32_t digit;
  uint32_t next;  // smallest key above the wanted one's last histogram
  Rank<float> rank;
  bool defined;
};

// ---- teams: after `merge`, `count` gives the counts of a pass over the whole sample, and `s.next` is that of all.

struct OneBlock {
  __device__ int64_t first() const { return threadIdx.x; }
  __device__ int64_t threads() const { return blockDim.x; }
  __device__ void merge(Selection&, int) const { __syncthreads(); }
  __device__ int64_t count(const Selection& s, int, int bin) const { return s.bins[bin]; }
};

// What several blocks need in global memory, all zero but `next`, which is ~0: see clear_team_counts.
struct TeamCounts {
  unsigned long long bins[kPasses][kBins];
  uint32_t next;
};

// `blocks` blocks of a cooperative launch, of which this is number `rank`. All blocks of the grid select at once.
struct SeveralBlocks {
  TeamCounts* total;
  int rank, blocks;

  __device__ int64_t first() const { return int64_t(rank) * blockDim.x + threadIdx.x; }
  __device__ int64_t threads() const { return int64_t(blocks) * blockDim.x; }
  __device__ void merge(Selection& s, int pass) const {
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
      if (s.bins[bin]) atomicAdd(&total->bins[pass][bin], static_cast<unsigned long long>(s.bins[bin]));
    }
    if (pass == kPasses - 1 && threadIdx.x == 0) atomicMin(&total->next, s.next);
    grid_barrier();
    if (pass == kPasses - 1 && threadIdx.x == 0) s.next = __ldcg(&total->next);
    __syncthreads();
  }
  __device__ int64_t count(const Selection&, int pass, int bin) const { return int64_t(__ldcg(&total->bins[pass][bin])); }
};

// By all blocks of a team, before a grid barrier.
__device__ inline void clear_team_counts(const SeveralBlocks& team) {
  for (int64_t i = team.first(); i < kPasses * kBins; i += team.threads()) team.total->bins[i / kBins][i % kBins] = 0;
  if (team.first() == 0) team.total->next = ~0u;
}

// ---- values

__device__ __forceinline__ uint32_t selection_key(float value) { return value == value ? ordered_key(value) : kNaNKey; }

// A sample's values, of any strides. `valid`, where given, says which exist.
template <class T>
struct SampleValues {
  const T* values;
  const uint8_t* valid;
  int64_t rows, columns;
  int64_t row_stride, column_stride, valid_row_stride, valid_column_stride;

  __device__ SampleValues(const Plane& v, const Plane& m, int64_t sample)
      : values(static_cast<const T*>(v.data) + sample * v.sample_stride),
        valid(m.data ? static_cast<const uint8_t*>(m.data) + sample * m.sample_stride : nullptr),
        rows(v.rows), columns(v.columns), row_stride(v.row_stride), column_stride(v.column_stride),
        valid_row_stride(m.row_stride), valid_column_stride(m.column_stride) {}

  __device__ int64_t count() const { return rows * columns; }

  // The key of value number `i`, if there is one and it exists.
  __device__ __forceinline__ bool load_key(int64_t i, uint32_t& key) const {
    if (i >= count()) return false;
    const uint32_t y = uint32_t(i) / uint32_t(columns), x = uint32_t(i) - y * uint32_t(columns);
    key = selection_key(to_float(values[y * row_stride + x * column_stride]));
    return !valid || valid[y * valid_row_stride + x * valid_column_stride];
  }

  // Calls f(exists, key) for values; thread `first` of `threads` takes its share.
  template <class F>
  __device__ __forceinline__ void visit(int64_t first, int64_t threads, F f) const {
    const bool packed = contiguous(row_stride, column_stride) &&
        (!valid || (contiguous(valid_row_stride, valid_column_stride) &&
                    reinterpret_cast<uintptr_t>(valid + to_aligned()) % kWidth == 0));
    packed ? visit_packs(first, threads, f) : visit_strided(first, threads, f);
  }

 private:
  static constexpr int kWidth = 16 / int(sizeof(T));

  __device__ bool contiguous(int64_t row, int64_t column) const {
    return (columns == 1 || column == 1) && (rows == 1 || row == columns);
  }
  __device__ int64_t to_aligned() const { return int64_t(-reinterpret_cast<uintptr_t>(values) % 16 / sizeof(T)); }

  // 16 bytes at a time, two loads on their way at once; single values before and behind the aligned part.
  template <class F>
  __device__ __forceinline__ void visit_packs(int64_t first, int64_t threads, F f) const {
    const int64_t count = rows * columns;
    const int64_t head = to_aligned() < count ? to_aligned() : count, packs = (count - head) / kWidth;
    for (int64_t i = first; i < count - packs * kWidth; i += threads) {
      const int64_t at = i < head ? i : i + packs * kWidth;
      f(!valid || valid[at], selection_key(to_float(values[at])));
    }
    for (int64_t p = first; p < packs; p += 2 * threads) {
      const int64_t at = head + p * kWidth;
      const bool has_next = p + threads < packs;
      const int64_t next = has_next ? at + threads * kWidth : at;
      const Pack<T> a = load<kWidth>(values + at), b = load<kWidth>(values + next);
      const Exists a_exists = exist(true, at), b_exists = exist(has_next, next);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) f(a_exists.value[e / 4] >> e % 4 * 8 & 255, selection_key(to_float(a.value[e])));
#pragma unroll
      for (int e = 0; e < kWidth; ++e) f(b_exists.value[e / 4] >> e % 4 * 8 & 255, selection_key(to_float(b.value[e])));
    }
  }

  using Exists = Pack<uint32_t, kWidth / 4>;  // four bytes to a word
  __device__ __forceinline__ Exists exist(bool any, int64_t at) const {
    Exists exists;
    if (valid) exists = load<kWidth / 4>(reinterpret_cast<const uint32_t*>(valid + at));
#pragma unroll
    for (int w = 0; w < kWidth / 4; ++w) exists.value[w] = !any ? 0 : valid ? exists.value[w] : ~0u;
    return exists;
  }

  template <class F>
  __device__ __forceinline__ void visit_strided(int64_t first, int64_t threads, F f) const {
    int64_t y = first / columns, x = first % columns;
    const int64_t step_y = threads / columns, step_x = threads % columns;
    while (y < rows) {
      f(!valid || valid[y * valid_row_stride + x * valid_column_stride],
        selection_key(to_float(values[y * row_stride + x * column_stride])));
      y += step_y, x += step_x;
      if (x >= columns) x -= columns, ++y;
    }
  }
};

// ---- selection

// Sum of the values of the threads before this one; `all`: of all.
template <int kThreads>
__device__ int64_t sum_before(int64_t value, int64_t* warp_sum, int64_t& all) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t inclusive = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (lane == kWarp - 1) warp_sum[warp] = inclusive;
  __syncthreads();
  int64_t before = inclusive - value;
  all = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += warp_sum[w];
    all += warp_sum[w];
  }
  return before;
}

// The key at a place in the order: place_of(how many there are, how many of them are NaN), which one thread calls. Leaves
// the place among equal keys and their number in `s`, and the counts of the last digit. By all threads of the team's
// blocks, none of which may be using `s`.
template <int kThreads, class Values, class Team, class Place>
__device__ uint32_t select_key(const Values& values, const Team& team, Place place_of, Selection& s) {
  constexpr int kOwn = kBins / kThreads;  // bins of a thread
  static_assert(kOwn * kThreads == kBins, "the threads of a block: a power of two, at most as many as bins");
  const int own = threadIdx.x * kOwn;
  uint32_t key = 0;  // as far as it is known
  if (threadIdx.x == 0) s.place = s.in_bin = 0, s.digit = 0, s.next = ~0u;

  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const uint32_t last = key | ((pass == 2 ? 1u << 10 : pass == 1 ? 1u << 21 : 0u) - 1);  // of the keys that agree so far
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) s.bins[bin] = 0;
    __syncthreads();
    // Lanes of a warp that add 1 to the same bin are served at once: a narrow range of values costs nothing.
    uint32_t(&bins)[kBins] = kept(s.bins);
    uint32_t above = ~0u;
    values.visit(team.first(), team.threads(), [&](bool exists, uint32_t other) {
      const uint32_t distance = other - key;  // of smaller keys: a larger number than of any that agrees
      if (exists & (distance <= last - key)) atomicAdd(&bins[distance >> shift], 1u);
      if (exists & (other > last)) above = min(above, other);
    });
    if (pass == kPasses - 1) {
      above = __reduce_min_sync(kAllLanes, above);
      if (threadIdx.x % kWarp == 0 && above != ~0u) atomicMin(&s.next, above);
    }
    team.merge(s, pass);

    int64_t mine = 0, all, place = s.place;
    for (int i = 0; i < kOwn; ++i) mine += team.count(s, pass, own + i);
    int64_t before = sum_before<kThreads>(mine, s.warp_sum, all);  // a barrier too: the place has been read
    if (pass == 0) {
      if (threadIdx.x == 0) s.wanted = place_of(all, team.count(s, pass, kBins - 1));
      __syncthreads();
      place = s.wanted;
    }
    if (before <= place && place < before + mine) {
      int bin = own;
      for (; place >= before + team.count(s, pass, bin); ++bin) before += team.count(s, pass, bin);
      s.digit = bin, s.place = place - before, s.in_bin = team.count(s, pass, bin);
    }
    __syncthreads();
    key |= s.digit << shift;
  }
  return key;
}

// The number at `weight` of the way from one key to the next, where the interpolation blends.
__device__ __forceinline__ float between(uint32_t key, uint32_t next, float weight, Interpolation interpolation) {
  const float value = from_ordered_key(key);
  const bool blends = interpolation == Interpolation::linear || interpolation == Interpolation::midpoint;
  return blends ? lerp(value, from_ordered_key(next), weight) : value;
}

// The q-quantile of a sample's values, as torch.quantile computes it: NaN if there is no value, one is NaN, or q is
// outside [0, 1]. As select_key; afterwards `s` may be used for something else.
template <int kThreads, class Values, class Team>
__device__ float team_quantile(const Values& values, const Team& team, float q, Interpolation interpolation,
                               bool rank_in_fp64, Selection& s) {
  const uint32_t key = select_key<kThreads>(values, team, [&](int64_t all, int64_t nans) {
    s.defined = q >= 0 && q <= 1 && all > 0 && nans == 0;
    s.rank = s.defined ? quantile_rank_in_integers(q, all, interpolation, rank_in_fp64) : Rank<float>{0, 0, 0};
    return s.rank.below;
  }, s);

  // The number one place further: the same again, or the next in the last histogram, or the smallest with other digits.
  uint32_t next = key;
  if (s.rank.above > s.rank.below && s.place + 1 >= s.in_bin) {
    constexpr int kOwn = kBins / kThreads;
    const int own = threadIdx.x * kOwn;
    for (int bin = own; bin < own + kOwn; ++bin) {
      if (bin > int(s.digit) && team.count(s, kPasses - 1, bin) > 0) {
        atomicMin(&s.next, (key & ~1023u) | uint32_t(bin));
        break;
      }
    }
    __syncthreads();
    next = s.next;
  }
  const float weight = s.rank.weight;
  const bool defined = s.defined;
  __syncthreads();
  if (!defined) return bit_cast<float>(0x7FC00000u);
  return between(key, next, weight, interpolation);
}

}  // namespace aml::cuda
