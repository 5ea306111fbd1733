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
  int32_t kept, kept_target, intersection, union_, bad_target;
};

// The sums of an item. Counts are floats, which is one instruction per pixel less, and exact: an item is small.
template <class Label>
struct ItemSums;

// A target of bytes: 1, or 0, or wrong.
template <>
struct ItemSums<unsigned> {
  float bce = 0, p = 0, kept = 0;                       // over kept pixels that are not target
  float target_bce = 0, target_p = 0, kept_target = 0;  // over kept pixels that are
  float intersection = 0, union_ = 0;
  unsigned labels = 0;  // of the kept target pixels, or-ed

  __device__ __forceinline__ void add(const Pixel<unsigned>& pixel, const LossOptions<float>&) {
    const Sigmoid<float> s = fast_sigmoid(pixel.z);
    const bool predicted = pixel.z > 0;
    // max(z, 0) - z y is the larger of 0 and z or -z.
    const float bce = multiply_add(log1p_slope(s.e), s.e, fmaxf(pixel.is_target ? -pixel.z : pixel.z, 0.0f));
    if (pixel.keep & pixel.is_target) target_bce += bce, target_p += s.p, kept_target += 1, labels |= pixel.label;
    if (pixel.keep & !pixel.is_target) this->bce += bce, p += s.p, kept += 1;
    if (predicted & pixel.is_target) intersection += 1;
    if (predicted | pixel.is_target) union_ += 1;
  }

  __device__ __forceinline__ StripSums total(const LossOptions<float>& o) const {
    return {multiply_add(o.positive_weight, kept_target, o.negative_weight * kept),
            multiply_add(o.positive_weight, target_bce, o.negative_weight * bce), p + target_p, kept_target, target_p,
            int32_t(kept + kept_target), int32_t(kept_target), int32_t(intersection), int32_t(union_),
            (labels & 0xFEFEFEFEu) != 0};
  }
};

// A target of any kind.
template <>
struct ItemSums<float> {
  float weight = 0, weighted_bce = 0, p = 0, y = 0, py = 0;
  float kept = 0, kept_target = 0, intersection = 0, union_ = 0, bad_target = 0;

  __device__ __forceinline__ void add(const Pixel<float>& pixel, const LossOptions<float>& o) {
    const Sigmoid<float> s = fast_sigmoid(pixel.z);
    const bool predicted = pixel.exists & (pixel.z > 0);
    const float label = pixel.label, w = multiply_add(o.positive_weight - o.negative_weight, label, o.negative_weight);
    if (pixel.keep) {
      weight += w, weighted_bce = multiply_add(w, cross_entropy(pixel.z, label, s.e), weighted_bce);
      p += s.p, y += label, py = multiply_add(s.p, label, py);
      kept += 1;
    }
    if (pixel.keep & pixel.is_target) kept_target += 1;
    if (pixel.keep & !((label >= 0) & (label <= 1))) bad_target += 1;
    if (predicted & pixel.is_target) intersection += 1;
    if (predicted | pixel.is_target) union_ += 1;
  }

  __device__ __forceinline__ StripSums total(const LossOptions<float>&) const {
    return {weight, weighted_bce, p, y, py, int32_t(kept), int32_t(kept_target), int32_t(intersection), int32_t(union_),
            int32_t(bad_target)};
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
