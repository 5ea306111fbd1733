// What the pixels of masked_loss add up to: over an item by a thread, over 32 items by a warp, over a sample by a block.
#pragma once

#include "pixels.cuh"

namespace aml::cuda {

// sigmoid() of common/loss.h by the units for special functions. exp(-|z|) has a relative error of 2^-22 + |z| 2^-24,
// and so never more than 2^-22 of 1.
__device__ __forceinline__ Sigmoid<float> fast_sigmoid(float z) {
#if defined(__CUDA_ARCH__)
  float e, reciprocal;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(fabsf(z) * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + e));
  return {e, reciprocal, z > 0 ? reciprocal : e * reciprocal};
#else
  return sigmoid(z);
#endif
}

// The sums of a strip of 32 items.
struct alignas(16) StripSums {
  float weight, weighted_bce, p, y, py;
  int32_t kept, kept_target, intersection, union_, bad_target;  // the last: of how many items
};

// The sums of an item.
template <class Label>
struct ItemSums;

// Two counts of an item's pixels, which are fewer than 4096, in one register. A float, which is one instruction per pixel
// less, and exact.
struct TwoCounts {
  float both = 0;

  __device__ __forceinline__ void add_to_first() { both += 1; }
  __device__ __forceinline__ void add_to_second() { both += 4096; }
  __device__ __forceinline__ int32_t first() const { return int32_t(both) & 4095; }
  __device__ __forceinline__ int32_t second() const { return int32_t(both) >> 12; }
};

// A sum of max(s, 0) + log(1 + e). The logarithms are one of a product: a multiply-add per pixel in place of a polynomial.
// What is kept is the product minus 1, since (1 + x) (1 + e) - 1 = x (1 + e) + e has positive terms only: it is as exact
// as a sum of logarithms, however small the e.
struct CrossEntropySum {
  float sum = 0, excess = 0;

  __device__ __forceinline__ void add(float s, float e) {
    sum += fmaxf(s, 0.0f);
    excess = multiply_add(excess, 1.0f + e, e);
  }
  __device__ __forceinline__ float total() const { return sum + log1pf(excess); }
};

// A target of bytes.
template <>
struct ItemSums<bool> {
  CrossEntropySum bce, target_bce;  // over kept pixels that are not target, and over those that are
  float p = 0, kept = 0, target_p = 0, kept_target = 0;
  float intersection = 0, union_ = 0;
  bool bad_target = false;

  __device__ __forceinline__ void add(const Pixel<bool>& pixel, const LossOptions<float>&) {
    const Sigmoid<float> s = fast_sigmoid(pixel.z);
    const bool predicted = pixel.exists & (pixel.z > 0);
    if (pixel.keep & pixel.is_target) target_bce.add(-pixel.z, s.e), target_p += s.p, kept_target += 1;
    if (pixel.keep & !pixel.is_target) bce.add(pixel.z, s.e), p += s.p, kept += 1;
    if (predicted & pixel.is_target) intersection += 1;
    if (predicted | pixel.is_target) union_ += 1;
  }
  // A pixel doubles a product at most, and floats end at 2^128.
  __device__ __forceinline__ void end_row() {
    if (fmaxf(bce.excess, target_bce.excess) > 1e30f) bce = {bce.total(), 0}, target_bce = {target_bce.total(), 0};
  }

  __device__ __forceinline__ StripSums total(const LossOptions<float>& o) const {
    return {multiply_add(o.positive_weight, kept_target, o.negative_weight * kept),
            multiply_add(o.positive_weight, target_bce.total(), o.negative_weight * bce.total()), p + target_p, kept_target,
            target_p, int32_t(kept + kept_target), int32_t(kept_target), int32_t(intersection), int32_t(union_), bad_target};
  }
};

// A target of any kind.
template <>
struct ItemSums<float> {
  float weight = 0, weighted_bce = 0, p = 0, y = 0, py = 0;
  TwoCounts kept, seen;  // all and target; the intersection and the union
  bool bad_target = false;

  __device__ __forceinline__ void add(const Pixel<float>& pixel, const LossOptions<float>& o) {
    const Sigmoid<float> s = fast_sigmoid(pixel.z);
    const bool predicted = pixel.exists & (pixel.z > 0);
    const float label = pixel.label, w = multiply_add(o.positive_weight - o.negative_weight, label, o.negative_weight);
    if (pixel.keep) {
      weight += w, weighted_bce = multiply_add(w, cross_entropy(pixel.z, label, s.e), weighted_bce);
      p += s.p, y += label, py = multiply_add(s.p, label, py);
      kept.add_to_first();
    }
    if (pixel.keep & pixel.is_target) kept.add_to_second();
    if (predicted & pixel.is_target) seen.add_to_first();
    if (predicted | pixel.is_target) seen.add_to_second();
  }
  __device__ __forceinline__ void end_row() {}

  __device__ __forceinline__ StripSums total(const LossOptions<float>&) const {
    return {weight, weighted_bce, p, y, py, kept.first(), kept.second(), seen.first(), seen.second(), bad_target};
  }
};

__device__ __forceinline__ StripSums warp_sums(StripSums s) {
  return {warp_sum(s.weight), warp_sum(s.weighted_bce), warp_sum(s.p), warp_sum(s.y), warp_sum(s.py),
          __reduce_add_sync(kAllLanes, s.kept), __reduce_add_sync(kAllLanes, s.kept_target),
          __reduce_add_sync(kAllLanes, s.intersection), __reduce_add_sync(kAllLanes, s.union_),
          __reduce_add_sync(kAllLanes, s.bad_target)};
}

template <class Sums>
__device__ __forceinline__ void add_to(SampleSums<float>& total, const Sums& s) {
  total.weight += s.weight, total.weighted_bce += s.weighted_bce;
  total.p += s.p, total.y += s.y, total.py += s.py;
  total.kept += s.kept, total.kept_target += s.kept_target;
  total.intersection += s.intersection, total.union_ += s.union_, total.bad_target += s.bad_target;
}

// The sums of `count` strips in thread 0, always added in the same order. By a whole block.
template <int kThreads>
__device__ SampleSums<float> block_sums(const StripSums* strips, int64_t count) {
  AML_SHARED(parts, SampleSums<float>[kThreads / kWarp]);
  SampleSums<float> sums{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) add_to(sums, strips[i]);
  sums = {warp_sum(sums.weight), warp_sum(sums.weighted_bce), warp_sum(sums.p), warp_sum(sums.y), warp_sum(sums.py),
          warp_sum(sums.kept), warp_sum(sums.kept_target), warp_sum(sums.intersection), warp_sum(sums.union_),
          warp_sum(sums.bad_target)};
  __syncthreads();  // `parts` may still be read from the sample before
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = sums;
  __syncthreads();
  sums = {};
  if (threadIdx.x == 0) {
    for (const SampleSums<float>& part : parts) add_to(sums, part);
  }
  return sums;
}

}  // namespace aml::cuda
