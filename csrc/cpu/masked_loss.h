// The loops of masked_loss: sums over a few rows of a sample, and the gradient of a few rows of logits.
#pragma once

#include <limits>

#include "resized_plane.h"

namespace aml::cpu {
namespace {

// A row of a tile of the target, and what is read at each of its pixels.
template <class T>
struct PixelRow {
  Blend<T> z, similarity;
  const T *target, *exists;
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
    return {logits_.row(y), similarity, read_row(call_.target, sample_, y, first_, count_, target_buffer_),
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
    for (int i = 0; i < 8; ++i) {
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        values_[i][lane] = from[i] && lane < count ? from[i][first + lane] : nothing[i];
      }
    }
    pixels = {{values_[0], values_[1], values_[2], row.z.weight}, {values_[3], values_[4], values_[5], row.similarity.weight}, values_[6], values_[7]};
  }

  PixelRow<T> pixels;

 private:
  T values_[8][kLanes<T>];
};

// Calls pixels(row, x) for each vector of pixels [x, x + kLanes) of a row, end(row, x, n) for the n that are left.
template <class T, class Pixels, class End>
AML_INLINE void for_each_vector(const PixelRow<T>& row, int64_t count, const Pixels& pixels, const End& end) {
  int64_t x = 0;
  for (; x + kLanes<T> <= count; x += kLanes<T>) pixels(row, x);
  if (x < count) end(RowEnd<T>(row, x, count - x).pixels, x, count - x);
}

// What a call says about all pixels of a sample. kResized: the logits are; kValid: not every pixel exists.
template <class T, bool kResized, bool kValid>
struct Filter {
  Lanes<T> limit;
  Mask<T> protect;

  struct Kept {
    Lanes<T> z, y;  // -1000 and 0 where left out: of such a pixel exp, p and the cross entropy are exactly 0
    Lanes<T> logit;
    Mask<T> keep, is_target, there;
  };

  AML_MEMBER Kept at(const PixelRow<T>& row, int64_t x) const {
    const Lanes<T> label = load_lanes(row.target + x);
    const Lanes<T> logit = kResized ? row.z.at(x) : load_lanes(row.z.a + x);
    Mask<T> is_target = label > Lanes<T>(0.5);
    Mask<T> keep = (row.similarity.at(x) >= limit) | (is_target & protect);
    Mask<T> there = keep;
    if constexpr (kValid) {
      there = load_lanes(row.exists + x) > Lanes<T>();
      is_target = is_target & there, keep = keep & there;
    }
    return {select(keep, logit, Lanes<T>(-1000)), select(keep, label, Lanes<T>()), logit, keep, is_target, there};
  }
};

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
struct BackwardCall {
  BackwardCall(const MaskedLossCall<T>& call, const LossGradient<T>& g, int64_t sample)
      : g(g), limit(call.limits[sample]), negative_weight(call.options.negative_weight),
        weight_step(call.options.positive_weight - negative_weight), protect_target(call.protect_target) {}

  LossGradient<T> g;
  T limit, negative_weight, weight_step;
  bool protect_target;
};

// Gives out(x, gradient) for each vector of a row, end(x, n, gradient) for the n pixels that fill none.
template <bool kResized, bool kValid, class T, class Out, class End>
AML_INLINE void gradient_row(const PixelRow<T>& row, int64_t count, const BackwardCall<T>& call, const Out& out, const End& end) {
  const Filter<T, kResized, kValid> filter{Lanes<T>(call.limit), Mask<T>::all(call.protect_target)};
  const auto gradient = [&](const PixelRow<T>& row, int64_t x) __attribute__((always_inline)) {
    const auto at = filter.at(row, x);
    return select(at.keep, pixel_gradient(at.z, at.y, call.g, call.negative_weight, call.weight_step), Lanes<T>());
  };
  for_each_vector(row, count, [&](const PixelRow<T>& row, int64_t x) __attribute__((always_inline)) { out(x, gradient(row, x)); },
                  [&](const PixelRow<T>& row, int64_t x, int64_t n) { end(x, n, gradient(row, 0)); });
}

template <bool kValid, class T>
inline void write_row(const PixelRow<T>& row, int64_t count, const BackwardCall<T>& call, T* out) {
  gradient_row<false, kValid>(
      row, count, call, [&](int64_t x, Lanes<T> g) __attribute__((always_inline)) { store(out + x, g.v); },
      [&](int64_t x, int64_t n, Lanes<T> g) { for (int64_t lane = 0; lane < n; ++lane) out[x + lane] = g.v[lane]; });
}

// Adds to the two rows that the logits were blended from. Their ends have room for a whole vector.
template <bool kValid, class T>
inline void add_blended_row(const PixelRow<T>& row, int64_t count, const BackwardCall<T>& call, T* here, T* next) {
  const Lanes<T> weight(row.z.weight);
  const auto add = [&](int64_t x, Lanes<T> g) __attribute__((always_inline)) {
    const Lanes<T> part = weight * g;
    store(next + x, (load_lanes(next + x) + part).v);
    store(here + x, (load_lanes(here + x) + (g - part)).v);
  };
  gradient_row<true, kValid>(row, count, call, add, [&](int64_t x, int64_t, Lanes<T> g) { add(x, g); });
}

// The transpose of the resize along a row: cell c collects from the pixels between c - 1 and c + 1. `here` is at the
// target's width and is used up.
template <class T>
inline void collect_row(T* here, const Axis<T>& columns, int64_t first, int64_t count, T* part, T* cells) {
  const T* weight = columns.weight + first;
  const int32_t *below = columns.below + first, *above = columns.above + first;
  for (int64_t x = 0; x < count; ++x) {
    part[x] = weight[x] * here[x];
    here[x] -= part[x];
  }
  for (int64_t x = 0; x < count;) {
    const int32_t cell = below[x];
    T low = 0, high = 0;
    for (; x < count && below[x] == cell; ++x) low += here[x], high += part[x];
    cells[cell] += low;
    cells[above[x - 1]] += high;
  }
}

// Rows at the edge of a task are computed in both tasks, so that each row of the result has one writer and one order.
template <class T>
void resized_backward(const MaskedLossCall<T>& call, const LossGradient<T>& g, int64_t sample, int64_t first,
                      int64_t last, void* gradient, T* scratch) {
  PixelRows<T> rows(call, scratch);
  const BackwardCall<T> options(call, g, sample);
  const auto add = call.valid.data ? add_blended_row<true, T> : add_blended_row<false, T>;
  T* here = scratch;                 // adds up for row r
  T* next = here + kTileColumns;     // and for row r + 1
  T* unused = next + kTileColumns;
  T* cells = unused + kTileColumns;  // [last - first, logits.columns]
  const int64_t width = call.logits.columns;
  for (int64_t i = 0; i < (last - first) * width; ++i) cells[i] = 0;
  int64_t top = 0;
  while (top < call.rows && call.logit_rows.below[top] < first - 1) ++top;

  for (int64_t x = 0; x < call.columns; x += kTileColumns) {
    const int64_t count = call.columns - x < kTileColumns ? call.columns - x : kTileColumns;
    rows.start_tile(sample, x, count);
    for (int64_t i = 0; i < kTileColumns; ++i) next[i] = 0;
    int64_t y = top;
    for (int64_t r = first - 1; r < last; ++r) {
      T* swapped = here; here = next; next = swapped;
      for (int64_t i = 0; i < kTileColumns; ++i) next[i] = 0;
      for (; y < call.rows && call.logit_rows.below[y] == r; ++y) {
        // The last row has nothing to blend with.
        add(rows.row(y), count, options, here, call.logit_rows.above[y] == r ? unused : next);
      }
      if (r >= first) collect_row(here, call.logit_columns, x, count, unused, cells + (r - first) * width);
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
  const BackwardCall<T> options(call, g, sample);
  const auto write_gradient = call.valid.data ? write_row<true, T> : write_row<false, T>;
  T* pixel = scratch;
  for (int64_t x = 0; x < call.columns; x += kTileColumns) {
    const int64_t count = call.columns - x < kTileColumns ? call.columns - x : kTileColumns;
    rows.start_tile(sample, x, count);
    for (int64_t y = first; y < last; ++y) {
      const int64_t offset = (sample * call.rows + y) * call.columns + x;
      const bool in_place = call.logits.type == native_type<T>;
      write_gradient(rows.row(y), count, options, in_place ? (T*)gradient + offset : pixel);
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
