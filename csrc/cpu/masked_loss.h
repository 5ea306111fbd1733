// The loops of masked_loss: sums over a few rows of a sample, and the gradient of a few rows of logits.
#pragma once

#include "rows.h"

namespace aml::cpu {
namespace {

// What is read at each pixel of the target, a row of a tile at a time.
template <class T>
class PixelRows {
 public:
  static int64_t scratch(const MaskedLossCall<T>& call) {
    return ResizedPlane<T>::scratch(call.logits, resizes(call, call.logits)) +
        ResizedPlane<T>::scratch(call.similarity, resizes(call, call.similarity)) + 2 * kTileColumns;
  }

  PixelRows(const MaskedLossCall<T>& call, T*& scratch)
      : call_(call),
        logits_(call.logits, resizes(call, call.logits), call.logit_rows, call.logit_columns, scratch),
        similarity_(call.similarity, resizes(call, call.similarity), call.similarity_rows, call.similarity_columns, scratch),
        target_buffer_(scratch),
        exists_buffer_(scratch + kTileColumns) {
    scratch += 2 * kTileColumns;
  }

  void start_tile(int64_t sample, int64_t first, int64_t count) {
    sample_ = sample, first_ = first, count_ = count;
    logits_.start_tile(sample, first, count);
    similarity_.start_tile(sample, first, count);
    if (!call_.valid.data) {
      for (int64_t x = 0; x < count; ++x) exists_buffer_[x] = 1;
    }
  }

  void load(int64_t y) {
    z = logits_.row(y);
    target = read_row(call_.target, sample_, y, first_, count_, target_buffer_);
    exists = call_.valid.data ? read_row(call_.valid, sample_, y, first_, count_, exists_buffer_) : exists_buffer_;
    // Without a map everything is similar enough: the threshold is -inf then.
    similarity = call_.similarity.data ? similarity_.row(y) : exists_buffer_;
  }

  const T *z, *target, *exists, *similarity;

 private:
  static bool resizes(const MaskedLossCall<T>& call, const Plane& plane) {
    return plane.data && (plane.rows != call.rows || plane.columns != call.columns);
  }

  const MaskedLossCall<T>& call_;
  ResizedPlane<T> logits_, similarity_;
  T *target_buffer_, *exists_buffer_;
  int64_t sample_ = 0, first_ = 0, count_ = 0;
};

template <class T>
inline void add_row(const PixelRows<T>& row, int64_t count, T limit, bool protect_target, T negative_weight,
                    T weight_step, SampleSums<double>& sums) {
  const T *z_row = row.z, *target = row.target, *exists = row.exists, *similarity = row.similarity;
  T weight_sum = 0, bce_sum = 0, p_sum = 0, y_sum = 0, py_sum = 0;
  int32_t kept = 0, kept_target = 0, intersection = 0, union_ = 0, bad = 0;
#pragma omp simd reduction(+ : weight_sum, bce_sum, p_sum, y_sum, py_sum, kept, kept_target, intersection, union_, bad)
  for (int32_t x = 0; x < int32_t(count); ++x) {
    const T label = target[x];
    const bool there = exists[x] != 0;
    const bool is_target = (label > T(0.5)) & there;
    const bool predicted = (z_row[x] > 0) & there;
    const bool keep = there & ((similarity[x] >= limit) | (protect_target & is_target));
    // Selected before any arithmetic: a left-out pixel may hold NaN.
    const T z = keep ? z_row[x] : T(0);
    const T y = keep ? label : T(0);
    const Sigmoid<T> s = sigmoid(z);
    const T weight = keep ? multiply_add(weight_step, y, negative_weight) : T(0);
    const T p = keep ? s.p : T(0);
    weight_sum += weight;
    bce_sum += weight * cross_entropy(z, y, s.e);
    p_sum += p;
    y_sum += y;
    py_sum += p * y;
    kept += keep;
    kept_target += keep & is_target;
    intersection += predicted & is_target;
    union_ += predicted | is_target;
    bad += !((y >= 0) & (y <= 1));
  }
  sums.weight += weight_sum, sums.weighted_bce += bce_sum;
  sums.p += p_sum, sums.y += y_sum, sums.py += py_sum;
  sums.kept += kept, sums.kept_target += kept_target;
  sums.intersection += intersection, sums.union_ += union_, sums.bad_target += bad;
}

template <class T>
void masked_loss_forward(const MaskedLossCall<T>& call, int64_t sample, int64_t first, int64_t last,
                         SampleSums<double>* sums, T* scratch) {
  PixelRows<T> rows(call, scratch);
  const T step = call.options.positive_weight - call.options.negative_weight;
  for (int64_t x = 0; x < call.columns; x += kTileColumns) {
    const int64_t count = call.columns - x < kTileColumns ? call.columns - x : kTileColumns;
    rows.start_tile(sample, x, count);
    for (int64_t y = first; y < last; ++y) {
      rows.load(y);
      add_row(rows, count, call.limits[sample], call.protect_target, call.options.negative_weight, step, *sums);
    }
  }
}

template <class T>
inline void gradient_row(const PixelRows<T>& row, int64_t count, T limit, bool protect_target, const LossGradient<T>& g,
                         T negative_weight, T weight_step, T* out) {
  const T *z_row = row.z, *target = row.target, *exists = row.exists, *similarity = row.similarity;
#pragma omp simd
  for (int32_t x = 0; x < int32_t(count); ++x) {
    const T label = target[x];
    const bool is_target = label > T(0.5);
    const bool keep = (exists[x] != 0) & ((similarity[x] >= limit) | (protect_target & is_target));
    const T z = keep ? z_row[x] : T(0);
    const T y = keep ? label : T(0);
    const T slope = pixel_gradient(z, y, g, negative_weight, weight_step);
    out[x] = keep ? slope : T(0);
  }
}

// Adds a row of gradients at the target's size to the row of logits that it was blended from.
template <class T>
inline void collect_row(const T* gradient, const Axis<T>& columns, int64_t first, int64_t count, T* cells) {
  for (int64_t x = 0; x < count; ++x) {
    const int32_t below = columns.below[first + x], above = columns.above[first + x];
    const T part = columns.weight[first + x] * gradient[x];
    cells[below] += gradient[x] - part;
    cells[above] += part;
  }
}

// The transpose of the resize: row r of the logits collects from the target's rows between r - 1 and r + 1. Rows at
// the edge of a task are computed in both tasks, so that each row of the result has one writer and one order.
template <class T>
void resized_backward(const MaskedLossCall<T>& call, const LossGradient<T>& g, int64_t sample, int64_t first,
                      int64_t last, void* gradient, T* scratch) {
  PixelRows<T> rows(call, scratch);
  T* pixel = scratch;
  T* here = pixel + kTileColumns;    // adds up for row r
  T* next = here + kTileColumns;     // and for row r + 1
  T* cells = next + kTileColumns;    // [last - first, logits.columns]
  const int64_t width = call.logits.columns;
  for (int64_t i = 0; i < (last - first) * width; ++i) cells[i] = 0;
  const T step = call.options.positive_weight - call.options.negative_weight;
  int64_t top = 0;
  while (top < call.rows && call.logit_rows.below[top] < first - 1) ++top;

  for (int64_t x = 0; x < call.columns; x += kTileColumns) {
    const int64_t count = call.columns - x < kTileColumns ? call.columns - x : kTileColumns;
    rows.start_tile(sample, x, count);
    for (int64_t i = 0; i < count; ++i) next[i] = 0;
    int64_t y = top;
    for (int64_t r = first - 1; r < last; ++r) {
      T* swapped = here; here = next; next = swapped;
      for (int64_t i = 0; i < count; ++i) next[i] = 0;
      for (; y < call.rows && call.logit_rows.below[y] == r; ++y) {
        rows.load(y);
        gradient_row(rows, count, call.limits[sample], call.protect_target, g, call.options.negative_weight, step, pixel);
        const T weight = call.logit_rows.weight[y];
        if (call.logit_rows.above[y] == r) {  // the last row: nothing to blend with
          for (int64_t i = 0; i < count; ++i) here[i] += pixel[i];
        } else {
          for (int64_t i = 0; i < count; ++i) {
            const T part = weight * pixel[i];
            next[i] += part;
            here[i] += pixel[i] - part;
          }
        }
      }
      if (r >= first) collect_row(here, call.logit_columns, x, count, cells + (r - first) * width);
    }
  }
  write(cells, (last - first) * width, gradient, call.logits.type, (sample * call.logits.rows + first) * width);
}

template <class T>
void masked_loss_backward(const MaskedLossCall<T>& call, const LossGradient<T>& g, int64_t sample, int64_t first,
                          int64_t last, void* gradient, T* scratch) {
  if (call.logits.rows != call.rows || call.logits.columns != call.columns) {
    return resized_backward(call, g, sample, first, last, gradient, scratch);
  }
  PixelRows<T> rows(call, scratch);
  T* pixel = scratch;
  const T step = call.options.positive_weight - call.options.negative_weight;
  for (int64_t x = 0; x < call.columns; x += kTileColumns) {
    const int64_t count = call.columns - x < kTileColumns ? call.columns - x : kTileColumns;
    rows.start_tile(sample, x, count);
    for (int64_t y = first; y < last; ++y) {
      rows.load(y);
      const int64_t offset = (sample * call.rows + y) * call.columns + x;
      const bool in_place = call.logits.type == native_type<T>;
      T* out = in_place ? (T*)gradient + offset : pixel;
      gradient_row(rows, count, call.limits[sample], call.protect_target, g, call.options.negative_weight, step, out);
      if (!in_place) write(pixel, count, gradient, call.logits.type, offset);
    }
  }
}

template <class T>
int64_t masked_loss_scratch(const MaskedLossCall<T>& call) {
  return PixelRows<T>::scratch(call) + 3 * kTileColumns + call.rows_per_task * call.logits.columns;
}

template <class T>
constexpr MaskedLossKernels<T> masked_loss_table() {
  return {masked_loss_scratch<T>, masked_loss_forward<T>, masked_loss_backward<T>};
}

}  // namespace
}  // namespace aml::cpu
