// The loops of masked_loss: sums over a few rows of a sample; the gradient is in masked_loss_backward.h.
#pragma once

#include "masked_loss_backward.h"
#include "masked_loss_sums.h"

namespace aml::cpu {
namespace {

template <bool kResized, bool kValid, Target kTarget, class T>
inline void add_row(const PixelRow<T>& row, int64_t columns, T limit, bool protect_target, T negative_weight,
                    T weight_step, double (*sums)[kLanes<T>], int64_t* counts) {
  const Filter<T, kResized, kValid, kTarget> filter{Lanes<T>(limit), Mask<T>::all(protect_target)};
  constexpr int64_t kStep = kRowVectors * kLanes<T>;
  for (int64_t first = 0; first < columns; first += kStep) {
    RowSums<T, kTarget> row_sums(negative_weight, weight_step);
    RowCounts<T> row_counts;
    const auto pixels = [&](const PixelRow<T>& row, int64_t x) __attribute__((always_inline)) {
      const auto at = filter.at(row, x);
      Mask<T> predicted = at.logit > Lanes<T>();
      if constexpr (kValid) predicted = predicted & at.there;
      row_sums.add(at, predicted);
      row_counts.add(at, predicted);
    };
    for_each_vector(row, first, columns - first < kStep ? columns : first + kStep, pixels,
                    [&](const PixelRow<T>& row, int64_t, int64_t) __attribute__((always_inline)) { pixels(row, 0); });
    row_sums.end_row(sums);
    row_counts.end_row(counts);
  }
}

template <class T>
using AddRow = void (*)(const PixelRow<T>&, int64_t, T, bool, T, T, double (*)[kLanes<T>], int64_t*);

template <Target kTarget, class T>
AddRow<T> choose_add_row(const MaskedLossCall<T>& call) {
  if (call.logits.rows != call.rows || call.logits.columns != call.columns) {
    return call.valid.data ? add_row<true, true, kTarget, T> : add_row<true, false, kTarget, T>;
  }
  return call.valid.data ? add_row<false, true, kTarget, T> : add_row<false, false, kTarget, T>;
}

template <class T>
void masked_loss_forward(const MaskedLossCall<T>& call, int64_t sample, int64_t first, int64_t last,
                         SampleSums<double>* result, T* scratch) {
  PixelRows<T> rows(call, scratch);
  const bool labels = call.target.type == Type::u8;
  const AddRow<T> add = labels ? choose_add_row<Target::Label>(call) : choose_add_row<Target::Soft>(call);
  const T negative = call.options.negative_weight, step = call.options.positive_weight - negative;
  double sums[kSums][kLanes<T>] = {};
  int64_t counts[kCounts] = {};
  for (int64_t x = 0; x < call.columns; x += kTileColumns) {
    const int64_t count = call.columns - x < kTileColumns ? call.columns - x : kTileColumns;
    rows.start_tile(sample, x, count);
    for (int64_t y = first; y < last; ++y) {
      add(rows.row(y), count, call.limits[sample], call.protect_target, negative, step, sums, counts);
    }
  }
  double sum[kSums] = {};
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    for (int i = 0; i < kSums; ++i) sum[i] += sums[i][lane];
  }
  *result = labels ? RowSums<T, Target::Label>::finish(sum, counts, call.options)
                   : RowSums<T, Target::Soft>::finish(sum, counts, call.options);
  result->kept = counts[kKept], result->kept_target = counts[kKeptTarget];
  result->intersection = counts[kIntersection], result->union_ = counts[kUnion], result->bad_target = counts[kBad];
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
