// The loops of masked_loss: sums over a few rows of a sample; the gradient is in masked_loss_backward.h.
#pragma once

#include "masked_loss_backward.h"

namespace aml::cpu {
namespace {

enum Count { kKept, kKeptTarget, kIntersection, kUnion, kInUnit, kCounts };
enum Sum { kBceSum, kPSum, kYSum, kPySum, kSums };

template <bool kResized, bool kValid, class T>
inline void add_row(const PixelRow<T>& row, int64_t count_, T limit, bool protect_target, T negative_weight,
                    T weight_step, double (*sums)[kLanes<T>], int64_t (*counts)[kLanes<T>]) {
  const Filter<T, kResized, kValid> filter{Lanes<T>(limit), Mask<T>::all(protect_target)};
  const Lanes<T> negative(negative_weight), step(weight_step), zero, one(1);
  Lanes<T> bce, p_sum, y_sum, py_sum;
  Vector<LaneInt<T>> kept{}, kept_target{}, intersection{}, union_{}, in_unit{};
  const auto pixels = [&](const PixelRow<T>& row, int64_t x) __attribute__((always_inline)) {
    const auto at = filter.at(row, x);
    Mask<T> predicted = at.logit > zero;
    if constexpr (kValid) predicted = predicted & at.there;
    const Sigmoid<Lanes<T>> s = sigmoid(at.z);
    bce = multiply_add(multiply_add(step, at.y, negative), cross_entropy(at.z, at.y, s.e), bce);
    p_sum += s.p;
    y_sum += at.y;
    py_sum = multiply_add(s.p, at.y, py_sum);
    kept = count(kept, at.keep);
    kept_target = count(kept_target, at.keep & at.is_target);
    intersection = count(intersection, predicted & at.is_target);
    union_ = count(union_, predicted | at.is_target);
    in_unit = count(in_unit, (at.y >= zero) & (one >= at.y));
  };
  for_each_vector(row, count_, pixels, [&](const PixelRow<T>& row, int64_t, int64_t) { pixels(row, 0); });
  const Lanes<T> row_sums[kSums] = {bce, p_sum, y_sum, py_sum};
  const Vector<LaneInt<T>> row_counts[kCounts] = {kept, kept_target, intersection, union_, in_unit};
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    for (int i = 0; i < kSums; ++i) sums[i][lane] += double(row_sums[i].v[lane]);
    for (int i = 0; i < kCounts; ++i) counts[i][lane] += row_counts[i][lane];
  }
}

template <class T>
using AddRow = void (*)(const PixelRow<T>&, int64_t, T, bool, T, T, double (*)[kLanes<T>], int64_t (*)[kLanes<T>]);

template <class T>
void masked_loss_forward(const MaskedLossCall<T>& call, int64_t sample, int64_t first, int64_t last,
                         SampleSums<double>* result, T* scratch) {
  PixelRows<T> rows(call, scratch);
  const bool resized = call.logits.rows != call.rows || call.logits.columns != call.columns;
  const AddRow<T> add = resized ? (call.valid.data ? add_row<true, true, T> : add_row<true, false, T>)
                                : (call.valid.data ? add_row<false, true, T> : add_row<false, false, T>);
  const T negative = call.options.negative_weight, step = call.options.positive_weight - negative;
  double sums[kSums][kLanes<T>] = {};
  int64_t counts[kCounts][kLanes<T>] = {};
  int64_t examined = 0;
  for (int64_t x = 0; x < call.columns; x += kTileColumns) {
    const int64_t count = call.columns - x < kTileColumns ? call.columns - x : kTileColumns;
    rows.start_tile(sample, x, count);
    examined += (last - first) * ((count + kLanes<T> - 1) / kLanes<T> * kLanes<T>);
    for (int64_t y = first; y < last; ++y) {
      add(rows.row(y), count, call.limits[sample], call.protect_target, negative, step, sums, counts);
    }
  }
  double sum[kSums] = {};
  int64_t number[kCounts] = {};
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    for (int i = 0; i < kSums; ++i) sum[i] += sums[i][lane];
    for (int i = 0; i < kCounts; ++i) number[i] += counts[i][lane];
  }
  *result = {double(negative) * double(number[kKept]) + double(step) * sum[kYSum], sum[kBceSum], sum[kPSum], sum[kYSum], sum[kPySum],
             number[kKept], number[kKeptTarget], number[kIntersection], number[kUnion], examined - number[kInUnit]};
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
