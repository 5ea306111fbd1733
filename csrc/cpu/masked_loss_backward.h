// The backward loops of masked_loss: the gradient of a few rows of logits.
#pragma once

#include "pixels.h"

namespace aml::cpu {
namespace {

template <class T>
struct BackwardCall {
  BackwardCall(const MaskedLossCall<T>& call, const LossGradient<T>& g, int64_t sample)
      : g(g), limit(call.limits[sample]), negative_weight(call.options.negative_weight),
        positive_weight(call.options.positive_weight), protect_target(call.protect_target) {}

  LossGradient<T> g;
  T limit, negative_weight, positive_weight;
  bool protect_target;
};

// The gradient of one pixel that is kept. For a label: -bce w sigmoid(-z) for the target, bce w sigmoid(z) for the rest,
// and p (1 - p) times one of two factors. So p - 1 is not rounded where p is almost 1.
template <class T, Target kTarget>
struct PixelGradient {
  explicit PixelGradient(const BackwardCall<T>& c)
      : call(c), rest_bce(c.g.bce * c.negative_weight), target_bce(-(c.g.bce * c.positive_weight)),
        rest_dice(c.g.dice_p), target_dice(c.g.dice_p + c.g.dice_py) {}

  const BackwardCall<T>& call;
  Lanes<T> rest_bce, target_bce, rest_dice, target_dice;

  template <class Pixels>
  AML_MEMBER Lanes<T> of(const Pixels& at) const {
    if constexpr (kTarget == Target::Soft) {
      return pixel_gradient(at.logit, at.y, call.g, call.negative_weight, call.positive_weight - call.negative_weight);
    }
    const Lanes<T> f = negate_where(at.is_target, at.logit);
    const Sigmoid<Lanes<T>> s = sigmoid(f, f > Lanes<T>());
    return multiply_add(s.e * s.reciprocal * s.reciprocal, select(at.is_target, target_dice, rest_dice),
                        select(at.is_target, target_bce, rest_bce) * s.p);
  }
};

// Gives out(x, gradient) for each vector of a row, end(x, n, gradient) for the n pixels that fill none.
template <bool kResized, bool kValid, Target kTarget, class T, class Out, class End>
AML_INLINE void gradient_row(PixelRow<T> row, int64_t count, const BackwardCall<T>& call, const Out& out, const End& end) {
  const Filter<T, kResized, kValid, kTarget> filter{Lanes<T>(call.limit), Mask<T>::all(call.protect_target)};
  const PixelGradient<T, kTarget> pixel(call);
  const auto gradient = [&](const PixelRow<T>& row, int64_t x) __attribute__((always_inline)) {
    const auto at = filter.at(row, x);
    return select(at.keep, pixel.of(at), Lanes<T>());
  };
  for_each_vector(row, 0, count, [&](const PixelRow<T>& row, int64_t x) __attribute__((always_inline)) { out(x, gradient(row, x)); },
                  [&](const PixelRow<T>& row, int64_t x, int64_t n) { end(x, n, gradient(row, 0)); });
}

template <bool kValid, Target kTarget, class T>
inline void write_row(const PixelRow<T>& row, int64_t count, const BackwardCall<T>& call, T* out) {
  gradient_row<false, kValid, kTarget>(
      row, count, call, [&](int64_t x, Lanes<T> g) __attribute__((always_inline)) { store(out + x, g.v); },
      [&](int64_t x, int64_t n, Lanes<T> g) { for (int64_t lane = 0; lane < n; ++lane) out[x + lane] = g.v[lane]; });
}

// Adds to the two rows that the logits were blended from. Their ends have room for a whole vector.
template <bool kValid, Target kTarget, class T>
inline void add_blended_row(const PixelRow<T>& row, int64_t count, const BackwardCall<T>& call, T* here, T* next) {
  const Lanes<T> weight(row.z.weight);
  const auto add = [&](int64_t x, Lanes<T> g) __attribute__((always_inline)) {
    const Lanes<T> part = weight * g;
    store(next + x, (load_lanes(next + x) + part).v);
    store(here + x, (load_lanes(here + x) + (g - part)).v);
  };
  gradient_row<true, kValid, kTarget>(row, count, call, add, [&](int64_t x, int64_t, Lanes<T> g) { add(x, g); });
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
  const bool labels = call.target.type == Type::u8, valid = call.valid.data != nullptr;
  const auto add = labels ? valid ? add_blended_row<true, Target::Label, T> : add_blended_row<false, Target::Label, T>
                          : valid ? add_blended_row<true, Target::Soft, T> : add_blended_row<false, Target::Soft, T>;
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
  const bool labels = call.target.type == Type::u8, valid = call.valid.data != nullptr;
  const auto write_gradient = labels ? valid ? write_row<true, Target::Label, T> : write_row<false, Target::Label, T>
                                     : valid ? write_row<true, Target::Soft, T> : write_row<false, Target::Soft, T>;
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

}  // namespace
}  // namespace aml::cpu
