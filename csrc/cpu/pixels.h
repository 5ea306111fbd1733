// What is read at each pixel of the target, and which pixels are kept.
#pragma once

#include <limits>

#include "resize.h"

namespace aml::cpu {
namespace {

// A row of a tile of the target, and what is read at each of its pixels.
template <class T>
struct PixelRow {
  Blend<T> z, similarity;
  const T* target;        // of a floating-point type, or
  const uint8_t* labels;  // uint8 and bool
  const T* exists;
};

template <class T>
class PixelRows {
 public:
  static int64_t scratch(const MaskedLossCall<T>& call) {
    return ResizedPlane<T>::scratch(call.logits, resizes(call, call.logits)) +
        ResizedPlane<T>::scratch(call.similarity, resizes(call, call.similarity)) + 3 * kTileColumns;
  }

  PixelRows(const MaskedLossCall<T>& call, T*& scratch)
      : call_(call),
        logits_(call.logits, resizes(call, call.logits), call.logit_rows, call.logit_columns, scratch),
        similarity_(call.similarity, resizes(call, call.similarity), call.similarity_rows, call.similarity_columns, scratch),
        target_buffer_(scratch), exists_buffer_(scratch + kTileColumns), zeros_(scratch + 2 * kTileColumns) {
    scratch += 3 * kTileColumns;
    for (int64_t x = 0; x < kTileColumns; ++x) zeros_[x] = 0;
  }

  void start_tile(int64_t sample, int64_t first, int64_t count) {
    sample_ = sample, first_ = first, count_ = count;
    logits_.start_tile(sample, first, count);
    similarity_.start_tile(sample, first, count);
  }

  PixelRow<T> row(int64_t y) {
    // Without a map everything is similar enough: the threshold is -inf then.
    Blend<T> similarity{zeros_, zeros_, zeros_, T(0)};
    if (call_.similarity.data) similarity = similarity_.row(y);
    if (!similarity.step) similarity.step = zeros_, similarity.least = similarity.a;
    const bool labels = call_.target.type == Type::u8;
    return {logits_.row(y), similarity,
            labels ? nullptr : read_row(call_.target, sample_, y, first_, count_, target_buffer_),
            labels ? read_bytes(call_.target, sample_, y, first_, count_, (uint8_t*)target_buffer_) : nullptr,
            call_.valid.data ? read_row(call_.valid, sample_, y, first_, count_, exists_buffer_) : nullptr};
  }

 private:
  static bool resizes(const MaskedLossCall<T>& call, const Plane& plane) {
    return plane.data && (plane.rows != call.rows || plane.columns != call.columns);
  }

  const MaskedLossCall<T>& call_;
  ResizedPlane<T> logits_, similarity_;
  T *target_buffer_, *exists_buffer_, *zeros_;
  int64_t sample_ = 0, first_ = 0, count_ = 0;
};

// The last pixels of a row that fill no vector, followed by pixels that are left out.
template <class T>
class RowEnd {
 public:
  RowEnd(const PixelRow<T>& row, int64_t first, int64_t count) {
    const T* from[] = {row.z.a, row.z.step, row.z.least, row.similarity.a, row.similarity.step, row.similarity.least, row.target, row.exists};
    const T nothing[] = {0, 0, 0, std::numeric_limits<T>::quiet_NaN(), 0, 0, 0, 0};
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
      for (int i = 0; i < 8; ++i) values_[i][lane] = from[i] && lane < count ? from[i][first + lane] : nothing[i];
      labels_[lane] = row.labels && lane < count ? row.labels[first + lane] : 0;
    }
    pixels = {{values_[0], values_[1], values_[2], row.z.weight}, {values_[3], values_[4], values_[5], row.similarity.weight},
              values_[6], labels_, values_[7]};
  }

  PixelRow<T> pixels;

 private:
  T values_[8][kLanes<T>];
  uint8_t labels_[kLanes<T>];
};

// Calls pixels(row, x) for each vector of pixels [x, x + kLanes) of [first, last), end(row, x, n) for the n that are left.
template <class T, class Pixels, class End>
AML_INLINE void for_each_vector(const PixelRow<T>& row, int64_t first, int64_t last, const Pixels& pixels, const End& end) {
  int64_t x = first;
  for (; x + kLanes<T> <= last; x += kLanes<T>) pixels(row, x);
  if (x < last) end(RowEnd<T>(row, x, last - x).pixels, x, last - x);
}

// What is computed of a pixel depends on its target: Soft is a probability, Label 0 or 1.
enum class Target { Soft, Label };

// What a call says about all pixels of a sample. kResized: the logits are; kValid: not every pixel exists.
template <class T, bool kResized, bool kValid, Target kTarget>
struct Filter {
  Lanes<T> limit;
  Mask<T> protect;

  struct Pixels {
    Lanes<T> logit, y;  // y: of Soft
    Mask<T> keep, is_target, there;
    Mask<T> bad;        // kept, and not a number in [0, 1]
  };

  AML_MEMBER Pixels at(const PixelRow<T>& row, int64_t x) const {
    Lanes<T> y;
    Mask<T> is_target;
    if constexpr (kTarget == Target::Label) {
      is_target = at_least(1, row.labels + x, T());
    } else {
      y = load_lanes(row.target + x);
      is_target = y > Lanes<T>(0.5);
    }
    const Lanes<T> logit = kResized ? row.z.at(x) : load_lanes(row.z.a + x);
    Mask<T> keep = (row.similarity.at(x) >= limit) | (is_target & protect);
    Mask<T> there = keep;
    if constexpr (kValid) {
      there = load_lanes(row.exists + x) > Lanes<T>();
      is_target = is_target & there, keep = keep & there;
    }
    Mask<T> bad;
    if constexpr (kTarget == Target::Label) {
      bad = keep & at_least(2, row.labels + x, T());
    } else {
      bad = and_not(keep, (y >= Lanes<T>()) & (Lanes<T>(1) >= y));
    }
    return {logit, y, keep, is_target, there, bad};
  }
};

}  // namespace
}  // namespace aml::cpu
